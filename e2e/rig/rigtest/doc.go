// Package rigtest is what tests that drive the built commands share: a site to act on, and waits for what it should come to.
package rigtest
