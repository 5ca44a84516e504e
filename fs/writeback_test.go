package fs_test

import (
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// TestChargeDuringWriteback: ext4 takes a block that it allocates at last off those that wait
// before it counts it as the file's, and in between st_blocks is too small. What a file is
// charged must not depend on it: here one of three blocks, of which one is a hole, with a block of attributes.
func TestChargeDuringWriteback(t *testing.T) {
	const block = 4096
	m := mount(t, quota.Usage{Bytes: 64 * block, Inodes: 8})
	fd := openFile(t, filepath.Join(m.dir, "f"), unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(fd)
	data := make([]byte, block)
	write := func(at int64) {
		t.Helper()
		if _, err := unix.Pwrite(fd, data, at*block); err != nil {
			t.Fatal(err)
		}
	}
	write(0)
	write(2)
	must(t, unix.Fsetxattr(fd, "user.x", make([]byte, 3000), 0))
	want := m.ledger.Used().Bytes

	backing := openFile(t, filepath.Join(m.tree, "f"), unix.O_RDWR)
	defer unix.Close(backing)
	var over atomic.Bool
	var flusher sync.WaitGroup
	defer flusher.Wait()
	defer over.Store(true)
	flusher.Go(func() {
		for !over.Load() {
			_ = unix.SyncFileRange(backing, 0, 0, unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
		}
	})
	for i := range 20000 {
		must(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, 2*block, block))
		write(2)
		if used := m.ledger.Used().Bytes; used != want {
			t.Fatalf("write %d: %d bytes are charged, %d before", i, used, want)
		}
	}
}
