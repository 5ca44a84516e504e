package state

import (
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// firstNode is the id of the first node: FUSE_ROOT_ID of include/uapi/linux/fuse.h, 1, has no record.
const firstNode = 2

// Node is an inode that the kernel knows. Its ID is the record's index, and how many
// nodes there were before: it never returns.
type Node struct {
	ID      uint64 // 0 when there is none
	Lookups uint64
	// Charge is what the ledger holds for it, in bytes, when Known.
	Charge uint64
	Volume uint32 // index of its record
	Bits   atomic.Uint32
	// Backing is by what the kernel knows the file that it is passed through to; 0 when it is not.
	Backing int32
	// The file handle is name_to_handle_at(2)'s.
	HandleType, HandleLen uint8
	Type                  uint8 // S_IFMT bits >> 12
	IO                    uint8 // how its open files are read and written
	HandleData            [20]byte
	// Known tells that Charge is what the ledger holds, Busy that it was being changed.
	Known, Busy bool
	_           uint16
}

// Handle is an open file or directory.
type Handle struct {
	ID    uint64 // what the kernel calls it, 0 when there is none
	Node  uint64 // its id
	Flags uint32 // of open(2)
	Bits  uint32
	// Request is the unique of the request that opened it, as long as the answer may be on its way.
	Request uint64
}

// Gone holds the last attributes of a node that has lost its last name: a struct stat.
type Gone struct {
	Node uint64 // its id, 0 when there is none
	Stat [152]byte
}

// Volume is what a volume uses. Its record is written by its ledger.
type Volume struct {
	Bytes, Inodes atomic.Int64
	// Changes is how many changes are under way.
	Changes atomic.Int64
	Bits    atomic.Uint32
	nameLen uint32
	name    [216]byte
	// View is whose group the files are seen as.
	View atomic.Uint64
}

// MaxName is the longest name of a volume, in bytes.
const MaxName = len(Volume{}.name)

func (v *Volume) used() bool { return v.nameLen != 0 }

// Name is the volume's name.
func (v *Volume) Name() string { return string(v.name[:v.nameLen]) }

func (r *Region) nodeAt(i uint32) *Node     { return at[Node](r, nodesAt, i) }
func (r *Region) handleAt(i uint32) *Handle { return at[Handle](r, handlesAt, i) }
func (r *Region) goneAt(i uint32) *Gone     { return at[Gone](r, goneAt, i) }
func (r *Region) volumeAt(i uint32) *Volume { return at[Volume](r, volumesAt, i) }

// AddNode makes a record, but for its ID, which id is to be: AddLookup sets it, when all else is there.
func (r *Region) AddNode() (n *Node, id uint64, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.nodes.take()
	if err != nil {
		return nil, 0, err
	}
	gen := r.head.nodeGen
	r.head.nodeGen++
	n = r.nodeAt(i)
	*n = Node{}
	return n, uint64(gen)<<32 | uint64(i+firstNode), nil
}

// Slot is the index of the record of a node, by its id.
func Slot(id uint64) uint32 { return uint32(id) - firstNode }

// NodeIn returns the record of an index that a node in use has.
func (r *Region) NodeIn(slot uint32) *Node { return r.nodeAt(slot) }

// NodeSlots returns how many records were ever used, and how many are.
func (r *Region) NodeSlots() (seen, used int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return int(r.head.nodes), r.nodes.used
}

// RemoveNode frees a record.
func (r *Region) RemoveNode(n *Node) {
	i := Slot(n.ID)
	n.ID = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.nodes.free(i)
}

// Nodes yields every node: the index of its record, and a copy of that. None may be made meanwhile, nor removed but the one
// that was yielded.
func (r *Region) Nodes(yield func(slot uint32, n *Node)) error {
	return r.scan(func(i uint32, n *Node) {
		if n.ID != 0 {
			yield(i, n)
		}
	})
}

// TrimNodes gives back the memory of nodes that are no more, in whole pages.
func (r *Region) TrimNodes() {
	r.mu.Lock()
	defer r.mu.Unlock()
	const size = unsafe.Sizeof(Node{})
	page := uintptr(unix.Getpagesize())
	r.nodes.unused(func(from, to uint32) {
		begin := (nodesAt + uintptr(from)*size + page - 1) / page * page
		end := (nodesAt + uintptr(to)*size) / page * page
		if begin < end { // what cannot be given back stays
			_ = unix.Fallocate(r.FD(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(begin), int64(end-begin))
		}
	})
}

// SetGone keeps the last attributes of a node.
func (r *Region) SetGone(node uint64, stat []byte) (*Gone, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.gone.take()
	if err != nil {
		return nil, err
	}
	g := r.goneAt(i)
	copy(g.Stat[:], stat)
	g.Node = node
	return g, nil
}

// RemoveGone frees a record.
func (r *Region) RemoveGone(g *Gone) {
	i := (uintptr(unsafe.Pointer(g)) - uintptr(unsafe.Pointer(&r.mem[goneAt]))) / unsafe.Sizeof(Gone{})
	g.Node = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone.free(uint32(i))
}

// Gone yields what was kept of nodes that have lost their last name, and drops
// what is of nodes that drop selects.
func (r *Region) Gone(drop func(*Gone) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.gone.each(func(i uint32) {
		if g := r.goneAt(i); drop(g) {
			g.Node = 0
			r.gone.free(i)
		}
	})
}

// AddHandle makes a handle of a file that a request opens; Request is its unique.
func (r *Region) AddHandle(node uint64, flags, bits uint32, request uint64) (*Handle, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.handles.take()
	if err != nil {
		return nil, err
	}
	gen := r.head.handleGen
	r.head.handleGen++
	h := r.handleAt(i)
	h.Node, h.Flags, h.Bits, h.Request = node, flags, bits, request&^Resent
	h.ID = uint64(gen)<<32 | uint64(i+1)
	return h, nil
}

// RemoveHandle frees a record.
func (r *Region) RemoveHandle(h *Handle) {
	i := uint32(h.ID) - 1
	h.ID = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.handles.free(i)
}

// Handles yields every open file. None may be made meanwhile, nor removed but the one that was yielded.
func (r *Region) Handles(yield func(*Handle)) {
	r.handles.each(func(i uint32) {
		if h := r.handleAt(i); h.ID != 0 {
			yield(h)
		}
	})
}

// AddVolume makes a record of a volume that uses nothing yet, and returns its index. ErrFull for
// a name beyond MaxName, too.
func (r *Region) AddVolume(name string) (*Volume, uint32, error) {
	if len(name) > MaxName {
		return nil, 0, ErrFull
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	i, err := r.volumes.take()
	if err != nil {
		return nil, 0, err
	}
	v := r.volumeAt(i)
	*v = Volume{}
	copy(v.name[:], name)
	v.nameLen = uint32(len(name))
	return v, i, nil
}

// RemoveVolume frees a record. No node may be of it any more.
func (r *Region) RemoveVolume(i uint32) {
	r.volumeAt(i).nameLen = 0
	r.mu.Lock()
	defer r.mu.Unlock()
	r.volumes.free(i)
}

// Volumes yields every volume, and its record's index.
func (r *Region) Volumes(yield func(uint32, *Volume)) {
	r.volumes.each(func(i uint32) { yield(i, r.volumeAt(i)) })
}
