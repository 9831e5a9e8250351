// Package durable makes files outlive power cuts.
//
// fsync(2) makes a file's data durable, not its name: that takes the fsync of its directory, and of each directory made for it.
package durable
