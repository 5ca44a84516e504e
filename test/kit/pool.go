package kit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/quota"
)

// Pool is a pool of a test, and its mount.
type Pool struct {
	t       testing.TB
	Backing string // mount point of the backing filesystem
	Dir     string // the pool
	Mnt     string // where it is or will be mounted
	RunDir  string // its control socket is in there
	ID      string

	MountArgs []string // further arguments of `croft mount`
	Keeper    string   // its --keeper; "none" when empty, so that the daemon is the process itself
	Node      string   // what the node is called, for `croft node`; empty for `croft mount`
	Tier      string   // what EachPool has mounted it with
	Program   string   // what Mount runs; what Binary returns when empty

	mu       sync.Mutex
	daemon   *Daemon
	baseline int // descriptors that the daemon has when nothing is open
}

// Daemon is a `croft mount` process.
type Daemon struct {
	Pid    int
	cmd    *exec.Cmd
	exited chan struct{} // closed after the process was reaped
	log    string
}

// Tiers are those that `croft mount --tier` knows; the last is the best, and the default.
var Tiers = []string{"daemon", "read", "hold", "gate"}

// EachPool runs a test in a mounted pool on each backing filesystem, in the tier
// that is the best there and in the one that holds all writes, and on ext4 in the others as well.
func EachPool(t *testing.T, test func(t *testing.T, p *Pool)) {
	t.Helper()
	EachFS(t, func(t *testing.T, fstype string) {
		for _, tier := range Tiers {
			if fstype != "ext4" && (tier == "daemon" || tier == "read") {
				continue
			}
			t.Run(tier, func(t *testing.T) {
				p := NewPool(t, fstype)
				p.Tier = tier
				p.MountArgs = []string{"--tier", tier}
				p.Mount()
				test(t, p)
			})
		}
	})
}

// NewPool makes a pool on a filesystem of its own, not mounted yet.
func NewPool(t testing.TB, fstype string) *Pool {
	t.Helper()
	return NewPoolIn(t, Backing(t, fstype, 3*Gi))
}

// NewPoolIn makes a pool in a backing filesystem that is mounted.
func NewPoolIn(t testing.TB, backing string) *Pool {
	t.Helper()
	p := PoolAt(t, backing)
	p.MustCroft("pool", "init", p.Dir)
	p.readID()
	return p
}

// PoolAt is for a pool that NewPoolIn made once, found again in a copy of its
// filesystem.
func PoolAt(t testing.TB, backing string) *Pool {
	t.Helper()
	Need(t)
	Binary(t)
	base := TempDir(t)
	p := &Pool{t: t, Backing: backing, Dir: filepath.Join(backing, "pool"), Mnt: filepath.Join(base, "mnt"), RunDir: filepath.Join(base, "run")}
	OK(t, os.Mkdir(p.Mnt, 0o755))
	OK(t, os.Mkdir(p.RunDir, 0o755))
	p.readID()
	t.Cleanup(p.cleanup)
	return p
}

func (p *Pool) readID() {
	body, err := os.ReadFile(filepath.Join(p.Dir, "pool.json"))
	if err != nil {
		return // not made yet
	}
	var c struct {
		ID string `json:"id"`
	}
	OK(p.t, json.Unmarshal(body, &c))
	p.ID = c.ID
}

