// Package account names what an edge reported of itself, so that two sides can agree on it without repeating it.
//
// An account is what all reports of an edge come to: pods by UID, models by namespace/name, and facts of the node. Both sides
// compute its digest: an edge that comes back names it, and a hub that holds the same account does not ask for it again.
// ../README.md describes the protocol.
package account
