// Package enrol keeps who may connect to a cloud hub and how the hub proves itself: a file of token hashes for edges, a
// signing key for heads.
package enrol
