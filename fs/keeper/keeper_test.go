package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
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
		for pool := range s.pools {
			s.drop(pool)
		}
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

// TestGarbage sends what no client should. It ends that client, leaves no descriptor, and
// hurts nobody else.
func TestGarbage(t *testing.T) {
	k := newKeeping(t)
	well := k.client().Pool("well")
	hold(t, well, "one", "1")
	good, err := request{op: opHold, pool: "p", name: "n"}.encode()
	if err != nil {
		t.Fatal(err)
	}
	changed := func(at int, to byte) []byte {
		b := append([]byte(nil), good...)
		b[at] = to
		return b
	}
	f := memory(t, "garbage")
	before := descriptors(t)
	fds := func(n int) (oob []byte) {
		all := make([]int, n)
		for i := range all {
			all[i] = int(f.Fd())
		}
		return unix.UnixRights(all...)
	}
	for name, c := range map[string]struct{ message, oob []byte }{
		"short":           {good[:10], fds(1)},
		"one byte":        {good[:1], nil},
		"empty":           {nil, fds(1)},
		"long":            {append(good[:requestSize:requestSize], 0), fds(1)},
		"very long":       {make([]byte, 60000), fds(1)},
		"another version": {changed(0, 9), fds(1)},
		"no pool":         {changed(2, 0), fds(1)},
		"pool with zero":  {changed(5, 'x'), fds(1)},
		"two descriptors": {good, fds(2)},
		"too many":        {good, fds(200)},
	} {
		t.Run(name, func(t *testing.T) {
			conn := k.raw()
			if _, _, err := conn.WriteMsgUnix(c.message, c.oob, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("it goes on: %v", err)
			}
			poll(t, "the end of what came with it", func() bool { return descriptors(t) == before })
		})
	}
	// An operation that a later version may have is no reason to hang up.
	conn := k.raw()
	for range 2 {
		if _, _, err := conn.WriteMsgUnix(changed(1, 99), fds(1), nil); err != nil {
			t.Fatal(err)
		}
		answer := make([]byte, 100)
		if n, err := conn.Read(answer); err != nil || n < 2 || answer[0] != answerFailed {
			t.Errorf("operation 99: %q, %v", answer[:n], err)
		}
	}
	poll(t, "the end of what came with it", func() bool { return descriptors(t) == before })
	wantTake(t, well, "one=1")
	if n := k.server.Pools(); n != 1 {
		t.Errorf("%d pools", n)
	}
}

// FuzzDecode wants whatever decodes to encode as the same.
func FuzzDecode(f *testing.F) {
	good, _ := request{op: opHold, pool: "p", name: "n"}.encode()
	f.Add(good)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(b)
		if err != nil {
			return
		}
		again, err := r.encode()
		if err != nil || string(again) != string(b) {
			t.Errorf("%q decodes to %+v, and that encodes to %q, %v", b, r, again, err)
		}
	})
}

// TestStuckClient has clients that ask and take no answer: nobody else waits, and they are left in the end.
func TestStuckClient(t *testing.T) {
	s := NewServer()
	s.patience = time.Second
	k := newKeepingOf(t, s)
	well := k.client().Pool("well")
	hold(t, well, "one", "1")
	list, err := request{op: opGet, pool: "well", name: "one"}.encode()
	if err != nil {
		t.Fatal(err)
	}
	var stuck []*net.UnixConn
	for range 20 {
		c := k.raw()
		stuck = append(stuck, c)
		if err := c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := c.Write(list); err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatal(err)
				}
				break // the keeper waits for it
			}
		}
	}
	wantTake(t, well, "one=1")
	wantTake(t, k.client().Pool("well"), "one=1")
	for _, c := range stuck {
		poll(t, "the end of the keeper's patience", func() bool {
			if err := c.SetWriteDeadline(time.Now().Add(time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			_, err := c.Write(list)
			return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
		})
	}
	wantTake(t, well, "one=1")
}

// TestTooManyClients: those beyond the bound are hung up on; when others go there is room again.
func TestTooManyClients(t *testing.T) {
	s := NewServer()
	s.clients = make(chan struct{}, 3)
	k := newKeepingOf(t, s)
	well := k.client().Pool("well")
	hold(t, well, "one", "1")
	a, b := k.client(), k.client()
	wantTake(t, a.Pool("well"), "one=1")
	wantTake(t, b.Pool("well"), "one=1")
	if _, err := k.client().Pool("well").Take(); !errors.Is(err, ErrGone) {
		t.Errorf("a fourth: %v", err)
	}
	a.Close()
	poll(t, "room for another", func() bool {
		c, err := Dial(k.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = c.Pool("well").Take()
		return err == nil
	})
}

// TestOtherUser wants another user to be refused, by the socket's mode and by who he is.
func TestOtherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test acts as another user: run it as root")
	}
	k := newKeeping(t)
	if fi, err := os.Stat(k.path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	// A path that everybody may walk, so that it is the keeper who refuses.
	dir, err := os.MkdirTemp("/tmp", "croft-keeper")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	open := start(t, filepath.Join(dir, "k"))
	defer open.stop()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(open.path, 0o666)); err != nil {
		t.Fatal(err)
	}
	ask := func(uid uint32) string {
		cmd := exec.Command("/proc/self/exe", "-test.run=TestOtherUserHelper", "-test.v")
		cmd.Env = append(os.Environ(), "KEEPER_TEST_SOCKET="+open.path)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if out := ask(0); !strings.Contains(out, "it answers: <nil>") {
		t.Errorf("root: %s", out)
	}
	if out := ask(65534); !strings.Contains(out, "it answers: ") || !strings.Contains(out, ErrGone.Error()) {
		t.Errorf("nobody: %s", out)
	}
}

func TestOtherUserHelper(t *testing.T) {
	path := os.Getenv("KEEPER_TEST_SOCKET")
	if path == "" {
		return // it is run by TestOtherUser
	}
	c, err := Dial(path, nil)
	if err == nil {
		_, err = c.Pool("a").Take()
	}
	fmt.Println("it answers:", err)
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
	k.server.drop("p")
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
	for pool := range map[string]bool{"p": true, "q": true, "r": true} {
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
	if n := descriptors(t); n != 1 {
		t.Errorf("%d descriptors, want the keeper's", n)
	}
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
	s.drop("p")

	file := memory(t, "no socket")
	if _, err := NewClient(file, nil); err == nil {
		t.Error("a file is a keeper")
	}
}
