package transport

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

var (
	// ErrServed is returned when Serve is called a second time.
	ErrServed = errors.New("transport: the connection was served already")

	// ErrInit is returned, wrapped, when the kernel and go-fuse do not come to terms on INIT.
	ErrInit = errors.New("transport: INIT failed")
)

// maxStackDepth lets files of a filesystem that itself stands on another one be passed through: two is FILESYSTEM_MAX_STACK_DEPTH of include/linux/fs.h.
const maxStackDepth = 2

// Conn is one mount and its threads. All methods may be called by several goroutines at a time.
type Conn struct {
	fs         fuse.RawFileSystem
	opts       Options
	log        *zap.Logger
	mountpoint string // absolute, as in mountinfo
	protocol   *fuse.ProtocolServer
	waker      *waker

	state        *state.Region
	ownState     bool // it ends with Serve
	resumed      bool // an earlier daemon has mounted
	work         work
	capabilities uint64

	// fdMu keeps fd open while notifications and ioctls use it. Serving threads do not
	// take it: the descriptor is closed after the last of them has ended.
	fdMu sync.RWMutex
	fd   int // -1 once closed

	served   atomic.Bool
	detached atomic.Bool // Unmount took the mount out of the tree
	dead     atomic.Bool // the kernel has ended the connection

	crew   crew
	panics atomic.Uint64

	failureMu sync.Mutex
	failure   error // guarded by failureMu: why a thread ended before the connection did

	counts [opcodeSlots]atomic.Uint64
}

// Mount mounts fs and answers the kernel's INIT. The mount is in the tree when
// Mount returns; whoever uses it waits until Serve is called, which must follow
// whatever happens: see the package's life cycle. Mount changes nothing if it
// fails. It needs CAP_SYS_ADMIN and CAP_SETPCAP.
func Mount(fs fuse.RawFileSystem, o Options) (*Conn, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("transport options: %w", err)
	}
	if err := tryThread(); err != nil {
		return nil, err
	}
	mountpoint, err := ResolveMountpoint(o.Mountpoint)
	if err != nil {
		return nil, fmt.Errorf("mount point: %w", err)
	}
	c, err := newConn(fs, o, mountpoint)
	if err != nil {
		return nil, err
	}
	if c.fd, err = mountFuse(&c.opts, mountpoint); err != nil {
		return nil, errors.Join(err, c.release())
	}
	if err := c.answerInit(); err != nil {
		err = errors.Join(err, c.Unmount(true))
		unix.Close(c.fd)
		return nil, errors.Join(err, c.release())
	}
	if missing := missingCapabilities(c.capabilities, o.DisabledCapabilities); len(missing) > 0 {
		c.log.Warn("the kernel lacks FUSE capabilities", zap.Strings("missing", missing))
	}
	return c, nil
}

func newConn(fs fuse.RawFileSystem, o Options, mountpoint string) (*Conn, error) {
	c := &Conn{
		fs:         fs,
		opts:       o,
		log:        o.Logger.With(zap.String("mountpoint", mountpoint)),
		mountpoint: mountpoint,
		state:      o.State,
		fd:         -1,
		crew:       crew{epoch: time.Now(), linger: defaultLinger, members: make(map[*thread]struct{})},
	}
	if c.state == nil {
		var err error
		if c.state, err = state.New("", "", o.requestSize()); err != nil {
			return nil, err
		}
		c.ownState = true
	}
	var err error
	if c.waker, err = newWaker(o.Wakeups); err != nil {
		if o.Wakeups == WakeupsFast {
			return nil, errors.Join(fmt.Errorf("wake-ups: %w", err), c.release())
		}
		c.log.Warn("processors may sleep between requests, which makes them slow", zap.Error(err))
	}
	logger, err := zap.NewStdLogAt(c.log.Named("go-fuse"), zapcore.DebugLevel)
	if err != nil {
		return nil, errors.Join(err, c.release())
	}
	c.protocol = fuse.NewProtocolServer(fs, &fuse.MountOptions{
		Name:                     o.Name,
		EnableAcl:                true,
		ExplicitDataCacheControl: true,
		IDMappedMount:            true,
		MaxStackDepth:            maxStackDepth,
		MaxWrite:                 o.MaxWrite,
		MaxBackground:            o.MaxBackground,
		ExtraCapabilities:        wantedCapabilities | o.ExtraCapabilities,
		DisabledCapabilities:     refusedCapabilities | o.DisabledCapabilities,
		Logger:                   logger,
		PanicHandler:             c.handlerPanicked,
	})
	return c, nil
}

// release lets go of what newConn has made.
func (c *Conn) release() error {
	c.waker.close()
	if c.ownState {
		return c.state.Close()
	}
	return nil
}

