// Package rig starts the built commands, and the links between them, for tests and demonstrations.
package rig
