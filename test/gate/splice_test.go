package gate_test

import (
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func immutable(t *testing.T, path string) bool {
	t.Helper()
	f, err := os.Open(path)
	kit.OK(t, err)
	defer f.Close()
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	kit.OK(t, err)
	return flags&0x10 != 0 // FS_IMMUTABLE_FL
}

// noneImmutable looks at every file of the pool.
func noneImmutable(t *testing.T, p *kit.Pool) {
	t.Helper()
	kit.OK(t, filepath.WalkDir(p.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && immutable(t, path) {
			t.Errorf("%s is immutable", path)
		}
		return err
	}))
}

// The ways in which a file grows without an event, each until an error, stop, or most bytes.
var silent = map[string]func(t *testing.T, f *os.File, stop time.Time, most int64) error{
	"sendfile": func(t *testing.T, f *os.File, stop time.Time, most int64) error {
		source := open(t, os.O_RDWR|os.O_CREATE, kit.TempDir(t), "source")
		kit.OK(t, source.Truncate(kit.Mi))
		for n := int64(0); n < most && time.Now().Before(stop); {
			off := int64(0)
			m, err := unix.Sendfile(int(f.Fd()), int(source.Fd()), &off, kit.Mi)
			if err != nil {
				return err
			}
			n += int64(m)
		}
		return nil
	},
	"splice": func(t *testing.T, f *os.File, stop time.Time, most int64) error {
		r, w, err := os.Pipe()
		kit.OK(t, err)
		defer r.Close()
		defer w.Close()
		buf := make([]byte, 64*kit.Ki)
		for n := int64(0); n < most && time.Now().Before(stop); {
			_, err := unix.Write(int(w.Fd()), buf)
			kit.OK(t, err)
			m, err := unix.Splice(int(r.Fd()), nil, int(f.Fd()), nil, len(buf), 0)
			if err != nil {
				return err
			}
			n += m
		}
		return nil
	},
	"store": func(t *testing.T, f *os.File, stop time.Time, most int64) error {
		r := kit.Process{Helper: "store", Args: []string{f.Name(), fmt.Sprint(most), fmt.Sprint(stop.UnixNano())}}.Run(t)
		if r.Code != 0 {
			return fmt.Errorf("exit %d: %.120s", r.Code, r.Stderr)
		}
		return nil
	},
}

