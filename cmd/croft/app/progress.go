package app

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/croftfs/croft/fs/pool"
)

// showEvery is how often a copying is looked at.
const showEvery = 500 * time.Millisecond

// showing calls copying, and on a terminal shows meanwhile how far it is.
func (a *App) showing(ctx context.Context, p *access, kind, name string, copying func() error) error {
	if !a.watched() {
		return copying()
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(showEvery)
		defer tick.Stop()
		shown := false
		for {
			select {
			case <-ctx.Done():
				if shown {
					fmt.Fprint(a.Stderr, "\r\x1b[K") // to the beginning of the line, which is erased
				}
				return
			case <-tick.C:
			}
			operations, err := p.Operations(ctx)
			if err != nil {
				continue // it is copying that tells
			}
			for _, op := range operations {
				if op.Kind == kind && op.Name == name {
					fmt.Fprintf(a.Stderr, "\r\x1b[K%s", progressLine(op))
					shown = true
				}
			}
		}
	})
	err := copying()
	cancel()
	wg.Wait()
	return err
}

func progressLine(op pool.Operation) string {
	return fmt.Sprintf("copying %s: %d of about %d files, %s of about %s", op.Source, op.Entries, op.TotalEntries,
		human(op.Bytes), human(max(op.Bytes, op.TotalBytes)))
}
