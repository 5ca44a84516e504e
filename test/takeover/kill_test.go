package takeover_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// load is all that runs while daemons die.
type load struct {
	t       *testing.T
	p       *kit.Pool
	workers map[string]*kit.Running
	stop    context.CancelFunc
	loops   sync.WaitGroup
	mu      sync.Mutex
	rounds  map[string]int // of the programs
	faults  []string
}

// startLoad has every kind of worker and program at work, each in a volume of its own.
func startLoad(t *testing.T, p *kit.Pool) *load {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	l := &load{t: t, p: p, workers: map[string]*kit.Running{}, stop: stop, rounds: map[string]int{}}
	t.Cleanup(func() {
		stop()
		l.loops.Wait()
	})
	for _, w := range []string{"names", "lines", "unlinked", "inside", "locks", "stores", "fill", "pace"} {
		size := uint64(512 * kit.Mi)
		if w == "fill" {
			size = 160 * kit.Mi
		}
		dir := p.Create(w, size)
		l.workers[w] = kit.Process{Helper: w, Args: []string{dir}}.Start(t)
	}
	for _, w := range l.workers {
		w.Line()
	}
	script := func(name, text string, more ...string) {
		l.loop(ctx, name, p.Create(name, kit.Gi), text, more...)
	}
	source := gitSource(t)
	script("fio", `fio --name=v --directory="$1" --size=24m --rw=randrw --bs=4k-64k --ioengine=psync --verify=crc32c --verify_fatal=1 --fallocate=none --thinktime=100 --output=/dev/null && rm "$1"/v.*`)
	script("git", `git clone -q --no-local "$2" "$1/clone" && git -C "$1/clone" fsck --strict --no-progress && rm -rf "$1/clone"`, source)
	script("sqlite", `sqlite3 -bail "$1/db" "create table if not exists t(a); begin; insert into t select hex(randomblob(100)) from generate_series(1,200); commit; update t set a = a || 'x' where rowid % 7 = 0; pragma integrity_check;" | grep -qx ok`)
	return l
}

// gitSource is a repository to clone.
func gitSource(t *testing.T) string {
	dir := filepath.Join(kit.TempDir(t), "source")
	kit.Must(t, "sh", "-ec", `git init -q "$1"; cd "$1"; git config user.email x@example.org; git config user.name x
		for i in $(seq 60); do head -c 3000 /dev/urandom >f$i; mkdir -p d$i; head -c 100 /dev/urandom >d$i/g; done; git add .; git commit -qm 1
		for i in $(seq 30); do echo "$i" >>f$i; git commit -qam "$i"; done`, "-", dir)
	return dir
}

// loop runs a shell script again and again.
func (l *load) loop(ctx context.Context, name, dir, text string, more ...string) {
	scratch := kit.TempDir(l.t)
	l.loops.Go(func() {
		for ctx.Err() == nil {
			cmd := exec.Command("bash", append([]string{"-ec", text, "-", dir}, more...)...)
			cmd.Dir = scratch // fio leaves files where it runs
			out, err := cmd.CombinedOutput()
			l.mu.Lock()
			if err != nil {
				l.faults = append(l.faults, fmt.Sprintf("%s: %v\n%s", name, err, out))
			} else {
				l.rounds[name]++
			}
			l.mu.Unlock()
			if err != nil {
				return
			}
		}
	})
}

// end ends the load and fails the test for what went wrong.
func (l *load) end() {
	l.t.Helper()
	l.stop()
	kit.Within(l.t, "the programs' end", l.loops.Wait)
	for name, w := range l.workers {
		kit.Within(l.t, "the end of "+name, func() {
			if code := w.Wait(); code != 0 {
				l.t.Errorf("%s: exit %d: %s", name, code, w.Output())
				return
			}
			l.t.Logf("%s: %s rounds", name, strings.ReplaceAll(strings.TrimSpace(w.Rest()), "\n", ", "))
		})
	}
	for _, fault := range l.faults {
		l.t.Error(fault)
	}
	l.t.Logf("programs: %v", l.rounds)
	for line := range strings.Lines(l.p.Log()) {
		if strings.Contains(line, "ERROR") && !strings.Contains(line, "the daemon has died") {
			l.t.Error(line)
		}
	}
}

func mount(t *testing.T, fstype, tier string) *kit.Pool {
	t.Helper()
	kit.Need(t, "fio", "git", "sqlite3")
	p := kit.NewPoolIn(t, kit.Backing(t, fstype, 8*kit.Gi))
	p.Keeper = "auto"
	p.MountArgs = []string{"--tier", tier}
	p.Mount()
	return p
}

// eachTier runs a test where the kernel reads and writes by itself and where the daemon does.
func eachTier(t *testing.T, test func(t *testing.T, fstype, tier string)) {
	for _, at := range [][2]string{{"ext4", "gate"}, {"ext4", "daemon"}, {"xfs", "gate"}, {"btrfs", "gate"}, {"ext4", "hold"}, {"ext4", "read"}} {
		t.Run(at[0]+"/"+at[1], func(t *testing.T) { test(t, at[0], at[1]) })
	}
}

// TestKill kills the daemon at random moments.
func TestKill(t *testing.T) {
	eachTier(t, func(t *testing.T, fstype, tier string) {
		p := mount(t, fstype, tier)
		l := startLoad(t, p)
		var took []time.Duration
		for range *kills {
			time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
			began := time.Now()
			p.KillServing()
			took = append(took, time.Since(began))
		}
		l.end()
		t.Logf("from a kill to an answer: %v", took)
		p.Check()
		p.Idle()
	})
}

// TestKillTwice kills the next daemon while it takes over.
func TestKillTwice(t *testing.T) {
	p := mount(t, "ext4", "gate")
	l := startLoad(t, p)
	for range *kills {
		pid := p.Serving()
		kit.OK(t, syscall.Kill(pid, syscall.SIGKILL))
		kit.Poll(t, "the next daemon", func() bool { next := p.Serving(); return next != 0 && next != pid })
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
		p.KillServing()
		time.Sleep(2 * healthy)
	}
	l.end()
	p.Check()
	p.Idle()
}

// TestStopped stops the daemon for a while: all wait, and go on.
func TestStopped(t *testing.T) {
	p := mount(t, "ext4", "gate")
	l := startLoad(t, p)
	pid := p.Serving()
	kit.OK(t, syscall.Kill(pid, syscall.SIGSTOP))
	time.Sleep(*stopped)
	kit.OK(t, syscall.Kill(pid, syscall.SIGCONT))
	p.KillServing()
	l.end()
	p.Check()
}

// TestUpgrade hands over under load, as an upgrade does.
func TestUpgrade(t *testing.T) {
	p := mount(t, "ext4", "gate")
	l := startLoad(t, p)
	for range *kills {
		pid := p.Serving()
		kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
		kit.Poll(t, "the next daemon", func() bool { next := p.Serving(); return next != 0 && next != pid })
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
	}
	l.end()
	if n := strings.Count(p.Log(), "taken over"); n != *kills {
		t.Errorf("%d of %d were taken over from", n, *kills)
	}
	p.Check()
	p.Idle()
}
