package quota

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Flags of an extent: include/uapi/linux/fiemap.h.
const (
	fiemapExtentUnwritten = 0x800
	fiemapExtentShared    = 0x2000
)

// Owned calls fn for the runs of bytes of the regular file behind fd, ascending, whose blocks hold data and
// are no other file's as well, and ends with the first error. What waits for its place on the disk is among them. The
// last run may end beyond the file.
func Owned(fd int, fn func(Range) error) error {
	m := new(fiemap) // fn may take long, and call for another
	for next := uint64(0); ; {
		extents, err := m.read(fd, next, maxPrealloc-next)
		if err != nil || len(extents) == 0 {
			return err
		}
		before := next
		for i := range extents {
			e := &extents[i]
			end := e.logical + e.length
			if e.flags&(fiemapExtentUnwritten|fiemapExtentShared) == 0 {
				if err := fn(Range{From: max(before, e.logical), To: end}); err != nil {
					return err
				}
			}
			if e.flags&fiemapExtentLast != 0 {
				return nil
			}
			next = max(next, end)
		}
		if next == before {
			return fmt.Errorf("mapping of the file: %w: no progress at byte %d", unix.EIO, next)
		}
	}
}
