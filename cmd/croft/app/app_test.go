package app

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/pool/control"
	"github.com/croftfs/croft/quota"
)

// fakePool is a pool without a disk.
type fakePool struct {
	control.Copies
	info pool.Info

	mu      sync.Mutex
	volumes map[string]pool.Volume // guarded by mu
	calls   []string               // guarded by mu
	check   pool.CheckResult
	counts  map[string]uint64 // guarded by mu
}

func newFakePool(dir string, names ...string) *fakePool {
	id, _ := pool.ReadID(dir)
	f := &fakePool{info: pool.Info{ID: id, Dir: dir, PID: os.Getpid()}, volumes: make(map[string]pool.Volume)}
	f.Copies = &fakeCopies{fakePool: f}
	for _, name := range names {
		f.volumes[name] = pool.Volume{
			Name:  name,
			State: pool.StateReady,
			Limit: quota.Usage{Bytes: 10 << 30, Inodes: 1000},
			Used:  quota.Usage{Bytes: 5<<30 + 4096, Inodes: 7},
		}
	}
	return f
}

func (f *fakePool) note(format string, args ...any) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
}

func (f *fakePool) Info() pool.Info { return f.info }

func (f *fakePool) Requests() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.counts
}

func (f *fakePool) Gate() pool.GateStats { return pool.GateStats{Held: 1, HeldTotal: 2} }

func (f *fakePool) setRequests(counts map[string]uint64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.counts = counts
}

func (f *fakePool) Create(_ context.Context, name string, o pool.CreateOptions) (pool.Volume, error) {
	f.note("create %s %+v", name, o)
	if v, err := f.Volume(context.Background(), name); err == nil {
		return v, fmt.Errorf("volume %s: %w", name, pool.ErrExists)
	}
	return pool.Volume{Name: name}, nil
}

func (f *fakePool) Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error) {
	f.note("resize %s %+v", name, o)
	v, err := f.Volume(ctx, name)
	if err == nil && o.Bytes != 0 && o.Bytes < v.Used.Bytes {
		err = fmt.Errorf("volume %s: %w", name, pool.ErrBelowUse)
	}
	return v, err
}

func (f *fakePool) Delete(ctx context.Context, name string, o pool.DeleteOptions) error {
	f.note("delete %s %+v", name, o)
	_, err := f.Volume(ctx, name)
	return err
}

func (f *fakePool) Volume(_ context.Context, name string) (pool.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v, ok := f.volumes[name]
	if !ok {
		return v, fmt.Errorf("volume %s: %w", name, pool.ErrNotFound)
	}
	return v, nil
}

func (f *fakePool) Volumes(context.Context) ([]pool.Volume, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []pool.Volume
	for _, name := range []string{"a", "b", "web-0"} {
		if v, ok := f.volumes[name]; ok {
			list = append(list, v)
		}
	}
	return list, nil
}

func (f *fakePool) Check(_ context.Context, o pool.CheckOptions) (pool.CheckResult, error) {
	f.note("check %+v", o)
	return f.check, nil
}

func (f *fakePool) WaitCounted(context.Context) error {
	f.note("wait counted")
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, v := range f.volumes {
		v.State = pool.StateReady
		f.volumes[name] = v
	}
	return nil
}

func (f *fakePool) WaitTrash(context.Context) error {
	f.note("wait trash")
	return nil
}

func (f *fakePool) Close() error {
	f.note("close")
	return nil
}

