package takeover_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
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
	t        *testing.T
	p        *kit.Pool
	workers  map[string]*kit.Running
	stop     context.CancelFunc
	loops    sync.WaitGroup
	mu       sync.Mutex
	rounds   map[string]int // of the programs
	programs int
	faults   []string
}

// startLoad has every kind of worker and program at work, each in a volume of its own, and more programs by name.
func startLoad(t *testing.T, p *kit.Pool, more ...string) *load {
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
	if slices.Contains(more, "postgresql") {
		script("postgresql", postgresql)
	}
	return l
}

// postgresql makes a cluster, works on it, and sees whether what its transactions have moved adds up.
const postgresql = `
bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | tail -n 1)
data=$1/pg
run=$(mktemp -d)
as() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
trap 'code=$?; [ $code = 0 ] || cat "$run"/log; as "$bin/pg_ctl" -D "$data" -m immediate stop || true; rm -rf "$data" "$run"; exit $code' EXIT
chown postgres "$1" "$run"
as "$bin/initdb" -D "$data" -A trust -U postgres --no-sync --locale=C
as "$bin/pg_ctl" -D "$data" -w -o "-c listen_addresses= -c unix_socket_directories=$run" -l "$run/log" start
as "$bin/pgbench" -h "$run" -U postgres -q -i -s 1 postgres
as "$bin/pgbench" -h "$run" -U postgres -n -c 4 -j 2 -T 3 postgres
as "$bin/psql" -h "$run" -U postgres -Atc "select (select sum(abalance) from pgbench_accounts) = sum(delta)
	and (select sum(bbalance) from pgbench_branches) = sum(delta) and (select sum(tbalance) from pgbench_tellers) = sum(delta)
	from pgbench_history" postgres | grep -qx t`

// gitSource is a repository to clone.
func gitSource(t *testing.T) string {
	dir := filepath.Join(kit.TempDir(t), "source")
	kit.Must(t, "sh", "-ec", `git init -q "$1"; cd "$1"; git config user.email x@example.org; git config user.name x
		for i in $(seq 60); do head -c 3000 /dev/urandom >f$i; mkdir -p d$i; head -c 100 /dev/urandom >d$i/g; done; git add .; git commit -qm 1
		for i in $(seq 30); do echo "$i" >>f$i; git commit -qam "$i"; done`, "-", dir)
	return dir
}

// loop runs a shell script again and again, and leaves the processors to the others for as long.
func (l *load) loop(ctx context.Context, name, dir, text string, more ...string) {
	l.programs++
	scratch := kit.TempDir(l.t)
	l.loops.Go(func() {
		for ctx.Err() == nil {
			cmd := exec.Command("bash", append([]string{"-ec", text, "-", dir}, more...)...)
			cmd.Dir = scratch // fio leaves files where it runs
			began := time.Now()
			out, err := cmd.CombinedOutput()
			took := time.Since(began)
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
			select {
			case <-ctx.Done():
			case <-time.After(took):
			}
		}
	})
}

// allDone tells whether each program has come to its end at least once, or has failed.
func (l *load) allDone() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.rounds) == l.programs || len(l.faults) > 0
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
	kit.Need(t, "fio", "git", "sqlite3", "psql", "setpriv")
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

// many kills are those of `make soak`.
const many = 100

// lull is the pause between kills beyond those that were asked for, in which the programs come on: at one kill after the
// other they take minutes on a slow machine.
const lull = 2 * time.Second

// TestKill kills the daemon at random moments, and now and then until every program has come to its end.
func TestKill(t *testing.T) {
	eachTier(t, func(t *testing.T, fstype, tier string) {
		p := mount(t, fstype, tier)
		var more []string
		if fstype == "ext4" && (tier == "gate" || tier == "daemon" && *kills >= many) {
			more = append(more, "postgresql") // it takes longest
		}
		l := startLoad(t, p, more...)
		var took []time.Duration
		for len(took) < *kills || !l.allDone() {
			if len(took) < *kills {
				time.Sleep(time.Duration(rand.IntN(400)) * time.Millisecond)
			} else {
				time.Sleep(lull)
			}
			began := time.Now()
			p.KillServing()
			took = append(took, time.Since(began))
		}
		l.end()
		slices.Sort(took)
		t.Logf("%d kills; from one to an answer %s at the median, %s at the most", len(took), took[len(took)/2], took[len(took)-1])
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
		p.AwaitNext(pid)
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
		p.AwaitNext(pid)
		time.Sleep(time.Duration(rand.IntN(200)) * time.Millisecond)
	}
	l.end()
	if n := strings.Count(p.Log(), "taken over"); n != *kills {
		t.Errorf("%d of %d were taken over from", n, *kills)
	}
	p.Check()
	p.Idle()
}

// TestKillSnapshot kills the daemon while volumes under load are held for a snapshot.
func TestKillSnapshot(t *testing.T) {
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) {
			p := mount(t, fstype, "gate")
			l := startLoad(t, p)
			made := 0
			for i := range *kills {
				name := fmt.Sprint("s", i)
				done := make(chan error, 1)
				go func() {
					done <- p.Command("snapshot", "create", "--pool", p.Dir, []string{"lines", "names", "inside"}[i%3], name).Run()
				}()
				time.Sleep(time.Duration(rand.IntN(1500)) * time.Millisecond) // when to strike: about half of them are made in time
				p.KillServing()
				if err := <-done; err == nil {
					made++
				}
				time.Sleep(2 * healthy)
				if list := p.MustCroft("snapshot", "list", "--pool", p.Dir, "-o", "json"); strings.Contains(list, `"`+name+`"`) { // it is whole, and can go
					p.MustCroft("snapshot", "delete", "--pool", p.Dir, name)
				}
			}
			l.end()
			t.Logf("%d of %d snapshots were made", made, *kills)
			p.Check()
			p.Idle()
		})
	}
}