// cleanup checks the pool one last time and takes everything away, whatever
// state the test has left it in.
func (p *Pool) cleanup() {
	p.t.Helper()
	p.mu.Lock()
	d := p.daemon
	p.mu.Unlock()
	if d != nil && d.alive() && !p.t.Failed() {
		p.Idle()
		p.Check()
	}
	if d != nil {
		if d.alive() {
			p.stop(d)
		}
		if p.t.Failed() {
			if body, err := os.ReadFile(d.log); err == nil {
				p.t.Logf("the last daemon's log:\n%s", tail(string(body), 3<<10))
			}
		}
	}
	for _, m := range MountsOn(p.t, p.Mnt) {
		if d == nil || !d.killed() {
			p.t.Errorf("a mount is left: %s on %s", m.Source, m.Mountpoint)
		}
		_ = unix.Unmount(p.Mnt, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	}
	if p.ID != "" && !p.t.Failed() {
		p.Check() // not mounted: straight from the disk
	}
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// Command is a croft command on this pool's run directory. It does not name the pool.
func (p *Pool) Command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(Context(p.t), Binary(p.t), args...)
	cmd.Env = append(os.Environ(), "CROFT_RUN_DIR="+p.RunDir)
	return cmd
}

// Croft runs a croft command.
func (p *Pool) Croft(args ...string) Result {
	p.t.Helper()
	return runCmd(p.t, p.Command(args...))
}

// MustCroft runs a croft command that has to succeed.
func (p *Pool) MustCroft(args ...string) string {
	p.t.Helper()
	r := p.Croft(args...)
	if r.Code != 0 {
		p.t.Fatalf("croft %s: %s", strings.Join(args, " "), r)
	}
	return r.Stdout
}

// Volume runs `croft volume VERB --pool … args`.
func (p *Pool) Volume(verb string, args ...string) Result {
	p.t.Helper()
	return p.Croft(append([]string{"volume", verb, "--pool", p.Dir}, args...)...)
}

// MustVolume is Volume that has to succeed.
func (p *Pool) MustVolume(verb string, args ...string) string {
	p.t.Helper()
	r := p.Volume(verb, args...)
	if r.Code != 0 {
		p.t.Fatalf("croft volume %s %s: %s", verb, strings.Join(args, " "), r)
	}
	return r.Stdout
}

// Create makes a volume of that many bytes and returns its directory in the mount.
func (p *Pool) Create(name string, bytes uint64, args ...string) string {
	p.t.Helper()
	p.MustVolume("create", append([]string{"--size", strconv.FormatUint(bytes, 10), name}, args...)...)
	return p.Path(name)
}

// Resize sets a volume's size in bytes.
func (p *Pool) Resize(name string, bytes uint64) Result {
	p.t.Helper()
	return p.Volume("resize", name, "--size", strconv.FormatUint(bytes, 10))
}

// Path is a path in a volume as a tenant sees it.
func (p *Pool) Path(volume string, elem ...string) string {
	return filepath.Join(append([]string{p.Mnt, volume}, elem...)...)
}

// Tree is the same on the backing filesystem.
func (p *Pool) Tree(volume string, elem ...string) string {
	return filepath.Join(append([]string{p.Dir, "volumes", volume}, elem...)...)
}

// Show returns a volume as `croft volume show` does.
func (p *Pool) Show(name string) pool.Volume {
	p.t.Helper()
	v, err := p.TryShow(name)
	OK(p.t, err)
	return v
}

// TryShow is Show for other goroutines and for volumes that may not be there.
func (p *Pool) TryShow(name string) (v pool.Volume, err error) {
	out, err := p.Command("volume", "show", "--pool", p.Dir, name, "-o", "json").Output()
	if err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			err = fmt.Errorf("show %s: %w: %s", name, err, exit.Stderr)
		}
		return v, err
	}
	return v, json.Unmarshal(out, &v)
}

// List returns all volumes by name.
func (p *Pool) List() map[string]pool.Volume {
	p.t.Helper()
	var list []pool.Volume
	out := p.MustVolume("list", "-o", "json")
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		p.t.Fatalf("croft volume list: %v in %s", err, out)
	}
	byName := map[string]pool.Volume{}
	for _, v := range list {
		byName[v.Name] = v
	}
	return byName
}

// Check runs `croft check` and fails the test on anything that it finds, and
// on a volume whose ledger, disk and limit do not fit each other.
func (p *Pool) Check() pool.CheckResult {
	p.t.Helper()
	result, r := p.RunCheck()
	if r.Code != 0 || !result.Clean() {
		p.t.Errorf("croft check: %s", r)
	}
	for _, v := range result.Volumes {
		if v.Ledger != v.Disk {
			p.t.Errorf("volume %s: ledger %v, disk %v", v.Name, v.Ledger, v.Disk)
		}
		if !v.Disk.Fits(v.Limit) {
			p.t.Errorf("volume %s: disk %v above the limit of %v", v.Name, v.Disk, v.Limit)
		}
	}
	return result
}