// poolDir makes what ReadID takes for a pool.
func poolDir(t *testing.T, id string) string {
	t.Helper()
	dir := t.TempDir()
	body := fmt.Sprintf(`{"type":"croft-pool","format":1,"id":"%s"}`, id)
	if err := os.WriteFile(filepath.Join(dir, "pool.json"), []byte(body), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

const (
	idA = "aaaaaaaaaaaaaaaa"
	idB = "bbbbbbbbbbbbbbbb"
)

// host is where commands run in a test.
type host struct {
	t    *testing.T
	opts Options
	env  map[string]string
}

func newHost(t *testing.T) *host {
	h := &host{t: t, env: make(map[string]string)}
	h.opts = Options{
		Version:  "v0-test",
		Getenv:   func(name string) string { return h.env[name] },
		RunDir:   filepath.Join(t.TempDir(), "run"),
		Patience: 300 * time.Millisecond,
		geteuid:  func() int { return 0 },
		open:     func(pool.Options) (localPool, error) { return nil, errors.New("opened a pool") },
		notify:   func(string) {},
	}
	return h
}

// opens makes the pool one that this process can open.
func (h *host) opens(f *fakePool) {
	h.opts.open = func(o pool.Options) (localPool, error) {
		if o.Dir != f.info.Dir {
			return nil, fmt.Errorf("opened %s", o.Dir)
		}
		return f, nil
	}
}

// serves makes the pool one that a daemon has.
func (h *host) serves(f *fakePool) {
	h.t.Helper()
	if os.Geteuid() != 0 {
		h.t.Skip("the control socket is for root")
	}
	s, err := control.Listen(f, control.Options{RunDir: h.opts.RunDir})
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { s.Shutdown(context.Background()) })
}

func (h *host) run(args ...string) (code int, stdout, stderr string) {
	var out, errOut bytes.Buffer
	o := h.opts
	o.Stdout, o.Stderr = &out, &errOut
	code = New(o).Run(h.t.Context(), args)
	return code, out.String(), errOut.String()
}

// want runs a command line and compares the exit code and a part of what is printed where it belongs.
func (h *host) want(code int, part string, args ...string) {
	h.t.Helper()
	got, stdout, stderr := h.run(args...)
	text := stdout
	if code == ExitFailure || code == ExitUsage {
		text = stderr
		if !strings.HasPrefix(stderr, "croft: ") {
			h.t.Errorf("croft %q: stderr %q", args, stderr)
		}
	}
	if got != code || !strings.Contains(text, part) {
		h.t.Errorf("croft %q: exit code %d, want %d with %q\nstdout: %s\nstderr: %s", args, got, code, part, stdout, stderr)
	}
}

func TestUsage(t *testing.T) {
	h := newHost(t)
	long := strings.Repeat("x", pool.MaxName+1)
	for _, test := range []struct {
		args string
		want string
	}{
		{"bogus", `unknown command "bogus"`},
		{"volum", "did you mean volume?"},
		{"volume bogus", `unknown command "bogus"`},
		{"volume create a", "--size is missing"},
		{"volume create --size 1Gi", "name the volume"},
		{"volume create --size 1Gi a b", `"b" is too many`},
		{"volume create --size 1Gi ..", "the first is a letter or a digit"},
		{"volume create --size 1Gi a/b", "letters, digits"},
		{"volume create --size 1Gi " + long, "at most 128"},
		{"volume create --size 10 a", "did you mean 10Gi?"},
		{"volume create --size 1Gi --inodes 0 a", "1 or more"},
		{"volume create --size 1Gi --mode 9 a", "octal"},
		{"volume create --size 1Gi --mode 0 a", "0700"},
		{"volume create --size 1Gi --mode 4755 a", "3777"},
		{"volume create --size 1Gi --owner root a", "UID:GID"},
		{"volume create --size 1Gi --owner 1:-1 a", "UID:GID"},
		{"volume create --size 1Gi --owner 4294967295:0 a", "UID:GID"},
		{"volume resize a", "to which size?"},
		{"volume resize", "name the volume"},
		{"volume delete", "name the volume"},
		{"volume delete --no-such-flag a", "no-such-flag"},
		{"volume list a", "unknown command"},
		{"volume list -o yaml", "table, json"},
		{"volume list", "which pool?"},
		{"check ../x", "letters, digits"},
		{"pool init", "1 arg"},
		{"mount /mnt", "which pool?"},
		{"mount --pool /a", "1 pools and 0 mountpoints"},
		{"mount --pool /a /b /c", "1 pools and 2 mountpoints"},
		{"mount --pool /a /b --idle-after 0s", "more than 0"},
		{"mount --pool /a /b --log-format xml", "console, json"},
		{"mount --pool /a /b --log-level loud", "info, debug"},
		{"doctor /a /b", "at most 1"},
		{"doctor --pool /a /b", "not both"},
		{"version x", "unknown command"},
	} {
		h.want(ExitUsage, test.want, strings.Fields(test.args)...)
	}
}

func TestNotRoot(t *testing.T) {
	h := newHost(t)
	h.opts.geteuid = func() int { return 1000 }
	for _, args := range []string{"volume list --pool /x", "pool init /x", "mount --pool /x /y", "check"} {
		h.want(ExitFailure, "only root can do this, and you are user 1000", strings.Fields(args)...)
	}
	h.want(ExitOK, "v0-test", "version")
	h.want(ExitOK, "Usage:", "volume", "create", "--help")
}

func TestVolumeCommands(t *testing.T) {
	dir := poolDir(t, idA)
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprintf("mounted=%v", mounted), func(t *testing.T) {
			h, f := newHost(t), newFakePool(dir, "a", "web-0")
			h.env[PoolEnv] = dir
			if mounted {
				h.serves(f)
			} else {
				h.opens(f)
			}
			h.want(ExitOK, "", "volume", "create", "--size", "1.5Gi", "--inodes", "9", "--mode", "2770", "--owner", "1:2", "new")
			h.want(ExitOK, "NAME    SIZE   USED   USE%   INODES   IUSED   STATE\na       10Gi   5Gi    51%    1000     7       ready\nweb-0 ", "volume", "list")
			h.want(ExitOK, "[\n  {\n    \"name\": \"a\",", "volume", "list", "-o", "json")
			h.want(ExitOK, "web-0   10Gi", "volume", "show", "web-0")
			h.want(ExitOK, "{\n  \"name\": \"web-0\",", "volume", "show", "web-0", "-o", "json")
			h.want(ExitOK, "", "volume", "resize", "a", "--size", "20Gi", "--inodes", "5")
			h.want(ExitOK, "", "volume", "delete", "a", "--force")
			h.want(ExitOK, "", "check", "a", "--repair")

			h.want(ExitFailure, "volume nope: no such volume (`croft volume list`", "volume", "show", "nope")
			h.want(ExitFailure, "no such volume", "volume", "resize", "nope", "--size", "1Gi")
			h.want(ExitFailure, "no such volume", "volume", "delete", "nope")
			h.want(ExitFailure, "volume a: volume exists already (`croft volume resize`", "volume", "create", "a", "--size", "1Gi")
			h.want(ExitFailure, "volume a: limit is below what is in use: 5368713216 bytes (5Gi) and 7 inodes", "volume", "resize", "a", "--size", "1Gi")

			calls := strings.Join(f.calls, "\n")
			for _, call := range []string{
				"create new {Bytes:1610612736 Inodes:9 Mode:grwxrwx--- UID:1 GID:2 Kind: Wipe:false Labels:map[]}",
				"resize a {Bytes:21474836480 Inodes:5}",
				"delete a {Force:true}",
				"check {Volumes:[a] Repair:true}",
			} {
				if !strings.Contains(calls, call) {
					t.Errorf("not called: %s\n%s", call, calls)
				}
			}
			if waited := strings.Contains(calls, "delete a {Force:true}\nwait trash\nclose"); waited == mounted {
				t.Errorf("waited for the trash: %v\n%s", waited, calls)
			}
		})
	}
}

