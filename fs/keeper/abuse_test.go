package keeper

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

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
