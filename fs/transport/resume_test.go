package transport

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// resumeEnv makes this program an earlier daemon, which resumes what its files 3 (/dev/fuse) and 4 (the region) are of.
const resumeEnv = "CROFT_TRANSPORT_TEST_RESUME"

// held is the number of the inode that an earlier daemon notes for what it does not answer.
const held = 4711

// resumeProcess serves until it is killed, or told to end: then it pauses first. It says which lookups it has begun of
// "held…", which it does not answer, and of "slow…", which it answers when its standard input ends.
func resumeProcess() {
	fail := func(err error) {
		if err != nil {
			fmt.Fprintln(os.Stderr, "the earlier daemon:", err)
			os.Exit(1)
		}
	}
	region, err := state.Open(os.NewFile(4, "region"))
	fail(err)
	fs := newTestFS()
	fs.lookup = func(_ <-chan struct{}, h *fuse.InHeader, name string) fuse.Status {
		switch {
		case strings.HasPrefix(name, "held"):
			q := region.Find(h.Unique)
			q.Inode = held
			q.Effect.Store(state.Trying)
			fmt.Println(name)
			select {}
		case strings.HasPrefix(name, "slow"):
			fmt.Println(name)
			_, _ = io.Copy(io.Discard, os.Stdin)
		}
		return fuse.OK
	}
	c, err := Resume(fs, Options{State: region}, 3)
	fail(err)
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() {
		<-term
		go func() {
			for !c.crew.paused.Load() {
				time.Sleep(time.Millisecond)
			}
			fmt.Println("paused")
		}()
		fail(c.Pause(context.Background()))
		os.Exit(0)
	}()
	fmt.Println("serving")
	fail(c.Serve())
}

// nextFS is a testFS that goes on with another one's requests.
type nextFS struct {
	*testFS
	mu    sync.Mutex
	names []string // guarded by mu: what was looked up
	taken []string // guarded by mu: what was taken back
}

func newNextFS() *nextFS {
	f := &nextFS{testFS: newTestFS()}
	f.lookup = func(_ <-chan struct{}, _ *fuse.InHeader, name string) fuse.Status {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.names = append(f.names, name)
		return fuse.OK
	}
	return f
}

func (f *nextFS) TakeBack(q *state.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.taken = append(f.taken, fmt.Sprint(q.Inode, " ", q.Effect.Load()))
}

// kept is a mount that its maker does not serve, and what others need to serve it.
type kept struct {
	*mounted
	region *state.Region
}

func keepMount(t *testing.T, fs *testFS) *kept {
	t.Helper()
	region := newRegion(t, RequestSize)
	k := &kept{mountTest(t, fs, Options{State: region}), region}
	region.SetMountpoint(k.dir)
	t.Cleanup(func() { // before mountTest's, which waits for the end of it
		k.serve()
		if n := fs.lookups.Load(); n != 0 {
			t.Errorf("who has only mounted was asked %d times", n)
		}
	})
	return k
}

func newRegion(t *testing.T, requestSize int) *state.Region {
	t.Helper()
	region, err := state.New("pool", "boot", requestSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { region.Close() })
	return region
}

// dup duplicates a descriptor, for another owner.
func dup(t *testing.T, fd int) *os.File {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "duplicate")
}

// earlier is a daemon in another process.
type earlier struct {
	cmd   *exec.Cmd
	stdin io.Closer
	said  *bufio.Scanner
	end   func(sig os.Signal) error // sends the signal and waits for the end; may be called again
}

func (k *kept) startEarlier(t *testing.T) *earlier {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), resumeEnv+"=1")
	cmd.ExtraFiles = []*os.File{dup(t, k.FD()), dup(t, k.region.FD())}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	out, errOut := cmd.StdoutPipe()
	err = errors.Join(err, errOut, cmd.Start())
	for _, f := range cmd.ExtraFiles {
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	e := &earlier{cmd: cmd, stdin: in, said: bufio.NewScanner(out)}
	wait := sync.OnceValue(func() error {
		_, _ = io.Copy(io.Discard, out)
		return cmd.Wait()
	})
	e.end = func(sig os.Signal) error {
		_ = cmd.Process.Signal(sig)
		return wait()
	}
	t.Cleanup(func() { _ = e.end(os.Kill) })
	e.wantLines(t, "serving")
	return e
}

func (e *earlier) wantLines(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for range want {
		within(t, "the earlier daemon", func() error {
			if !e.said.Scan() {
				return errors.Join(errors.New("it has ended"), e.said.Err())
			}
			return nil
		})
		got = append(got, e.said.Text())
	}
	if slices.Sort(got); !slices.Equal(got, want) {
		t.Fatalf("the earlier daemon said %q, want %q", got, want)
	}
}