func TestRecounting(t *testing.T) {
	dir := poolDir(t, idA)
	for _, mounted := range []bool{false, true} {
		h, f := newHost(t), newFakePool(dir, "a")
		v := f.volumes["a"]
		v.State = pool.StateRecounting
		f.volumes["a"] = v
		if mounted {
			h.serves(f)
		} else {
			h.opens(f)
		}
		code, stdout, stderr := h.run("volume", "list", "--pool", dir)
		if code != ExitOK || strings.Contains(stdout, "recounting") != mounted || strings.Contains(stderr, "recounting what was in use at a crash: a") == mounted {
			t.Errorf("mounted %v: %d\n%s%s", mounted, code, stdout, stderr)
		}
	}
}

func TestCheck(t *testing.T) {
	dir := poolDir(t, idA)
	h, f := newHost(t), newFakePool(dir)
	h.opens(f)
	h.want(ExitOK, `"volumes": []`, "check", "--pool", dir, "-o", "json")
	f.check.Volumes = []pool.VolumeCheck{{Name: "a", Findings: []string{"used is 5, on disk 6"}, Repaired: true}, {Name: "b"}}
	h.want(ExitFindings, "a: used is 5, on disk 6", "check", "--pool", dir)
	h.want(ExitFindings, "b      clean", "check", "--pool", dir)
	h.want(ExitFindings, "a      repaired", "check", "--pool", dir)
	h.want(ExitFindings, `"repaired": true`, "check", "--pool", dir, "-o", "json")
	f.check = pool.CheckResult{Findings: []string{"volumes/\x1b[2Jx has no record"}}
	h.want(ExitFindings, `pool: volumes/\x1b[2Jx has no record`, "check", "--pool", dir)
}

