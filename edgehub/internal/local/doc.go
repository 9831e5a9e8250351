// Package local
package local
