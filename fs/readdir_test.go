package fs_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/quota"
)

// BenchmarkReadDirPlus is without the kernel's half: what an entry costs the daemon.
func BenchmarkReadDirPlus(b *testing.B) {
	const files = 1000
	pool := b.TempDir()
	open := func(path string) *os.File {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		return f
	}
	tree := filepath.Join(pool, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		b.Fatal(err)
	}
	for i := range files {
		if err := os.WriteFile(filepath.Join(tree, fmt.Sprintf("file-%06d", i)), nil, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	f, err := fs.New(fs.Options{PoolDir: open(pool), Rule: quota.Rule{Block: 4096}})
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	ledger := quota.NewLedger(quota.Usage{Bytes: 1 << 30, Inodes: 1 << 20}, quota.Usage{})
	if err := f.AddVolume(fs.VolumeConfig{ID: "v", Root: fs.Dir{At: open(tree)}, Orphans: fs.Dir{At: open(pool)}, Ledger: ledger}); err != nil {
		b.Fatal(err)
	}
	var root fuse.EntryOut
	if s := f.Lookup(nil, &fuse.InHeader{NodeId: 1}, "v", &root); s != fuse.OK {
		b.Fatal(s)
	}
	page := make([]byte, 64<<10)
	list := func(each func(page []byte)) {
		for at := uint64(0); ; {
			out := fuse.NewDirEntryList(page, at)
			if s := f.ReadDirPlus(nil, &fuse.ReadIn{InHeader: fuse.InHeader{NodeId: root.NodeId}, Offset: at, Size: uint32(len(page))}, out); s != fuse.OK {
				b.Fatal(s)
			}
			if len(out.Bytes()) == 0 {
				return
			}
			each(out.Bytes())
			at = out.Offset
		}
	}
	known := 0
	list(func(page []byte) {
		_, entries, err := fuse.ParseDirLookupEntries(page)
		if err != nil {
			b.Fatal(err)
		}
		for _, e := range entries {
			if e.NodeId != 0 {
				known++
			}
		}
	})
	if known != files {
		b.Fatalf("%d entries have a node, not %d", known, files)
	}
	b.ReportAllocs()
	for b.Loop() {
		list(func([]byte) {})
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/files, "ns/entry")
}
