package gate

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

func openFile(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// held opens a gate and a file of one page in it whose events are raised. foreign
// has this process's own events come to decide.
func held(t *testing.T, foreign bool, decide func(*Event) Verdict) (g *Gate, silent int, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, os.Getpagesize()), 0o600); err != nil {
		t.Fatal(err)
	}
	silent = openFile(t, path, unix.O_RDWR)
	pid := os.Getpid()
	if foreign {
		pid = -1
	}
	g, err := Open(Options{Decide: decide, pid: pid})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if g.group >= 0 {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	if err := g.Mark(silent); err != nil {
		t.Fatal(err)
	}
	if err := g.Hold(silent); err != nil {
		t.Fatal(err)
	}
	return g, silent, path
}

func TestSelfTest(t *testing.T) {
	dir := openFile(t, t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY)
	if err := SelfTest(dir); err != nil {
		t.Fatal(err)
	}
}

// What this process does itself is allowed without decide, which may hold locks.
func TestOwnCallsPass(t *testing.T) {
	g, _, path := held(t, false, func(*Event) Verdict { return Deny(unix.ENOSPC) })
	fd := openFile(t, path, unix.O_RDWR)
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(fd, 1); err != nil {
		t.Fatal(err)
	}
	if g.Events() != 2 || g.Held() != 0 {
		t.Fatalf("%d events, %d held, want 2 and 0", g.Events(), g.Held())
	}
}

func TestPanicIsAnswered(t *testing.T) {
	g, _, path := held(t, true, func(*Event) Verdict { panic("test") })
	fd := openFile(t, path, unix.O_RDWR)
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err != unix.EIO {
		t.Fatalf("got %v, want EIO", err)
	}
	if g.Held() != 0 {
		t.Fatalf("%d still held", g.Held())
	}
}

// An event that is answered later, and one that never is: closing lets it go on.
func TestLaterAndClose(t *testing.T) {
	events := make(chan *Event, 2)
	g, _, path := held(t, true, func(ev *Event) Verdict { events <- ev; return Later })
	fd := openFile(t, path, unix.O_RDWR)
	done := make(chan error, 1)
	write := func() { _, err := unix.Pwrite(fd, []byte("x"), 0); done <- err }
	go write()
	g.Answer(<-events, Deny(unix.EDQUOT))
	if err := <-done; err != unix.EDQUOT {
		t.Fatalf("got %v, want EDQUOT", err)
	}
	go write()
	<-events
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatalf("a write that was held when the gate closed: %v", err)
	}
	if err := g.Mark(fd); err == nil {
		t.Fatal("a closed gate marks")
	}
}

// CallOf tells what a held thread does.
func TestCallOf(t *testing.T) {
	var callers Callers
	t.Cleanup(callers.Close)
	var call atomic.Value
	var tid atomic.Int64
	_, _, path := held(t, true, func(ev *Event) Verdict {
		c := callers.Of(ev.TID)
		call.Store(c)
		tid.Store(int64(ev.TID))
		if callers.Over(ev.TID, c) {
			return Deny(unix.EIO)
		}
		return Allow
	})
	fd := openFile(t, path, unix.O_RDWR)
	appending := openFile(t, path, unix.O_WRONLY|unix.O_APPEND)
	buf := [][]byte{[]byte("x")}
	for name, c := range map[string]struct {
		do   func() error
		want Access
	}{
		"pread":   {func() error { _, err := unix.Pread(fd, buf[0], 0); return err }, Reads},
		"preadv2": {func() error { _, err := unix.Preadv2(fd, buf, 0, 0); return err }, Reads},
		"write":   {func() error { _, err := unix.Write(fd, buf[0]); return err }, Writes},
		"pwritev": {func() error { _, err := unix.Pwritev(fd, buf, 0); return err }, Writes},
		"append":  {func() error { _, err := unix.Write(appending, buf[0]); return err }, Writes},
		"RWF_APPEND": {func() error {
			_, err := unix.Pwritev2(fd, buf, 0, 0x10)
			return err
		}, Appends},
		"ftruncate": {func() error { return unix.Ftruncate(fd, 10) }, Unknown},
	} {
		if err := c.do(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := call.Load().(Call)
		if got.Access != c.want {
			t.Errorf("%s: access %d, want %d", name, got.Access, c.want)
		}
		if wants := map[string]uint64{"write": 1, "append": 1}[name]; got.Len != wants {
			t.Errorf("%s: %d bytes, want %d", name, got.Len, wants)
		}
		if got.Access == Writes {
			if a := got.Appending(int(tid.Load())); a != (name == "append") {
				t.Errorf("%s: O_APPEND %v", name, a)
			}
		}
	}
	// Over: not while it runs, but once it sleeps elsewhere or is gone.
	running, stop := spin(t)
	if callers.Over(running, Call{Access: Writes}) {
		t.Error("a thread that runs has ended its call")
	}
	stop()
	if !callers.Over(1<<30, Call{Access: Writes}) {
		t.Error("a thread that is gone has not ended its call")
	}
	if callers.Of(0).Access != Unknown || callers.Of(1<<30).Access != Unknown {
		t.Error("a thread that is not there does something")
	}
	if isWorker(os.Getpid()) {
		t.Error("this process is taken for a worker of the kernel")
	}
}

// spin starts a process that does nothing but run. A goroutine would be parked now and then.
func spin(t *testing.T) (tid int, stop func()) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "echo; while :; do :; done")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 1))
	}
	if err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func TestBrake(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	fd := openFile(t, path, unix.O_CREAT|unix.O_RDWR)
	for _, on := range []bool{true, true, false, false} {
		if err := Brake(fd, on); err != nil {
			t.Fatal(err)
		}
		_, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
		if (err == unix.EPERM) != on {
			t.Fatalf("brake %v: open for writing: %v", on, err)
		}
	}
}

// TestOpenWithoutDescriptors runs out of descriptors at each one that Open needs: it fails, and leaves none behind.
func TestOpenWithoutDescriptors(t *testing.T) {
	descriptors := func() int {
		t.Helper()
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Fatal(err)
		}
	}
	defer restore()
	failed := make(map[string]bool)
	for most := uint64(0); ; most++ {
		before := descriptors()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: limit.Max}); err != nil {
			t.Fatal(err)
		}
		g, err := Open(Options{Decide: func(*Event) Verdict { return Allow }})
		restore()
		if err == nil {
			if err := g.Close(); err != nil {
				t.Error(err)
			}
			break
		}
		if !errors.Is(err, unix.EMFILE) {
			t.Fatal(err)
		}
		what, _, _ := strings.Cut(err.Error(), ":")
		failed[what] = true
		if after := descriptors(); after != before {
			t.Errorf("%v: %d descriptors before, %d after", err, before, after)
		}
	}
	if !failed["fanotify_init"] || !failed["eventfd"] {
		t.Errorf("what failed: %v", failed)
	}
}
