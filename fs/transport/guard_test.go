package transport

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// These tests use their own mounts. A process that ends (a failed test, a timeout, SIGKILL)
// while one of its threads waits for an answer that its own handler owes cannot end: a request
// that was read is waited for without regard to signals (request_wait_answer in
// fs/fuse/dev.c), and the waiting thread keeps /dev/fuse open, so that the
// connection does not end either. Therefore a second process, the guard, is
// told of every connection, and aborts those of a process that hangs in its end.

// guardEnv makes the test binary run as the guard of the process it names.
const guardEnv = "CROFT_TRANSPORT_TEST_GUARD"

// fusectlEnv is a place to look for the connections beside the usual one.
const fusectlEnv = "CROFT_TRANSPORT_TEST_FUSECTL"

// fusectl is where the connections are; TestMain mounts one if there is none.
var fusectl = cmp.Or(os.Getenv(fusectlEnv), "/sys/fs/fuse/connections")

// guard tells the guarding process which connections are this process's.
var guard struct {
	mu   sync.Mutex // guards what is written to pipe
	pipe *os.File
}

func TestMain(m *testing.M) {
	if parent := os.Getenv(guardEnv); parent != "" {
		guardProcess(parent, os.Args[1])
		return
	}
	if os.Getenv(resumeEnv) != "" {
		resumeProcess()
		return
	}
	os.Exit(runGuarded(m))
}

func runGuarded(m *testing.M) int {
	if os.Geteuid() == 0 {
		done, err := startGuard()
		if err != nil {
			fmt.Fprintln(os.Stderr, "no guard against processes that hang in their end:", err)
			return 1
		}
		defer done()
	}
	return m.Run()
}

func startGuard() (done func(), err error) {
	unmount, err := findFusectl()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	child := exec.Command("/proc/self/exe", fusectl)
	child.Env = append(os.Environ(), fmt.Sprintf("%s=%d", guardEnv, os.Getpid()))
	child.Stdin = r
	child.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // whoever kills the group leaves it
	if err := child.Start(); err != nil {
		return nil, err
	}
	guard.pipe = w
	return func() {
		w.Close()
		_ = child.Wait()
		unmount()
	}, nil
}

// findFusectl mounts fusectl in a place of its own if it is not where it belongs.
func findFusectl() (unmount func(), err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(fusectl, &st); err == nil && st.Type == fusectlMagic {
		return func() {}, nil
	}
	dir, err := os.MkdirTemp("", "fusectl")
	if err != nil {
		return nil, err
	}
	if err := unix.Mount("fusectl", dir, "fusectl", 0, ""); err != nil {
		return nil, fmt.Errorf("mount fusectl: %w", err)
	}
	fusectl = dir
	return func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		_ = os.Remove(dir)
	}, nil
}

// fusectlMagic is FUSE_CTL_SUPER_MAGIC of fs/fuse/control.c.
const fusectlMagic = 0x65735543

// guardConnection has the connection of that device aborted if this process hangs in its
// end, until the function that it returns is called.
func guardConnection(device uint64) (done func()) {
	tell := func(sign string) {
		guard.mu.Lock()
		defer guard.mu.Unlock()
		if guard.pipe != nil {
			fmt.Fprintf(guard.pipe, "%s%d\n", sign, unix.Minor(device))
		}
	}
	tell("+")
	return func() { tell("-") }
}

// abortConnection ends the connection of that device: every request is answered ECONNABORTED.
func abortConnection(device uint64) error {
	return os.WriteFile(filepath.Join(fusectl, fmt.Sprint(unix.Minor(device)), "abort"), []byte("1"), 0o200)
}

// guardProcess ends with the process parent, or once it has helped it to end.
func guardProcess(parent, fusectl string) {
	var mu sync.Mutex
	connections := map[string]bool{}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			mu.Lock()
			connections[in.Text()[1:]] = in.Text()[0] == '+'
			mu.Unlock()
		}
	}()
	for dying := 0; ; {
		select {
		case <-ended:
			return
		case <-time.After(100 * time.Millisecond):
		}
		if !dyingProcess(parent) {
			dying = 0
			continue
		}
		// As long as it hangs it has its connections, and their numbers are theirs.
		if dying++; dying < 3 {
			continue
		}
		mu.Lock()
		for c, open := range connections {
			if open {
				_ = os.WriteFile(filepath.Join(fusectl, c, "abort"), []byte("1"), 0o200)
			}
		}
		mu.Unlock()
		return
	}
}

// dyingProcess tells whether a process that has been told to end, from within or without, has
// a thread that does not: it sleeps uninterruptibly, with SIGKILL pending.
func dyingProcess(pid string) bool {
	names, _ := filepath.Glob(filepath.Join("/proc", pid, "task", "*", "status"))
	for _, name := range names {
		text, _ := os.ReadFile(name)
		var uninterruptible, killed bool
		for line := range strings.Lines(string(text)) {
			field, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
			switch field {
			case "State":
				uninterruptible = strings.HasPrefix(value, "D")
			case "SigPnd":
				pending, err := strconv.ParseUint(value, 16, 64)
				killed = err == nil && pending&(1<<(unix.SIGKILL-1)) != 0
			}
		}
		if uninterruptible && killed {
			return true
		}
	}
	return false
}

// TestGuard lets a process end while it waits for an answer of its own handler.
func TestGuard(t *testing.T) {
	if os.Getenv("CROFT_TRANSPORT_TEST_HANG") != "" {
		b, fs := newBlocker(), newTestFS()
		fs.lookup = b.lookup
		m := mountTest(t, fs, Options{}).serve()
		go func() { _ = stat(m.path("block")) }()
		b.wait(t, 1)
		os.Exit(3)
	}
	requireFuse(t)
	dir := t.TempDir()
	child := exec.Command("/proc/self/exe", "-test.run=^TestGuard$")
	child.Env = append(os.Environ(), "CROFT_TRANSPORT_TEST_HANG=1", fusectlEnv+"="+fusectl, "TMPDIR="+dir, "GOTMPDIR="+dir)
	t.Cleanup(func() { // before dir is removed, which would ask the mount
		entries, err := Mounts(MountFilter{})
		found := 0
		for _, e := range entries {
			if strings.HasPrefix(e.Mountpoint, dir+"/") {
				found++
				err = errors.Join(err, abortConnection(e.Device), Detach(e.Mountpoint))
			}
		}
		if found != 1 || err != nil {
			t.Errorf("the process has left %d mounts, want 1: the test tests nothing; %v", found, err)
		}
	})
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	var ended error
	within(t, "a process that ends while it waits for itself", func() error {
		ended = child.Wait()
		return nil
	})
	if child.ProcessState.ExitCode() != 3 {
		t.Errorf("it ended with %v", ended)
	}
}
