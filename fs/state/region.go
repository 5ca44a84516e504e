package state

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// layout is the version of what is in the region: a daemon refuses that of a newer one. It is a string so
// that a test can link a build of another.
var layout = "1"

var version = func() uint32 {
	n, err := strconv.ParseUint(layout, 10, 32)
	if err != nil {
		panic(err)
	}
	return uint32(n)
}()

var (
	// ErrNewer is returned for a region of a newer layout.
	ErrNewer = errors.New("the state region is of a newer croft")
	// ErrForeign is returned for what is not a region.
	ErrForeign = errors.New("not a state region")
	// ErrFull is returned when a section has no room.
	ErrFull = errors.New("the state region is full")
)

const magic = 0x31_45_54_41_54_53_46_43 // "CFSTATE1"

// Sizes of the sections in records, and their places in bytes.
const (
	maxVolumes  = 1 << 16
	maxEvents   = 1 << 16
	maxHandles  = 1 << 24
	maxGone     = 1 << 22
	maxRequests = 1 << 10
	maxNodes    = 1 << 28

	volumesAt = 1 << 16
	eventsAt  = volumesAt + maxVolumes*unsafe.Sizeof(Volume{})
	handlesAt = eventsAt + EventBuffer + maxEvents*unsafe.Sizeof(Event{})
	goneAt    = handlesAt + maxHandles*unsafe.Sizeof(Handle{})
	nodesAt   = goneAt + maxGone*unsafe.Sizeof(Gone{})
	// requestsAt is the last, since a request's size is not known here.
	requestsAt = nodesAt + maxNodes*unsafe.Sizeof(Node{})
)

// header is the first section.
type header struct {
	magic   uint64
	version uint32
	// requestSize is the room for one request's message, in bytes.
	requestSize uint32
	initLen     uint32
	_           uint32
	initMessage [1 << 12]byte
	pool        [64]byte // its id
	boot        [64]byte // the boot's
	tier        [16]byte
	mountpoint  [unix.PathMax]byte
	takeOvers   uint64
	backing     atomic.Int32
	nodeGen     uint32
	handleGen   uint32
	// Records at and beyond these were never used.
	volumes, handles, gone, nodes, requests uint32

	redo redo
}

// redo is a change of a node's lookups under way, which is more than one store: it is
// made again by who takes over. There is one at a time.
type redo struct {
	node    atomic.Uint32 // index of its record, plus one; 0 when there is none
	request uint32        // index of its record, plus one; 0 when there is none
	given   uint32        // how many the request has given away before
	_       uint32
	id      uint64
	lookups uint64 // after
}

// Region is a state region. Its methods may be called concurrently; the records are their owners' to guard.
type Region struct {
	file *os.File
	mem  []byte
	head *header

	mu       sync.Mutex
	nodes    slots
	handles  slots
	gone     slots
	volumes  slots
	requests slots

	// bound leads to a request by its unique, unless a later one took its place.
	bound [maxRequests]atomic.Pointer[Request]
}

