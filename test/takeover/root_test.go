package takeover_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestDeletedVolumes kills the daemon while it tells the kernel of deleted volumes: that takes the lock of the directory
// of volumes, which whoever looks for a name there has until the daemon has answered. One that waited for it could not end.
func TestDeletedVolumes(t *testing.T) {
	const kills, lookers, changers = 40, 16, 4
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	p.Mount()
	var all sync.WaitGroup
	var over atomic.Bool
	for i := range lookers {
		all.Go(func() {
			for j := 0; !over.Load(); j++ {
				if _, err := os.Lstat(filepath.Join(p.Mnt, fmt.Sprint("none-", i, "-", j))); !os.IsNotExist(err) {
					t.Error(err)
					return
				}
			}
		})
	}
	client := p.Control()
	defer client.CloseIdleConnections()
	// A call that a kill meets fails, and its volume may stay.
	call := func(method, name, body string) bool {
		r, err := http.NewRequest(method, "http://croft/v1/volumes/"+name, strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return false
		}
		answer, err := client.Do(r)
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	}
	var deleted atomic.Int64
	for i := range changers {
		all.Go(func() {
			for j := 0; !over.Load(); j++ {
				name := fmt.Sprint("v", i, "-", j)
				if !call("POST", name, `{"bytes":1048576}`) {
					continue
				}
				_, _ = os.Lstat(p.Path(name)) // the kernel hears of it
				if call("DELETE", name, "") {
					deleted.Add(1)
				}
			}
		})
	}
	for i := range kills {
		before := deleted.Load()
		kit.Poll(t, "deletions", func() bool { return deleted.Load() > before+int64(i%7) })
		p.KillServing()
	}
	t.Log(deleted.Load(), "volumes were deleted")
	over.Store(true)
	all.Wait()
}

// TestListedVolumes: the kernel keeps the list of volumes, and yet each call is seen at once, also by who has it
// open, whichever daemon has made the volume, and whichever has listed them.
func TestListedVolumes(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	p.Mount()
	open, err := unix.Open(p.Mnt, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	kit.OK(t, err)
	defer unix.Close(open)
	want := []string{}
	compare := func(when string) {
		t.Helper()
		names := listed(t, p.Mnt)
		if !slices.Equal(names, want) {
			t.Errorf("%s: listed are %v, there are %v", when, names, want)
		}
		_, err := unix.Seek(open, 0, unix.SEEK_SET)
		kit.OK(t, err)
		names = []string{}
		for buf := make([]byte, 64); ; { // little more than a name at a time
			n, err := unix.Getdents(open, buf)
			kit.OK(t, err)
			if n == 0 {
				break
			}
			_, _, names = unix.ParseDirent(buf[:n], -1, names)
		}
		if slices.Sort(names); !slices.Equal(names, want) {
			t.Errorf("%s: after rewinding these are listed: %v, there are %v", when, names, want)
		}
	}
	for i := range 12 {
		name := fmt.Sprintf("v%02d", i)
		compare("before " + name)
		p.Create(name, kit.Mi)
		want = append(want, name)
		compare(name + " was made")
		if i%3 == 0 {
			p.KillServing()
			compare("another daemon")
		}
		if i%4 == 3 {
			p.MustVolume("delete", want[1])
			want = slices.Delete(want, 1, 2)
			compare("one was deleted")
		}
	}
}

// TestListingGoesOn: what the next daemon is asked for first is the end of a listing, and then another one.
func TestListingGoesOn(t *testing.T) {
	for _, fstype := range kit.Filesystems {
		t.Run(fstype, func(t *testing.T) {
			p := kit.NewPool(t, fstype)
			p.Keeper = "auto"
			p.Mount()
			dir := p.Create("v", kit.Mi)
			want := []string{}
			for i := range 5 {
				want = append(want, fmt.Sprint("file", i))
				kit.OK(t, os.WriteFile(filepath.Join(dir, want[i]), nil, 0o644))
				open, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
				kit.OK(t, err)
				buf := make([]byte, 4096)
				if n, err := unix.Getdents(open, buf); err != nil || n == 0 {
					t.Fatalf("%d bytes, %v", n, err)
				}
				p.KillServing()
				if n, err := unix.Getdents(open, buf); err != nil || n != 0 {
					t.Errorf("at the end: %d bytes, %v", n, err)
				}
				kit.OK(t, unix.Close(open))
				kit.OK(t, os.WriteFile(filepath.Join(dir, "more"), nil, 0o644))
				kit.OK(t, os.Remove(filepath.Join(dir, "more")))
				if names := listed(t, dir); !slices.Equal(names, want) {
					t.Errorf("listed are %v, there are %v", names, want)
				}
			}
		})
	}
}

// listed opens and lists a directory; the names are sorted.
func listed(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	kit.OK(t, err)
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
