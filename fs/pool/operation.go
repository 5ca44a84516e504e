package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/copytree"
)

// Operation is a copying that is under way.
type Operation struct {
	Kind   string    `json:"kind"` // OperationSnapshot or OperationClone
	Name   string    `json:"name"` // what is made
	Source string    `json:"source"`
	Begun  time.Time `json:"begun"`
	// Entries and Bytes are what is copied so far; of is about what it will be in the end.
	Entries      uint64 `json:"entries"`
	Bytes        uint64 `json:"bytes"`
	TotalEntries uint64 `json:"total_entries"`
	TotalBytes   uint64 `json:"total_bytes"`
}

// What Operation.Kind says.
const (
	OperationSnapshot = "snapshot"
	OperationClone    = "clone"
)

// operation is one of Pool.copying. Its Operation does not change but for what progress says.
type operation struct {
	Operation
	progress copytree.Progress
}

// begin registers an operation. The context that it returns ends with the caller's and with the pool, which is not
// closed before end was called.
func (p *Pool) begin(ctx context.Context, op *operation) (_ context.Context, end func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, nil, ErrClosed
	}
	op.Begun = time.Now().UTC()
	p.copying[op] = struct{}{}
	p.background.Add(1)
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(p.ctx, cancel)
	return ctx, func() {
		stop()
		cancel()
		p.mu.Lock()
		delete(p.copying, op)
		p.mu.Unlock()
		p.background.Done()
	}, nil
}

// Operations lists what is being copied now, the oldest first.
func (p *Pool) Operations(context.Context) ([]Operation, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Operation, 0, len(p.copying))
	for op := range p.copying {
		o := op.Operation
		o.Entries, o.Bytes = op.progress.Entries.Load(), op.progress.Bytes.Load()
		list = append(list, o)
	}
	slices.SortFunc(list, func(a, b Operation) int { return a.Begun.Compare(b.Begun) })
	return list, nil
}

// making tells whether an operation makes something of that name.
func (p *Pool) making(kind, name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for op := range p.copying {
		if op.Kind == kind && op.Name == name {
			return true
		}
	}
	return false
}

// asNoRoom makes a full disk an ErrNoRoom.
func asNoRoom(err error) error {
	if errors.Is(err, unix.ENOSPC) && !errors.Is(err, ErrNoRoom) {
		return fmt.Errorf("%w: %w", ErrNoRoom, err)
	}
	return err
}
