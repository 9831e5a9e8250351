// Package uplink
package uplink
