// Package reconcile
package reconcile
