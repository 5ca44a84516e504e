package keeper_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/test/kit"
)

func newSupervised(t *testing.T, args ...string) *kit.Pool {
	t.Helper()
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	p.MountArgs = args
	return p
}

// waitNext waits for a daemon that is not pid.
func waitNext(t *testing.T, p *kit.Pool, pid int) int {
	t.Helper()
	var next int
	kit.Poll(t, "the next daemon", func() bool { next = p.Serving(); return next != 0 && next != pid })
	return next
}

// TestSupervisorKilled: the daemon goes on without, and is ended as one that never had any.
func TestSupervisorKilled(t *testing.T) {
	p := newSupervised(t)
	d := p.Mount()
	x := newTenant(t, p)
	pid := p.Serving()
	t.Cleanup(func() { _ = syscall.Kill(pid, syscall.SIGKILL) })
	wantMetric(t, p, "keeper_up", "1")
	d.Kill()
	kit.Poll(t, "the daemon's word about it", func() bool { return metric(p, "keeper_up") == "0" })
	x.works()
	if !strings.Contains(p.Log(), "end with this process") {
		t.Error("the log does not say that nobody keeps the mount")
	}
	kit.OK(t, syscall.Kill(pid, syscall.SIGUSR2)) // to hand over to nobody
	kit.Poll(t, "a word about it", func() bool { return strings.Contains(p.Log(), "this one goes on") })
	x.works()
	x.leave()
	p.Check()
	kit.OK(t, syscall.Kill(pid, syscall.SIGTERM))
	kit.Poll(t, "its end", func() bool { return syscall.Kill(pid, 0) == syscall.ESRCH })
	if r := p.Croft("probe", p.Mnt); r.Code != 1 || !strings.Contains(r.Stderr, "no pool is mounted") {
		t.Errorf("after its end: %s", r)
	}
}

// install puts a program in the place of another, as an upgrade does.
func install(t *testing.T, program, content string) {
	t.Helper()
	if content == "" {
		body, err := os.ReadFile(kit.Binary(t))
		kit.OK(t, err)
		content = string(body)
	}
	kit.OK(t, os.WriteFile(program+".new", []byte(content), 0o755))
	kit.OK(t, os.Rename(program+".new", program))
}

// mountBy mounts by a copy of the program that can be replaced.
func mountBy(t *testing.T, p *kit.Pool) (program string) {
	t.Helper()
	program = filepath.Join(kit.TempDir(t), "croft")
	install(t, program, "")
	p.Program = program
	p.Mount()
	return program
}

// TestUpgradeRefused upgrades to programs that cannot take over: the one before goes on, then and
// after its death, until there is one that can.
func TestUpgradeRefused(t *testing.T) {
	for name, c := range map[string]struct{ content, says string }{
		"fails":        {"#!/bin/sh\nexit 7\n", "could not take over"},
		"no program":   {"\x00\x01\x02 nothing", "could not take over"},
		"says why":     {"#!/bin/sh\nprintf 'the state is of a newer croft' >&3\nexit 1\n", "the state is of a newer croft"},
		"dies":         {"#!/bin/sh\necho the new one tries >&2\nkill -9 $$\n", "the new one tries"},
		"never serves": {"#!/bin/sh\nexec sleep 1000 3>&-\n", "does not come to serve"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newSupervised(t, "--watchdog=500ms")
			program := mountBy(t, p)
			x := newTenant(t, p)
			old := p.Serving()
			install(t, program, c.content)
			kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
			waitNext(t, p, old)
			x.works()
			kit.Poll(t, "who goes on", func() bool { return exe(p.Serving()) == program+" (deleted)" })
			kit.Poll(t, "a word about it", func() bool { return strings.Contains(p.Log(), c.says) })
			tries := strings.Count(p.Log(), c.says)
			pid := p.Serving()
			kit.OK(t, syscall.Kill(pid, syscall.SIGKILL))
			pid = waitNext(t, p, pid)
			x.works()
			if n := strings.Count(p.Log(), c.says); n != tries {
				t.Error("what could not take over was tried again, though nobody has asked for it")
			}
			install(t, program, "")
			kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
			waitNext(t, p, pid)
			x.works()
			if got := exe(p.Serving()); got != program {
				t.Errorf("%s goes on, want %s", got, program)
			}
			x.leave()
			p.Idle()
			p.Stop()
		})
	}
}

func exe(pid int) string {
	target, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return target
}

