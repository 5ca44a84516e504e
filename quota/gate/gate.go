package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// Event is a system call that is held.
type Event struct {
	// Inode is the number of the inode, 0 when nobody can tell: the daemon that has read the
	// event has died before it had looked, and what is held is a thread of the kernel.
	Inode uint64
	// TID is the thread that is held, 0 when it is in a process namespace that the
	// daemon does not see. Own tells that it is one of this process.
	TID int
	Own bool
	// Off and Len are the range in bytes, rounded to whole pages. An append's
	// Off is where the file's position was, not where the file ends. Len is 0
	// for a truncation to Off.
	Off, Len uint64

	call Call // Callers.CallOf's

	// fd is by what the kernel knows the event. It is a descriptor of the inode
	// (O_RDONLY), unless an earlier daemon has read the event.
	fd   int
	slot int // index of its record
	turn turn
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
	memory *memory
	numbers
	left     []*Event // of an earlier daemon; run's own
	stopping atomic.Bool
	step     func(string)

	mu       sync.RWMutex // is held shared while group is used, exclusively to close it
	group    int          // -1 once closed
	detached bool
}

// ErrClosed is returned once the gate is closed.
var ErrClosed = errors.New("gate is closed")

// Options say how to open a gate.
type Options struct {
	// Decide answers an event. It must not wait for anything that waits for the held
	// thread; what it cannot answer at once it answers by Answer, Later. It is called
	// on the gate's thread, one event at a time. When it panics, the event is denied with EIO.
	Decide func(*Event) Verdict
	// Pace is called once for each event. Default: nothing.
	Pace func()
	// State is where what is held is noted for the next daemon. Default: memory of the gate's.
	State *state.Region
	// Group is a descriptor of the group that an earlier daemon has made, whose State this is;
	// it remains the caller's. What that daemon has not answered is decided first, and may be
	// decided a second time: its answer may have been given. Default, 0: a new group, and what
	// State says is held is forgotten.
	Group int
	// Logger takes what goes wrong. Default: none.
	Logger *zap.Logger

	// pid is whose threads' events are our own. Default: this process.
	pid int
	// step is called between the steps of what must be right wherever it ends. Default: nothing.
	step func(string)
}

// Open makes a group, or goes on with one, and starts a thread that has events
// answered. Needs CAP_SYS_ADMIN and a file limit of as many events as are held at once.
func Open(o Options) (*Gate, error) {
	if o.pid == 0 {
		o.pid = os.Getpid()
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Pace == nil {
		o.Pace = func() {}
	}
	if o.step == nil {
		o.step = func(string) {}
	}
	if o.Group > 0 && o.State == nil {
		return nil, errors.New("a group of an earlier daemon without the state that says what it holds")
	}
	group, err := openGroup(o.Group)
	if err != nil {
		return nil, err
	}
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		unix.Close(group)
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	g := &Gate{
		decide: o.Decide, pace: o.Pace, log: o.Logger, pid: o.pid, step: o.step,
		group: group, stop: stop, ended: make(chan struct{}), numbers: numbers{spare: stop},
	}
	g.memory, g.left = newMemory(o.State, o.Group > 0, o.step)
	for _, ev := range g.left {
		g.keep(ev)
		o.step("kept")
	}
	g.held.Add(int64(len(g.left)))
	go g.run()
	return g, nil
}

func openGroup(kept int) (int, error) {
	if kept > 0 {
		what, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(kept))
		if err == nil && what != "anon_inode:[fanotify]" {
			err = fmt.Errorf("descriptor %d is %s, not a fanotify group", kept, what)
		}
		var group int
		if err == nil {
			group, err = unix.FcntlInt(uintptr(kept), unix.F_DUPFD_CLOEXEC, 0)
		}
		if err != nil {
			return -1, fmt.Errorf("group of an earlier daemon: %w", err)
		}
		return group, nil
	}
	const class = unix.FAN_CLASS_PRE_CONTENT | unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS
	group, err := unix.FanotifyInit(class|unix.FAN_REPORT_TID|unix.FAN_CLOEXEC|unix.FAN_NONBLOCK,
		unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		return -1, fmt.Errorf("fanotify_init: %w", err)
	}
	return group, nil
}

// FD is the group's descriptor, for who keeps it. Only a group with a State is worth that.
func (g *Gate) FD() int { return g.group }