// Offsets in struct fuse_init_out, with the header before it.
const (
	initOutFlags  = outHeaderSize + 12
	initOutFlags2 = outHeaderSize + 32
	initOutEnd    = outHeaderSize + 64
)

// answerInit reads the first request, which is INIT, and replies to it.
func (c *Conn) answerInit() error {
	t, err := newThread(c)
	if err != nil {
		return err
	}
	defer c.state.FreeRequest(t.request)
	n, err := t.read()
	if err != nil {
		return fmt.Errorf("%w: read: %w", ErrInit, err)
	}
	c.state.SetInit(t.in[:n])
	t.request.Clear(t.in)
	c.counts[opInit].Add(1)
	reply, err := c.init()
	if err != nil {
		return err
	}
	if _, err := unix.Write(c.fd, reply); err != nil {
		return fmt.Errorf("%w: write: %w", ErrInit, err)
	}
	return nil
}

// init comes to terms with what the kernel has said in INIT, and returns the answer.
func (c *Conn) init() ([]byte, error) {
	message := c.state.Init()
	if len(message) < inHeaderSize || requestOpcode(message) != opInit {
		return nil, fmt.Errorf("%w: the kernel did not begin with it", ErrInit)
	}
	out := make([]byte, c.opts.requestSize())
	n, status := c.protocol.HandleRequest([][]byte{bytes.Clone(message)}, [][]byte{out})
	reply := out[:n]
	if !status.Ok() || replyStatus(reply) != 0 || len(reply) < initOutEnd {
		return nil, fmt.Errorf("%w: the answer is %v, %w, %d bytes", ErrInit, status, unix.Errno(-replyStatus(reply)), len(reply))
	}
	c.capabilities = uint64(binary.NativeEndian.Uint32(reply[initOutFlags:])) |
		uint64(binary.NativeEndian.Uint32(reply[initOutFlags2:]))<<32
	return reply, nil
}

// handlerPanicked is called by go-fuse on the goroutine whose handler has panicked.
func (c *Conn) handlerPanicked(cause any) fuse.Status {
	c.panics.Add(1)
	c.log.Error("panic in a request handler", zap.Any("panic", cause), zap.ByteString("stack", debug.Stack()))
	return fuse.EIO
}

// Capabilities returns the fuse.CAP_* bits that the kernel offered and that were accepted.
func (c *Conn) Capabilities() uint64 { return c.capabilities }

// Resends tells whether the kernel can send again what was not answered, without which nobody can
// take the connection over.
func (c *Conn) Resends() bool {
	const flags2, hasResend = inHeaderSize + 16, 1 << (39 - 32) // of struct fuse_init_in; FUSE_HAS_RESEND, Linux 6.9
	message := c.state.Init()
	return len(message) >= flags2+4 && binary.NativeEndian.Uint32(message[flags2:])&hasResend != 0
}

// Passthrough tells whether the kernel offers FOPEN_PASSTHROUGH.
func (c *Conn) Passthrough() bool { return c.capabilities&fuse.CAP_PASSTHROUGH != 0 }

// Mountpoint returns the path of the mount as mountinfo shows it.
func (c *Conn) Mountpoint() string { return c.mountpoint }

// FD returns the descriptor of /dev/fuse, or -1 when Serve has ended. It remains
// the Conn's; to keep it, for instance in another process, duplicate it. The
// mount lives until its last duplicate is closed or it is unmounted.
func (c *Conn) FD() int {
	c.fdMu.RLock()
	defer c.fdMu.RUnlock()
	return c.fd
}

// Counts returns how many requests were read so far, by the kernel's names of the operations
// ("LOOKUP"). Those that did not occur are absent; unknown ones are counted as "OTHER".
func (c *Conn) Counts() map[string]uint64 {
	counts := make(map[string]uint64)
	for op := range c.counts {
		n := c.counts[op].Load()
		switch {
		case n == 0:
		case op == 0:
			counts[opcodeNames[0]] += n
		default:
			counts[OpcodeName(uint32(op))] = n
		}
	}
	return counts
}

func (c *Conn) count(op uint32) {
	if op >= opcodeSlots {
		op = 0
	}
	c.counts[op].Add(1)
}

// DisablePoll makes the kernel learn that no file on the mount supports poll(2), so
// that it never asks again. After that this process may use its own mount through os.File. It
// must be called while Serve runs. Daemons do not need it; tests do.
func (c *Conn) DisablePoll() error {
	// go-fuse answers for this name in the root directory by itself.
	fd, err := unix.Open(filepath.Join(c.mountpoint, ".go-fuse-epoll-hack"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("disable poll: %w", err)
	}
	defer unix.Close(fd)
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("disable poll: %w", err)
	}
	return nil
}
