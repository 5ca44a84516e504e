package transport

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// ErrNoResend is returned by Resume where the kernel cannot send requests again.
var ErrNoResend = errors.New("transport: the kernel does not send again what was not answered (Linux 6.9)")

// Resumer is a filesystem that goes on with an earlier daemon's. TakeBack is called for
// each request that daemon has not answered, before any is served again.
type Resumer interface {
	TakeBack(q *state.Request)
}

// Resume goes on with a connection that an earlier daemon has left: fd is its
// descriptor, which is the Conn's from then on unless Resume fails, and o.State what
// it has written. Nothing must be using the two. The mount may have ended meanwhile: Serve says so.
//
// What that daemon has read and not answered is served first; fs is a Resumer if it
// must know of it. As Mount, Resume needs CAP_SYS_ADMIN and CAP_SETPCAP.
func Resume(fs fuse.RawFileSystem, o Options, fd int) (*Conn, error) {
	o.EnsureDefaults()
	if o.State == nil {
		return nil, errors.New("transport: nothing to resume from")
	}
	if o.Mountpoint == "" {
		o.Mountpoint = o.State.Mountpoint()
	}
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("transport options: %w", err)
	}
	if err := tryThread(); err != nil {
		return nil, err
	}
	c, err := newConn(fs, o, o.State.Mountpoint())
	if err != nil {
		return nil, err
	}
	if _, err := c.init(); err != nil {
		return nil, errors.Join(err, c.release())
	}
	c.fd, c.resumed = fd, true
	return c, nil
}

// work is what is to be served before more is read.
type work struct {
	mu   sync.Mutex
	todo []task
}

// task is a request in its record.
type task struct {
	request *state.Request
	message []byte
	n       int
}

func (w *work) take() (t task, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.todo) == 0 {
		return t, false
	}
	t = w.todo[0]
	w.todo = w.todo[1:]
	return t, true
}

// next returns the length of the next request: one that is left, or a new one.
func (t *thread) next() (int, error) {
	task, ok := t.c.work.take()
	if !ok {
		return t.read()
	}
	t.c.state.FreeRequest(t.request)
	t.request, t.in = task.request, task.message
	return task.n, nil
}

// resume finds out what the earlier daemon has answered, and what is to be served again.
func (c *Conn) resume() error {
	var left []task
	c.state.Requests(messageLead, func(q *state.Request, m state.Message) { left = append(left, task{request: q, message: m}) })
	resent, fresh, err := c.collect()
	if err != nil {
		return err
	}
	resumer, _ := c.fs.(Resumer)
	for _, t := range left {
		op := requestOpcode(t.message)
		switch again, ok := resent[requestUnique(t.message)&^state.Resent]; {
		case messageLength(t.message) == 0:
		case op == opForget || op == opBatchForget:
			if n := messageLength(t.message); n <= len(t.message) {
				forget(c.fs, t.request, t.message[:n])
			}
		case ok && !t.request.Scratch: // it was not answered
			t.n = copy(t.message, again)
			delete(resent, requestUnique(again)&^state.Resent)
			if resumer != nil {
				resumer.TakeBack(t.request)
			}
			c.state.Bind(t.request, requestUnique(again))
			c.work.todo = append(c.work.todo, t)
			continue
		}
		t.request.Clear(t.message)
		c.state.FreeRequest(t.request)
	}
	for _, message := range resent { // of which nothing is kept
		fresh = append(fresh, message)
	}
	for _, message := range fresh {
		q, m, err := c.state.TakeRequest(messageLead)
		if err != nil {
			return err
		}
		c.state.Bind(q, requestUnique(message))
		c.work.todo = append(c.work.todo, task{request: q, message: m, n: copy(m, message)})
	}
	c.log.Info("requests are served again", zap.Int("requests", len(c.work.todo)))
	return nil
}

// collect has the kernel send again what was not answered, and reads it. It also
// returns what it has read beside: the first request that is new, and interrupts.
func (c *Conn) collect() (resent map[uint64][]byte, fresh [][]byte, err error) {
	resent = make(map[uint64][]byte)
	if err := unix.SetNonblock(c.fd, true); err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, unix.SetNonblock(c.fd, false)) }()
	if err := c.NotifyResend(); err != nil {
		if errors.Is(err, unix.ENODEV) {
			return resent, nil, nil // the threads find out
		}
		if errors.Is(err, unix.EINVAL) {
			err = ErrNoResend
		}
		return nil, nil, err
	}
	// Into memory that is there: see state.Region.TakeRequest.
	scratch, buf, err := c.state.TakeRequest(messageLead)
	if err != nil {
		return nil, nil, err
	}
	defer c.state.FreeRequest(scratch)
	scratch.Scratch = true
	for {
		n, err := unix.Read(c.fd, buf)
		switch {
		case err == unix.EINTR || err == unix.ENOENT:
			continue
		case err == unix.EAGAIN || err == unix.ENODEV:
			return resent, fresh, nil
		case err != nil:
			return nil, nil, fmt.Errorf("read from the FUSE device: %w", err)
		case n < inHeaderSize:
			return nil, nil, fmt.Errorf("a request of %d bytes: %w", n, unix.EIO)
		}
		message := append([]byte(nil), buf[:n]...)
		op, unique := requestOpcode(message), requestUnique(message)
		c.count(op)
		switch {
		case op == opForget || op == opBatchForget:
			scratch.Progress = 0
			forget(c.fs, scratch, message)
		case op == opInterrupt:
			// Of a request that comes again: nobody waits for it to be told.
		case unique&state.Resent != 0:
			resent[unique&^state.Resent] = message
		default: // those that come again are before all others
			return resent, append(fresh, message), nil
		}
	}
}

// Pause is the end of serving when the next daemon is to go on: nobody begins another
// request, and it returns when those that were begun are answered. What threads
// read from then on stays as it is, in the records. The process must end then; Serve does not return.
func (c *Conn) Pause(ctx context.Context) error {
	c.crew.paused.Store(true)
	for c.crew.working.Load() > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d requests are under way: %w", c.crew.working.Load(), ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
	return nil
}
