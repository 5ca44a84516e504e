package gate

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// The environment of this test's binary when it is a daemon.
const (
	envKill   = "GATE_TEST_KILL"   // "step count": where it kills itself
	envInodes = "GATE_TEST_INODES" // of the two files
)

func TestMain(m *testing.M) {
	if kill, ok := os.LookupEnv(envKill); ok {
		if err := daemon(kill); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// daemon answers what is held until its input ends, or it has come to where it is to be killed.
func daemon(kill string) error {
	var inodes [2]uint64
	if _, err := fmt.Sscan(os.Getenv(envInodes), &inodes[0], &inodes[1]); err != nil {
		return err
	}
	var at string
	var count int64
	if _, err := fmt.Sscan(kill, &at, &count); err != nil {
		return err
	}
	region, err := state.Open(os.NewFile(3, "state"))
	if err != nil {
		return err
	}
	var n atomic.Int64
	_, err = open(Options{State: region, Group: 4, step: func(step string) {
		if step == at && n.Add(1) == count {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		}
	}}, inodes)
	if err == nil {
		_, err = io.Copy(io.Discard, os.Stdin)
	}
	return err
}

// open opens a gate that decides by rule: every third event from another thread, later.
func open(o Options, inodes [2]uint64) (*Gate, error) {
	var g *Gate
	ready := make(chan struct{})
	o.Decide = func(ev *Event) Verdict {
		<-ready
		page := ev.Off / uint64(os.Getpagesize())
		verdict := Deny(unix.EBUSY) // an inode that is none of them
		for i, ino := range inodes {
			if ino == ev.Inode {
				verdict = Allow
				if errno := rule(i, page); errno != 0 {
					verdict = Deny(errno)
				}
			}
		}
		if page%3 == 0 {
			go g.Answer(ev, verdict)
			return Later
		}
		return verdict
	}
	var err error
	g, err = Open(o)
	close(ready)
	return g, err
}

// rule is what a write of a page of one of the files is to be answered.
func rule(file int, page uint64) unix.Errno {
	switch {
	case page%2 == uint64(file):
		return 0
	case file == 0:
		return unix.ENOSPC
	}
	return unix.EDQUOT
}

// ground is a group with two files in it, which a keeper has, and a region.
type ground struct {
	region *state.Region
	kept   *Gate // only its group
	inodes [2]uint64
	fds    [2]int
	paths  [2]string
}

func newGround(t *testing.T) *ground {
	t.Helper()
	gr := &ground{}
	var err error
	if gr.region, err = state.New("pool", "boot", os.Getpagesize()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { gr.region.Close() })
	group, err := openGroup(0)
	if err != nil {
		t.Fatal(err)
	}
	gr.kept = &Gate{group: group}
	t.Cleanup(func() {
		if gr.kept.group >= 0 {
			unix.Close(group)
		}
	})
	dir := t.TempDir()
	for i := range gr.fds {
		gr.paths[i] = filepath.Join(dir, strconv.Itoa(i))
		fd := openFile(t, gr.paths[i], unix.O_CREAT|unix.O_RDWR)
		if err := errors.Join(gr.kept.Mark(fd), gr.kept.Hold(fd)); err != nil {
			t.Fatal(err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		gr.inodes[i] = st.Ino
		gr.fds[i] = openFile(t, gr.paths[i], unix.O_RDWR)
	}
	return gr
}

// write writes n pages at once, and returns what goes wrong with that, one for each.
func (gr *ground) write(n int) <-chan error {
	results := make(chan error, n)
	for i := range n {
		go func() {
			file, page := i%2, uint64(i/2)
			_, err := unix.Pwrite(gr.fds[file], make([]byte, os.Getpagesize()), int64(page)*int64(os.Getpagesize()))
			if want := rule(file, page); err != want && (err != nil || want != 0) {
				results <- fmt.Errorf("file %d, page %d: %v, want %v", file, page, err, want)
				return
			}
			results <- nil
		}()
	}
	return results
}

func check(t *testing.T, results <-chan error) {
	t.Helper()
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// queued returns once the group has n events that nobody has read.
func (gr *ground) queued(t *testing.T, n int) {
	t.Helper()
	for {
		bytes, err := unix.IoctlGetInt(gr.kept.group, unix.TIOCINQ) // FIONREAD
		if err != nil {
			t.Fatal(err)
		}
		if bytes/unix.FAN_EVENT_METADATA_LEN == n {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// serve runs a daemon until it kills itself.
func (gr *ground) serve(t *testing.T, kill string) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envKill+"="+kill, fmt.Sprintf("%s=%d %d", envInodes, gr.inodes[0], gr.inodes[1]))
	var output strings.Builder
	cmd.Stdout, cmd.Stderr = &output, &output
	for _, fd := range []int{gr.region.FD(), gr.kept.group} {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		file := os.NewFile(uintptr(dup), "kept")
		defer file.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, file)
	}
	input, err := cmd.StdinPipe() // it ends with this process at the latest
	if err != nil {
		t.Fatal(err)
	}
	defer input.Close()
	err = cmd.Run()
	if status, ok := cmd.ProcessState.Sys().(interface{ Signal() unix.Signal }); !ok || status.Signal() != unix.SIGKILL {
		t.Fatalf("a daemon that was to be killed at %s: %v\n%s", kill, err, output.String())
	}
}

// resume goes on in this process.
func (gr *ground) resume(t *testing.T) *Gate {
	t.Helper()
	g, err := open(Options{State: gr.region, Group: gr.kept.group, pid: -1}, gr.inodes)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// empty tells whether nothing is held any more.
func (gr *ground) empty(t *testing.T) {
	t.Helper()
	buffer, held := gr.region.Events()
	for i := range held {
		if held[i].FD != 0 {
			t.Errorf("record %d: %+v", i, held[i])
		}
	}
	for i, b := range buffer {
		if b != 0 {
			t.Fatalf("byte %d of the buffer is %d", i, b)
		}
	}
}

// Wherever daemons are killed, one after the other, each held write gets its answer.
func TestKill(t *testing.T) {
	const writers = 200
	for _, c := range []struct {
		kills  string
		crowds bool // the numbers of what is left are in use here
	}{
		{kills: "read 1"},
		{kills: "read 1", crowds: true},
		{kills: "noted 1"},
		{kills: "noted 77"},
		{kills: "noted 200"},
		{kills: "forgotten 1"},
		{kills: "forgotten 1", crowds: true},
		{kills: "answered 1"},
		{kills: "answered 100"},
		{kills: "answered 100", crowds: true},
		{kills: "answered 200"},
		{kills: "removed 100"},
		{kills: "read 1, found 1"},
		{kills: "noted 77, found 50, kept 1, kept 200, answered 1, answered 30, removed 10", crowds: true},
		{kills: "forgotten 1, answered 1, answered 1, answered 1, removed 1, removed 1, kept 7"},
	} {
		t.Run(fmt.Sprintf("%s crowds=%v", c.kills, c.crowds), func(t *testing.T) {
			gr := newGround(t)
			results := gr.write(writers)
			gr.queued(t, writers)
			for kill := range strings.SplitSeq(c.kills, ", ") {
				gr.serve(t, kill)
			}
			if c.crowds {
				for range 2 * writers {
					openFile(t, os.DevNull, unix.O_RDONLY)
				}
			}
			g := gr.resume(t)
			check(t, results)
			check(t, gr.write(writers)) // nothing is left in the kernel that their answers reach instead
			if err := g.Close(); err != nil {
				t.Fatal(err)
			}
			if held := g.Held(); held != 0 {
				t.Errorf("%d held", held)
			}
			gr.empty(t)
		})
	}
}

// A caller that is killed while nobody answers: its event is still there, and is answered.
func TestKilledCaller(t *testing.T) {
	gr := newGround(t)
	caller := exec.Command("dd", "if=/dev/zero", "of="+gr.paths[1], "bs=4096", "count=1", "conv=notrunc", "status=none")
	if err := caller.Start(); err != nil {
		t.Fatal(err)
	}
	gr.queued(t, 1)
	gr.serve(t, "read 1")
	if err := caller.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = caller.Wait()
	g := gr.resume(t)
	check(t, gr.write(8))
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	gr.empty(t)
}

// What is left when a gate is detached is answered by the next alone, each by its own
// answer: also when the number of the first is free for an instant, and becomes the second's.
func TestDetach(t *testing.T) {
	for freed, same := range map[string]bool{"keeping": false, "reading": true} {
		t.Run(freed, func(t *testing.T) {
			gr := newGround(t)
			events := make(chan *Event, 1)
			o := Options{
				Decide: func(ev *Event) Verdict { events <- ev; return Later },
				State:  gr.region, Group: gr.kept.group, pid: -1,
			}
			first, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			write := func(fd int) <-chan error {
				done := make(chan error, 1)
				go func() { _, err := unix.Pwrite(fd, []byte("x"), 0); done <- err }()
				return done
			}
			done := write(gr.fds[0])
			left := <-events
			if err := first.Detach(); err != nil {
				t.Fatal(err)
			}
			first.Answer(left, Deny(unix.EIO))
			t.Cleanup(func() { // its process would end
				unix.Close(first.group)
				unix.Close(first.stop)
			})

			free := make(chan int)
			o.step = func(step string) {
				if step == freed {
					if fd, ok := <-free; ok {
						unix.Close(fd)
					}
				}
			}
			second, err := Open(o)
			if err != nil {
				t.Fatal(err)
			}
			ev := <-events
			if ev.fd != left.fd || ev.Inode != gr.inodes[0] {
				t.Fatalf("left is event %d of inode %d, was event %d of %d", ev.fd, ev.Inode, left.fd, gr.inodes[0])
			}
			for { // no lower one is free
				fd, err := unix.FcntlInt(uintptr(gr.fds[0]), unix.F_DUPFD_CLOEXEC, 0)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { unix.Close(fd) })
				if fd > left.fd {
					break
				}
			}
			other := write(gr.fds[1])
			gr.queued(t, 1)
			free <- left.fd
			close(free)
			next := <-events
			if (next.fd == left.fd) != same {
				t.Fatalf("the new event is %d, the one that is left %d", next.fd, left.fd)
			}
			second.Answer(next, Deny(unix.EDQUOT))
			second.Answer(ev, Deny(unix.ENOSPC))
			if err := <-done; err != unix.ENOSPC {
				t.Errorf("the write that was left: %v, want ENOSPC", err)
			}
			if err := <-other; err != unix.EDQUOT {
				t.Errorf("the new write: %v, want EDQUOT", err)
			}
			// Closed, it holds nothing, though the group is kept.
			done = write(gr.fds[0])
			<-events
			if err := second.Close(); err != nil {
				t.Fatal(err)
			}
			if err := <-done; err != nil {
				t.Errorf("a write that was held when the gate closed: %v", err)
			}
			if err := <-write(gr.fds[1]); err != nil {
				t.Errorf("a write after the gate closed: %v", err)
			}
		})
	}
}

// A group that is gone has taken what it held with it.
func TestNewGroup(t *testing.T) {
	gr := newGround(t)
	results := gr.write(4)
	gr.queued(t, 4)
	gr.serve(t, "noted 2")
	g, err := Open(Options{Decide: func(*Event) Verdict { panic("an event of another group") }, State: gr.region})
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	gr.empty(t)
	unix.Close(gr.kept.group)
	gr.kept.group = -1
	for range cap(results) {
		<-results
	}
}

func TestGroupIsChecked(t *testing.T) {
	gr := newGround(t)
	for name, o := range map[string]Options{
		"a file":        {State: gr.region, Group: gr.fds[0]},
		"not open":      {State: gr.region, Group: 1 << 20},
		"without state": {Group: gr.kept.group},
	} {
		if g, err := Open(o); err == nil {
			t.Errorf("%s is taken for a group", name)
			_ = g.Close()
		}
	}
}
