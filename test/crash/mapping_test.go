package crash_test

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestMappingOutlivesDaemon has a mapping that stores into the backing file
// outlive the daemon. The next one does not know who has it, and still lets no
// hole come about that it could fill without being charged; and who opens the
// file then sees what it stores.
func TestMappingOutlivesDaemon(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		for _, tier := range []string{"read", "daemon"} {
			t.Run("then "+tier, func(t *testing.T) { mappingOutlives(t, fstype, tier) })
		}
	})
}

func mappingOutlives(t *testing.T, fstype, next string) {
	const size, limit = 1 * kit.Mi, 8 * kit.Mi
	p := kit.NewPool(t, fstype)
	p.MountArgs = []string{"--tier", "read"}
	d := p.Mount()
	dir := p.Create("v", limit)
	changes := map[string]func(path string) error{
		"truncated": func(path string) error { return os.Truncate(path, 4*kit.Mi) },
		"written beyond": func(path string) error {
			return with(path, unix.O_WRONLY, func(fd int) error {
				_, err := unix.Pwrite(fd, []byte("x"), 2*kit.Mi)
				return err
			})
		},
		"punched": func(path string) error {
			return with(path, unix.O_WRONLY, func(fd int) error {
				return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
			})
		},
	}
	maps := map[string][]byte{}
	for name := range changes {
		path := filepath.Join(dir, name)
		kit.OK(t, os.WriteFile(path, bytes.Repeat([]byte{7}, size), 0o644))
		reader, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		kit.OK(t, err)
		kit.OK(t, with(path, unix.O_RDWR, func(fd int) error {
			maps[name], err = unix.Mmap(fd, 0, 4*kit.Mi, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			return err
		}))
		defer func() { _ = unix.Munmap(maps[name]) }()
		unix.Close(reader)
	}
	d.Kill()
	p.MountArgs = []string{"--tier", next}
	p.Mount()
	for name, change := range changes {
		path := filepath.Join(dir, name)
		kit.OK(t, change(path))
		var st unix.Stat_t
		kit.OK(t, unix.Stat(path, &st))
		for i := int64(0); i < st.Size; i += 4096 {
			maps[name][i]++
		}
		if next == "read" {
			kit.OK(t, with(path, unix.O_RDWR, func(fd int) error {
				mine, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
				if err != nil {
					return err
				}
				maps[name][0] = 'x'
				if mine[0] != 'x' {
					t.Errorf("%s: a store by the old mapping does not show in a new one", name)
				}
				return unix.Munmap(mine)
			}))
		}
		p.Check()
		kit.OK(t, unix.Munmap(maps[name]))
		maps[name] = nil
		kit.OK(t, os.Remove(path))
	}
	p.Idle()
}

// with opens a file for fn.
func with(path string, flags int, fn func(fd int) error) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return fn(fd)
}
