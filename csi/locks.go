package csi

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"go.uber.org/zap"
)

// errFault is returned for a panic, which is logged.
var errFault = errors.New("a fault of the driver: its log tells more")

// locks refuse a call about what another call is under way for (CSI spec, "Concurrency").
type locks struct {
	mu   sync.Mutex // guards held, and hold.users
	held map[string]bool
}

// hold is a lock that somebody has. The last of its users lets go of it.
type hold struct {
	of    *locks
	key   string
	users int
}

// take locks key, or returns ErrPending.
func (l *locks) take(key string) (*hold, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held[key] {
		return nil, fmt.Errorf("%s: %w", key, ErrPending)
	}
	if l.held == nil {
		l.held = make(map[string]bool)
	}
	l.held[key] = true
	return &hold{of: l, key: key, users: 1}, nil
}

// share has the lock last until release is called once more.
func (h *hold) share() {
	h.of.mu.Lock()
	defer h.of.mu.Unlock()
	h.users++
}

func (h *hold) release() {
	h.of.mu.Lock()
	defer h.of.mu.Unlock()
	if h.users--; h.users == 0 {
		delete(h.of.held, h.key)
	}
}

// copies are what goes on when its caller has gone: a call's deadline may be shorter than any copy of a large volume takes.
type copies struct {
	ctx     context.Context // ends with the driver
	log     *zap.Logger
	running sync.WaitGroup
}

// do has fn run to its end under a lock, and waits for that as long as ctx lasts: then ErrPending.
func (c *copies) do(ctx context.Context, h *hold, fn func(context.Context) error) error {
	h.share()
	ended := make(chan error, 1)
	c.running.Go(func() {
		err := c.guard(fn)
		h.release() // first: who is told may call again at once
		ended <- err
	})
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", h.key, ErrPending)
	}
}

// guard makes a panic of fn an error: nobody else would catch it, and it would be the end of every mount.
func (c *copies) guard(fn func(context.Context) error) (err error) {
	defer func() {
		if fault := recover(); fault != nil {
			c.log.Error("panic", zap.Any("fault", fault), zap.ByteString("stack", debug.Stack()))
			err = errFault
		}
	}()
	return fn(c.ctx)
}
