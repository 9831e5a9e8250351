// Package desired brings what an edge should hold from a cloud hub to the edge.
package desired
