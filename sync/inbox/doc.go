// Package inbox books what edges send, so that the cloud holds every record exactly once and knows what was lost.
package inbox
