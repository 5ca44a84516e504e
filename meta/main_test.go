package meta

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/croftfs/croft/quota"
	"golang.org/x/sys/unix"
)

// childEnv makes the test binary run one of children on the store that is its argument.
const childEnv = "CROFT_META_TEST_CHILD"

// children are what tests do in a process of its own, to be killed.
var children = map[string]func(dir string) error{
	"hold":    holdStore,
	"steps":   runSteps,
	"full":    fillDisk,
	"reopen":  reopenFull,
	"squeeze": squeeze,
}

func TestMain(m *testing.M) {
	name := os.Getenv(childEnv)
	if name == "" {
		os.Exit(m.Run())
	}
	if err := children[name](os.Args[1]); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
}

// child is a process that runs one of children. It says a line after each step, and
// goes on when it is told to.
type child struct {
	t   *testing.T
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func startChild(t *testing.T, name, dir string) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command("/proc/self/exe", dir)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+name)
	c.cmd.Stderr = os.Stderr
	in, err := c.cmd.StdinPipe()
	must(t, err)
	out, err := c.cmd.StdoutPipe()
	must(t, err)
	c.in, c.out = in, bufio.NewScanner(out)
	must(t, c.cmd.Start())
	t.Cleanup(c.kill)
	return c
}

// expect waits for the child to say line.
func (c *child) expect(line string) {
	c.t.Helper()
	timer := time.AfterFunc(20*time.Second, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	if !c.out.Scan() || c.out.Text() != line {
		c.t.Fatalf("the child said %q, want %q; %v", c.out.Text(), line, c.cmd.Wait())
	}
}

func (c *child) goOn() {
	c.t.Helper()
	_, err := fmt.Fprintln(c.in)
	must(c.t, err)
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill() // SIGKILL
	_ = c.cmd.Wait()
}

// say is what a child does after each step.
func say(line string) {
	fmt.Println(line)
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
}

func holdStore(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	say("open")
	return s.Close()
}

// step is something that is durable when it returns, and how to see it.
type step struct {
	name string
	do   func(*Store) error
	seen func(*Store) error
}

func volume(name string) Volume {
	return Volume{Name: name, Limit: quota.Usage{Bytes: 1 << 30, Inodes: 1 << 16}, State: StateReady,
		Created: time.Unix(1000, 0).UTC(), Labels: map[string]string{"pool": "p"}}
}

func wantState(name string, want State) func(*Store) error {
	return func(s *Store) error {
		v, err := s.Volume(name)
		if err == nil && v.State != want {
			err = fmt.Errorf("state %s, want %s", v.State, want)
		}
		return err
	}
}

func checkpoint(s *Store, name string) (Checkpoint, error) {
	all, err := s.Checkpoints()
	c, ok := all[name]
	if err == nil && !ok {
		err = ErrNotFound
	}
	return c, err
}

func wantCheckpoint(name string, want Checkpoint) func(*Store) error {
	return func(s *Store) error {
		c, err := checkpoint(s, name)
		if err == nil && c != want {
			err = fmt.Errorf("checkpoint %+v, want %+v", c, want)
		}
		return err
	}
}

func wantNone(name string) func(*Store) error {
	return func(s *Store) error {
		_, errV := s.Volume(name)
		_, errC := checkpoint(s, name)
		if !errors.Is(errV, ErrNotFound) || !errors.Is(errC, ErrNotFound) {
			return fmt.Errorf("volume: %v, checkpoint: %v", errV, errC)
		}
		return nil
	}
}

func wantPublished(n int) func(*Store) error {
	return func(s *Store) error {
		all, err := s.Publications()
		if err == nil && len(all) != n {
			err = fmt.Errorf("%d publications, want %d", len(all), n)
		}
		return err
	}
}

var clean = Checkpoint{Used: quota.Usage{Bytes: 4096, Inodes: 1}, BootID: "boot", Taken: time.Unix(2000, 0).UTC()}

var steps = []step{
	{"create", func(s *Store) error { return s.CreateVolume(volume("a")) }, wantState("a", StateReady)},
	{"put", func(s *Store) error { v := volume("b"); v.State = StateCreating; return s.PutVolume(v) }, wantState("b", StateCreating)},
	{"update", func(s *Store) error {
		_, err := s.UpdateVolume("a", func(v *Volume) error { v.State = StateDeleting; return nil })
		return err
	}, wantState("a", StateDeleting)},
	{"checkpoint", func(s *Store) error { return s.PutCheckpoint("a", clean, true) }, wantCheckpoint("a", clean)},
	{"dirty", func(s *Store) error { return s.SetDirty("b", "boot") }, wantCheckpoint("b", Checkpoint{Dirty: true, BootID: "boot"})},
	{"delete", func(s *Store) error { return s.DeleteVolume("a") }, wantNone("a")},
	{"publish", func(s *Store) error { return s.PutPublication(publication("a", "/t")) }, wantPublished(1)},
	{"unpublish", func(s *Store) error { return s.DeletePublication("a", "/t") }, wantPublished(0)},
}

func runSteps(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	for _, step := range steps {
		if err := step.do(s); err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		say(step.name)
	}
	return nil
}

// TestKilledAfterAStep: what has returned survives kill -9.
func TestKilledAfterAStep(t *testing.T) {
	for i, last := range steps {
		t.Run(last.name, func(t *testing.T) {
			dir := t.TempDir()
			c := startChild(t, "steps", dir)
			for _, step := range steps[:i] {
				c.expect(step.name)
				c.goOn()
			}
			c.expect(last.name)
			c.kill()
			must(t, last.seen(openStore(t, dir)))
		})
	}
}

// TestPowerCutAfterAStep: what has returned survives a power cut, after which there is what was
// sent to the disk: a copy of the image, taken while it is mounted.
func TestPowerCutAfterAStep(t *testing.T) {
	image, dir := mountImage(t, 256<<20)
	s := openStore(t, filepath.Join(dir, "meta"))
	look := func(step step) {
		t.Helper()
		cut := filepath.Join(t.TempDir(), "image")
		command(t, "cp --sparse=always "+image+" "+cut)
		after := t.TempDir()
		command(t, "mount -o loop,nodiscard "+cut+" "+after)
		defer func() { must(t, unix.Unmount(after, 0)) }()
		s, err := Open(Options{Dir: filepath.Join(after, "meta")})
		if err != nil {
			t.Fatalf("after a cut behind %s: %v", step.name, err)
		}
		defer s.Close()
		if err := step.seen(s); err != nil {
			t.Errorf("after a cut behind %s: %v", step.name, err)
		}
	}
	for _, step := range steps {
		must(t, step.do(s))
		look(step)
	}
	// A record in a log that Badger has meanwhile left for the next one.
	last := step{"late", func(s *Store) error { return s.update(putOf(volume("late"))) }, wantState("late", StateReady)}
	must(t, last.do(s))
	other := volume("other")
	other.Labels["x"] = strings.Repeat("x", 1<<20-4096)
	for log := s.space.log; s.space.log == log; {
		must(t, s.update(putOf(other)))
	}
	must(t, s.sync())
	look(last)
}

func mountImage(t *testing.T, size int64) (image, dir string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts a filesystem: run it as root")
	}
	image, dir = filepath.Join(t.TempDir(), "image"), t.TempDir()
	f, err := os.Create(image)
	must(t, err)
	must(t, errors.Join(f.Truncate(size), f.Close()))
	command(t, "mkfs.ext4 -q -F -m 0 -E nodiscard "+image)
	command(t, "mount -o loop,nodiscard "+image+" "+dir)
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return image, dir
}

