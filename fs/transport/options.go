package transport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"go.uber.org/zap"

	"github.com/croftfs/croft/fs/state"
)

const (
	defaultName          = "croft"
	defaultMaxWrite      = 1 << 20
	defaultMaxBackground = 64
	defaultMaxThreads    = 64

	// minMaxWrite is what the kernel raises a smaller max_write to
	// (process_init_reply in fs/fuse/inode.c).
	minMaxWrite = 4096

	// maxMaxWrite is what InitOut.MaxPages, 16 bits wide, can express in pages of 4 KiB.
	maxMaxWrite = 65535 * 4096
)

// Options say how to mount and serve. The zero value of a field means its default.
type Options struct {
	// Name makes the filesystem's type, "fuse.<Name>". Default "croft".
	Name string

	// FsName is the source that mountinfo shows. Default Name.
	FsName string

	// Mountpoint is an existing directory, and not itself a symbolic link.
	// It is made absolute and the links in its parents are resolved. It has no default.
	Mountpoint string

	// AllowDevices lets device nodes on the mount open their devices. Default false
	// (MS_NODEV): such nodes may exist, but a tenant's node must not reach a device of the host.
	AllowDevices bool

	// NoSuid makes set-id bits on the mount have no effect (MS_NOSUID). Default
	// false: they work, as on the local disk that a volume stands for.
	NoSuid bool

	// MaxWrite is the largest READ and WRITE, in bytes. Default 1 MiB, at least 4 KiB. It is
	// cut to what the sysctl fs.fuse.max_pages_limit allows.
	// Every serving thread has two buffers of about this size.
	MaxWrite int

	// MaxBackground is how many asynchronous requests (readahead, asynchronous direct
	// I/O) the kernel keeps under way. Default 64, at most 65535.
	MaxBackground int

	// MinThreads is how many threads serve as long as handlers compute, and stay
	// when all are idle. Default: one for two processors, at most 8.
	MinThreads int

	// MaxThreads is how many handlers may run at a time. Default 64.
	MaxThreads int

	// Wakeups says whether processors are kept from sleeping while requests come fast. Default WakeupsAuto.
	Wakeups Wakeups

	// ExtraCapabilities and DisabledCapabilities are fuse.CAP_* bits to ask for beyond this
	// package's own, and to leave out of them. Default none.
	ExtraCapabilities, DisabledCapabilities uint64

	// State is where what the next daemon must know of the requests is kept; its messages
	// have room for RequestSize, or more where MaxWrite is more. Default: memory of its own.
	State *state.Region

	// Notify hands the kernel a message that may have to wait for the lock of a directory: Notify of this package, which
	// is the default. A daemon that others are to take over from must do that in another process: who waits for that lock
	// cannot be killed, and whoever holds it waits for the next daemon.
	Notify func(dev int, message []byte) error

	// Step, when set, is called with "replied" when a request was answered, and its record not
	// cleared yet, so that a test can end the process there. The opcode is FUSE's.
	Step func(opcode uint32, step string)

	// Logger takes what goes wrong, and at debug level what go-fuse has to say. Default none.
	Logger *zap.Logger
}

// EnsureDefaults replaces zero values by the defaults.
func (o *Options) EnsureDefaults() {
	setDefault(&o.Name, defaultName)
	setDefault(&o.FsName, o.Name)
	setDefault(&o.MaxWrite, defaultMaxWrite)
	setDefault(&o.MaxBackground, defaultMaxBackground)
	setDefault(&o.Wakeups, WakeupsAuto)
	setDefault(&o.MinThreads, min(max(runtime.NumCPU()/2, 1), 8))
	setDefault(&o.MaxThreads, max(defaultMaxThreads, o.MinThreads))
	if o.Notify == nil {
		o.Notify = Notify
	}
	if o.Step == nil {
		o.Step = func(uint32, string) {}
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
}

// RequestSize is the room for a request's message with the default MaxWrite, in bytes.
var RequestSize = (&Options{MaxWrite: defaultMaxWrite}).requestSize()

// requestSize is the longest message or answer: besides the payload there is room for the
// longest fixed part, and two names.
func (o *Options) requestSize() int { return max(o.MaxWrite, maxXattr) + 2*os.Getpagesize() }

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

// Validate reports every fault of the options, after EnsureDefaults, as one joined error.
func (o *Options) Validate() error {
	var faults []error
	fault := func(bad bool, format string, args ...any) {
		if bad {
			faults = append(faults, fmt.Errorf(format, args...))
		}
	}
	fault(o.Name == "" || strings.ContainsAny(o.Name, ",./ \t\n\x00"), "name %q cannot be a filesystem subtype", o.Name)
	fault(strings.ContainsRune(o.FsName, 0), "filesystem name %q has a NUL byte", o.FsName)
	fault(o.Mountpoint == "", "no mount point given")
	fault(strings.ContainsRune(o.Mountpoint, 0), "mount point %q has a NUL byte", o.Mountpoint)
	fault(filepath.Clean(o.Mountpoint) == "/", "the root directory cannot be the mount point")
	fault(o.MaxWrite < minMaxWrite || o.MaxWrite > maxMaxWrite, "max write %d is not within %d and %d", o.MaxWrite, minMaxWrite, maxMaxWrite)
	fault(o.MaxBackground < 1 || o.MaxBackground > 65535, "max background %d is not within 1 and 65535", o.MaxBackground)
	fault(o.Wakeups != WakeupsAuto && o.Wakeups != WakeupsFast && o.Wakeups != WakeupsPlain, "wake-ups %q are not %s, %s or %s",
		o.Wakeups, WakeupsAuto, WakeupsFast, WakeupsPlain)
	fault(o.State != nil && o.State.RequestSize() < o.requestSize(), "the state region has no room for requests of %d bytes", o.requestSize())
	fault(o.MinThreads < 1, "min threads %d is less than 1", o.MinThreads)
	fault(o.MaxThreads < o.MinThreads, "max threads %d is less than min threads %d", o.MaxThreads, o.MinThreads)
	return errors.Join(faults...)
}
