// Package space asks how much room a file system has. Who writes there decides how much of it to leave free.
package space

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Of returns the bytes that may still be written to the file system that holds path, and its size.
func Of(path string) (free, size int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, 0, fmt.Errorf("ask for the free space of %s: %w", path, err)
	}
	unit := int64(fs.Bsize) //nolint:unconvert // the types differ between architectures
	return int64(fs.Bavail) * unit, int64(fs.Blocks) * unit, nil
}