// resume serves the mount from now on, until unmount is called, which waits for it.
func (k *kept) resume(t *testing.T, fs *nextFS) (unmount func()) {
	t.Helper()
	region, err := state.Open(dup(t, k.region.FD()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { region.Close() })
	fd, err := unix.FcntlInt(uintptr(k.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Resume(fs, Options{State: region}, fd)
	if err != nil {
		t.Fatal(err)
	}
	if c.Mountpoint() != k.dir || c.Capabilities() != k.Capabilities() {
		t.Errorf("it goes on with %s, %x; it was %s, %x", c.Mountpoint(), c.Capabilities(), k.dir, k.Capabilities())
	}
	served := make(chan error, 1)
	go func() { served <- c.Serve() }()
	return func() {
		t.Helper()
		if err := c.Unmount(false); err != nil {
			t.Fatal(err)
		}
		k.detached.Store(true)
		within(t, "Serve", func() error { return <-served })
		if n := fs.unmounts(); n != 1 {
			t.Errorf("OnUnmount was called %d times", n)
		}
	}
}

// look looks names up, each by a caller of its own, and returns how to wait for the answers.
func (k *kept) look(t *testing.T, names ...string) (wait func()) {
	answers := make(chan error, len(names))
	for _, name := range names {
		go func() {
			if err := stat(k.path(name)); !errors.Is(err, unix.ENOENT) {
				answers <- fmt.Errorf("stat %s: %w", name, err)
			}
			answers <- nil
		}()
	}
	return func() {
		t.Helper()
		for range names {
			within(t, "who has looked", func() error { return <-answers })
		}
	}
}

func (f *nextFS) wantNames(t *testing.T, names ...string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.Sort(f.names); !slices.Equal(f.names, names) {
		t.Errorf("looked up were %q, want %q", f.names, names)
	}
}

// TestResume kills a daemon with requests under way. The next one answers these and what came
// meanwhile, once each, and nothing that was answered.
func TestResume(t *testing.T) {
	k := keepMount(t, newTestFS())
	e := k.startEarlier(t)
	k.look(t, "answered")()
	waitHeld := k.look(t, "held-1", "held-2")
	e.wantLines(t, "held-1", "held-2")
	_ = e.end(os.Kill)
	waitLate := k.look(t, "late-1", "late-2")

	next := newNextFS()
	unmount := k.resume(t, next)
	waitHeld()
	waitLate()
	k.look(t, "new")()
	unmount()
	next.wantNames(t, "held-1", "held-2", "late-1", "late-2", "new")
	note := fmt.Sprint(held, " ", state.Trying)
	if want := []string{note, note}; !slices.Equal(next.taken, want) {
		t.Errorf("taken back were %q, want %q", next.taken, want)
	}
}

// TestPause has a daemon answer what it has begun, and leave the rest to the next one.
func TestPause(t *testing.T) {
	k := keepMount(t, newTestFS())
	e := k.startEarlier(t)
	waitSlow := k.look(t, "slow")
	e.wantLines(t, "slow")
	if err := e.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	e.wantLines(t, "paused")
	waitLate := k.look(t, "late")
	e.stdin.Close()
	waitSlow()
	if err := e.end(unix.Signal(0)); err != nil {
		t.Errorf("the earlier daemon: %v", err)
	}

	next := newNextFS()
	unmount := k.resume(t, next)
	waitLate()
	unmount()
	next.wantNames(t, "late")
}

// TestResumeEnded goes on with a mount that was taken away while nobody served it.
func TestResumeEnded(t *testing.T) {
	k := keepMount(t, newTestFS())
	if err := k.Unmount(true); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(uintptr(k.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	next := newNextFS()
	c, err := Resume(next, Options{State: k.region}, fd)
	if err != nil {
		t.Fatal(err)
	}
	within(t, "Serve", c.Serve)
	if n := next.unmounts(); n != 1 {
		t.Errorf("OnUnmount was called %d times", n)
	}
}

// TestResumeFaults wants each fault named, and the descriptor left to the caller.
func TestResumeFaults(t *testing.T) {
	checkLeaks(t)
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"no region":      {Options{Mountpoint: "/mnt"}, "nothing to resume from"},
		"no mount point": {Options{State: newRegion(t, RequestSize)}, "no mount point given"},
		"no INIT":        {Options{State: newRegion(t, RequestSize), Mountpoint: "/mnt"}, "the kernel did not begin with it"},
		"a small region": {Options{State: newRegion(t, minMaxWrite), Mountpoint: "/mnt"}, "no room for requests"},
	} {
		if _, err := Resume(newTestFS(), c.o, fd); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil {
		t.Errorf("the descriptor: %v", err)
	}
}
