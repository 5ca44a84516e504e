package csi

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/singleflight"
)

// locks has calls about the same thing go one after the other.
type locks struct {
	mu   sync.Mutex               // guards held
	held map[string]chan struct{} // closed when it is let go of
}

// take waits until nobody has key, or returns ErrPending when ctx ends before that.
func (l *locks) take(ctx context.Context, key string) (release func(), err error) {
	for {
		l.mu.Lock()
		other := l.held[key]
		if other == nil {
			if l.held == nil {
				l.held = make(map[string]chan struct{})
			}
			mine := make(chan struct{})
			l.held[key] = mine
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, key)
				l.mu.Unlock()
				close(mine)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: %w", key, ErrPending)
		}
	}
}

// copies are what goes on when its caller has gone.
type copies struct {
	ctx     context.Context // ends with the driver
	group   singleflight.Group
	running sync.WaitGroup
}

// do has fn run to its end, once at a time for a key, and waits for that as long as ctx lasts: then ErrPending.
func (c *copies) do(ctx context.Context, key string, fn func(context.Context) error) error {
	c.running.Add(1)
	done := c.group.DoChan(key, func() (any, error) { return nil, fn(c.ctx) })
	ended := make(chan error, 1)
	go func() {
		defer c.running.Done()
		ended <- (<-done).Err
	}()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", key, ErrPending)
	}
}
