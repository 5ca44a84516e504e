package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/quota"
)

const testID = "0123456789abcdef"

// fakePool answers every call with err, and notes what it was asked.
type fakePool struct {
	Copies
	mu    sync.Mutex
	err   error
	name  string
	asked any
	block chan struct{} // Check waits for it, or for its context
}

var volume = pool.Volume{
	Name:    "web-0",
	State:   pool.StateReady,
	Limit:   quota.Usage{Bytes: 10 << 30, Inodes: 1000},
	Used:    quota.Usage{Bytes: 1<<63 + 1, Inodes: 7},
	Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	Open:    3,
}

func (f *fakePool) note(name string, asked any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.name, f.asked = name, asked
	return f.err
}

func (f *fakePool) Info() pool.Info {
	return pool.Info{ID: testID, Dir: "/srv/croft", PID: 42, TakeOvers: 3, TakeOver: 65 * time.Millisecond}
}
func (f *fakePool) Requests() map[string]uint64 {
	return map[string]uint64{"LOOKUP": 1<<63 + 1, "INIT": 1}
}
func (f *fakePool) Gate() pool.GateStats { return pool.GateStats{Held: 3, HeldTotal: 4} }
func (f *fakePool) Create(_ context.Context, name string, o pool.CreateOptions) (pool.Volume, error) {
	return volume, f.note(name, o)
}
func (f *fakePool) Resize(_ context.Context, name string, o pool.ResizeOptions) (pool.Volume, error) {
	return volume, f.note(name, o)
}
func (f *fakePool) Delete(_ context.Context, name string, o pool.DeleteOptions) error {
	return f.note(name, o)
}
func (f *fakePool) Volume(_ context.Context, name string) (pool.Volume, error) {
	return volume, f.note(name, nil)
}
func (f *fakePool) Volumes(context.Context) ([]pool.Volume, error) {
	return []pool.Volume{volume}, f.note("", nil)
}
func (f *fakePool) Check(ctx context.Context, o pool.CheckOptions) (pool.CheckResult, error) {
	if f.block != nil {
		select {
		case <-f.block:
		case <-ctx.Done():
			return pool.CheckResult{}, ctx.Err()
		}
	}
	return pool.CheckResult{Findings: []string{"x"}}, f.note("", o)
}

func start(t *testing.T, f *fakePool, o Options) (*Client, *Server) {
	t.Helper()
	if os.Geteuid() != 0 && o.peerUID == nil {
		o.peerUID = func(net.Conn) (uint32, error) { return 0, nil }
	}
	if o.RunDir == "" {
		o.RunDir = filepath.Join(t.TempDir(), "run")
	}
	s, err := Listen(f, o)
	if err != nil {
		t.Fatal(err)
	}
	c := NewClient(s.Path())
	t.Cleanup(func() {
		c.Close()
		s.Shutdown(context.Background())
	})
	return c, s
}

func TestRoundTrip(t *testing.T) {
	f := &fakePool{}
	c, _ := start(t, f, Options{})
	ctx := t.Context()

	info, err := c.Info(ctx)
	if err != nil || info != f.Info() {
		t.Errorf("Info: %+v, %v", info, err)
	}
	counts, err := c.Requests(ctx)
	if err != nil || !reflect.DeepEqual(counts, f.Requests()) {
		t.Errorf("Requests: %v, %v", counts, err)
	}
	vs, err := c.Volumes(ctx)
	if err != nil || !reflect.DeepEqual(vs, []pool.Volume{volume}) {
		t.Errorf("Volumes: %+v, %v", vs, err)
	}
	v, err := c.Volume(ctx, "web-0")
	if err != nil || !reflect.DeepEqual(v, volume) || f.name != "web-0" {
		t.Errorf("Volume: %+v, %v, asked %q", v, err, f.name)
	}
	create := pool.CreateOptions{Bytes: 1 << 62, Inodes: 5, Mode: 0o750, UID: 1, GID: 2}
	v, err = c.Create(ctx, "a", create)
	if err != nil || !reflect.DeepEqual(v, volume) || !reflect.DeepEqual(f.asked, create) {
		t.Errorf("Create: %+v, %v, asked %+v", v, err, f.asked)
	}
	resize := pool.ResizeOptions{Bytes: 5, Inodes: 6}
	v, err = c.Resize(ctx, "a", resize)
	if err != nil || !reflect.DeepEqual(v, volume) || f.asked != resize {
		t.Errorf("Resize: %+v, %v, asked %+v", v, err, f.asked)
	}
	if err := c.Delete(ctx, "a", pool.DeleteOptions{Force: true}); err != nil || f.asked != (pool.DeleteOptions{Force: true}) {
		t.Errorf("Delete: %v, asked %+v", err, f.asked)
	}
	check := pool.CheckOptions{Volumes: []string{"a", "b"}, Repair: true}
	r, err := c.Check(ctx, check)
	if err != nil || r.Clean() || !reflect.DeepEqual(f.asked, check) {
		t.Errorf("Check: %+v, %v, asked %+v", r, err, f.asked)
	}
}

