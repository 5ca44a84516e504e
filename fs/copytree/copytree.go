package copytree

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

const (
	// batchSize is how many entries of a directory one worker takes at a time.
	batchSize = 256
	// maxBatches is how many of these may wait. Whoever reads a directory does the rest by itself.
	maxBatches = 256
)

// Options say how to copy.
type Options struct {
	// Rule is what files are charged by: the copy's charges are made those of the source.
	Rule quota.Rule
	// Workers is how many files are copied at a time. 0 means two for each CPU, at most 16.
	Workers int
	// StageFrom is the size in bytes of the smallest file that Stage copies.
	StageFrom int64
	// Staged are files that were copied before. Default: none.
	Staged *Staged
	// Progress, when set, is counted up meanwhile.
	Progress *Progress
}

// EnsureDefaults puts the default where a field is zero.
func (o *Options) EnsureDefaults() {
	if o.Workers <= 0 {
		o.Workers = min(2*runtime.NumCPU(), 16)
	}
	if o.Progress == nil {
		o.Progress = new(Progress)
	}
}

// Progress is what has been copied so far.
type Progress struct {
	Entries atomic.Uint64 // inodes
	Bytes   atomic.Uint64 // the sizes of the files whose data is there
}

// Copy makes the directory dst, which is empty, a copy of src, attributes included. It fails with the first
// error, or when ctx ends; dst then holds a part. A file that vanishes from src meanwhile is an error.
func Copy(ctx context.Context, src, dst *os.File, o Options) error {
	c, err := newCopier(ctx, src, dst, o)
	if err != nil {
		return err
	}
	return c.run()
}

// copier is one copying of a tree: two stacks of work. What was begun comes before new directories, so that
// few of these are open at a time.
type copier struct {
	ctx          context.Context
	o            Options
	src, dst     *os.File
	srcFD, dstFD int // theirs, for open_by_handle_at(2)
	mount        int // of the source
	isXFS        bool
	staging      *Staged // what Stage makes; nil in Copy
	links        links
	noReflink    atomic.Bool

	mu      sync.Mutex // guards what follows
	idle    sync.Cond  // signalled when any of it changes
	batches []batch
	dirs    []dirHandles
	busy    int
	err     error
	stopped atomic.Bool // err is set
}

// dirHandles find a directory and what becomes its copy.
type dirHandles struct{ src, dst unix.FileHandle }

// dir is a directory that is being copied. Its attributes are set last.
type dir struct {
	src, dst int // descriptors; dst is -1 while staging
	left     atomic.Int64
}

// batch is a part of a directory.
type batch struct {
	*dir
	names []string
}

func newCopier(ctx context.Context, src, dst *os.File, o Options) (*copier, error) {
	o.EnsureDefaults()
	c := &copier{ctx: ctx, o: o, src: src, dst: dst, srcFD: int(src.Fd()), dstFD: int(dst.Fd())}
	c.idle.L = &c.mu
	c.links.init()
	from, mount, err := unix.NameToHandleAt(c.srcFD, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("handle of %s: %w", src.Name(), err)
	}
	to, _, err := unix.NameToHandleAt(c.dstFD, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return nil, fmt.Errorf("handle of %s: %w", dst.Name(), err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(c.srcFD, &st); err != nil {
		return nil, fmt.Errorf("statfs of %s: %w", src.Name(), err)
	}
	c.mount, c.dirs, c.isXFS = mount, []dirHandles{{from, to}}, st.Type == unix.XFS_SUPER_MAGIC
	return c, nil
}

func (c *copier) run() error {
	defer runtime.KeepAlive(c) // and with it the files of its descriptors
	stop := context.AfterFunc(c.ctx, func() { c.fail(c.ctx.Err()) })
	defer stop()
	var wg sync.WaitGroup
	for range c.o.Workers {
		wg.Go(func() {
			for {
				b, d, ok := c.next()
				if !ok {
					return
				}
				if b.dir != nil {
					c.copyBatch(b)
				} else {
					c.copyDir(d)
				}
				c.done()
			}
		})
	}
	wg.Wait()
	for _, b := range c.batches { // what a copy that failed has left
		c.release(b.dir)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// next waits for work; not ok when there is none and will be none. After each, done is called.
func (c *copier) next() (b batch, d dirHandles, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.batches) == 0 && len(c.dirs) == 0 && c.busy > 0 && c.err == nil {
		c.idle.Wait()
	}
	switch {
	case c.err != nil:
		return b, d, false
	case len(c.batches) > 0:
		b, c.batches = pop(c.batches)
	case len(c.dirs) > 0:
		d, c.dirs = pop(c.dirs)
	default:
		return b, d, false
	}
	c.busy++
	return b, d, true
}

func pop[T any](stack []T) (last T, rest []T) {
	n := len(stack) - 1
	last = stack[n]
	var zero T
	stack[n] = zero
	return last, stack[:n]
}

func (c *copier) done() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy--; c.busy == 0 {
		c.idle.Broadcast()
	}
}

// fail ends the copying. The first error stands.
func (c *copier) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		c.stopped.Store(true)
	}
	c.idle.Broadcast()
}

func (c *copier) failed() bool { return c.stopped.Load() }

// share gives a batch to whoever is free; false when too many wait already.
func (c *copier) share(b batch) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.batches) >= maxBatches {
		return false
	}
	c.batches = append(c.batches, b)
	c.idle.Signal()
	return true
}

func (c *copier) push(d dirHandles) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dirs = append(c.dirs, d)
	c.idle.Signal()
}

// copyDir opens a directory and copies what is in it.
func (c *copier) copyDir(h dirHandles) {
	d := &dir{src: -1, dst: -1}
	d.left.Store(1)
	var err error
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	d.src, err = unix.OpenByHandleAt(c.srcFD, h.src, flags|unix.O_NOATIME)
	if err == nil && c.staging == nil {
		d.dst, err = unix.OpenByHandleAt(c.dstFD, h.dst, flags)
	}
	if err != nil {
		c.closeDir(d)
		if c.staging == nil || !gone(err) {
			c.fail(fmt.Errorf("open a directory of the tree: %w", err))
		}
		return
	}
	if err := c.readDir(d); err != nil {
		c.fail(fmt.Errorf("read a directory of the tree: %w", err))
	}
	c.release(d)
}

func (c *copier) readDir(d *dir) error {
	fd, err := unix.Openat(d.src, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOATIME, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "directory")
	defer f.Close()
	for !c.failed() {
		names, err := f.Readdirnames(batchSize)
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		b := batch{d, names}
		d.left.Add(1)
		if len(names) < batchSize || !c.share(b) {
			c.copyBatch(b)
		}
	}
	return nil
}

func (c *copier) copyBatch(b batch) {
	for _, name := range b.names {
		if c.failed() {
			break
		}
		if err := c.copyEntry(b.dir, name); err != nil {
			c.fail(fmt.Errorf("copy %q: %w", name, err))
			break
		}
	}
	c.release(b.dir)
}

// release ends a part of a directory; the last one sets its attributes.
func (c *copier) release(d *dir) {
	if d.left.Add(-1) > 0 {
		return
	}
	defer c.closeDir(d)
	if d.dst < 0 || c.failed() {
		return
	}
	var st unix.Stat_t
	err := unix.Fstat(d.src, &st)
	if err == nil {
		err = copyAttributes(d.src, d.dst, &st)
	}
	if err != nil {
		c.fail(fmt.Errorf("attributes of a directory: %w", err))
	}
}

func (c *copier) closeDir(d *dir) {
	for _, fd := range []int{d.src, d.dst} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// gone tells whether an error says that an entry is no longer what it was.
func gone(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
