package quota

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// ScanOptions says how a tree is scanned.
type ScanOptions struct {
	// Rule is what inodes are charged by.
	Rule Rule

	// Workers is how many directories are read at a time. 0 means two for
	// each CPU, at most 16.
	Workers int

	// Watch, when set, is called for each regular file before its charge is read,
	// concurrently, and more than once for one of several links. What it returns is
	// called with the charge when that is what was counted. dirFD and name are the file's.
	Watch func(dirFD int, name string) (counted func(charge uint64))

	// OnlyWatch has Watch called and nothing counted: the extent map of a file that
	// is being written is waited for.
	OnlyWatch bool
}

// EnsureDefaults puts the default where a field is zero.
func (o *ScanOptions) EnsureDefaults() {
	if o.Workers <= 0 {
		o.Workers = min(2*runtime.NumCPU(), 16)
	}
	o.Rule.Block = o.Rule.block()
}

// ScanResult is what is in a tree.
type ScanResult struct {
	Usage              // the sum of the charges, and of the inodes
	Files       uint64 // regular files, each inode once
	Directories uint64 // without the root of the tree
	Others      uint64 // symlinks, FIFOs, sockets and devices, each inode once
	Links       uint64 // names beyond the first of an inode that were found in the tree
}

func (r *ScanResult) add(s ScanResult) {
	r.Usage = r.Usage.Add(s.Usage)
	r.Files += s.Files
	r.Directories += s.Directories
	r.Others += s.Others
	r.Links += s.Links
}

// Scan sums up the charges of all that is in the tree below dir, dir itself
// not included. dir may be open with O_PATH; its offset is not used. An inode of
// several links is charged once. Whatever something else is mounted on is left
// out, and so is what is below. An entry that vanishes meanwhile is left out; any
// other failure, and the end of ctx, ends the scan with an error.
//
// It needs the privilege to read any directory, and holds no more than a few
// hundred descriptors. Access times do not change.
func Scan(ctx context.Context, dir *os.File, o ScanOptions) (ScanResult, error) {
	o.EnsureDefaults()
	// Control keeps dir from being closed meanwhile.
	raw, err := dir.SyscallConn()
	if err != nil {
		return ScanResult{}, fmt.Errorf("scan %s: %w", dir.Name(), err)
	}
	var result ScanResult
	var scanErr error
	if err := raw.Control(func(fd uintptr) { result, scanErr = scan(ctx, int(fd), o) }); err != nil {
		scanErr = err
	}
	if scanErr != nil {
		return ScanResult{}, fmt.Errorf("scan %s: %w", dir.Name(), scanErr)
	}
	return result, nil
}

func scan(ctx context.Context, dirFD int, o ScanOptions) (ScanResult, error) {
	mountFD, err := openDir(dirFD, ".")
	if err != nil {
		return ScanResult{}, err
	}
	defer unix.Close(mountFD)
	rootFD, err := openDir(dirFD, ".")
	if err != nil {
		return ScanResult{}, err
	}
	s := &scanner{rule: o.Rule, watch: o.Watch, onlyWatch: o.OnlyWatch, mountFD: mountFD}
	s.idle.L = &s.mu
	root := &scanDir{fd: rootFD, claims: 1}
	s.held.Add(1)
	s.push(root)
	return s.run(ctx, o.Workers)
}

const (
	// direntBuffer holds some thousand entries a system call.
	direntBuffer = 128 << 10

	// openDirs is how many directories may stay open only until their
	// subdirectories have been opened. Those beyond it are closed and found
	// again by their handles.
	openDirs = 256
)

// scanner is one scan: a stack of directories to read, so that the tree is
// walked depth first and few directories wait.
type scanner struct {
	rule    Rule
	watch   func(dirFD int, name string) (counted func(charge uint64))
	mountFD int // for open_by_handle_at

	onlyWatch bool

	held  atomic.Int64 // directories held open
	links linkSet

	mu      sync.Mutex // guards what follows
	idle    sync.Cond  // signalled when any of it changes
	stack   []*scanDir
	busy    int // workers reading a directory
	err     error
	stopped atomic.Bool // err is set
}

func (s *scanner) run(ctx context.Context, workers int) (total ScanResult, err error) {
	stop := context.AfterFunc(ctx, func() { s.fail(ctx.Err()) })
	defer stop()
	found := make([]ScanResult, workers)
	var wg sync.WaitGroup
	for i := range found {
		wg.Go(func() {
			w := &scanWorker{scanner: s, buf: make([]byte, direntBuffer)}
			for d := s.pop(); d != nil; d = s.pop() {
				w.visit(d)
				s.visited()
			}
			found[i] = w.found
		})
	}
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.stack { // what a scan that failed has left
		if d.parent == nil {
			s.release(d)
		} else {
			s.release(d.parent)
		}
	}
	for _, f := range found {
		total.add(f)
	}
	return total, s.err
}

func (s *scanner) push(dirs ...*scanDir) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stack = append(s.stack, dirs...)
	s.idle.Broadcast()
}

// pop waits for a directory to read, and returns nil when there will be none.
// After each that it returns, visited is called.
func (s *scanner) pop() *scanDir {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.stack) == 0 && s.busy > 0 && s.err == nil {
		s.idle.Wait()
	}
	if s.err != nil || len(s.stack) == 0 {
		return nil
	}
	last := len(s.stack) - 1
	d := s.stack[last]
	s.stack[last] = nil
	s.stack = s.stack[:last]
	s.busy++
	return d
}

func (s *scanner) visited() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.busy--; s.busy == 0 {
		s.idle.Broadcast()
	}
}

// fail ends the scan. The first error stands.
func (s *scanner) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
		s.stopped.Store(true)
	}
	s.idle.Broadcast()
}
