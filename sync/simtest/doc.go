// Package simtest runs hubs and edges of package desired in a deterministic world of lost, repeated and late messages,
// lagging caches, crashes and power cuts.
//
// A world obeys commands, one per line (see World.Exec). The scripts in testdata are read by people, and random histories are lists
// of the same commands: a failing one is printed, shortened, and can be kept as a script.
package simtest
