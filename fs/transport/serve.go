package transport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

const (
	// threadName is what /proc/<pid>/task/<tid>/comm shows.
	threadName = "croft-serve"

	// secbitNoSetuidFixup is SECBIT_NO_SETUID_FIXUP of include/uapi/linux/securebits.h:
	// capabilities stay as they are when a user id changes from or to 0.
	secbitNoSetuidFixup = 1 << 2

	// maxXattr is the largest value of an extended attribute: XATTR_SIZE_MAX of include/uapi/linux/limits.h.
	maxXattr = 64 << 10
)

// Serve serves requests until the connection ends. It returns nil if that was an unmount,
// otherwise why it could not go on, in which case the mount has been detached. Before it returns all handlers have
// returned, the descriptor is closed, and OnUnmount has been called. The first
// call does this; others return ErrServed at once.
func (c *Conn) Serve() error {
	if !c.served.CompareAndSwap(false, true) {
		return ErrServed
	}
	if c.resumed {
		if err := c.resume(); err != nil {
			c.fail(err)
		}
	}
	for range max(c.opts.MinThreads, min(len(c.work.todo), c.opts.MaxThreads)) {
		c.startThread()
	}
	c.crew.running.Wait()

	var err error
	if !c.dead.Load() {
		c.failureMu.Lock()
		err = c.failure
		c.failureMu.Unlock()
		err = errors.Join(err, c.Unmount(true))
		c.dead.Store(true)
	}
	c.fdMu.Lock()
	unix.Close(c.fd)
	c.fd = -1
	c.fdMu.Unlock()
	c.fs.OnUnmount()
	return errors.Join(err, c.release())
}

// onOwnThread runs fn on a thread that ends with it. That is never the process's first
// thread, which could not end, and whose umask and credentials are what others see of the process.
func onOwnThread(fn func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			fn()
			return // still locked: the runtime ends the thread
		}
		bound := make(chan struct{})
		go func() {
			runtime.LockOSThread()
			close(bound)
			fn()
		}()
		<-bound // as long as the first thread is locked here, the other goroutine cannot get it
		runtime.UnlockOSThread()
	}()
}

// prepareThread makes the calling thread fit to run handlers: see the package comment.
func prepareThread() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the thread's umask: %w", err)
	}
	unix.Umask(0)
	bits, err := unix.PrctlRetInt(unix.PR_GET_SECUREBITS, 0, 0, 0, 0)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_SECUREBITS, uintptr(bits|secbitNoSetuidFixup), 0, 0, 0)
	}
	if err != nil {
		return fmt.Errorf("set the thread's securebits (CAP_SETPCAP is needed): %w", err)
	}
	name, err := unix.BytePtrFromString(threadName)
	if err == nil {
		err = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(name)), 0, 0, 0)
	}
	return err
}

// tryThread tells whether prepareThread works in this process.
func tryThread() error {
	result := make(chan error, 1)
	onOwnThread(func() { result <- prepareThread() })
	return <-result
}

// fail logs an error that ends a thread, and keeps the first for Serve.
func (c *Conn) fail(err error) {
	c.log.Error("a serving thread ended", zap.Error(err))
	c.failureMu.Lock()
	defer c.failureMu.Unlock()
	if c.failure == nil {
		c.failure = err
	}
}

// thread holds what a serving thread reuses from request to request.
type thread struct {
	c  *Conn
	fd int

	// request is the record of what the thread works on; in is its message.
	request       *state.Request
	in, out       []byte
	inIov, outIov [1][]byte // here, so as not to be allocated for each request
	pace          pace

	since  atomic.Int64 // when the handler began, in nanoseconds after crew.epoch; 0 when none runs
	isSlow atomic.Bool  // the thread is counted in crew.slow
}

func newThread(c *Conn) (*thread, error) {
	t := &thread{
		c:    c,
		fd:   c.fd,
		pace: pace{waker: c.waker},
		out:  pageBuffer(outHeaderSize, c.opts.requestSize()),
	}
	var err error
	if t.request, t.in, err = c.state.TakeRequest(messageLead); err != nil {
		return nil, fmt.Errorf("record of requests: %w", err)
	}
	return t, nil
}

// messageLead is what of a message comes before the data of a WRITE, in bytes.
const messageLead = int(unsafe.Sizeof(fuse.WriteIn{}))

// pageBuffer returns a buffer of lead+size bytes whose byte lead is the first of a page.
func pageBuffer(lead, size int) []byte {
	page := os.Getpagesize()
	buf := make([]byte, lead+size+page)
	skip := page - int((uintptr(unsafe.Pointer(&buf[0]))+uintptr(lead))%uintptr(page))
	return buf[skip : skip+lead+size : skip+lead+size]
}

