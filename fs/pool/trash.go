package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// trash frees trees in the background. Their owners were hostile, so it goes by
// (descriptor, name), follows nothing, opens directories only, and needs one
// descriptor and no recursion however deep a tree is: it takes a tree apart by
// moving each subdirectory up into the trash itself. A crash leaves more,
// smaller trees in the trash.
type trash struct {
	dir    *os.File
	log    *zap.Logger
	work   chan struct{} // holds a token when there may be something to do
	busy   chan struct{} // holds a token while a sweep is under way
	prefix string        // of names: no two processes make the same
	next   atomic.Uint64
}

func (t *trash) init(log *zap.Logger) {
	t.log = log
	t.work, t.busy = make(chan struct{}, 1), make(chan struct{}, 1)
	t.prefix = strconv.FormatInt(time.Now().UnixNano(), 36) + "-" + strconv.Itoa(os.Getpid()) + "-"
}

// wipePrefix begins the names of what is overwritten before it is freed.
const wipePrefix = "wipe-"

// newName makes a name for what is moved into the trash.
func (t *trash) newName(wipe bool) string {
	name := t.prefix + strconv.FormatUint(t.next.Add(1), 36)
	if wipe {
		name = wipePrefix + name
	}
	return name
}

// wipes tells whether what has that name in the trash is overwritten first.
func wipes(name string) bool { return strings.HasPrefix(name, wipePrefix) }

// take moves parent/name into the trash, durably, to be overwritten before it is freed if wipe; no error
// when it is not there.
func (t *trash) take(parent *os.File, name string, wipe bool) error {
	err := unix.Renameat2(int(parent.Fd()), name, int(t.dir.Fd()), t.newName(wipe), unix.RENAME_NOREPLACE)
	if err != nil && err != unix.ENOENT {
		return fmt.Errorf("move %s/%s into the trash: %w", parent.Name(), name, err)
	}
	return errors.Join(t.dir.Sync(), parent.Sync())
}

// wake has the background look into the trash.
func (t *trash) wake() {
	select {
	case t.work <- struct{}{}:
	default:
	}
}

func (p *Pool) reapTrash() {
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-p.trash.work:
		}
		if err := p.trash.sweep(p.ctx); err != nil && p.ctx.Err() == nil {
			p.log.Error("some of the trash cannot be freed", zap.Error(err))
		}
	}
}

// WaitTrash waits until what was deleted is freed. An error names what cannot be.
func (p *Pool) WaitTrash(ctx context.Context) error { return p.trash.sweep(ctx) }

// sweep frees all that is in the trash. What fails is left and reported.
func (t *trash) sweep(ctx context.Context) error {
	select {
	case t.busy <- struct{}{}:
		defer func() { <-t.busy }()
	case <-ctx.Done():
		return ctx.Err()
	}
	failed := make(map[string]error)
	for {
		names, err := t.list()
		if err != nil {
			return err
		}
		progress := false
		for _, name := range names {
			if failed[name] != nil {
				continue
			}
			if err := t.free(ctx, name); err != nil {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				failed[name] = err
				continue
			}
			progress = true
		}
		if !progress {
			var errs []error
			for _, err := range failed {
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		}
	}
}

func (t *trash) list() ([]string, error) {
	dir, err := openDirAt(t.dir, ".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(0)
}

// free removes the entry name of the trash with all that is below it.
func (t *trash) free(ctx context.Context, name string) error {
	for stack := []string{name}; len(stack) > 0; {
		name := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		below, err := t.remove(ctx, name)
		if err != nil {
			return err
		}
		stack = append(stack, below...)
	}
	return nil
}

// remove removes one entry of the trash. The directories in it are moved into
// the trash first; below names them.
func (t *trash) remove(ctx context.Context, name string) (below []string, err error) {
	wipe := wipes(name)
	if wipe {
		if err := t.wipe(ctx, t.dir, name); err != nil {
			return nil, err
		}
	}
	if err := unix.Unlinkat(int(t.dir.Fd()), name, 0); err == nil || err == unix.ENOENT {
		return nil, nil
	} else if err != unix.EISDIR {
		return nil, fmt.Errorf("unlink %s/%s: %w", t.dir.Name(), name, err)
	}
	dir, err := openDirAt(t.dir, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(4096)
		if ignoreEOF(err) != nil {
			return below, err
		}
		if len(names) == 0 {
			err := unix.Unlinkat(int(t.dir.Fd()), name, unix.AT_REMOVEDIR)
			if err != unix.ENOTEMPTY {
				return below, ignoreENOENT(err)
			}
			// What was removed while it was read has hidden some of it.
		}
		for _, child := range names {
			if ctx.Err() != nil {
				return below, ctx.Err()
			}
			moved, err := t.removeChild(ctx, dir, child, wipe)
			if err != nil {
				return below, fmt.Errorf("remove %s/%s: %w", dir.Name(), child, err)
			}
			if moved != "" {
				below = append(below, moved)
			}
		}
		if len(names) == 0 {
			if _, err := dir.Seek(0, io.SeekStart); err != nil {
				return below, err
			}
		}
	}
}

// removeChild unlinks an entry, or moves it into the trash when it is a directory.
func (t *trash) removeChild(ctx context.Context, dir *os.File, child string, wipe bool) (moved string, err error) {
	if wipe {
		if err := t.wipe(ctx, dir, child); err != nil {
			return "", err
		}
	}
	err = unix.Unlinkat(int(dir.Fd()), child, 0)
	if err != unix.EISDIR {
		return "", ignoreENOENT(err)
	}
	if err := unix.Unlinkat(int(dir.Fd()), child, unix.AT_REMOVEDIR); err != unix.ENOTEMPTY {
		return "", ignoreENOENT(err)
	}
	moved = t.newName(wipe)
	return moved, unix.Renameat2(int(dir.Fd()), child, int(t.dir.Fd()), moved, unix.RENAME_NOREPLACE)
}

func ignoreENOENT(err error) error {
	if err == unix.ENOENT {
		return nil
	}
	return err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