// TestProgramRemoved: a daemon that dies has a successor though its program is gone.
func TestProgramRemoved(t *testing.T) {
	p := newSupervised(t)
	program := mountBy(t, p)
	x := newTenant(t, p)
	kit.OK(t, os.Remove(program))
	p.KillServing()
	x.works()
	kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
	waitNext(t, p, p.Serving())
	x.works()
	x.leave()
	p.Idle()
	p.Stop()
}

// hesitate has the next daemon wait before it begins, until what is returned is called.
func hesitate(t *testing.T, program string) (goOn func()) {
	t.Helper()
	shell := fmt.Sprintf("#!/bin/sh\necho hesitating >&2; while [ -e %[1]s.wait ]; do sleep 0.01; done\nexec %[1]s.real \"$@\"\n", program)
	kit.OK(t, os.WriteFile(program+".wait", nil, 0o600))
	install(t, program+".real", "")
	install(t, program, shell)
	return func() { kit.OK(t, os.Remove(program+".wait")) }
}

// TestUpgradeTwice asks for an upgrade while a daemon takes over: there are two.
func TestUpgradeTwice(t *testing.T) {
	p := newSupervised(t)
	goOn := hesitate(t, mountBy(t, p))
	x := newTenant(t, p)
	kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
	kit.Poll(t, "the next daemon", func() bool { return strings.Contains(p.Log(), "hesitating") })
	kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
	goOn()
	kit.Poll(t, "the one after it", func() bool { return metric(p, "take_overs_total") == "2" })
	x.works()
	x.leave()
	p.Idle()
	p.Stop()
	if n := strings.Count(p.Log(), "has handed over"); n != 2 {
		t.Errorf("%d daemons have handed over", n)
	}
}

// TestUnmountBetween unmounts while no daemon lives: the next one finds that there is nothing to do.
func TestUnmountBetween(t *testing.T) {
	p := newSupervised(t)
	goOn := hesitate(t, mountBy(t, p))
	p.Create("v", 64*kit.Mi)
	d := p.Daemon()
	kit.OK(t, syscall.Kill(p.Serving(), syscall.SIGKILL))
	kit.Poll(t, "the supervisor's word about it", func() bool { return strings.Contains(p.Log(), "the daemon has died") })
	kit.OK(t, unix.Unmount(p.Mnt, 0))
	goOn()
	kit.Within(t, "the end of all", func() { <-d.Exited() })
	if code := d.ExitCode(); code != 0 {
		t.Errorf("exit %d\n%s", code, p.Log())
	}
	p.Mount()
	p.Check()
	p.Stop()
}

// TestBackground mounts with --daemon: it is the supervisor that stays, and the first error is told.
func TestBackground(t *testing.T) {
	p := newSupervised(t)
	log := filepath.Join(filepath.Dir(p.RunDir), "background.log")
	p.MustCroft("mount", "--daemon", "--log-file", log, "--pool", p.Dir, p.Mnt)
	pid := info(t, p).PID
	parent := parentOf(t, pid)
	t.Cleanup(func() {
		_ = syscall.Kill(parent, syscall.SIGKILL)
		_ = syscall.Kill(pid, syscall.SIGKILL)
		_ = unix.Unmount(p.Mnt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	})
	if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", parent)); !strings.Contains(string(args), "\x00--keeper=auto\x00") {
		t.Fatalf("its parent is %q", args)
	}
	r := p.Croft("mount", "--daemon", "--log-file", log, "--pool", p.Dir, p.Mnt)
	if r.Code != 1 || !strings.Contains(r.Stderr, "in use") {
		t.Errorf("a second: %s", r)
	}
	x := newTenant(t, p)
	kit.OK(t, syscall.Kill(pid, syscall.SIGKILL))
	x.works()
	next := info(t, p).PID
	if next == pid || parentOf(t, next) != parent {
		t.Errorf("%d serves, of %d", next, parentOf(t, next))
	}
	pid = next
	x.leave()
	kit.OK(t, syscall.Kill(parent, syscall.SIGTERM))
	kit.Poll(t, "the end of both", func() bool { return gone(parent) && gone(pid) })
	if body, err := os.ReadFile(log); err != nil || !strings.Contains(string(body), "taken over") {
		t.Errorf("the log says %s, %v", body, err)
	}
}

// gone tells whether a process has ended; that nobody has waited for it does not count.
func gone(pid int) bool {
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(body), ") Z ")
}

func info(t *testing.T, p *kit.Pool) (i pool.Info) {
	t.Helper()
	client := p.Control()
	defer client.CloseIdleConnections()
	kit.Poll(t, "the daemon's answer", func() bool {
		r, err := client.Get("http://croft/v1/info")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return json.NewDecoder(r.Body).Decode(&i) == nil
	})
	return i
}

