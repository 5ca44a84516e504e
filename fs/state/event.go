package state

import "unsafe"

// EventBuffer is the room for what read(2) of the gate's group returns, in bytes.
const EventBuffer = 64 << 10

// Event is a system call that the gate holds. It is there from when it was read until it was
// answered.
type Event struct {
	FD       int32 // by which the kernel knows it; 0 when there is none
	TID      int32
	Used     bool // the record was ever used
	Off, Len uint64
	Inode    uint64 // 0 until it is known
}

// Events returns where the gate reads its events, and where it keeps those that are held. Both
// are the gate's.
func (r *Region) Events() (buffer []byte, held []Event) {
	r.populate(r.mem[eventsAt : eventsAt+EventBuffer])
	buffer = r.mem[eventsAt : eventsAt+EventBuffer : eventsAt+EventBuffer]
	return buffer, unsafe.Slice((*Event)(unsafe.Pointer(&r.mem[eventsAt+EventBuffer])), maxEvents)
}
