// Package seqset holds sets of sequence numbers as sorted ranges.
package seqset
