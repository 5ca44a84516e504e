package posix_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestOpensNeverFail has processes open, map, run, replace and remove the same few files in every
// mode at once, some of them killed in the middle. All open files of an inode
// must agree on how the kernel treats them; where they did not, open(2) would answer EIO or EBUSY.
// Afterwards the daemon holds no descriptor (see kit), and the kernel no backing id.
func TestOpensNeverFail(t *testing.T) {
	eachTier(t, func(t *testing.T, p *kit.Pool, dir string) {
		seed := uint64(time.Now().UnixNano())
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		program, err := exec.LookPath("true")
		kit.OK(t, err)
		image, err := os.ReadFile(program)
		kit.OK(t, err)
		kit.OK(t, os.WriteFile(filepath.Join(dir, "program"), image, 0o755))
		for i := range openerFiles {
			write(t, filepath.Join(dir, fmt.Sprint("f", i)), "0")
		}
		start := func(i int) *kit.Running {
			return kit.Process{Helper: "opener", Args: []string{dir, fmt.Sprint(seed + uint64(i)), "700"}}.Start(t)
		}
		workers := []*kit.Running{start(0), start(1), start(2)}
		for i := range 8 {
			victim := start(10 + i)
			victim.Line() // it is under way
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
			victim.Kill()
		}
		for _, w := range workers {
			w.Line()
			if said := w.Line(); said != "done" {
				t.Error(said)
			}
			if code := w.Wait(); code != 0 {
				t.Errorf("an opener ended with %d", code)
			}
		}
		names, err := os.ReadDir(dir)
		kit.OK(t, err)
		for _, e := range names {
			kit.OK(t, os.Remove(filepath.Join(dir, e.Name())))
		}
		p.Idle()
		kit.Poll(t, "all space is back", func() bool { u := p.Show("v").Used; return u.Bytes == 0 && u.Inodes == 0 })
	})
}

const openerFiles = 4

// opener does what TestOpensNeverFail says, in the directory args[0], args[2] times.
func opener(args []string) int {
	seed, _ := strconv.ParseUint(args[1], 10, 64)
	steps, _ := strconv.Atoi(args[2])
	o := &openerState{dir: args[0], random: rand.New(rand.NewPCG(seed, 1))}
	fmt.Println("started")
	for i := range steps {
		if err := o.step(); err != nil {
			fmt.Printf("step %d, seed %d: %v\n", i, seed, err)
			return 1
		}
	}
	fmt.Println("done")
	return 0
}

type openerState struct {
	dir    string
	random *rand.Rand
	fds    []int
	maps   [][]byte
}

func (o *openerState) path() string {
	return filepath.Join(o.dir, fmt.Sprint("f", o.random.IntN(openerFiles)))
}

func (o *openerState) own(name string) string {
	return filepath.Join(o.dir, fmt.Sprint(name, os.Getpid()))
}

func (o *openerState) step() error {
	for len(o.fds) > 6 {
		i := o.random.IntN(len(o.fds))
		unix.Close(o.fds[i])
		o.fds = append(o.fds[:i], o.fds[i+1:]...)
	}
	for len(o.maps) > 4 {
		if err := unix.Munmap(o.maps[0]); err != nil {
			return err
		}
		o.maps = o.maps[1:]
	}
	switch n := o.random.IntN(24); {
	case n < 14:
		return o.use()
	case n < 17: // replaced at once
		next := o.own("next")
		if err := os.WriteFile(next, bytes.Repeat([]byte{'0'}, o.random.IntN(20_000)), 0o644); err != nil {
			return err
		}
		return os.Rename(next, o.path())
	case n < 18:
		return o.run()
	case n < 19:
		name := o.own("link")
		if err := os.Link(o.path(), name); err != nil && !errors.Is(err, os.ErrNotExist) { // replaced meanwhile
			return fmt.Errorf("link: %w", err)
		}
		if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	case n < 20:
		return o.nameless()
	case n < 21:
		return o.reopen()
	case n < 22:
		return o.send()
	default:
		return os.Truncate(o.path(), int64(o.random.IntN(20_000)))
	}
}