// RunCheck runs `croft check` without judging.
func (p *Pool) RunCheck(args ...string) (result pool.CheckResult, r Result) {
	p.t.Helper()
	r = p.Croft(append([]string{"check", "--pool", p.Dir, "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(r.Stdout), &result); err != nil {
		p.t.Fatalf("croft check -o json: %v\n%s", err, r)
	}
	return result, r
}

// Used returns what a volume uses.
func (p *Pool) Used(name string) quota.Usage {
	p.t.Helper()
	return p.Show(name).Used
}

// Socket is the path of the pool's control socket.
func (p *Pool) Socket() string { return filepath.Join(p.RunDir, p.ID+".sock") }

// CSISocket is the path of the CSI socket of `croft node`.
func (p *Pool) CSISocket() string { return filepath.Join(p.RunDir, "csi", "csi.sock") }

// Control returns a client of the control socket, whatever the host in its URLs.
func (p *Pool) Control() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", p.Socket())
	}}}
}

// Daemon returns the daemon that Mount has started last.
func (p *Pool) Daemon() *Daemon {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.daemon
}

// Mount starts the daemon and waits until it serves. env is added to its
// environment.
func (p *Pool) Mount(env ...string) *Daemon {
	p.t.Helper()
	logPath := filepath.Join(filepath.Dir(p.RunDir), "daemon.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	OK(p.t, err)
	defer log.Close()
	// Not under Context: the daemon lives as long as the test wants it to.
	keeper := p.Keeper
	if keeper == "" {
		keeper = "none"
	}
	args := []string{"mount", "--keeper", keeper, "--pool", p.Dir, p.Mnt}
	if p.Node != "" {
		args = []string{"node", "--keeper", keeper, "--node-id", p.Node, "--endpoint", "unix://" + p.CSISocket(),
			"--pool", filepath.Base(p.Mnt) + "=" + p.Dir, "--mount-root", filepath.Dir(p.Mnt)}
	}
	args = append(args, p.MountArgs...)
	program := p.Program
	if program == "" {
		program = Binary(p.t)
	}
	cmd := exec.Command(program, args...)
	cmd.Env = append(append(os.Environ(), "CROFT_RUN_DIR="+p.RunDir), env...)
	cmd.Stdout, cmd.Stderr = log, log
	// Its own process group: a signal to the tests' terminal is not the daemon's.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	OK(p.t, cmd.Start())
	d := &Daemon{Pid: cmd.Process.Pid, cmd: cmd, exited: make(chan struct{}), log: logPath}
	go func() {
		_ = cmd.Wait()
		close(d.exited)
	}()
	p.mu.Lock()
	p.daemon = d
	p.mu.Unlock()
	if !poll(func() bool { return !d.alive() || p.serves() }) || !d.alive() {
		body, _ := os.ReadFile(logPath)
		p.t.Fatalf("croft mount is not ready (running: %v):\n%s", d.alive(), tail(string(body), 8<<10))
	}
	p.baseline = len(p.descriptors())
	return d
}

// serves tells whether the mount answers and the sockets listen. The
// mount of a dead daemon answers ENOTCONN.
func (p *Pool) serves() bool {
	sockets := []string{p.Socket()}
	if p.Node != "" {
		sockets = append(sockets, p.CSISocket())
	}
	for _, socket := range sockets {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			return false
		}
		conn.Close()
	}
	const fuseSuperMagic = 0x65735546 // statfs(2)
	var st unix.Statfs_t
	return unix.Statfs(p.Mnt, &st) == nil && st.Type == fuseSuperMagic
}

func (d *Daemon) alive() bool {
	select {
	case <-d.exited:
		return false
	default:
		return true
	}
}

// killed tells whether SIGKILL has ended the daemon.
func (d *Daemon) killed() bool {
	if d.alive() {
		return false
	}
	status, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && status.Signaled() && status.Signal() == syscall.SIGKILL
}

// Kill ends the daemon with SIGKILL and waits until it is gone.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	<-d.exited
}

// Exited is closed when the daemon has ended.
func (d *Daemon) Exited() <-chan struct{} { return d.exited }

// ExitCode is how the daemon has ended; -1 when a signal has ended it.
func (d *Daemon) ExitCode() int { return d.cmd.ProcessState.ExitCode() }

// Signal sends the daemon a signal.
func (d *Daemon) Signal(s os.Signal) error { return d.cmd.Process.Signal(s) }

// Stop ends the daemon as systemd does and waits until it is gone, with its
// mount and its socket.
func (p *Pool) Stop() {
	p.t.Helper()
	p.stop(p.Daemon())
}

