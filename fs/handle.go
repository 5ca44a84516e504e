package fs

import (
	"math"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// file is one open file.
type file struct {
	node  *node
	flags uint32 // as the caller opened it
	// record is what the next daemon must know.
	record *state.Handle

	// mu is held shared while fd is used, exclusively to close it.
	mu sync.RWMutex
	fd int // -1 once closed
	// borrowed tells that fd is the node's backing file's, or its writing's.
	borrowed bool
	// writes tells that it is counted in the node's writing; guarded by node.mu.
	writes bool
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
	case h.node.vol.removed.Load():
		h.mu.RUnlock()
		return unix.ESTALE
	}
	return nil
}

func (h *file) done() { h.mu.RUnlock() }

// handleWrites is a bit of state.Handle: file.writes.
const handleWrites = 1

func (h *file) setWrites(writes bool) {
	h.writes = writes
	if h.record != nil {
		h.record.Bits = handleBits(h)
	}
}

func handleBits(h *file) uint32 {
	if h.writes {
		return handleWrites
	}
	return 0
}

// handleTable maps the handle numbers that the kernel holds to open files.
type handleTable struct {
	state *state.Region

	mu   sync.RWMutex
	open map[uint64]*file
}

func (t *handleTable) init(region *state.Region) {
	t.state, t.open = region, make(map[uint64]*file)
}

// add makes a handle; unique is that of the request that opens it.
func (t *handleTable) add(h *file, unique uint64) uint64 {
	r, err := t.state.AddHandle(h.node.id, h.flags, handleBits(h), unique)
	if err != nil {
		panic(err) // there are more than can be: the request is answered with EIO
	}
	h.record = r
	t.mu.Lock()
	defer t.mu.Unlock()
	t.open[r.ID] = h
	return r.ID
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

// forget ends what take has begun: whoever takes over finds the handle until then.
func (t *handleTable) forget(h *file) { t.state.RemoveHandle(h.record) }

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

// writers lists the open files that write, by node.
func (t *handleTable) writers() map[*node][]*file {
	t.mu.RLock()
	defer t.mu.RUnlock()
	files := make(map[*node][]*file)
	for _, h := range t.open {
		if h.writes {
			files[h.node] = append(files[h.node], h)
		}
	}
	return files
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