func TestErrors(t *testing.T) {
	f := &fakePool{}
	c, _ := start(t, f, Options{})
	for _, code := range codes {
		f.err = fmt.Errorf("volume %q: %w: because", "web-0", code.err)
		calls := map[string]func() error{
			"create":  func() error { _, err := c.Create(t.Context(), "a", pool.CreateOptions{}); return err },
			"resize":  func() error { _, err := c.Resize(t.Context(), "a", pool.ResizeOptions{}); return err },
			"delete":  func() error { return c.Delete(t.Context(), "a", pool.DeleteOptions{}) },
			"volume":  func() error { _, err := c.Volume(t.Context(), "a"); return err },
			"volumes": func() error { _, err := c.Volumes(t.Context()); return err },
			"check":   func() error { _, err := c.Check(t.Context(), pool.CheckOptions{}); return err },
		}
		for name, call := range calls {
			err := call()
			if !errors.Is(err, code.err) || err.Error() != f.err.Error() {
				t.Errorf("%s, %s: got %v, want %v", name, code.code, err, f.err)
			}
			for _, other := range codes {
				if !errors.Is(code.err, other.err) && errors.Is(err, other.err) {
					t.Errorf("%s: is also %v", code.code, other.err)
				}
			}
		}
	}
	f.err = errors.New("disk on fire")
	if _, err := c.Volumes(t.Context()); err == nil || err.Error() != "disk on fire" {
		t.Errorf("an unknown error: %v", err)
	}
}

func TestNames(t *testing.T) {
	f := &fakePool{}
	c, _ := start(t, f, Options{})
	for _, name := range []string{
		".", "..", "../../etc", "a/b", "//", "/a", "a/", "a?b", "a#b", "a%2Fb", "%2e%2e", "ä", "a b", "a\nb", "\x00", "\xff\xfe", "+", "a;b", "{name}",
		strings.Repeat("x", pool.MaxName),
	} {
		if _, err := c.Volume(t.Context(), name); err != nil || f.name != name {
			t.Errorf("%q arrived as %q, %v", name, f.name, err)
		}
	}
	for _, name := range []string{"", "/", strings.Repeat("x", 2<<20)} {
		if err := c.Delete(t.Context(), name, pool.DeleteOptions{}); !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("name of %d bytes: %v", len(name), err)
		}
	}
}

