// Command edgehub is Longshore's agent on an edge box: it keeps what the cluster wants here, also with no link at all.
package main
