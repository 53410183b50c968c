package opener

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// edge is how much of a volume's beginning and end is cleared, in bytes: mkfs.ext4 and
// the kernel look there for other file systems.
const edge = 256 << 10

// clearForFormat writes zeros wherever mkfs.ext4 reads, or writes less than a sector,
// which has the kernel read the rest: both ends of the volume, and the first block of
// each group, where it puts copies of its superblock. On an authenticated volume a
// sector that was never written cannot be read. Everything else ext4 writes whole
// before it reads it, so that no volume has to be overwritten from end to end.
func clearForFormat(device string) error {
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("clear volume: %w", err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	for _, at := range clearings(size) {
		if err != nil {
			break
		}
		_, err = f.WriteAt(make([]byte, at.length), at.start)
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("clear volume: %w", err)
	}
	return nil
}

// clearing is a part of a volume, in bytes.
type clearing struct{ start, length int64 }

// clearings are the parts of a volume of that size to clear.
func clearings(size int64) []clearing {
	list := []clearing{{0, min(edge, size)}}
	for at := int64(fsGroup * fsBlock); at+fsBlock <= size; at += fsGroup * fsBlock {
		list = append(list, clearing{at, fsBlock})
	}
	if start := max(0, size-edge) / fsBlock * fsBlock; start > 0 {
		list = append(list, clearing{start, size - start})
	}
	return list
}