func TestBadRequests(t *testing.T) {
	c, _ := start(t, &fakePool{}, Options{})
	for _, test := range []struct{ method, path, body, want string }{
		{"POST", "/v1/volumes/a", `{"bytes":1,"colour":"red"}`, `unknown field \"colour\"`},
		{"POST", "/v1/volumes/a", `{"bytes":`, "unexpected"},
		{"POST", "/v1/volumes/a", `{"bytes":-1}`, "cannot unmarshal"},
		{"POST", "/v1/volumes/a", `{} {}`, "follows"},
		{"POST", "/v1/check", `[]`, "cannot unmarshal"},
		{"GET", "/v2/info", ``, "unknown to this daemon"},
		{"PUT", "/v1/info", ``, "unknown to this daemon"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), test.method, "http://croft"+test.path, strings.NewReader(test.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.http.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusBadRequest || !strings.Contains(string(b), test.want) {
			t.Errorf("%s %s %s: %s %s", test.method, test.path, test.body, resp.Status, b)
		}
	}
}

func TestOnlyRoot(t *testing.T) {
	c, _ := start(t, &fakePool{}, Options{peerUID: func(net.Conn) (uint32, error) { return 1000, nil }})
	if _, err := c.Info(t.Context()); !errors.Is(err, ErrForbidden) || !strings.Contains(err.Error(), "1000") {
		t.Errorf("user 1000: %v", err)
	}
	c, _ = start(t, &fakePool{}, Options{peerUID: func(net.Conn) (uint32, error) { return 0, errors.New("no idea") }})
	if _, err := c.Info(t.Context()); !errors.Is(err, ErrForbidden) {
		t.Errorf("unknown user: %v", err)
	}
}

func TestPeerUID(t *testing.T) {
	var uid uint32
	c, _ := start(t, &fakePool{}, Options{peerUID: func(conn net.Conn) (uint32, error) {
		var err error
		uid, err = peerUID(conn)
		return 0, err
	}})
	if _, err := c.Info(t.Context()); err != nil || uid != uint32(os.Geteuid()) {
		t.Errorf("uid %d, %v", uid, err)
	}
}

func TestModes(t *testing.T) {
	_, s := start(t, &fakePool{}, Options{})
	for path, want := range map[string]os.FileMode{s.Path(): 0o600, filepath.Dir(s.Path()): 0o700} {
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}
	open := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o777)); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(&fakePool{}, Options{RunDir: open}); err == nil {
		t.Error("a run directory that others may write was accepted")
	}
	if _, err := Listen(&fakePool{}, Options{RunDir: filepath.Join(t.TempDir(), strings.Repeat("x", 120))}); err == nil || !strings.Contains(err.Error(), "107") {
		t.Errorf("a long path: %v", err)
	}
}

func TestStaleSocket(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := SocketPath(dir, testID)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if _, err := Listen(&fakePool{}, Options{RunDir: dir}); err == nil {
		t.Fatal("a socket in use was taken")
	}
	l.Close()

	c := NewClient(path)
	if _, err := c.Info(t.Context()); !errors.Is(err, ErrNoServer) {
		t.Errorf("stale socket: %v", err)
	}
	if _, err := NewClient(path + "x").Info(t.Context()); !errors.Is(err, ErrNoServer) {
		t.Errorf("no socket: %v", err)
	}
	c, _ = start(t, &fakePool{}, Options{RunDir: dir})
	if _, err := c.Info(t.Context()); err != nil {
		t.Error(err)
	}
	paths, err := Sockets(dir)
	if err != nil || !reflect.DeepEqual(paths, []string{path}) {
		t.Errorf("Sockets: %v, %v", paths, err)
	}
	if paths, err := Sockets(dir + "/none"); err != nil || paths != nil {
		t.Errorf("Sockets of no directory: %v, %v", paths, err)
	}
}

func TestShutdown(t *testing.T) {
	f := &fakePool{block: make(chan struct{})}
	c, s := start(t, f, Options{})
	result := make(chan error, 1)
	check := func() {
		_, err := c.Check(context.Background(), pool.CheckOptions{})
		result <- err
	}
	go check()
	time.Sleep(50 * time.Millisecond) // the request is under way
	done := make(chan error, 1)
	go func() { done <- s.Shutdown(context.Background()) }()
	time.Sleep(50 * time.Millisecond)
	close(f.block)
	if err := <-result; err != nil {
		t.Errorf("the request under way: %v", err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(s.Path()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	if err := s.Shutdown(context.Background()); err != nil {
		t.Errorf("again: %v", err)
	}

	f = &fakePool{block: make(chan struct{})}
	c, s = start(t, f, Options{})
	go check()
	time.Sleep(50 * time.Millisecond)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a shutdown cut short: %v", err)
	}
	if err := <-result; err == nil {
		t.Error("the request was answered")
	}
}

func TestCallerGoes(t *testing.T) {
	f := &fakePool{block: make(chan struct{})}
	c, s := start(t, f, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Check(ctx, pool.CheckOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if err := s.Shutdown(t.Context()); err != nil { // the pool's context has ended, or this hangs
		t.Error(err)
	}
}
