// Package kube is a source of desired state for the mirror.
package kube