// New makes an empty region for a pool. requestSize is the longest message of the
// kernel that a request has room for, in bytes.
func New(pool, boot string, requestSize int) (*Region, error) {
	fd, err := unix.MemfdCreate("croft-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	file := os.NewFile(uintptr(fd), "croft-state")
	page := os.Getpagesize()
	requestSize = (requestSize + page - 1) / page * page
	size := int64(requestsAt) + maxRequests*int64(requestStride(requestSize))
	if err := file.Truncate(size); err != nil {
		file.Close()
		return nil, fmt.Errorf("size of the state region: %w", err)
	}
	r, err := attach(file, size)
	if err != nil {
		return nil, err
	}
	h := r.head
	h.version, h.requestSize = version, uint32(requestSize)
	copy(h.pool[:], pool)
	copy(h.boot[:], boot)
	h.magic = magic
	return r, nil
}

// Open takes over the region behind a descriptor, which is the Region's from then on.
// ErrForeign, ErrNewer.
func Open(file *os.File) (*Region, error) {
	fi, err := file.Stat()
	if err == nil && fi.Size() < int64(requestsAt) {
		err = ErrForeign
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	r, err := attach(file, fi.Size())
	if err != nil {
		return nil, err
	}
	switch h := r.head; {
	case h.magic != magic || fi.Size() != int64(requestsAt)+maxRequests*int64(requestStride(int(h.requestSize))):
		err = ErrForeign
	case h.version > version:
		err = fmt.Errorf("%w: layout %d, and this one knows %d", ErrNewer, h.version, version)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close())
	}
	r.finish()
	r.nodes.grow(r.head.nodes)
	if err := r.scan(func(i uint32, n *Node) { r.nodes.set(i, n.ID != 0) }); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	r.handles.load(r.head.handles, func(i uint32) bool { return r.handleAt(i).ID != 0 })
	r.gone.load(r.head.gone, func(i uint32) bool { return r.goneAt(i).Node != 0 })
	r.volumes.load(r.head.volumes, func(i uint32) bool { return r.volumeAt(i).used() })
	r.requests.load(r.head.requests, func(i uint32) bool { return r.requestAt(i).Taken != 0 })
	return r, nil
}

func attach(file *os.File, size int64) (*Region, error) {
	mem, err := unix.Mmap(int(file.Fd()), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("map the state region: %w", err)
	}
	r := &Region{file: file, mem: mem, head: (*header)(unsafe.Pointer(&mem[0]))}
	r.nodes.init(&r.head.nodes, maxNodes)
	r.handles.init(&r.head.handles, maxHandles)
	r.gone.init(&r.head.gone, maxGone)
	r.volumes.init(&r.head.volumes, maxVolumes)
	r.requests.init(&r.head.requests, maxRequests)
	runtime.AddCleanup(r, func(mem []byte) { _ = unix.Munmap(mem) }, mem)
	return r, nil
}

// Close closes the descriptor. The memory stays as long as the Region is referred to:
// what points into it may be used to the end.
func (r *Region) Close() error { return r.file.Close() }

// FD is the region's descriptor, for the keeper.
func (r *Region) FD() int { return int(r.file.Fd()) }

// populate has memory there before the kernel is to write into it on behalf of a thread that may be
// killed meanwhile. Where it is not, the kernel does not get it for such a thread,
// and then it fails the request that it was about to hand out: fuse_dev_do_read in
// fs/fuse/dev.c has fuse_copy_fill get pages, which ends early when a signal is fatal
// (__get_user_pages in mm/gup.c). So has fanotify (copy_event_to_user).
func (r *Region) populate(mem []byte) {
	_ = unix.Madvise(mem, unix.MADV_POPULATE_WRITE) // before Linux 5.14 there is that gap
	_ = unix.Mlock(mem)                             // without the privilege it may be swapped out
}

// release gives populated memory back.
func (r *Region) release(mem []byte) {
	_ = unix.Munlock(mem)
	off := uintptr(unsafe.Pointer(&mem[0])) - uintptr(unsafe.Pointer(&r.mem[0]))
	_ = unix.Fallocate(r.FD(), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(len(mem)))
}

func at[T any](r *Region, section uintptr, i uint32) *T {
	var record T
	return (*T)(unsafe.Pointer(&r.mem[section+uintptr(i)*unsafe.Sizeof(record)]))
}

// scan yields a copy of each node's record that was ever used. They are read, and not looked at in place: for the first look
// at a page its mapping is made, which in a virtual machine takes longer than reading what is on it, and there are many pages.
func (r *Region) scan(yield func(i uint32, n *Node)) error {
	const atOnce = 1 << 12
	seen := r.head.nodes
	buf := make([]Node, min(seen, atOnce))
	for from := uint32(0); from < seen; from += atOnce {
		records := buf[:min(seen-from, atOnce)]
		raw := unsafe.Slice((*byte)(unsafe.Pointer(&records[0])), uintptr(len(records))*unsafe.Sizeof(Node{}))
		off := int64(nodesAt) + int64(from)*int64(unsafe.Sizeof(Node{}))
		if _, err := r.file.ReadAt(raw, off); err != nil {
			return fmt.Errorf("read the state region: %w", err)
		}
		for i := range records {
			yield(from+uint32(i), &records[i])
		}
	}
	return nil
}

func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// Pool is the id of the pool that the region is of.
func (r *Region) Pool() string { return text(r.head.pool[:]) }

// Boot is the id of the boot in which it was made.
func (r *Region) Boot() string { return text(r.head.boot[:]) }

// RequestSize is how long a message can be, in bytes.
func (r *Region) RequestSize() int { return int(r.head.requestSize) }

// SetInit keeps the kernel's INIT request.
func (r *Region) SetInit(message []byte) {
	r.head.initLen = uint32(copy(r.head.initMessage[:], message))
}

// Init is the kernel's INIT request; empty before SetInit.
func (r *Region) Init() []byte { return r.head.initMessage[:r.head.initLen] }

// SetTier keeps what the mount is served by.
func (r *Region) SetTier(tier string) {
	clear(r.head.tier[:])
	copy(r.head.tier[:], tier)
}

// Tier is what the mount is served by; empty before SetTier.
func (r *Region) Tier() string { return text(r.head.tier[:]) }

// SetMountpoint keeps where the pool is mounted.
func (r *Region) SetMountpoint(path string) {
	clear(r.head.mountpoint[:])
	copy(r.head.mountpoint[:], path)
}

// Mountpoint is where the pool is mounted; empty before SetMountpoint.
func (r *Region) Mountpoint() string { return text(r.head.mountpoint[:]) }

// SetBacking notes the id of a backing file that the kernel has just given.
func (r *Region) SetBacking(id int32) { r.head.backing.Store(id) }

// LastBacking is the id that was noted last.
func (r *Region) LastBacking() int32 { return r.head.backing.Load() }

// TakenOver counts a take-over, and returns how many there were.
func (r *Region) TakenOver() uint64 {
	r.head.takeOvers++
	return r.head.takeOvers
}

// TakeOvers is how many take-overs there were.
func (r *Region) TakeOvers() uint64 { return r.head.takeOvers }

// Memory is how many bytes of memory the region takes.
func (r *Region) Memory() (int64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(r.FD(), &st); err != nil {
		return 0, err
	}
	return st.Blocks * 512, nil
}
