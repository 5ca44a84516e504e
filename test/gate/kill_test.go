package gate_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// hammer appends to the file args[0] from args[1] threads, by a descriptor each, until its
// standard input ends. ENOSPC does not end it, and other errors end the thread; it
// says so when all have ended. It exits with 3 when that was EIO, with 4 when it came of
// the mount's end.
func hammer(args []string) int {
	threads, err := strconv.Atoi(args[1])
	if err != nil {
		return 2
	}
	var over atomic.Bool
	var code atomic.Int64
	var wg sync.WaitGroup
	for range threads {
		f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		wg.Go(func() {
			buf := make([]byte, 64*kit.Ki)
			for !over.Load() {
				_, err := unix.Write(int(f.Fd()), buf)
				if err == nil || err == unix.ENOSPC {
					continue
				}
				fmt.Fprintln(os.Stderr, err)
				switch err {
				case unix.EIO:
					code.Store(3)
				case unix.ENOTCONN, unix.ECONNABORTED:
					code.Store(4)
				default:
					code.Store(1)
				}
				return
			}
		})
	}
	fmt.Println("hammers")
	go func() {
		wg.Wait()
		fmt.Println("ended")
	}()
	_, _ = io.Copy(io.Discard, os.Stdin)
	over.Store(true)
	wg.Wait()
	return int(code.Load())
}

// TestKill kills the daemon while system calls are held. Who had files open goes on
// until the next one is there.
func TestKill(t *testing.T) {
	const limit = 256 * kit.Mi
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 6*kit.Gi)
		dir := p.Create("v", limit)
		for round := range 3 {
			before := heldTotal(t, p)
			hammers := startHammers(t, dir)
			kit.Poll(t, "held system calls", func() bool { return heldTotal(t, p) > before+100 })
			p.Daemon().Kill()
			if round == 1 {
				// A command has the pool in between: it must not take the files for known.
				// Nothing limits them until the next daemon does, so they have a rest.
				for _, h := range hammers {
					h.Signal(unix.SIGSTOP)
				}
				_, _ = p.RunCheck()
				for _, h := range hammers {
					h.Signal(unix.SIGCONT)
				}
			}
			p.Mount()
			leftBehind(t, p, hammers, fmt.Sprint("round ", round))
			if t.Failed() {
				return
			}
		}
	})
}

// TestCutOff ends the daemon while files are open for writing: its mount is cut off.
func TestCutOff(t *testing.T) {
	const limit = 256 * kit.Mi
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 6*kit.Gi)
		dir := p.Create("v", limit)
		before := heldTotal(t, p)
		hammers := startHammers(t, dir)
		kit.Poll(t, "held system calls", func() bool { return heldTotal(t, p) > before+100 })
		d := p.Daemon()
		kit.OK(t, d.Signal(unix.SIGTERM))
		kit.Poll(t, "the mount's end", func() bool {
			var st unix.Stat_t
			return unix.Stat(dir, &st) == unix.ENOENT
		})
		kit.OK(t, d.Signal(unix.SIGTERM)) // it waits for nobody, then
		kit.Within(t, "the daemon's end", func() { <-d.Exited() })
		p.Mount()
		leftBehind(t, p, hammers, "cut off")
	})
}

// startHammers has four processes fill a volume: what is opened once it is full is not passed.
func startHammers(t *testing.T, dir string) (hammers []*kit.Running) {
	t.Helper()
	for i := range 4 {
		h := kit.Process{Helper: "hammer", Args: []string{fmt.Sprint(dir, "/h", i), "4"}}.Start(t)
		h.Line()
		hammers = append(hammers, h)
	}
	return hammers
}

// leftBehind is called once the next daemon serves the volume v, that an earlier one
// has left with hammers at work.
func leftBehind(t *testing.T, p *kit.Pool, hammers []*kit.Running, what string) {
	t.Helper()
	kit.Poll(t, "the recount", func() bool { return p.Show("v").State != "recounting" })
	// What had begun goes on to its end.
	for i, h := range hammers {
		kit.Within(t, fmt.Sprint("the refusal of writer ", i), func() {
			if line := h.Line(); line != "ended" {
				t.Errorf("writer %d says %q", i, line)
			}
		})
	}
	used := onDisk(t, p, "v")
	time.Sleep(300 * time.Millisecond)
	v := p.Show("v")
	t.Logf("%s: %d bytes above the limit", what, int64(used)-int64(v.Limit.Bytes))
	if now := onDisk(t, p, "v"); now != used {
		t.Errorf("%s: the volume grew from %d to %d bytes", what, used, now)
	}
	result, r := p.RunCheck()
	for _, v := range result.Volumes {
		if v.Ledger != v.Disk || len(v.Findings) > 0 && v.Disk.Fits(v.Limit) || len(v.Findings) > 1 {
			t.Errorf("%s: croft check: %s", what, r)
		}
	}
	// A new writer gets room when there is some, whatever the old ones hold.
	names := []string{"h0", "h1", "h2", "h3"}
	for i, name := range names {
		if err := os.Remove(p.Path("v", name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		if i == 0 {
			f, err := os.Open(filepath.Join(p.Path("v", names[1])))
			if err == nil {
				_, err = f.Read(make([]byte, 4096))
				f.Close()
			}
			kit.OK(t, err)
		}
	}
	if p.Used("v").Bytes == 0 {
		t.Errorf("%s: nothing is charged for files that are open", what)
	}
	refused := 0
	for i, h := range hammers {
		kit.Within(t, fmt.Sprint("the end of writer ", i), func() {
			switch code := h.Wait(); code {
			case 3:
				refused++
			case 4: // the volume was gated already when it opened its file
			default:
				t.Errorf("writer %d ended with %d", i, code)
			}
		})
	}
	if refused == 0 {
		t.Errorf("%s: nobody was refused: the test tests nothing", what)
	}
	kit.Poll(t, "the room of removed files", func() bool { return p.Used("v").Bytes == 0 })
	p.Check()
	p.Idle()
}

// TestLeft has files that outlive the daemon removed, linked, replaced, mapped, and
// opened anew.
func TestLeft(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		for _, tier := range []string{"gate", "hold"} {
			t.Run(tier, func(t *testing.T) { testLeft(t, fstype, tier) })
		}
	})
}

