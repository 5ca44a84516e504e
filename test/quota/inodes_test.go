package quota_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

// TestInodesExact makes inodes of every kind, 8 goroutines at once, until
// ENOSPC: as many are there as the limit says.
func TestInodesExact(t *testing.T) {
	const inodes = 1000
	kinds := []struct {
		name string
		make func(path string) error
	}{
		{"files", func(path string) error {
			f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			return f.Close()
		}},
		{"directories", func(path string) error { return os.Mkdir(path, 0o755) }},
		{"symbolic links", func(path string) error { return os.Symlink("target", path) }},
		{"FIFOs", func(path string) error { return unix.Mkfifo(path, 0o644) }},
		{"sockets", func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o644, 0) }},
		{"nodes of files", func(path string) error { return unix.Mknod(path, unix.S_IFREG|0o644, 0) }},
	}
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		for i, kind := range kinds {
			t.Run(kind.name, func(t *testing.T) {
				volume := fmt.Sprint("v", i)
				dir := p.Create(volume, limit, "--inodes", fmt.Sprint(inodes))
				sampler := p.Sample(volume)
				var n, made atomic.Int64
				together(t, 8, func(int) error {
					for {
						err := kind.make(filepath.Join(dir, fmt.Sprint(n.Add(1))))
						if errors.Is(err, unix.ENOSPC) {
							return nil
						} else if err != nil {
							return err
						}
						made.Add(1)
					}
				})
				sampler.Stop(t, quota.Usage{Bytes: limit, Inodes: inodes})
				if used := p.Used(volume).Inodes; used != inodes || made.Load() != inodes {
					t.Errorf("made %d, used %d, the limit is %d", made.Load(), used, inodes)
				}
				exact(t, p, volume)
				// One goes, one comes; links and data need no inode.
				name := filepath.Join(dir, firstName(t, dir))
				kit.OK(t, os.Remove(name))
				kit.OK(t, kind.make(name))
				kit.IsErr(t, "one more", kind.make(name+"more"), unix.ENOSPC)
				if kind.name == "files" {
					kit.OK(t, os.Link(name, name+"link"))
					kit.OK(t, os.WriteFile(name, make([]byte, 3*block), 0))
				}
				exact(t, p, volume)
				empty(t, p, volume)
			})
		}
	})
}

func firstName(t *testing.T, dir string) string {
	t.Helper()
	f, err := os.Open(dir)
	kit.OK(t, err)
	defer f.Close()
	names, err := f.Readdirnames(1)
	kit.OK(t, err)
	return names[0]
}

// TestDefaultInodes expects an inode for each 16 KiB, following the size.
func TestDefaultInodes(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	p.Create("v", limit)
	p.Create("named", limit, "--inodes", "77")
	if v := p.Show("v"); v.Limit != (quota.Usage{Bytes: limit, Inodes: limit / (16 * kit.Ki)}) {
		t.Errorf("limit %v", v.Limit)
	}
	for _, name := range []string{"v", "named"} {
		if r := p.Resize(name, 2*limit); r.Code != 0 {
			t.Errorf("resize: %s", r)
		}
	}
	if v := p.Show("v"); v.Limit != (quota.Usage{Bytes: 2 * limit, Inodes: 2 * limit / (16 * kit.Ki)}) {
		t.Errorf("limit %v after it was resized", v.Limit)
	}
	if v := p.Show("named"); v.Limit != (quota.Usage{Bytes: 2 * limit, Inodes: 77}) {
		t.Errorf("limit %v after it was resized", v.Limit)
	}
}
