// Package reconcile brings what runs on an edge to what its committed list says.
//
// It is level-triggered: whatever woke it, it compares the whole list with what there is. Each pod that cannot be
// brought there has a pause of its own that doubles, so that one bad pod costs the others nothing.
package reconcile
