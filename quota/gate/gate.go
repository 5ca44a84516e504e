package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Event is a system call that is held.
type Event struct {
	// FD is a descriptor of the inode (O_RDONLY), until the event is answered.
	FD int
	// TID is the thread that is held, 0 when it is in a process namespace that the
	// daemon does not see. Own tells that it is one of this process.
	TID int
	Own bool
	// Off and Len are the range in bytes, rounded to whole pages. An append's
	// Off is where the file's position was, not where the file ends. Len is 0
	// for a truncation to Off.
	Off, Len uint64
}

// Verdict is the answer to an event.
type Verdict uint32

// Allow lets the system call go on.
const Allow Verdict = unix.FAN_ALLOW

// Later tells that whoever decides will call Answer.
const Later Verdict = 0

// Deny has the system call fail with errno: EPERM, EIO, EBUSY, ETXTBSY, EAGAIN,
// ENOSPC or EDQUOT (fanotify_validate_response).
func Deny(errno unix.Errno) Verdict {
	return Verdict(unix.FAN_DENY | uint32(errno)<<24) // FAN_DENY_ERRNO
}

// Gate is a fanotify group. Its marks end with it.
type Gate struct {
	decide func(*Event) Verdict
	pace   func()
	log    *zap.Logger
	pid    int
	stop   int // eventfd
	ended  chan struct{}
	held   atomic.Int64
	total  atomic.Uint64

	mu    sync.RWMutex // is held shared while group is used, exclusively to close it
	group int          // -1 once closed
}

// ErrClosed is returned once the gate is closed.
var ErrClosed = errors.New("gate is closed")

// Open makes a group and starts a thread that has decide answer its events, one
// at a time. decide must not wait for anything that waits for the held thread; what
// it cannot answer at once it answers by Answer, Later. When it panics, the event
// is denied with EIO. pace is called once for each. Needs CAP_SYS_ADMIN and a file limit of Deny's events at once.
func Open(decide func(*Event) Verdict, pace func(), log *zap.Logger) (*Gate, error) {
	return open(decide, pace, log, os.Getpid())
}

