// Package manifest feeds the mirror from a watched folder of YAML files: the source that needs no cluster.
//
// The kinds are those of the Kubernetes source: Edge and Model (longshore.dev/v1alpha1), Pod (with nodeName), ConfigMap
// and Secret (v1). Each file is taken as a whole or not at all: while a file has an error, the objects of its last good
// content stay, also over a restart of the hub.
package manifest
