// Package inbox keeps the books of what edges send, so that every record counts once and a loss is known.
//
// Everything here is a pure value: whoever stores records commits the encoded Account in the same transaction and
// acknowledges from the committed one.
package inbox