// open takes the events of threads of the process pid for our own.
func open(decide func(*Event) Verdict, pace func(), log *zap.Logger, pid int) (*Gate, error) {
	const class = unix.FAN_CLASS_PRE_CONTENT | unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS
	group, err := unix.FanotifyInit(class|unix.FAN_REPORT_TID|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(group)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	g := &Gate{decide: decide, pace: pace, log: log, pid: pid, group: group, stop: stop, ended: make(chan struct{})}
	go g.run()
	return g, nil
}

// Close lets everything go on that is held, and takes away all marks.
func (g *Gate) Close() error {
	if _, err := unix.Write(g.stop, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	<-g.ended
	g.mu.Lock()
	defer g.mu.Unlock()
	// The kernel allows what was not answered (fanotify_release).
	err := unix.Close(g.group)
	g.group = -1
	return errors.Join(err, unix.Close(g.stop))
}

// Held returns how many events are held at this moment.
func (g *Gate) Held() int64 { return g.held.Load() }

// Events returns how many events there were.
func (g *Gate) Events() uint64 { return g.total.Load() }

func (g *Gate) mark(fd int, flags uint) error {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.group < 0 {
		return ErrClosed
	}
	// Without a path it is the inode of fd that is marked.
	_, _, errno := unix.Syscall6(unix.SYS_FANOTIFY_MARK, uintptr(g.group), uintptr(flags), unix.FAN_PRE_ACCESS, uintptr(fd), 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// Mark has files that are opened from now on raise events, and ignores them
// until Hold. fd is open on the inode, and not O_PATH.
func (g *Gate) Mark(fd int) error {
	if err := g.mark(fd, unix.FAN_MARK_ADD); err != nil {
		return fmt.Errorf("fanotify_mark: %w", err)
	}
	return g.Release(fd)
}

// Hold has the inode's events raised. What the kernel has begun goes on.
func (g *Gate) Hold(fd int) error {
	if err := g.mark(fd, unix.FAN_MARK_REMOVE|unix.FAN_MARK_IGNORE); err != nil && err != unix.ENOENT {
		return fmt.Errorf("fanotify_mark: hold: %w", err)
	}
	return nil
}

// Release has the inode's events ignored again. Those that are held stay so.
func (g *Gate) Release(fd int) error {
	if err := g.mark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_IGNORE|unix.FAN_MARK_IGNORED_SURV_MODIFY); err != nil {
		return fmt.Errorf("fanotify_mark: release: %w", err)
	}
	return nil
}

// Unmark takes the inode's mark away.
func (g *Gate) Unmark(fd int) error {
	ignored := g.mark(fd, unix.FAN_MARK_REMOVE|unix.FAN_MARK_IGNORE)
	if ignored == unix.ENOENT {
		ignored = nil
	}
	if err := errors.Join(ignored, g.mark(fd, unix.FAN_MARK_REMOVE)); err != nil {
		return fmt.Errorf("fanotify_mark: unmark: %w", err)
	}
	return nil
}

// Answer answers an event for which decide has returned Later, once.
func (g *Gate) Answer(ev *Event, v Verdict) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	g.held.Add(-1)
	if g.group >= 0 { // else the kernel has let it go
		response := [2]uint32{uint32(int32(ev.FD)), uint32(v)} // struct fanotify_response
		buf := (*[8]byte)(unsafe.Pointer(&response))[:]
		for {
			_, err := unix.Write(g.group, buf)
			if err == unix.EINTR {
				continue
			}
			if err != nil && err != unix.ENOENT { // ENOENT: the caller was killed
				g.log.Error("answer to a held system call", zap.Int("tid", ev.TID), zap.Error(err))
			}
			break
		}
	}
	syscall.Close(ev.FD)
}

// rangeInfo is struct fanotify_event_info_range of include/uapi/linux/fanotify.h.
type rangeInfo struct {
	typ, _ uint8
	len    uint16
	_      uint32
	off    uint64
	count  uint64
}

func (g *Gate) run() {
	runtime.LockOSThread()
	defer close(g.ended)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(g.group, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if stopped := g.wait(); stopped {
				return
			}
		case err != nil:
			// A descriptor for the event could not be had: the kernel has denied it.
			g.log.Error("read of held system calls", zap.Error(err))
		default:
			g.dispatch(buf[:n])
		}
	}
}

// wait returns when there are events, or true when there will be none.
func (g *Gate) wait() (stopped bool) {
	fds := []unix.PollFd{{Fd: int32(g.group), Events: unix.POLLIN}, {Fd: int32(g.stop), Events: unix.POLLIN}}
	_, _ = unix.Poll(fds, -1)
	return fds[1].Revents != 0
}

func (g *Gate) dispatch(buf []byte) {
	for len(buf) >= unix.FAN_EVENT_METADATA_LEN {
		m := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&buf[0]))
		if m.Event_len < unix.FAN_EVENT_METADATA_LEN || int(m.Event_len) > len(buf) {
			g.log.Error("malformed fanotify event", zap.Uint32("length", m.Event_len))
			return
		}
		info := buf[m.Metadata_len:m.Event_len]
		buf = buf[m.Event_len:]
		if m.Fd < 0 {
			continue
		}
		ev := &Event{FD: int(m.Fd), TID: int(m.Pid)}
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
		g.held.Add(1)
		g.total.Add(1)
		g.pace()
		if v := g.judge(ev); v != Later {
			g.Answer(ev, v)
		}
	}
}

// judge answers for the caller when decide cannot: it must not be held for ever.
func (g *Gate) judge(ev *Event) (v Verdict) {
	defer func() {
		if p := recover(); p != nil {
			g.log.Error("panic over a held system call", zap.Any("panic", p), zap.Stack("stack"))
			v = Deny(unix.EIO)
		}
	}()
	// Our own system calls are charged by whoever makes them, and may be made
	// under locks that decide takes.
	if ev.Own = ev.TID > 0 && unix.Tgkill(g.pid, ev.TID, 0) == nil; ev.Own {
		return Allow
	}
	return g.decide(ev)
}
