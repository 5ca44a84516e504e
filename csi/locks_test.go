package csi

import (
	"context"
	"errors"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestLocks(t *testing.T) {
	var l locks
	a, err := l.take("a")
	ok(t, err)
	if _, err := l.take("a"); true {
		wantMessage(t, err, ErrPending, "a: ")
	}
	b, err := l.take("b")
	ok(t, err)
	a.share()
	a.release()
	_, err = l.take("a")
	wantErr(t, "shared", err, ErrPending)
	a.release()
	b.release()
	for _, key := range []string{"a", "b"} {
		h, err := l.take(key)
		ok(t, err)
		h.release()
	}
	if len(l.held) > 0 {
		t.Errorf("held are %v", l.held)
	}
}

// copying is a driver's copies, and a copy that ends when it is told to.
type copying struct {
	locks   locks
	copies  copies
	close   context.CancelFunc
	begun   chan struct{}
	proceed chan error
}

func newCopying(t *testing.T) *copying {
	c := &copying{begun: make(chan struct{}), proceed: make(chan error, 1)}
	c.copies.log = zap.NewNop()
	c.copies.ctx, c.close = context.WithCancel(context.Background())
	t.Cleanup(func() { c.close(); c.copies.running.Wait() })
	return c
}

// call copies as a handler does. The copy ends with what proceed says, or with its context.
func (c *copying) call(ctx context.Context) error {
	lock, err := c.locks.take("copy")
	if err != nil {
		return err
	}
	defer lock.release()
	return c.copies.do(ctx, lock, func(ctx context.Context) error {
		close(c.begun)
		select {
		case err := <-c.proceed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

// TestCopyIsWaitedFor wants a copy's end to be told to its caller, and nothing to be locked from then on: again and
// again, for it is a matter of who is quicker.
func TestCopyIsWaitedFor(t *testing.T) {
	for i := range 1000 {
		want := []error{nil, errors.New("no room")}[i%2]
		c := newCopying(t)
		c.proceed <- want
		wantErr(t, "copy", c.call(t.Context()), want)
		lock, err := c.locks.take("copy")
		if err != nil {
			t.Fatalf("the lock of copy %d, which has ended: %v", i, err)
		}
		lock.release()
	}
}

// TestCallerLeaves wants a copy to go on when its caller has gone, and calls meanwhile to be told so.
func TestCallerLeaves(t *testing.T) {
	c := newCopying(t)
	ctx, leave := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() { first <- c.call(ctx) }()
	<-c.begun
	wantErr(t, "a second call", c.call(t.Context()), ErrPending)
	leave()
	wantErr(t, "a caller who has left", <-first, ErrPending)
	wantErr(t, "a call when the caller has left", c.call(t.Context()), ErrPending)
	if err := c.copies.ctx.Err(); err != nil {
		t.Errorf("the copy's context ends with the caller's: %v", err)
	}

	c.proceed <- nil
	c.copies.running.Wait()
	c.begun = make(chan struct{})
	c.proceed <- nil
	wantErr(t, "the call after that", c.call(t.Context()), nil)
}

// TestDriverClosed wants copies to end with the driver, which waits for them.
func TestDriverClosed(t *testing.T) {
	d, err := New(Options{NodeID: "node-a"})
	ok(t, err)
	lock, err := d.lockVolume("copy")
	ok(t, err)
	begun, caller, ended := make(chan struct{}), make(chan error, 1), false
	go func() {
		defer lock.release()
		caller <- d.copies.do(t.Context(), lock, func(ctx context.Context) error {
			close(begun)
			<-ctx.Done()
			ended = true
			return ctx.Err()
		})
	}()
	<-begun
	d.Close()
	if !ended {
		t.Error("Close has not waited for the copy")
	}
	wantErr(t, "copy", <-caller, context.Canceled)
}

// TestCopyPanics has a panic end the copy, and nothing else: its caller is told, and the name is free again.
func TestCopyPanics(t *testing.T) {
	log, logged := observer.New(zap.ErrorLevel)
	c := copies{ctx: t.Context(), log: zap.New(log)}
	var l locks
	for range 2 {
		lock, err := l.take("volume v")
		if err != nil {
			t.Fatal(err)
		}
		err = c.do(t.Context(), lock, func(context.Context) error { panic("half way") })
		lock.release()
		if got := status.Code(asStatus(err)); got != codes.Internal {
			t.Errorf("%v: %v", got, err)
		}
	}
	if entries := logged.All(); len(entries) != 2 || entries[0].ContextMap()["fault"] != "half way" {
		t.Errorf("logged: %v", entries)
	}
}