func testLeft(t *testing.T, fstype, tier string) {
	p := mount(t, fstype, 3*kit.Gi)
	p.MountArgs = []string{"--tier", tier} // of those that follow
	dir := p.Create("v", kit.Gi)
	piece := buffer(t, kit.Mi)
	names := []string{"plain", "linked", "orphan", "replaced", "removed", "mapped", "joined"}
	files := make(map[string]*os.File)
	write := func(name string, want error) {
		t.Helper()
		kit.Within(t, "a write of "+name, func() {
			if _, err := unix.Write(int(files[name].Fd()), piece); !errors.Is(err, want) {
				t.Errorf("write of %s: %v, not %v", name, err, want)
			}
		})
	}
	for _, name := range names {
		files[name] = open(t, os.O_CREATE|os.O_RDWR|os.O_APPEND, dir, name)
		write(name, nil)
	}
	kit.OK(t, os.Link(p.Path("v", "linked"), p.Path("v", "link")))
	kit.OK(t, os.Remove(p.Path("v", "orphan")))
	mem, err := unix.Mmap(int(files["mapped"].Fd()), 0, kit.Mi, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	kit.OK(t, err)
	for range 2 { // the second daemon leaves them to the third
		p.Daemon().Kill()
		for _, name := range names {
			write(name, nil)
		}
		p.Mount()
		kit.Poll(t, "the recount", func() bool { return p.Show("v").State != "recounting" })
		for _, name := range names {
			write(name, unix.EIO)
			if _, err := files[name].ReadAt(make([]byte, 4096), 0); err != nil {
				t.Errorf("read of %s: %v", name, err)
			}
		}
		mem[4096]++
		p.Check()
	}
	if used := p.Used("v"); used.Inodes != uint64(len(names)) || used.Bytes < 3*kit.Mi*uint64(len(names)) {
		t.Errorf("%v are in use for %d files of 3 MiB", used, len(names))
	}
	// Who opens such a file anew cannot be told from who had it open.
	joins := open(t, os.O_WRONLY|os.O_APPEND, dir, "joined")
	_, err = joins.Write(piece)
	kit.OK(t, err)
	write("joined", nil)
	kit.OK(t, joins.Close())
	kit.Poll(t, "the refusal of who is left", func() bool {
		_, err := unix.Write(int(files["joined"].Fd()), piece)
		return err == unix.EIO
	})
	kit.OK(t, os.WriteFile(p.Path("v", "other"), piece, 0o600))
	kit.OK(t, os.Rename(p.Path("v", "other"), p.Path("v", "replaced")))
	kit.OK(t, os.Remove(p.Path("v", "removed")))
	p.Check()
	if used := p.Used("v"); used.Inodes != uint64(len(names))+1 {
		t.Errorf("%v are in use for %d files, one of them replaced", used, len(names))
	}
	for _, f := range files {
		kit.OK(t, f.Close())
	}
	kit.OK(t, unix.Munmap(mem))
	kit.Poll(t, "the end of what has no name", func() bool { return p.Used("v").Inodes == uint64(len(names))-2 })
	p.Check()
	p.Idle()
	f := open(t, os.O_WRONLY, dir, "plain")
	_, err = f.WriteAt(piece, 3*kit.Mi)
	kit.OK(t, errors.Join(err, f.Close()))
}

// TestLeftToTierRead has a daemon after it that can hold nothing.
func TestLeftToTierRead(t *testing.T) {
	p := mount(t, "ext4", 3*kit.Gi)
	dir := p.Create("v", kit.Gi)
	f := open(t, os.O_CREATE|os.O_RDWR|os.O_APPEND, dir, "f")
	write := func() {
		t.Helper()
		_, err := f.Write(make([]byte, kit.Mi))
		kit.OK(t, err)
	}
	write()
	p.Daemon().Kill()
	p.MountArgs = []string{"--tier", "read"}
	p.Mount()
	kit.Poll(t, "the recount", func() bool { return p.Show("v").State != "recounting" })
	write() // which is not counted
	p.Stop()
	p.MountArgs = []string{"--tier", "gate"}
	p.Mount()
	kit.Poll(t, "the recount", func() bool { return p.Show("v").State != "recounting" })
	if _, err := f.Write(make([]byte, kit.Mi)); !errors.Is(err, unix.EIO) {
		t.Errorf("the third daemon: %v, not EIO", err)
	}
	p.Check()
	kit.OK(t, f.Close())
	p.Idle()
}