func (p *Pool) stop(d *Daemon) {
	p.t.Helper()
	_ = d.Signal(syscall.SIGTERM)
	if !poll(func() bool { return !d.alive() }) {
		p.t.Errorf("the daemon does not end on SIGTERM")
		// Ends what waits in the mount, and with it the daemon's last reason to stay.
		_ = unix.Unmount(p.Mnt, unix.MNT_FORCE|unix.MNT_DETACH)
		d.Kill()
		return
	}
	if code := d.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("the daemon ended with %s", d.cmd.ProcessState)
	}
	if left := MountsOn(p.t, p.Mnt); len(left) > 0 {
		p.t.Errorf("SIGTERM has left the mount")
	}
	if _, err := os.Lstat(p.Socket()); err == nil {
		p.t.Errorf("SIGTERM has left the control socket")
	}
}

// Idle waits until the daemon holds no descriptor of a tenant's file and no
// more descriptors in all than it began with, and fails the test when it never
// comes to that: the kernel sends a file's release after close(2) has returned.
// Directories do not count: the daemon keeps a bounded cache of them. Nor do
// the record store's files, of which there are more and less.
func (p *Pool) Idle() {
	p.t.Helper()
	var held []string
	if !poll(func() bool {
		held = p.descriptors()
		return len(held) <= p.baseline && len(p.tenants(held)) == 0
	}) {
		p.t.Errorf("the idle daemon has %d descriptors, it began with %d:\n%s", len(held), p.baseline, strings.Join(held, "\n"))
	}
}

// tenants picks the descriptors of files in volumes and of orphans.
func (p *Pool) tenants(held []string) (files []string) {
	for _, path := range held {
		for _, dir := range []string{"volumes", "orphans", "trash", "snapshots"} {
			if strings.HasPrefix(path, filepath.Join(p.Dir, dir)+"/") {
				files = append(files, path)
			}
		}
	}
	return files
}

// descriptors lists what the daemon has open, without directories and the
// record store's files.
func (p *Pool) descriptors() (held []string) {
	dir := fmt.Sprintf("/proc/%d/fd", p.Serving())
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		target, err := os.Readlink(path)
		if err != nil || strings.HasPrefix(target, filepath.Join(p.Dir, "meta")+"/") {
			continue
		}
		// Never stat through a link that leads to a FUSE mount: not ours to have open.
		if !strings.HasPrefix(target, p.Mnt) {
			if fi, err := os.Stat(path); err == nil && fi.IsDir() {
				continue
			}
		}
		// The runtime's own come with the first need of them.
		if strings.HasPrefix(target, "anon_inode:[event") {
			continue
		}
		held = append(held, target)
	}
	sort.Strings(held)
	return held
}

// Statfs is what df shows of a volume.
func Statfs(t testing.TB, path string) unix.Statfs_t {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		t.Fatalf("statfs %s: %v", path, err)
	}
	return st
}

// Sampler watches a volume's use while something fills it.
type Sampler struct {
	stop, done chan struct{}
	Peak       quota.Usage
	Samples    int
	err        error
}

// Sample asks the daemon for a volume's use again and again until Stop. Until
// then the daemon is not Idle.
func (p *Pool) Sample(name string) *Sampler {
	s := &Sampler{stop: make(chan struct{}), done: make(chan struct{})}
	client := p.Control()
	go func() {
		defer close(s.done)
		defer client.CloseIdleConnections()
		tick := time.NewTicker(pollEvery) // leaves the processors to those who fill
		defer tick.Stop()
		for {
			var v pool.Volume
			r, err := client.Get("http://croft/v1/volumes/" + name)
			if err == nil {
				err = errors.Join(json.NewDecoder(r.Body).Decode(&v), r.Body.Close())
			}
			if err == nil && v.Name != name {
				err = fmt.Errorf("%s: %+v", r.Status, v)
			}
			if err != nil {
				s.err = err
				return
			}
			s.Samples++
			s.Peak.Bytes = max(s.Peak.Bytes, v.Used.Bytes)
			s.Peak.Inodes = max(s.Peak.Inodes, v.Used.Inodes)
			select {
			case <-s.stop:
				return
			case <-tick.C:
			}
		}
	}()
	return s
}

// Stop ends the sampling; the test fails when a sample was above the limit.
func (s *Sampler) Stop(t testing.TB, limit quota.Usage) {
	t.Helper()
	close(s.stop)
	<-s.done
	if s.err != nil {
		t.Errorf("sampler: %v", s.err)
	}
	if !s.Peak.Fits(limit) {
		t.Errorf("the use was seen at %v, above the limit of %v", s.Peak, limit)
	}
}
