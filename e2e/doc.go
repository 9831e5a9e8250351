// Package e2e holds the tests that drive the built binaries as users do.
package e2e