func parentOf(t *testing.T, pid int) (parent int) {
	t.Helper()
	body, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	kit.OK(t, err)
	rest := string(body)[strings.LastIndexByte(string(body), ')')+2:]
	var state string
	_, err = fmt.Sscan(rest, &state, &parent)
	kit.OK(t, err)
	return parent
}

// TestWatchdog stops the daemon: who looks says so in time, and the supervisor has another take over.
func TestWatchdog(t *testing.T) {
	p := newSupervised(t, "--watchdog=6s")
	p.Mount()
	x := newTenant(t, p)
	if r := p.Croft("probe", p.Mnt); r.Code != 0 || r.Stdout+r.Stderr != "" {
		t.Errorf("one that serves: %s", r)
	}
	p.MustCroft("probe", "--pool", p.Dir, "--timeout", "1m")
	pid := p.Serving()
	kit.OK(t, syscall.Kill(pid, syscall.SIGSTOP))
	for _, args := range [][]string{{p.Mnt}, {"--pool", p.Dir}, {p.Path("v")}} {
		began := time.Now()
		r := p.Croft(append([]string{"probe", "--timeout", "200ms"}, args...)...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "no answer in 200ms") {
			t.Errorf("one that hangs: %s", r)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %s to say so", took)
		}
	}
	x.works()
	if next := p.Serving(); next == pid {
		t.Error("the daemon that did not answer serves")
	}
	if !strings.Contains(p.Log(), "the mounts do not answer") {
		t.Error("the log does not say why")
	}
	wantMetric(t, p, "take_overs_total", "1")
	p.MustCroft("probe", p.Mnt)
	x.leave()
	p.Idle()
}

func TestProbe(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{2, "which mount?", nil},
		{2, "must be more than 0", []string{"--timeout=0s", p.Mnt}},
		{2, "not both", []string{"--pool", p.Dir, p.Mnt}},
		{1, "no pool is mounted on " + p.Mnt, []string{p.Mnt}},
		{1, "is not mounted", []string{"--pool", p.Dir}},
		{1, "not a Croft pool", []string{"--pool", "/"}},
		{1, "no such file", []string{"/no/such/place"}},
	} {
		if r := p.Croft(append([]string{"probe"}, c.args...)...); r.Code != c.code || !strings.Contains(r.Stderr, c.says) {
			t.Errorf("%q: %s, want %d, %s", c.args, r, c.code, c.says)
		}
	}
	d := p.Mount()
	p.MustCroft("probe", "--", p.Mnt, p.Mnt)
	d.Kill()
	if r := p.Croft("probe", p.Mnt); r.Code != 1 || !strings.Contains(r.Stderr, "its daemon has died") {
		t.Errorf("one that is dead: %s", r)
	}
	p.Mount()
	p.MustCroft("probe", p.Mnt)
}

// TestSystemd is told what it wants to know, by the process that it has started.
func TestSystemd(t *testing.T) {
	for _, keeper := range []string{"auto", "none"} {
		t.Run(keeper, func(t *testing.T) {
			p := kit.NewPool(t, "ext4")
			p.Keeper = keeper
			path := filepath.Join(kit.TempDir(t), "notify")
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			kit.OK(t, err)
			defer unix.Close(fd)
			kit.OK(t, unix.Bind(fd, &unix.SockaddrUnix{Name: path}))
			kit.OK(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1))
			d := p.Mount("NOTIFY_SOCKET="+path, "WATCHDOG_USEC=300000")
			ready, fed := false, 0
			kit.Within(t, "that it is fed", func() {
				for fed < 5 {
					b, oob := make([]byte, 500), make([]byte, 100)
					n, oobn, _, _, err := unix.Recvmsg(fd, b, oob, 0)
					kit.OK(t, err)
					messages, err := unix.ParseSocketControlMessage(oob[:oobn])
					kit.OK(t, err)
					cred, err := unix.ParseUnixCredentials(&messages[0])
					kit.OK(t, err)
					if int(cred.Pid) != d.Pid {
						t.Errorf("%d says %q, and not %d", cred.Pid, b[:n], d.Pid)
					}
					if text := string(b[:n]); strings.Contains(text, "READY=1") {
						ready = true
					} else if text == "WATCHDOG=1" {
						fed++
						if !ready {
							t.Error("fed before it was ready")
						}
					}
				}
			})
			p.Stop()
		})
	}
}

