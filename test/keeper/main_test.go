// Package keeper_test runs keepers, daemons and those who look after them as processes, and has them
// end in all orders.
package keeper_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

func TestMain(m *testing.M) {
	kit.Main(m, map[string]kit.Helper{"inside": inside})
}

// keeper is a `croft keeper`.
type keeper struct {
	t      *testing.T
	cmd    *exec.Cmd
	socket string
	log    *os.File
}

// startKeeper starts one and waits until it listens.
func startKeeper(t *testing.T, socket string) *keeper {
	t.Helper()
	log, err := os.CreateTemp(t.TempDir(), "keeper")
	kit.OK(t, err)
	k := &keeper{t: t, socket: socket, log: log, cmd: exec.Command(kit.Binary(t), "keeper", "--socket", socket)}
	k.cmd.Stderr = log
	kit.OK(t, k.cmd.Start())
	t.Cleanup(func() {
		_ = k.cmd.Process.Kill()
		_ = k.cmd.Wait()
		log.Close()
	})
	kit.Poll(t, "the keeper's socket", func() bool { return strings.Contains(k.said(), "keeping") })
	return k
}

func (k *keeper) said() string {
	body, err := os.ReadFile(k.log.Name())
	kit.OK(k.t, err)
	return string(body)
}

// end ends it with a signal.
func (k *keeper) end(sig syscall.Signal) {
	k.t.Helper()
	kit.OK(k.t, k.cmd.Process.Signal(sig))
	err := k.cmd.Wait()
	if sig == unix.SIGTERM && err != nil {
		k.t.Errorf("the keeper: %v", err)
	}
}

// memory is a process's resident memory in KiB, by a key of /proc/PID/smaps_rollup.
func memory(t *testing.T, pid int, key string) int {
	t.Helper()
	body, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "smaps_rollup"))
	kit.OK(t, err)
	found := regexp.MustCompile(`(?m)^` + key + `: +(\d+) kB$`).FindSubmatch(body)
	if found == nil {
		t.Fatalf("no %s in %s", key, body)
	}
	n, err := strconv.Atoi(string(found[1]))
	kit.OK(t, err)
	return n
}

// metric is what the daemon tells Prometheus; "" when it does not answer.
func metric(p *kit.Pool, name string) string {
	r := p.Croft("metrics", "--pool", p.Dir)
	for line := range strings.Lines(r.Stdout) {
		if rest, ok := strings.CutPrefix(line, "croft_"+name+"{"); ok {
			fields := strings.Fields(rest)
			return fields[len(fields)-1]
		}
	}
	return ""
}

func wantMetric(t *testing.T, p *kit.Pool, name, want string) {
	t.Helper()
	if got := metric(p, name); got != want {
		t.Errorf("croft_%s is %q, want %q", name, got, want)
	}
}

// inside has a file open and a directory to be in, and does something with both for each line that
// it is told.
func inside(args []string) int {
	if err := os.Chdir(args[0]); err != nil {
		return fail(err)
	}
	f, err := os.OpenFile("file", os.O_CREATE|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return fail(err)
	}
	os.Stdout.WriteString("here\n")
	for i := 1; ; i++ {
		if _, err := os.Stdin.Read(make([]byte, 1)); err != nil {
			return 0
		}
		if _, err := f.WriteString("x"); err != nil {
			return fail(err)
		}
		if st, err := f.Stat(); err != nil || st.Size() != int64(i) {
			return fail(err)
		}
		if err := os.Mkdir(strconv.Itoa(i), 0o700); err != nil {
			return fail(err)
		}
		os.Stdout.WriteString("done\n")
	}
}

func fail(err error) int {
	if err != nil {
		os.Stderr.WriteString(err.Error() + "\n")
	}
	return 1
}

// tenant is somebody inside a volume.
type tenant struct {
	t *testing.T
	r *kit.Running
}

func newTenant(t *testing.T, p *kit.Pool) *tenant {
	t.Helper()
	r := kit.Process{Helper: "inside", Args: []string{p.Create("v", 256*kit.Mi)}}.Start(t)
	r.Line()
	return &tenant{t, r}
}

// works wants all that he does to be done.
func (x *tenant) works() {
	x.t.Helper()
	x.r.Say("")
	if got := x.r.Line(); got != "done" {
		x.t.Errorf("%q", got)
	}
}

func (x *tenant) leave() {
	x.t.Helper()
	if code := x.r.Wait(); code != 0 {
		x.t.Errorf("exit %d: %s", code, x.r.Output())
	}
}
