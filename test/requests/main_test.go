// Package requests_test pins what the kernel asks for each ordinary job, so that
// a request that has become unnecessary does not creep back.
//
// The counts are in testdata/counts. After a change that is meant,
//
//	hack/with-scratch.sh go test ./test/requests -run /.*/ext4 -args -update
//
// writes down what is measured there; comments and bounds stay as they are.
package requests_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool/control"
	"github.com/croftfs/croft/test/kit"
)

var update = flag.Bool("update", false, "write what is measured to testdata/counts")

func TestMain(m *testing.M) { kit.Main(m, map[string]kit.Helper{"job": runJob}) }

const (
	owner = 1000 // whose files they are, and who does the jobs
	other = 2000 // somebody else, for whom the kernel must ask for ACLs
)

// Test does every job in a daemon that has seen nothing of its files. What the
// kernel asks depends on how much of it the kernel does itself, and not on the
// backing filesystem.
func Test(t *testing.T) {
	kit.Need(t, "git", "tar")
	for _, tier := range []string{"daemon", "read", "gate"} {
		t.Run(tier, func(t *testing.T) {
			kit.EachFS(t, func(t *testing.T, fstype string) { measureAll(t, tier, fstype) })
		})
	}
}

func measureAll(t *testing.T, tier, fstype string) {
	want := readPins(t)
	p := kit.NewPool(t, fstype)
	p.MountArgs = []string{"--tier", tier}
	// A first daemon, for the preparations: the second one's kernel knows of nothing.
	p.Mount()
	dir := p.Create("v", 1*kit.Gi, "--owner", fmt.Sprintf("%d:%d", owner, owner))
	for _, j := range jobs {
		if r := j.process(dir, "prepare").Run(t); r.Code != 0 {
			t.Fatalf("%s: prepare: %s", j.name, r)
		}
	}
	p.Idle()
	p.Stop()
	p.Mount()
	root, err := os.Open(p.Mnt) // the first OPENDIR
	kit.OK(t, err)
	root.Close()
	for _, j := range jobs {
		t.Run(j.name, func(t *testing.T) {
			got, took := measure(t, p, j, dir)
			if *update {
				want.set(j.name, tier, got)
				return
			}
			pin, ok := want.get(j.name, tier)
			if !ok {
				t.Fatalf("testdata/counts has no counts of it; measured: %s", got)
			}
			if diff := pin.diff(got, took); diff != "" {
				t.Errorf("the kernel asked for something else:\n%s", diff)
			}
		})
	}
	if *update && !t.Failed() {
		want.write(t)
	}
}

// measure runs a job in a process that is in its directory already, and returns how long it took as well.
func measure(t *testing.T, p *kit.Pool, j job, dir string) (counts, time.Duration) {
	t.Helper()
	child := j.process(dir, "run").Start(t)
	if line := child.Line(); line != "ready" {
		t.Fatalf("the job says %q", line)
	}
	before := settled(t, p)
	began := time.Now()
	child.Say("go")
	if line := child.Line(); line != "done" {
		t.Fatalf("the job says %q", line)
	}
	took := time.Since(began)
	got := settled(t, p).minus(before)
	if code := child.Wait(); code != 0 {
		t.Fatalf("the job ends with %d", code)
	}
	return got, took
}

// settled returns the counts when all that was asked is counted: after the
// last close(2) RELEASE and FORGET are in the kernel's queue, and come before
// the answer to a statfs(2) that was called later. They are counted by other
// threads of the daemon than that, so the counts have to stay for a few rounds.
func settled(t *testing.T, p *kit.Pool) counts {
	t.Helper()
	p.Idle()
	client := control.NewClient(p.Socket())
	defer client.Close()
	var last counts
	rounds := 0
	kit.Poll(t, "an end of requests", func() bool {
		kit.Statfs(t, p.Mnt)
		all, err := client.Requests(kit.Context(t))
		kit.OK(t, err)
		now := countsOf(all)
		if now.String() == last.String() {
			rounds++
		} else {
			rounds = 0
		}
		last = now
		return rounds == 5
	})
	return last
}

// process is the job's process: root for what it prepares.
func (j job) process(dir, phase string) kit.Process {
	uid := uint32(owner)
	if j.user != 0 && phase == "run" {
		uid = j.user
	}
	return kit.Process{Helper: "job", Args: []string{j.name, phase, filepath.Join(dir, j.dir())}, UID: uid, GID: uid}
}

func (j job) dir() string { return strings.NewReplacer(" ", "-", ",", "").Replace(j.name) }

// runJob is the process that prepares a job or does it. It goes into the job's
// directory first, and stays until its standard input ends: neither the way
// there nor the end of it is counted.
func runJob(args []string) int {
	runtime.LockOSThread()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	// What reads $PWD compares it with ".", and git looks for its configuration.
	for name, value := range map[string]string{"HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C", "TZ": "UTC"} {
		os.Setenv(name, value)
	}
	os.Unsetenv("PWD")
	os.Unsetenv("TMPDIR")
	unix.Umask(0o022)
	for _, j := range jobs {
		if j.name != args[0] {
			continue
		}
		if args[1] == "prepare" {
			if err := unix.Mkdir(args[2], 0o755); err != nil {
				return fail(err)
			}
		}
		if err := unix.Chdir(args[2]); err != nil {
			return fail(err)
		}
		if args[1] == "prepare" {
			if j.prepare != nil {
				if err := j.prepare(); err != nil {
					return fail(err)
				}
			}
			return 0
		}
		if j.before != nil {
			if err := j.before(); err != nil {
				return fail(err)
			}
		}
		fmt.Println("ready")
		line := make([]byte, 3)
		if _, err := unix.Read(0, line); err != nil {
			return fail(err)
		}
		if err := j.run(); err != nil {
			return fail(err)
		}
		fmt.Println("done")
		if _, err := unix.Read(0, line); err != nil {
			return fail(err)
		}
		return 0
	}
	return fail(fmt.Errorf("no such job: %s", args[0]))
}