// TestUnits has systemd check the example units.
func TestUnits(t *testing.T) {
	kit.Need(t, "systemd-analyze")
	units, err := filepath.Glob("../../deploy/systemd/*.service")
	kit.OK(t, err)
	if len(units) != 2 {
		t.Fatalf("the units are %v", units)
	}
	dir := kit.TempDir(t)
	var copies []string
	for _, unit := range units {
		body, err := os.ReadFile(unit)
		kit.OK(t, err)
		at := filepath.Join(dir, filepath.Base(unit))
		kit.OK(t, os.WriteFile(at, []byte(strings.ReplaceAll(string(body), "/usr/bin/croft", kit.Binary(t))), 0o644))
		copies = append(copies, at)
	}
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no"}, copies...)...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, dir) || strings.Contains(line, "croft") {
			t.Errorf("systemd: %s", line)
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze: %v\n%s", err, out)
	}
}

// TestRestart has a keeper elsewhere, and a parent that starts the next daemon all the same: when one is killed, does not answer,
// or is to be upgraded. The parent's SIGTERM leaves the mount to the keeper, and so does the end of both.
func TestRestart(t *testing.T) {
	p, k := newPool(t)
	p.MountArgs = []string{"--restart", "--watchdog=6s"}
	d := p.Mount()
	x := newTenant(t, p)
	pid := p.Serving()
	if parent := parentOf(t, pid); parent != d.Pid {
		t.Fatalf("the daemon is %d, its parent %d, and the command %d", pid, parent, d.Pid)
	}
	for _, sig := range []syscall.Signal{unix.SIGKILL, unix.SIGSEGV, unix.SIGKILL, unix.SIGSTOP} {
		kit.OK(t, syscall.Kill(pid, sig))
		x.works()
		pid = waitNext(t, p, pid)
	}
	for range 2 {
		kit.OK(t, d.Signal(unix.SIGHUP))
		pid = waitNext(t, p, pid)
		x.works()
	}
	if parent := parentOf(t, pid); parent != d.Pid {
		t.Errorf("the parent is another: %d, not %d", parent, d.Pid)
	}
	wantMetric(t, p, "take_overs_total", "6")

	kit.OK(t, d.Signal(unix.SIGTERM))
	kit.Within(t, "the end of the command", func() { <-d.Exited() })
	if !gone(pid) {
		t.Errorf("the daemon %d has outlived the command", pid)
	}
	x.r.Say("") // who asks meanwhile waits
	d = p.Mount()
	if got := x.r.Line(); got != "done" {
		t.Errorf("%q", got)
	}
	pid = p.Serving()
	d.Kill()
	kit.OK(t, syscall.Kill(pid, unix.SIGKILL))
	kit.Poll(t, "the daemon's end", func() bool { return gone(pid) })
	x.r.Say("")
	p.Mount()
	if got := x.r.Line(); got != "done" {
		t.Errorf("%q", got)
	}
	x.leave()
	p.Idle()
	end(t, p, k)
	if r := p.Croft("mount", "--keeper", "none", "--restart", "--pool", p.Dir, p.Mnt); r.Code != 2 || !strings.Contains(r.Stderr, "nobody keeps") {
		t.Errorf("with nobody who keeps: %s", r)
	}
}

// TestProbeHolds looks at what the process that touches a mount has open, which may hang there for as long as it likes: nothing of
// whoever asks, who would wait for it.
func TestProbeHolds(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	d := p.Mount()
	kit.OK(t, d.Signal(unix.SIGSTOP))
	cmd := p.Command("probe", "--timeout", "1h", p.Mnt)
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	kit.OK(t, err)
	defer out.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = out, out, out
	kit.OK(t, cmd.Start())
	var held []string
	kit.Poll(t, "the process that touches the mount", func() bool {
		children, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
		for _, path := range children {
			body, _ := os.ReadFile(path)
			for _, pid := range strings.Fields(string(body)) {
				held = nil
				args, _ := os.ReadFile("/proc/" + pid + "/cmdline")
				links, _ := filepath.Glob("/proc/" + pid + "/fd/*")
				for _, link := range links {
					if to, err := os.Readlink(link); err == nil {
						held = append(held, to)
					}
				}
				if strings.Contains(string(args), "\x00--direct\x00") && len(held) > 2 {
					return true
				}
			}
		}
		return false
	})
	if slices.Contains(held, out.Name()) {
		t.Errorf("it has the caller's file open: %q", held)
	}
	kit.OK(t, d.Signal(unix.SIGCONT))
	kit.Within(t, "the end of the probe", func() { err = cmd.Wait() })
	kit.OK(t, err)
}
