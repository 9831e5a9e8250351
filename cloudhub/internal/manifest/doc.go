// Package manifest is a source of desired state for the mirror.
package manifest