// Detach ends the gate's thread, answers nothing more and leaves the group and what is held to
// the next daemon, which somebody keeps it for. This one must end then. Its own system calls
// must be over before: they are held like any.
func (g *Gate) Detach() error {
	if err := g.end(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.detached = true
	return nil
}

func (g *Gate) end() error {
	g.stopping.Store(true)
	if _, err := unix.Write(g.stop, binary.NativeEndian.AppendUint64(nil, 1)); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	<-g.ended
	return nil
}

// Close lets everything go on that is held, and takes away all marks, also when
// somebody keeps the group.
func (g *Gate) Close() error {
	if err := g.end(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	err := unix.FanotifyMark(g.group, unix.FAN_MARK_FLUSH, 0, unix.AT_FDCWD, "")
	if err != nil {
		err = fmt.Errorf("fanotify_mark: flush: %w", err)
	}
	g.memory.each(func(fd int) { _ = g.respond(fd, Allow) }) // ENOENT: it was answered
	for {
		n, err := unix.Read(g.group, g.memory.buffer)
		if err != nil {
			break
		}
		_ = parse(g.memory.buffer[:n], func(ev *Event) {
			_ = g.respond(ev.fd, Allow)
			unix.Close(ev.fd)
		})
		clear(g.memory.buffer)
	}
	// Without a State: the kernel allows what was not answered (fanotify_release).
	err = errors.Join(err, unix.Close(g.group))
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
// until Hold, also when the inode was marked and held already. fd is open on the inode, and
// not O_PATH.
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
	if g.detached || !g.isTurn(ev, v) {
		return // the next daemon does it, or the answer to the one before
	}
	for ev != nil {
		g.held.Add(-1)
		if g.group >= 0 { // else the kernel has let it go
			if err := g.respond(ev.fd, v); err != nil && err != unix.ENOENT { // ENOENT: it was answered
				g.log.Error("answer to a held system call", zap.Int("tid", ev.TID), zap.Error(err))
			}
		}
		g.step("answered")
		// In this order: the number may be another event's as soon as it is closed.
		g.memory.remove(ev)
		g.step("removed")
		ev, v = g.letGo(ev)
	}
}

func (g *Gate) respond(fd int, v Verdict) error {
	response := [2]uint32{uint32(int32(fd)), uint32(v)} // struct fanotify_response
	buf := (*[8]byte)(unsafe.Pointer(&response))[:]
	for {
		if _, err := unix.Write(g.group, buf); err != unix.EINTR {
			return err
		}
	}
}

func (g *Gate) run() {
	runtime.LockOSThread()
	defer close(g.ended)
	for _, ev := range g.left {
		g.pace()
		g.handle(ev)
	}
	g.left = nil
	for !g.stopping.Load() {
		g.step("keeping")
		g.keepAgain()
		g.step("reading")
		n, err := unix.Read(g.group, g.memory.buffer)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			g.wait()
		case err != nil:
			// A descriptor for the event could not be had: the kernel has denied it.
			g.log.Error("read of held system calls", zap.Error(err))
			clear(g.memory.buffer)
		default:
			g.step("read")
			g.dispatch(n)
		}
	}
}

// wait returns when there are events, or the gate is to end.
func (g *Gate) wait() {
	fds := []unix.PollFd{{Fd: int32(g.group), Events: unix.POLLIN}, {Fd: int32(g.stop), Events: unix.POLLIN}}
	_, _ = unix.Poll(fds, -1)
}

// dispatch has the events answered that n bytes of the buffer hold. They are noted before
// the first is.
func (g *Gate) dispatch(n int) {
	var events []*Event
	err := parse(g.memory.buffer[:n], func(ev *Event) {
		var st unix.Stat_t
		if err := unix.Fstat(ev.fd, &st); err != nil {
			g.log.Error("inode of a held system call", zap.Error(err))
		}
		ev.Inode = st.Ino
		g.hasNumber(ev)
		g.memory.add(ev)
		g.step("noted")
		events = append(events, ev)
	})
	g.memory.forget(n)
	g.step("forgotten")
	if err != nil {
		g.log.Error("read of held system calls", zap.Error(err))
	}
	g.held.Add(int64(len(events)))
	g.total.Add(uint64(len(events)))
	for _, ev := range events {
		g.pace()
		g.handle(ev)
	}
}

func (g *Gate) handle(ev *Event) {
	if v := g.judge(ev); v != Later {
		g.Answer(ev, v)
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
