package state

import (
	"os"
	"sync/atomic"
	"unsafe"
)

// How far the work on a request has come. What a killed daemon has answered is not
// asked again; all else is, from the beginning.
const (
	// Begun: nothing has been done that cannot be done again.
	Begun = iota
	// Trying: the one system call that cannot be done twice was about to be made.
	Trying
	// Done: it was made, and what it has changed is in the ledger.
	Done
)

// maxGiven is how many lookups one answer can give away: an answer to READDIRPLUS.
const maxGiven = 2048

// Request is what a serving thread works on.
type Request struct {
	Taken uint32 // 1 when a thread has it
	// Scratch tells that it only reads what comes again, which another record is of.
	Scratch bool
	// Effect is Begun, Trying or Done.
	Effect atomic.Uint32
	// Progress counts the nodes of a BATCH_FORGET that were forgotten.
	Progress uint32
	given    uint32
	unique   uint64 // 0 when it works on none
	// Inode is what the operation needs to know when it is asked again: the number of
	// the inode that it is about, before.
	Inode uint64
	// Orphan is the number of the inode that TMPFILE is about to name in the orphans of the volume.
	Orphan uint64
	// Bytes and Inodes are reserved for it in the volume of that record since it is Trying.
	Bytes, Inodes uint64
	Volume        uint32
	_             uint32
	nodes         [maxGiven]uint64
	// The message follows, in pages of its own.
}

// Message is a request's buffer: the kernel writes the message into it. It begins at
// a page's end so that a WRITE's data begins at the next.
type Message = []byte

var requestHead = (int(unsafe.Sizeof(Request{})) + os.Getpagesize() - 1) / os.Getpagesize() * os.Getpagesize()

func requestStride(size int) int { return requestHead + os.Getpagesize() + size }

func (r *Region) requestOffset(i uint32) uintptr {
	return requestsAt + uintptr(i)*uintptr(requestStride(r.RequestSize()))
}

func (r *Region) requestAt(i uint32) *Request {
	return (*Request)(unsafe.Pointer(&r.mem[r.requestOffset(i)]))
}

// TakeRequest has a thread work on requests by a record of its own. lead is how
// many bytes of a message come before what is to begin at a page.
func (r *Region) TakeRequest(lead int) (*Request, Message, error) {
	r.mu.Lock()
	i, err := r.requests.take()
	r.mu.Unlock()
	if err != nil {
		return nil, nil, err
	}
	q := r.requestAt(i)
	m := r.message(i, lead)
	r.populate(r.requestMemory(i))
	q.Clear(m)
	q.Taken = 1
	return q, m, nil
}

// requestMemory is a record and its message, in whole pages.
func (r *Region) requestMemory(i uint32) []byte {
	at := r.requestOffset(i)
	return r.mem[at : at+uintptr(requestStride(r.RequestSize()))]
}

func (r *Region) message(i uint32, lead int) Message {
	page := uintptr(os.Getpagesize())
	at := r.requestOffset(i) + uintptr(requestHead) + page - uintptr(lead)
	end := at + uintptr(lead) + uintptr(r.RequestSize())
	return r.mem[at:end:end]
}

func (r *Region) requestIndex(q *Request) uint32 {
	off := uintptr(unsafe.Pointer(q)) - uintptr(unsafe.Pointer(&r.mem[requestsAt]))
	return uint32(off / uintptr(requestStride(r.RequestSize())))
}

// FreeRequest ends TakeRequest.
func (r *Region) FreeRequest(q *Request) {
	i := r.requestIndex(q)
	q.Taken, q.Scratch = 0, false
	q.unique = 0
	r.release(r.requestMemory(i))
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests.free(i)
}

// Requests yields what threads worked on when the last daemon ended.
func (r *Region) Requests(lead int, yield func(*Request, Message)) {
	r.requests.each(func(i uint32) {
		r.populate(r.requestMemory(i))
		yield(r.requestAt(i), r.message(i, lead))
	})
}

// Clear makes ready for the next message: what the kernel writes first is its length.
func (q *Request) Clear(m Message) {
	*(*uint32)(unsafe.Pointer(&m[0])) = 0
	q.unique = 0
	q.Effect.Store(Begun)
	q.Progress, q.given, q.Inode, q.Orphan, q.Bytes, q.Inodes = 0, 0, 0, 0, 0, 0
}

// Unique is the kernel's number of the request; 0 when it works on none.
func (q *Request) Unique() uint64 { return q.unique }

// Room tells whether the answer can give away another lookup.
func (q *Request) Room() bool { return q == nil || q.given < maxGiven }

// AddLookup counts a lookup of a node, and notes that the answer to the request gives it
// away; q may be nil. One call at a time. Room told that there is room.
func (r *Region) AddLookup(n *Node, id uint64, q *Request) {
	redo := &r.head.redo
	redo.id, redo.lookups = id, n.Lookups+1
	redo.request = 0
	if q != nil {
		redo.request, redo.given = r.requestIndex(q)+1, q.given
	}
	redo.node.Store(uint32(id) - firstNode + 1)
	r.finish()
}

// finish makes the change that redo says.
func (r *Region) finish() {
	redo := &r.head.redo
	i := redo.node.Load()
	if i == 0 {
		return
	}
	n := r.nodeAt(i - 1)
	n.Lookups = redo.lookups
	if redo.request != 0 {
		q := r.requestAt(redo.request - 1)
		q.nodes[redo.given] = redo.id
		q.given = redo.given + 1
	}
	n.ID = redo.id
	redo.node.Store(0)
}

// Given lists the nodes of which the answer gives away a lookup.
func (q *Request) Given() []uint64 { return q.nodes[:q.given] }

// TakeBack forgets what the answer was to give away.
func (q *Request) TakeBack() { q.given = 0 }

// Resent is FUSE_UNIQUE_RESEND of include/uapi/linux/fuse.h: the kernel sets it in the
// unique of a request that it sends again.
const Resent = 1 << 63

// Bind makes the request found by its unique, until it is cleared.
func (r *Region) Bind(q *Request, unique uint64) {
	q.unique = unique &^ Resent
	r.bound[unique/2%uint64(len(r.bound))].Store(q) // the kernel counts in steps of two
}

// Find returns the request of a unique, nil when no thread works on it.
func (r *Region) Find(unique uint64) *Request {
	unique &^= Resent
	if q := r.bound[unique/2%uint64(len(r.bound))].Load(); q != nil && q.unique == unique {
		return q
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var found *Request
	r.requests.each(func(i uint32) {
		if q := r.requestAt(i); q.unique == unique {
			found = q
		}
	})
	return found
}
