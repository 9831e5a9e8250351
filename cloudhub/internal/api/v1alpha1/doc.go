// Package v1alpha1 holds the Kubernetes kinds of the group longshore.dev: Edge and Model.
//
// +kubebuilder:object:generate=true
// +groupName=longshore.dev
package v1alpha1
