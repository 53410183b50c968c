package store

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// room refuses an object that would leave the disk without reserve.
func room(dir string, size int64) error {
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return fmt.Errorf("ask for free space: %w", err)
	}
	if free := int64(s.Bavail) * s.Bsize; free-size < minFree {
		return fmt.Errorf("%d bytes are free, an object of %d would leave less than %d", free, size, minFree)
	}
	return nil
}
