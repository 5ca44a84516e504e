package gate

import (
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// memory is where the gate reads its events, and notes those that are held, so that the
// next daemon finds them: there is no instant at which an event that was read is in neither.
type memory struct {
	region *state.Region // what follows is in it, and it must stay
	buffer []byte
	mu     sync.Mutex // guards what follows
	held   []state.Event
	free   []int // records that were used
	next   int   // the first that was not
}

// newMemory also returns what an earlier daemon has not answered, unless its group is gone.
func newMemory(region *state.Region, groupKept bool, step func(string)) (*memory, []*Event) {
	if region == nil {
		return &memory{buffer: make([]byte, state.EventBuffer)}, nil
	}
	m := &memory{region: region}
	m.buffer, m.held = region.Events()
	var left []*Event
	known := make(map[state.Event]bool)
	for m.next < len(m.held) && m.held[m.next].Used {
		switch r := m.held[m.next]; {
		case r.FD != 0 && groupKept:
			ev := &Event{Inode: r.Inode, TID: int(r.TID), Off: r.Off, Len: r.Len, fd: int(r.FD), slot: m.next}
			left = append(left, ev)
			r.Inode = 0
			known[r] = true
		default:
			m.held[m.next].FD = 0
			m.free = append(m.free, m.next)
		}
		m.next++
	}
	if groupKept { // what was read and not noted yet, or only in part
		_ = parse(m.buffer, func(ev *Event) {
			if known[state.Event{Used: true, FD: int32(ev.fd), TID: int32(ev.TID), Off: ev.Off, Len: ev.Len}] {
				return
			}
			ev.Inode = inodeOf(ev.TID)
			m.add(ev)
			left = append(left, ev)
			step("found")
		})
	}
	clear(m.buffer)
	return m, left
}

// forget has nothing left in the buffer of what a read has put there: n bytes, and what it
// may have begun after them.
func (m *memory) forget(n int) {
	const longest = unix.FAN_EVENT_METADATA_LEN + int(unsafe.Sizeof(rangeInfo{}))
	clear(m.buffer[:min(n+longest, len(m.buffer))])
}

func (m *memory) add(ev *Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(m.free); n > 0 {
		ev.slot, m.free = m.free[n-1], m.free[:n-1]
	} else if ev.slot = m.next; m.held != nil && m.next == len(m.held) {
		ev.slot = -1 // more than there can be descriptors
		return
	} else {
		m.next++
	}
	if m.held == nil {
		return
	}
	r := &m.held[ev.slot]
	*r = state.Event{Used: true, TID: int32(ev.TID), Off: ev.Off, Len: ev.Len, Inode: ev.Inode}
	atomic.StoreInt32(&r.FD, int32(ev.fd)) // not before the others: it says that they are there
}

func (m *memory) remove(ev *Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if ev.slot < 0 {
		return
	}
	if m.held != nil {
		atomic.StoreInt32(&m.held[ev.slot].FD, 0)
	}
	m.free = append(m.free, ev.slot)
}

// each yields by what the kernel knows the events that are held.
func (m *memory) each(yield func(fd int)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.held[:min(m.next, len(m.held))] {
		if fd := m.held[i].FD; fd != 0 {
			yield(int(fd))
		}
	}
}

// rangeInfo is struct fanotify_event_info_range of include/uapi/linux/fanotify.h.
type rangeInfo struct {
	typ, _ uint8
	len    uint16
	_      uint32
	off    uint64
	count  uint64
}

// parse yields the events that buf holds; bytes of zero end them.
func parse(buf []byte, yield func(*Event)) error {
	for len(buf) >= unix.FAN_EVENT_METADATA_LEN {
		m := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&buf[0]))
		if m.Event_len == 0 {
			return nil
		}
		if m.Event_len < unix.FAN_EVENT_METADATA_LEN || int(m.Event_len) > len(buf) || uint32(m.Metadata_len) > m.Event_len {
			return fmt.Errorf("a malformed event of %d bytes", m.Event_len)
		}
		info := buf[m.Metadata_len:m.Event_len]
		buf = buf[m.Event_len:]
		if m.Fd < 0 {
			continue
		}
		ev := &Event{fd: int(m.Fd), TID: int(m.Pid)}
		for len(info) >= int(unsafe.Sizeof(rangeInfo{})) {
			r := (*rangeInfo)(unsafe.Pointer(&info[0]))
			if r.typ == unix.FAN_EVENT_INFO_TYPE_RANGE {
				ev.Off, ev.Len = r.off, r.count
			}
			if r.len == 0 || int(r.len) > len(info) {
				break
			}
			info = info[r.len:]
		}
		yield(ev)
	}
	return nil
}

// inodeOf finds out on which inode a held thread works: the first argument of its system
// call is the descriptor. The mount shows the numbers of the backing inodes, and
// is asked nothing: the kernel knows the attributes of what is open.
func inodeOf(tid int) uint64 {
	var c Callers
	defer c.Close()
	call := c.Of(tid)
	if call.Access == Unknown {
		return 0
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", tid, call.fd)
	var stx unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &stx) != nil {
		return 0
	}
	return stx.Ino
}