// use opens a file somehow, and perhaps maps, reads and writes it.
func (o *openerState) use() error {
	access := []int{unix.O_RDONLY, unix.O_RDONLY, unix.O_WRONLY, unix.O_RDWR}[o.random.IntN(4)]
	flags := access | []int{0, 0, 0, unix.O_SYNC, unix.O_CREAT, unix.O_NOATIME, unix.O_NONBLOCK, unix.O_DIRECT}[o.random.IntN(8)]
	if access != unix.O_RDONLY {
		flags |= []int{0, 0, unix.O_APPEND, unix.O_TRUNC}[o.random.IntN(4)]
	}
	fd, err := unix.Open(o.path(), flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("open with %#x: %w", flags, err)
	}
	o.fds = append(o.fds, fd)
	if access != unix.O_WRONLY && o.random.IntN(2) == 0 {
		prot := unix.PROT_READ
		if access == unix.O_RDWR {
			prot |= unix.PROT_WRITE
		}
		m, err := unix.Mmap(fd, 0, 20_480, prot, []int{unix.MAP_SHARED, unix.MAP_PRIVATE}[o.random.IntN(2)])
		if err != nil {
			return fmt.Errorf("map after open with %#x: %w", flags, err)
		}
		o.maps = append(o.maps, m)
	}
	if flags&unix.O_DIRECT != 0 { // has the backing filesystem's rules
		return nil
	}
	if access != unix.O_WRONLY {
		if _, err := unix.Pread(fd, make([]byte, 4096), 0); err != nil {
			return fmt.Errorf("read after open with %#x: %w", flags, err)
		}
	}
	if access != unix.O_RDONLY {
		if _, err := unix.Pwrite(fd, []byte("0000"), int64(o.random.IntN(20_000))); err != nil {
			return fmt.Errorf("write after open with %#x: %w", flags, err)
		}
	}
	return nil
}

// run executes the program, or replaces it with a copy that somebody has just written.
func (o *openerState) run() error {
	program := filepath.Join(o.dir, "program")
	if o.random.IntN(2) == 0 {
		if err := exec.Command(program).Run(); err != nil {
			return fmt.Errorf("run: %w", err)
		}
		return nil
	}
	image, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	next := o.own("program")
	if err := os.WriteFile(next, image, 0o755); err != nil {
		return err
	}
	return os.Rename(next, program)
}

// nameless makes a file without a name, and gives it one.
func (o *openerState) nameless() error {
	fd, err := unix.Open(o.dir, unix.O_TMPFILE|[]int{unix.O_RDWR, unix.O_WRONLY}[o.random.IntN(2)]|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("O_TMPFILE: %w", err)
	}
	o.fds = append(o.fds, fd)
	name := o.own("named")
	if err := unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW); err != nil {
		return fmt.Errorf("linkat of a nameless file: %w", err)
	}
	r, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open what was linked: %w", err)
	}
	o.fds = append(o.fds, r)
	return os.Rename(name, o.path())
}

// reopen opens a file by way of another descriptor, whatever has become of its name.
func (o *openerState) reopen() error {
	fd, err := unix.Open(o.path(), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer unix.Close(fd)
	again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), []int{unix.O_RDONLY, unix.O_RDWR}[o.random.IntN(2)]|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open by way of an open file: %w", err)
	}
	o.fds = append(o.fds, again)
	return nil
}

// send copies one file to another in the kernel.
func (o *openerState) send() error {
	from, err := os.Open(o.path())
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(o.path(), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer to.Close()
	if n := o.random.IntN(3); n == 0 {
		_, err = unix.Sendfile(int(to.Fd()), int(from.Fd()), nil, 10_000)
	} else if n == 1 {
		_, err = unix.CopyFileRange(int(from.Fd()), nil, int(to.Fd()), nil, 10_000, 0)
		if errors.Is(err, unix.EINVAL) { // the same file
			err = nil
		}
	} else {
		_, err = io.Copy(to, io.LimitReader(from, 10_000))
	}
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return nil
}