func command(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// fill takes all the space that there is.
func fill(dir string) error {
	f, err := os.OpenFile(filepath.Join(filepath.Dir(dir), "fill"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, n := range []int{1 << 20, 4096, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, n))
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
	}
	return errors.Join(ignore(f.Sync(), unix.ENOSPC))
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

const fullVolumes = 40

func fillDisk(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	for i := range fullVolumes {
		if err := s.CreateVolume(volume(fmt.Sprint("v", i))); err != nil {
			return err
		}
	}
	if err := fill(dir); err != nil {
		return err
	}
	if room, err := s.Room(); err != nil || room != 0 {
		return fmt.Errorf("room %d, %v, want a full disk", room, err)
	}
	for i := range fullVolumes / 2 {
		name := fmt.Sprint("v", i)
		if err := errors.Join(s.SetDirty(name, "boot"), s.PutCheckpoint(name, clean, true), s.DeleteVolume(name)); err != nil {
			return err
		}
	}
	say("deleted")
	return nil
}

// reopenFull opens a store on a full disk, whose ballast must do.
func reopenFull(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	if err := s.DeleteVolume(fmt.Sprint("v", fullVolumes/2)); err != nil {
		return err
	}
	say("reopened")
	if err := fill(dir); err != nil { // what the ballast gave
		return err
	}
	if err := s.DeleteVolume(fmt.Sprint("v", fullVolumes/2+1)); err != nil {
		return err
	}
	if err := s.Close(); !errors.Is(err, ErrNoRoom) {
		return fmt.Errorf("close: %v, want ErrNoRoom", err)
	}
	say("closed")
	return nil
}

// squeeze opens a store on a full disk without ballast.
func squeeze(dir string) error {
	s, err := Open(Options{Dir: dir})
	if err != nil {
		return err
	}
	if err := ignore(s.DeleteVolume(fmt.Sprint("v", fullVolumes/2+2)), ErrNoRoom); err != nil {
		return err
	}
	if err := s.Close(); err != nil {
		return err
	}
	say("squeezed")
	return nil
}

// TestFullDisk: Badger must not die of it, and records can still be deleted.
func TestFullDisk(t *testing.T) {
	_, mount := mountImage(t, 256<<20)
	dir := filepath.Join(mount, "meta")
	ballast := func() int64 {
		st, err := os.Stat(filepath.Join(dir, ballastName))
		must(t, err)
		return st.Size()
	}
	c := startChild(t, "full", dir)
	c.expect("deleted")
	if ballast() != ballastSize {
		t.Errorf("a ballast of %d bytes is left, want it whole: nothing needed it", ballast())
	}
	c.kill()

	must(t, fill(dir))
	c = startChild(t, "reopen", dir)
	c.expect("reopened")
	if ballast() != 0 {
		t.Errorf("a ballast of %d bytes is left, want it given up", ballast())
	}
	c.goOn()
	c.expect("closed")
	c.kill()

	must(t, fill(dir))
	c = startChild(t, "squeeze", dir)
	c.expect("squeezed")
	c.kill()

	must(t, os.Remove(filepath.Join(mount, "fill")))
	s := openStore(t, dir)
	if ballast() != ballastSize {
		t.Errorf("a ballast of %d bytes with room for a whole one", ballast())
	}
	all, err := s.Volumes()
	must(t, err)
	if n := len(all); n != fullVolumes/2-2 && n != fullVolumes/2-3 {
		t.Errorf("%d volumes are left", n)
	}
	must(t, s.Close())
	if err := s.CreateVolume(volume("x")); err == nil {
		t.Error("a closed store takes records")
	}
}

// TestFullDiskWithoutRoom: a store that cannot be opened safely is not opened.
func TestFullDiskWithoutRoom(t *testing.T) {
	_, mount := mountImage(t, 64<<20)
	dir := filepath.Join(mount, "meta")
	must(t, os.Mkdir(dir, 0o700))
	must(t, fill(dir))
	if s, err := Open(Options{Dir: dir}); !errors.Is(err, ErrNoRoom) {
		t.Fatalf("opened %v, %v", s, err)
	}
	must(t, os.Remove(filepath.Join(mount, "fill")))
	must(t, openStore(t, dir).CreateVolume(volume("a")))
}
