package keeper

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// keeping is a keeper on a socket.
type keeping struct {
	t      *testing.T
	path   string
	server *Server
	l      *Listener
	done   chan error
}

func start(t *testing.T, path string) *keeping { return startServer(t, path, NewServer()) }

func startServer(t *testing.T, path string, s *Server) *keeping {
	t.Helper()
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	k := &keeping{t: t, path: path, server: s, l: l, done: make(chan error, 1)}
	go func() { k.done <- k.server.Serve(l) }()
	return k
}

// stop ends it; those who are connected stay.
func (k *keeping) stop() {
	k.t.Helper()
	if err := k.l.Close(); err != nil {
		k.t.Error(err)
	}
	if err := <-k.done; err != nil {
		k.t.Error(err)
	}
}

func newKeeping(t *testing.T) *keeping { return newKeepingOf(t, NewServer()) }

func newKeepingOf(t *testing.T, s *Server) *keeping {
	k := startServer(t, filepath.Join(t.TempDir(), "k"), s)
	t.Cleanup(func() { // all clients have gone, and the test's own descriptors
		k.stop()
		s.dropAll()
		poll(t, "the end of all descriptors", func() bool { return descriptors(t) == 0 })
	})
	return k
}

func (k *keeping) client() *Client {
	k.t.Helper()
	c, err := Dial(k.path, nil)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { c.Close() })
	return c
}

// raw is a client that says what it likes.
func (k *keeping) raw() *net.UnixConn {
	k.t.Helper()
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: k.path, Net: "unixpacket"})
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { c.Close() })
	return c
}

// poll waits until ok.
func poll(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never came: ", what)
		}
	}
}

// memory is a memfd that says what it is.
func memory(t *testing.T, text string) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), text)
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

func hold(t *testing.T, p *Pool, name, text string) {
	t.Helper()
	f := memory(t, text)
	if err := p.Hold(name, int(f.Fd())); err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// wantTake wants what is held to be what is named: "name=text name=text".
func wantTake(t *testing.T, p *Pool, want string) {
	t.Helper()
	files, err := p.Take()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, pair := range strings.Fields(want) {
		name, text, _ := strings.Cut(pair, "=")
		f := files[name]
		if f == nil {
			t.Fatalf("%q is not held: %v", name, files)
		}
		n++
		b := make([]byte, 100)
		got, _ := f.ReadAt(b, 0)
		if string(b[:got]) != text {
			t.Errorf("%s holds %q, want %q", name, b[:got], text)
		}
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s is inherited: %#x, %v", name, flags, err)
		}
		f.Close()
	}
	if n != len(files) {
		t.Errorf("%d are held, want %d: %v", len(files), n, files)
	}
}

// descriptors counts this process's memfds: the keeper is in it.
func descriptors(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if target, _ := os.Readlink("/proc/self/fd/" + e.Name()); strings.HasPrefix(target, "/memfd:test") {
			n++
		}
	}
	return n
}

func TestHoldTakeDrop(t *testing.T) {
	k := newKeeping(t)
	a, b := k.client().Pool("a"), k.client().Pool("b")
	wantTake(t, a, "")
	hold(t, a, "one", "1")
	hold(t, a, "two", "2")
	hold(t, b, "one", "b1")
	wantTake(t, a, "one=1 two=2")
	hold(t, a, "one", "anew")
	wantTake(t, a, "one=anew two=2")
	wantTake(t, b, "one=b1")
	// Who comes later gets the same, and twice.
	later := k.client().Pool("a")
	wantTake(t, later, "one=anew two=2")
	wantTake(t, later, "one=anew two=2")
	if n := k.server.Pools(); n != 2 {
		t.Errorf("%d pools", n)
	}
	if err := a.Drop(); err != nil {
		t.Error(err)
	}
	wantTake(t, later, "")
	wantTake(t, b, "one=b1")
	if err := b.Drop(); err != nil {
		t.Error(err)
	}
	later.client.Close() // it remembers what it took
	if n := descriptors(t); n != 0 {
		t.Errorf("%d descriptors are left", n)
	}
}