func TestFindPool(t *testing.T) {
	dirA, dirB := poolDir(t, idA), poolDir(t, idB)

	h := newHost(t)
	h.want(ExitFailure, "not a Croft pool", "volume", "list", "--pool", t.TempDir())
	h.want(ExitFailure, "opened a pool", "volume", "list", "--pool", dirA)

	// The only daemon needs no name, a stale socket does not count, and a flag comes before the environment.
	a := newFakePool(dirA, "a")
	h.serves(a)
	h.want(ExitOK, "10Gi", "volume", "show", "a")
	h.env[PoolEnv] = dirB
	h.want(ExitOK, "10Gi", "volume", "show", "a", "--pool", dirA)
	h.want(ExitFailure, "opened a pool", "volume", "show", "a")
	h.env[PoolEnv] = ""

	h.serves(newFakePool(dirB, "b"))
	h.want(ExitUsage, dirB, "volume", "list")
	h.want(ExitUsage, dirA, "volume", "list")
	h.want(ExitOK, "b ", "volume", "list", "--pool", dirB)
	rel, err := filepath.Rel(must(os.Getwd()), dirB)
	if err != nil {
		t.Fatal(err)
	}
	h.want(ExitOK, "b ", "volume", "list", "--pool", rel)

	// A copy of a pool is not what the daemon has.
	h.opens(newFakePool(poolDir(t, idA), "b"))
	h.want(ExitFailure, "opened", "volume", "list", "--pool", poolDir(t, idA))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func TestPoolInUse(t *testing.T) {
	dir := poolDir(t, idA)
	h := newHost(t)
	h.opts.open = func(pool.Options) (localPool, error) {
		return nil, fmt.Errorf("pool %s: %w by process 42", dir, pool.ErrInUse)
	}
	h.want(ExitFailure, "pool is in use by process 42; for 300ms it neither let go nor listened on "+h.opts.RunDir, "volume", "list", "--pool", dir)

	// Another command lets go of it.
	f, tries := newFakePool(dir, "a"), 0
	h.opts.Patience = 10 * time.Second
	h.opts.open = func(pool.Options) (localPool, error) {
		if tries++; tries < 3 {
			return nil, pool.ErrInUse
		}
		return f, nil
	}
	h.want(ExitOK, "10Gi", "volume", "list", "--pool", dir)

	// It was a daemon that was starting.
	tries = 0
	h.opts.open = func(pool.Options) (localPool, error) {
		if tries++; tries == 2 {
			h.serves(f)
		}
		return nil, pool.ErrInUse
	}
	h.want(ExitOK, "10Gi", "volume", "list", "--pool", dir)
}

func TestCompletion(t *testing.T) {
	h := newHost(t)
	dir := poolDir(t, idA)
	if err := os.MkdirAll(filepath.Join(dir, "volumes", "on-disk"), 0o700); err != nil {
		t.Fatal(err)
	}
	h.want(ExitOK, "on-disk\n:4", "__complete", "volume", "show", "--pool", dir, "")
	h.serves(newFakePool(dir, "a", "web-0"))
	h.want(ExitOK, "a\nweb-0\n:4", "__complete", "volume", "show", "")
	h.want(ExitOK, "a\nweb-0\n:4", "__complete", "volume", "delete", "--pool", dir, "")
	h.want(ExitOK, "web-0\n:4", "__complete", "check", "a", "")
	h.want(ExitOK, dir+"\n:0", "__complete", "volume", "list", "--pool", "")
	h.want(ExitOK, "table\njson\n:4", "__complete", "doctor", "-o", "")
	for _, shell := range []string{"bash", "zsh", "fish"} {
		h.want(ExitOK, "croft", "completion", shell)
	}
	if code, out, _ := h.run("completion", "show", ""); code != ExitUsage {
		t.Errorf("%d %s", code, out)
	}
}

func TestBestTier(t *testing.T) {
	held := errors.New("not held")
	for _, test := range []struct {
		passthrough bool
		holds       error
		tier        fs.Tier
		reasons     int
	}{{true, nil, fs.TierGate, 0}, {true, held, fs.TierRead, 1}, {false, nil, fs.TierDaemon, 1}, {false, held, fs.TierDaemon, 2}} {
		tier, reasons := bestTier(test.passthrough, test.holds)
		if tier != test.tier || len(reasons) != test.reasons {
			t.Errorf("%+v: %s, %q", test, tier, reasons)
		}
	}
}

func TestResolvePlaces(t *testing.T) {
	dirA, dirB, base := poolDir(t, idA), poolDir(t, idB), t.TempDir()
	mnt, link, file := filepath.Join(base, "mnt"), filepath.Join(base, "link"), filepath.Join(base, "file")
	if err := errors.Join(
		os.Mkdir(mnt, 0o755), os.Mkdir(mnt+"/below", 0o755), os.Mkdir(mnt+"2", 0o755), os.Symlink(mnt, link), os.WriteFile(file, nil, 0o644),
		os.Mkdir(dirA+"/x", 0o755), os.Symlink(base, base+"/self"), os.Symlink(dirA, base+"/poolA"),
	); err != nil {
		t.Fatal(err)
	}
	places, err := resolvePlaces([]string{base + "/poolA", dirB}, []string{base + "/self/mnt", mnt + "2/"})
	if want := []place{{dirA, mnt}, {dirB, mnt + "2"}}; err != nil || !reflect.DeepEqual(places, want) {
		t.Errorf("%v, %v", places, err)
	}
	for _, test := range []struct {
		pools, mountpoints []string
		want               string
	}{
		{[]string{base}, []string{mnt}, "not a Croft pool"},
		{[]string{dirA}, []string{base + "/none"}, "mkdir -p " + base + "/none"},
		{[]string{dirA}, []string{base + "/none/below"}, "mkdir -p " + base + "/none/below"},
		{[]string{dirA}, []string{link}, "symbolic link"},
		{[]string{dirA}, []string{file}, "not a directory"},
		{[]string{dirA}, []string{dirA + "/x"}, "inside the pool"},
		{[]string{dirA}, []string{base + "/poolA/x"}, "inside the pool"},
		{[]string{dirB}, []string{dirA + "/x"}, "inside the pool"},
		{[]string{dirA}, []string{dirA}, "hide the pool"},
		{[]string{dirB}, []string{dirA}, "is a pool itself"},
		{[]string{dirA}, []string{filepath.Dir(dirA)}, "hide the pool"},
		{[]string{dirA, dirA}, []string{mnt, mnt + "2"}, "named twice"},
		{[]string{dirA, dirB}, []string{mnt, mnt}, "hides the other"},
		{[]string{dirA, dirB}, []string{mnt + "/below", mnt}, "hides the other"},
	} {
		if _, err := resolvePlaces(test.pools, test.mountpoints); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v on %v: %v, want %q", test.pools, test.mountpoints, err, test.want)
		}
	}
	if _, err := resolveLogFile(base+"/self/mnt/log", places); err == nil {
		t.Error("a log on the mount was accepted")
	}
	if err := os.Symlink(file, mnt+"3"); err != nil {
		t.Fatal(err)
	}
	if path, err := resolveLogFile(mnt+"3", places); err != nil || path != file {
		t.Errorf("%s, %v", path, err)
	}
}

func TestDaemonArgs(t *testing.T) {
	o := &mountOptions{log: newLogOptions(), tier: newChoice("read"), wakeups: newChoice("plain"), idleAfter: time.Second, promise: promise{overcommit: 1.5, spare: 5}, metrics: ":9808"}
	got := daemonArgs(o, []place{{"/a", "/-b"}, {"/c d", "/e"}})
	want := []string{"mount", "--ready-fd=3", "--idle-after=1s", "--overcommit=1.5", "--spare=5", "--tier=read", "--wakeups=plain",
		"--metrics-address=:9808",
		"--log-format=console", "--log-level=info", "--pool=/a", "--pool=/c d", "--", "/-b", "/e"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%q", got)
	}
}
