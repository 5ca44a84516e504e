package fs

import (
	"math"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// file is one open file or directory.
type file struct {
	node  *node
	flags uint32 // as the caller opened it

	// mu is held shared while fd is used, exclusively to close it.
	mu sync.RWMutex
	fd int // -1 once closed
	// borrowed tells that fd is the node's backing file's, or its writing's.
	borrowed bool
	// writes tells that it is counted in the node's writing.
	writes bool

	dir dirStream // directories only
}

func (h *file) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fd >= 0 && !h.borrowed {
		syscall.Close(h.fd)
	}
	h.fd = -1
}

// use pins the descriptor; done must follow when it returns nil. ESTALE when
// the volume was removed under the open file.
func (h *file) use() error {
	h.mu.RLock()
	switch {
	case h.fd < 0:
		h.mu.RUnlock()
		return unix.EBADF
	case h.node.vol != nil && h.node.vol.removed.Load():
		h.mu.RUnlock()
		return unix.ESTALE
	}
	return nil
}

func (h *file) done() { h.mu.RUnlock() }

// handleTable maps the handle numbers that the kernel holds to open files.
type handleTable struct {
	mu   sync.RWMutex
	open map[uint64]*file
	next uint64
}

func (t *handleTable) init() { t.open = make(map[uint64]*file) }

func (t *handleTable) add(h *file) uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next++
	t.open[t.next] = h
	return t.next
}

func (t *handleTable) get(fh uint64) (*file, error) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if h := t.open[fh]; h != nil {
		return h, nil
	}
	return nil, unix.EBADF
}

func (t *handleTable) take(fh uint64) *file {
	t.mu.Lock()
	defer t.mu.Unlock()
	h := t.open[fh]
	delete(t.open, fh)
	return h
}

func (t *handleTable) drain() []*file {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := make([]*file, 0, len(t.open))
	for fh, h := range t.open {
		all = append(all, h)
		delete(t.open, fh)
	}
	return all
}

// nodesOf lists the nodes of a volume's open files.
func (t *handleTable) nodesOf(v *volume) []*node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var nodes []*node
	for _, h := range t.open {
		if h.node.vol == v {
			nodes = append(nodes, h.node)
		}
	}
	return nodes
}

// handleRoom is asked before a file of the volume is opened. Each open file is a
// descriptor of the daemon: one tenant shall not take those that operations in
// other volumes need. ENFILE when the volume has its share.
func (f *FS) handleRoom(v *volume) error {
	if v.openings.Load() >= f.maxOpen {
		return unix.ENFILE
	}
	return nil
}

// openShare is how many files one volume may have open: half of the
// descriptors that the process may have.
func openShare() int64 {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return math.MaxInt64
	}
	return int64(min(limit.Cur, math.MaxInt64) / 2)
}

// useHandle finds and pins an open file.
func (f *FS) useHandle(fh uint64) (*file, error) {
	h, err := f.handles.get(fh)
	if err != nil {
		return nil, err
	}
	if err := h.use(); err != nil {
		return nil, err
	}
	return h, nil
}