func TestRefused(t *testing.T) {
	k := newKeeping(t)
	p := k.client().Pool("a")
	f := memory(t, "x")
	fd := int(f.Fd())
	for _, c := range []struct {
		err, want error
	}{
		{p.Hold("", fd), ErrRefused},
		{p.Hold("none", -1), ErrRefused},
		{p.Hold(strings.Repeat("x", nameSize+1), fd), unix.EINVAL},
		{p.Hold("a\x00b", fd), unix.EINVAL},
		{p.client.Pool("").Hold("x", fd), unix.EINVAL},
		{p.client.Pool(strings.Repeat("x", poolSize+1)).Hold("x", fd), unix.EINVAL},
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("%v, want %v", c.err, c.want)
		}
	}
	if _, err := p.get("nothing"); !errors.Is(err, ErrRefused) {
		t.Errorf("nothing: %v", err)
	}
	for i := range maxNames {
		hold(t, p, fmt.Sprint(i), "x")
	}
	if err := p.Hold("one too many", fd); !errors.Is(err, ErrRefused) {
		t.Errorf("one too many: %v", err)
	}
	hold(t, p, "3", "in the place of another")
	longest := p.client.Pool(strings.Repeat("x", poolSize))
	hold(t, longest, strings.Repeat("y", nameSize), "z")
	wantTake(t, longest, strings.Repeat("y", nameSize)+"=z")
	if err := errors.Join(p.Drop(), longest.Drop()); err != nil {
		t.Error(err)
	}
	f.Close()
	if n := descriptors(t); n != 0 {
		t.Errorf("%d descriptors are left", n)
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "k")
	k := start(t, path)
	if _, err := Listen(path); !errors.Is(err, unix.EADDRINUSE) || !strings.Contains(err.Error(), path) {
		t.Errorf("a second: %v", err)
	}
	k.stop()
	// What a dead keeper leaves is no hindrance.
	old, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	old.SetUnlinkOnClose(false)
	old.Close()
	start(t, path).stop()
	// A file is no socket, and is not taken away.
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file); !errors.Is(err, unix.ENOTSOCK) {
		t.Errorf("a file: %v", err)
	}
	if body, err := os.ReadFile(file); string(body) != "precious" {
		t.Errorf("%q, %v", body, err)
	}
	long := filepath.Join(dir, strings.Repeat("x", 120))
	if _, err := Listen(long); !errors.Is(err, unix.ENAMETOOLONG) || !strings.Contains(err.Error(), strconv.Itoa(maxPath-4)) {
		t.Errorf("a long path: %v", err)
	}
	if _, err := Listen(filepath.Join(dir, "none", "k")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no directory: %v", err)
	}
}

// TestKeeperGoes has the keeper go and another come: it gets what the last one held, and
// not what was dropped.
func TestKeeperGoes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k")
	k := start(t, path)
	changes := make(chan bool, 8)
	c, err := Dial(path, func(up bool, err error) {
		if up != (err == nil) {
			t.Errorf("up: %v, %v", up, err)
		}
		changes <- up
	})
	if err != nil {
		t.Fatal(err)
	}
	p, q, r := c.Pool("p"), c.Pool("q"), c.Pool("r")
	hold(t, p, "one", "1")
	hold(t, p, "one", "anew")
	hold(t, q, "two", "2")
	hold(t, r, "dropped", "x")
	if err := r.Drop(); err != nil {
		t.Error(err)
	}
	for round := range 3 {
		k.stop()
		k.server.hangUp(t, c)
		if <-changes {
			t.Fatal("it came before it went")
		}
		if _, err := p.Take(); !errors.Is(err, ErrGone) || c.Up() {
			t.Errorf("with nobody there: %v, up %v", err, c.Up())
		}
		if round == 1 {
			if err := q.Drop(); err != nil { // it is gone with the keeper
				t.Error(err)
			}
		}
		k = start(t, path)
		if !<-changes || !c.Up() {
			t.Fatal("it went before it came")
		}
		wantTake(t, p, "one=anew")
		if round < 1 {
			wantTake(t, q, "two=2")
		} else {
			wantTake(t, q, "")
		}
		wantTake(t, r, "")
	}
	// A daemon that has taken over has a new keeper hold what it took.
	next, err := Dial(path, func(up bool, _ error) { changes <- up })
	if err != nil {
		t.Fatal(err)
	}
	wantTake(t, next.Pool("p"), "one=anew")
	c.Close()
	k.stop()
	k.server.hangUp(t, next)
	if <-changes {
		t.Fatal("it came before it went")
	}
	k = start(t, path)
	if !<-changes {
		t.Fatal("it went before it came")
	}
	wantTake(t, next.Pool("p"), "one=anew")
	next.Close()
	k.stop()
	k.server.dropAll()
	select {
	case up := <-changes:
		t.Errorf("after its end: %v", up)
	default:
	}
}

// hangUp ends the connection of a client as the end of the keeper's process would, and what it holds.
func (s *Server) hangUp(t *testing.T, c *Client) {
	t.Helper()
	c.mu.Lock()
	l := c.link
	c.mu.Unlock()
	if err := l.conn.CloseRead(); err != nil {
		t.Fatal(err)
	}
	<-l.gone
	s.dropAll()
}

func (s *Server) dropAll() {
	s.mu.Lock()
	pools := slices.Collect(maps.Keys(s.pools))
	s.mu.Unlock()
	for _, pool := range pools {
		s.drop(pool)
	}
}

// TestSocketpair is how a supervisor keeps for its child, which has no other keeper.
func TestSocketpair(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours := os.NewFile(uintptr(pair[0]), "ours")
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer()
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.ServeConn(conn.(*net.UnixConn))
	}()
	gone := make(chan error, 1)
	c, err := NewClient(os.NewFile(uintptr(pair[1]), "theirs"), func(up bool, err error) {
		if up {
			t.Error("there is no other")
		}
		gone <- err
	})
	if err != nil {
		t.Fatal(err)
	}
	p := c.Pool("p")
	hold(t, p, "one", "1")
	wantTake(t, p, "one=1")
	// It closes what it has sent after the answer is here.
	poll(t, "only the keeper's descriptor", func() bool { return descriptors(t) == 1 })
	conn.Close()
	<-served
	if err := <-gone; !errors.Is(err, io.EOF) {
		t.Error(err)
	}
	if err := p.Hold("two", pair[0]); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	if err := errors.Join(p.Drop(), c.Close()); err != nil {
		t.Error(err)
	}
	s.dropAll()

	file := memory(t, "no socket")
	if _, err := NewClient(file, nil); err == nil {
		t.Error("a file is a keeper")
	}
}
