// Package kube is a source of desired state for the mirror, and the place where what edges report is written: Kubernetes.
//
// In: Edges, Models, the Nodes made here and the pods bound to them are followed with one watch each; the ConfigMaps and
// Secrets that those pods name with one watch per object, as a kubelet does, and only in namespaces opted in by a RoleBinding
// to the ClusterRole longshore-objects. Out: each edge has one key in a queue; a worker reads the newest report and the newest
// objects, and writes what differs: the Edge's status, its Node, the statuses of its pods, and the deletion of those that have
// finished.
package kube
