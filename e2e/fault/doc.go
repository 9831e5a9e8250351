// Package fault holds the built commands to their promises while everything around them fails: processes, disks, networks and
// neighbours.
package fault