// mapped maps the beginning of a file for stores.
func mapped(path string, length int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return unix.Mmap(int(f.Fd()), 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
}

// store stores into a file of so many bytes until it is refused, or a time has come.
func store(args []string) int {
	most, _ := strconv.Atoi(args[1])
	nanos, _ := strconv.ParseInt(args[2], 10, 64)
	mem, err := mapped(args[0], most)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for n := 0; n < most && time.Now().UnixNano() < nanos; n += 4096 {
		mem[n] = 1
	}
	return 0
}

// insist is store for a process that SIGBUS does not end, a block at a time.
func insist(args []string) int {
	signal.Ignore(unix.SIGBUS)
	most, _ := strconv.Atoi(args[1])
	mem, err := mapped(args[0], most)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for n := 0; n < most; n += block {
		mem[n] = 1
		time.Sleep(time.Millisecond) // the daemon is to see it, not to be outrun
	}
	return 0
}

// TestInsist ends a process that goes on storing into the holes of a full volume, where a store cannot be refused.
func TestInsist(t *testing.T) {
	const limit, most = 256 * kit.Mi, kit.Gi
	for _, fstype := range []string{"xfs", "btrfs"} {
		t.Run(fstype, func(t *testing.T) {
			p := mount(t, fstype, 3*kit.Gi)
			dir := p.Create("v", limit)
			f := open(t, os.O_CREATE|os.O_RDWR, dir, "f")
			kit.OK(t, f.Truncate(most))
			fillUp(t, dir, "rest")
			r := kit.Process{Helper: "insist", Args: []string{f.Name(), fmt.Sprint(most)}}.Run(t)
			if r.Code != -1 {
				t.Errorf("it was not killed: %s", r)
			}
			if said := p.Log(); strings.Count(said, "SIGBUS") < 10 || !strings.Contains(said, "SIGKILL") {
				t.Errorf("the daemon says:\n%s", said)
			}
			if over := int64(onDisk(t, p, "v")) - limit; over > 64*kit.Mi {
				t.Errorf("%d bytes above the limit", over)
			}
			f.Close()
			removeAll(t, dir)
			p.Idle()
			p.Check()
		})
	}
}

// TestSilent measures how far a full volume grows by what raises no events.
func TestSilent(t *testing.T) {
	const limit, most = 256 * kit.Mi, kit.Gi
	kit.EachFS(t, func(t *testing.T, fstype string) {
		for name, grow := range silent {
			t.Run(name, func(t *testing.T) {
				p := mount(t, fstype, 3*kit.Gi)
				dir := p.Create("v", limit)
				path := dir + "/f"
				f := open(t, os.O_CREATE|os.O_RDWR, path)
				if name == "store" {
					kit.OK(t, f.Truncate(most))
				}
				fillUp(t, dir, "rest")
				err := grow(t, f, time.Now().Add(time.Second), most)
				over := int64(onDisk(t, p, "v")) - limit
				t.Logf("%d KiB above the limit, %v", over>>10, err)
				if err == nil {
					t.Error("it was not stopped")
				}
				if name == "store" && fstype != "ext4" {
					// Only when it is seen a second time, and its maps are found.
					if over > 512*kit.Mi {
						t.Errorf("%d bytes above the limit", over)
					}
				} else if over > 64*kit.Mi {
					t.Errorf("%d bytes above the limit", over)
				}
				braked := func(name string) bool { return immutable(t, p.Tree("v", name)) }
				if fstype == "ext4" {
					kit.Poll(t, "the brake", func() bool { return braked("f") })
				}
				// Room for what follows, and not enough for the brake to be let go.
				kit.OK(t, os.Truncate(dir+"/rest", kit.Stat(t, dir+"/rest").Size-over-4*kit.Mi))
				if fstype == "ext4" && !braked("f") {
					t.Error("let go without much room")
				}
				for i, err := range []error{
					os.Chmod(path, 0o600), unix.Setxattr(path, "user.x", []byte("y"), 0), os.Link(path, path+"2"),
					os.Rename(path, dir+"/g"), os.Rename(dir+"/g", path), os.Remove(path + "2"), os.Chtimes(path, time.Now(), time.Now()),
					os.Chown(path, 1, 1), os.Truncate(path, 10*kit.Mi), f.Truncate(9 * kit.Mi), os.WriteFile(path+"3", nil, 0o600), os.Rename(path+"3", path),
				} {
					if err != nil {
						t.Errorf("change %d of a braked file: %v", i, err)
					}
				}
				f.Close()
				removeAll(t, dir)
				p.Idle()
				p.Check()
				noneImmutable(t, p)
			})
		}
	})
}

// TestBrakeKilled holds that a crash leaves nothing braked.
func TestBrakeKilled(t *testing.T) {
	const limit = 256 * kit.Mi
	p := mount(t, "ext4", 3*kit.Gi)
	dir := p.Create("v", limit)
	f := open(t, os.O_CREATE|os.O_RDWR, dir, "f")
	fillUp(t, dir, "rest")
	if err := silent["splice"](t, f, time.Now().Add(kit.Backstop), kit.Gi); err == nil {
		t.Error("it was not stopped")
	}
	kit.Poll(t, "the brake", func() bool { return immutable(t, p.Tree("v", "f")) })
	p.Daemon().Kill()
	f.Close()
	p.Mount()
	noneImmutable(t, p)
	removeAll(t, dir)
	p.Stop()
	noneImmutable(t, p)
}