// read waits for a request and returns its length. It fails with ENODEV when the connection has ended.
func (t *thread) read() (int, error) {
	for {
		n, err := unix.Read(t.fd, t.in)
		switch {
		case err == nil && n >= inHeaderSize:
			t.c.state.Bind(t.request, requestUnique(t.in))
			return n, nil
		case err == nil:
			return 0, fmt.Errorf("a request of %d bytes: %w", n, unix.EIO)
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOENT):
			// ENOENT: the request was interrupted before it was copied.
		default:
			return 0, err
		}
	}
}

// serve handles the request of n bytes and writes the reply.
func (t *thread) serve(n int) {
	defer func() {
		t.c.opts.Step(requestOpcode(t.in), "replied")
		t.request.Clear(t.in)
	}()
	op, unique := requestOpcode(t.in), requestUnique(t.in)
	t.c.count(op)
	t.pace.count()
	reply := t.handle(n)
	// go-fuse answers EAGAIN to a second INTERRUPT of a request, whereupon the
	// kernel sends it again, and again. None need be answered.
	if len(reply) == 0 || op == opInterrupt {
		return
	}
	// As a system call that may block: the kernel ends the request in it, which can
	// be the end of an inode whose pages wait for another request.
	_, err := unix.Write(t.fd, reply)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return // ENOENT: whoever asked has been killed, or the connection has ended
	}
	t.c.log.Error("the kernel refused a reply", zap.String("opcode", OpcodeName(op)), zap.Uint64("unique", unique),
		zap.Int("length", len(reply)), zap.Int32("status", replyStatus(reply)), zap.Error(err))
	// A reply that the kernel cannot parse leaves the request waiting. One of EIO ends it,
	// and is ENOENT if the request was ended already.
	_, _ = unix.Write(t.fd, t.errorReply(unique, unix.EIO))
}

// handle runs the request's handler and returns the reply, which is empty if none is due.
func (t *thread) handle(n int) (reply []byte) {
	op, unique := requestOpcode(t.in), requestUnique(t.in)
	failed := func() []byte {
		if !expectsReply(op) {
			return nil
		}
		return t.errorReply(unique, unix.EIO)
	}
	defer func() {
		// go-fuse recovers from a panic in a handler, but not from one in a
		// ReadResult, nor from its own.
		if cause := recover(); cause != nil {
			t.c.handlerPanicked(cause)
			reply = failed()
		}
	}()
	if op == opForget || op == opBatchForget {
		forget(t.c.fs, t.request, t.in[:n])
		return nil
	}
	t.inIov[0], t.outIov[0] = t.in[:n], t.out
	size, status := t.c.protocol.HandleRequest(t.inIov[:], t.outIov[:])
	if !status.Ok() {
		t.c.log.Error("a request could not be handled", zap.String("opcode", OpcodeName(op)),
			zap.Int("length", n), zap.Stringer("status", status))
		return failed()
	}
	return t.out[:size]
}

// forget runs the handler of FORGET for each node of the request that was not forgotten
// yet. There are millions when the kernel makes room, and go-fuse would allocate for each.
func forget(fs fuse.RawFileSystem, q *state.Request, message []byte) {
	body := message[inHeaderSize:]
	if requestOpcode(message) == opForget { // struct fuse_forget_in { u64 nlookup; }
		if len(body) >= 8 && q.Progress == 0 {
			q.Progress++
			fs.Forget(requestNode(message), binary.NativeEndian.Uint64(body))
		}
		return
	}
	const head, one = 8, 16 // struct fuse_batch_forget_in { u32 count, dummy; }, then struct fuse_forget_one
	body = body[min(head, len(body)):]
	for body = body[min(int(q.Progress)*one, len(body)):]; len(body) >= one; body = body[one:] {
		q.Progress++
		fs.Forget(binary.NativeEndian.Uint64(body), binary.NativeEndian.Uint64(body[8:]))
	}
}

// errorReply overwrites the reply buffer.
func (t *thread) errorReply(unique uint64, errno unix.Errno) []byte {
	putOutHeader(t.out, outHeaderSize, -int32(errno), unique)
	return t.out[:outHeaderSize]
}

// replyStatus returns the negated errno in a reply's header.
func replyStatus(reply []byte) int32 {
	if len(reply) < outHeaderSize {
		return -int32(unix.EIO)
	}
	return int32(binary.NativeEndian.Uint32(reply[4:]))
}
