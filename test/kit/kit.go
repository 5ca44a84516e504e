package kit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Backstop ends what hangs. Nothing takes nearly as long when all is well.
var Backstop = 3 * time.Minute

// pollEvery is the pause between two looks at a state that is waited for.
const pollEvery = 2 * time.Millisecond

// helperEnv names the helper that the re-executed test binary is to be.
const helperEnv = "CROFT_TEST_HELPER"

// Helper is a small program inside a test binary, run as a process of its own
// by Start and Run. What it returns is its exit code.
type Helper func(args []string) int

var helpers = map[string]Helper{}

// binary is built once a process.
var binary struct {
	once sync.Once
	dir  string
	path string
	err  error
}

// Main is a suite's TestMain: it runs the helper that this process was started
// to be, or else the tests.
func Main(m *testing.M, h map[string]Helper) {
	for name, fn := range h {
		helpers[name] = fn
	}
	if name := os.Getenv(helperEnv); name != "" {
		fn := helpers[name]
		if fn == nil {
			fmt.Fprintf(os.Stderr, "no helper %q\n", name)
			os.Exit(127)
		}
		os.Exit(fn(os.Args[1:]))
	}
	code := m.Run()
	if binary.dir != "" {
		_ = os.RemoveAll(binary.dir)
	}
	os.Exit(code)
}

// Need fails the test when it does not run as root, or /dev/fuse or one of the
// tools is missing.
func Need(t testing.TB, tools ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Fatalf("this test needs FUSE: %v", err)
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("this test needs %s: %v", tool, err)
		}
	}
}

// Binary builds croft, statically as it is shipped, and returns its path.
func Binary(t testing.TB) string {
	t.Helper()
	binary.once.Do(func() {
		if binary.dir, binary.err = os.MkdirTemp("", "croft-bin-"); binary.err != nil {
			return
		}
		binary.path = filepath.Join(binary.dir, "croft")
		binary.err = build(binary.path)
	})
	if binary.err != nil {
		t.Fatal(binary.err)
	}
	return binary.path
}

// Build builds another croft, with settings for the linker.
func Build(t testing.TB, path string, ldflags string) {
	t.Helper()
	OK(t, build(path, "-ldflags", ldflags))
}

func build(path string, flags ...string) error {
	root, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	cmd := exec.Command("go", append(append([]string{"build"}, flags...), "-o", path, "./cmd/croft")...)
	cmd.Dir = strings.TrimSpace(string(root))
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build croft: %w\n%s", err, out)
	}
	return nil
}

// TempDir is t.TempDir with a short path (a control socket's is bounded) that
// every user may walk through (tenants are not root).
func TempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "croft")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove the test's directory: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Context ends with the test, and with the backstop.
func Context(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), Backstop)
	t.Cleanup(cancel)
	return ctx
}

// Poll waits until done returns true. The test fails with what when it never does.
func Poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	if !poll(done) {
		t.Fatalf("never came: %s", what)
	}
}

func poll(done func() bool) bool {
	ctx, cancel := context.WithTimeout(context.Background(), Backstop)
	defer cancel()
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
	return true
}

// Within runs fn and fails the test when it does not return: for what must not
// block. The goroutine of a call that hangs is left behind.
func Within(t testing.TB, what string, fn func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		fn()
	}()
	select {
	case <-done:
	case <-time.After(Backstop):
		t.Fatalf("%s: blocks", what)
	}
}

// Result is how a command ended.
type Result struct {
	Stdout, Stderr string
	Code           int // -1 when a signal ended it
}

func (r Result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.Code, r.Stdout, r.Stderr)
}

func runCmd(t testing.TB, cmd *exec.Cmd) Result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	cmd.WaitDelay = Backstop
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", cmd, err)
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}
}

// Exec runs a tool and returns how it ended.
func Exec(t testing.TB, name string, args ...string) Result {
	t.Helper()
	return runCmd(t, exec.CommandContext(Context(t), name, args...))
}

// Must runs a tool that has to succeed and returns what it printed.
func Must(t testing.TB, name string, args ...string) string {
	t.Helper()
	r := Exec(t, name, args...)
	if r.Code != 0 {
		t.Fatalf("%s %s: %s", name, strings.Join(args, " "), r)
	}
	return r.Stdout
}

// Process describes how a helper is to run.
type Process struct {
	Helper   string
	Args     []string
	UID, GID uint32 // 0 is root
	Umask    int    // of the helper; 0 leaves it as it is
}

// command re-executes the test binary. It goes by /proc/self/exe because the
// path of a test binary leads through directories of root only.
func (p Process) command(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", p.Args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+p.Helper)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if p.UID != 0 || p.GID != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: p.UID, Gid: p.GID}
	}
	cmd.Dir = "/"
	return cmd
}

// Run runs a helper to its end.
func (p Process) Run(t testing.TB) Result {
	t.Helper()
	return runCmd(t, p.command(Context(t)))
}

// Running is a helper under way.
type Running struct {
	t      testing.TB
	cmd    *exec.Cmd
	out    bytes.Buffer
	stdin  *os.File
	stdout *os.File
}

// Start starts a helper whose standard input and output are Running's pipes.
func (p Process) Start(t testing.TB) *Running {
	t.Helper()
	cmd := p.command(Context(t))
	childIn, stdin, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, childOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r := &Running{t: t, cmd: cmd, stdin: stdin, stdout: stdout}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = childIn, childOut, &r.out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	childIn.Close()
	childOut.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		stdin.Close()
		stdout.Close()
	})
	return r
}

// Line reads a line of what the helper prints: how a helper says where it is.
func (r *Running) Line() string {
	r.t.Helper()
	var line []byte
	b := make([]byte, 1)
	for {
		n, err := r.stdout.Read(b)
		if n == 1 && b[0] == '\n' {
			return string(line)
		}
		if err != nil {
			r.t.Fatalf("helper ended after %q: %v\n%s", line, err, r.out.String())
		}
		line = append(line, b[0])
	}
}

// Say writes a line to the helper's standard input.
func (r *Running) Say(line string) {
	r.t.Helper()
	if _, err := r.stdin.WriteString(line + "\n"); err != nil {
		r.t.Fatal(err)
	}
}

// Wait waits for the helper's end and returns its exit code.
func (r *Running) Wait() int {
	r.stdin.Close()
	_ = r.cmd.Wait()
	return r.cmd.ProcessState.ExitCode()
}

// Rest is what the helper prints from now on to its end; Wait may have been called.
func (r *Running) Rest() string {
	body, _ := io.ReadAll(r.stdout)
	return string(body)
}

// Output is what the helper has written to its standard error.
func (r *Running) Output() string { return r.out.String() }

// Signal sends the helper a signal.
func (r *Running) Signal(sig os.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(sig); err != nil {
		r.t.Fatal(err)
	}
}

// Kill ends the helper at once.
func (r *Running) Kill() { _ = r.cmd.Process.Kill(); _ = r.cmd.Wait() }

// IsErr fails the test unless err is want, by errors.Is.
func IsErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: %v, want %v", what, err, want)
	}
}

// OK fails the test at once when err is not nil.
func OK(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Stat is lstat(2).
func Stat(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %s: %v", path, err)
	}
	return st
}
