package fs

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

const (
	// rootIno is the inode number of the directory that lists the volumes; no
	// backing filesystem gives it to a file (ext4 keeps 1 for bad blocks, xfs
	// begins at 128, btrfs at 256).
	rootIno = 1

	// cacheTimeout is how long the kernel may keep names and attributes.
	// Nobody but this mount changes a volume's tree, so it is long.
	cacheTimeout = time.Hour

	// storeTimeout is that for the attributes of a file that mappings store into.
	storeTimeout = time.Second

	// maxCopy bounds one copy_file_range request, in bytes; callers loop.
	maxCopy = 64 << 20

	// dirCacheSize is how many directory descriptors are kept open.
	dirCacheSize = 1024
)

// Options configure an FS.
type Options struct {
	// PoolDir is the pool's directory, opened for reading; FS owns it from
	// then on. It anchors open_by_handle_at(2) and statfs(2).
	PoolDir *os.File
	// Rule is the pool's charge rule.
	Rule quota.Rule
	// State is where the FS keeps what the next daemon must know. If it holds what an
	// earlier daemon has left, Restore goes on with that. Default: memory of its own.
	State *state.Region
	// Step, when set, is called between the steps of operations that cannot be done
	// twice, so that a test can end the process there. The opcode is FUSE's.
	Step func(opcode uint32, step string)
	// Waits, when set, is called on a serving thread that is about to wait for
	// a recount or for Quiesce, and what it returns when the wait is over: the
	// transport can serve others by another thread meanwhile. Default: nothing.
	Waits func() (over func())
	// Logger receives what an operation cannot tell its caller. Default: none.
	Logger *zap.Logger
}

// FS serves a pool's volumes. Its fuse.RawFileSystem methods are called by the
// transport, each on an OS thread of its own that holds fs capabilities,
// umask 0 and an unshared fs_struct; they may be called concurrently.
type FS struct {
	fuse.RawFileSystem // answers what we do not serve; see api_check.go

	pool    *os.File
	rule    quota.Rule
	log     *zap.Logger
	isExt4  bool
	isXFS   bool
	isBtrfs bool
	// smallBlocks tells that the backing filesystem's blocks are smaller than the rule's.
	smallBlocks bool
	waits       func() (over func())
	holdAlways  bool  // TierHold
	maxOpen     int64 // open files a volume

	state *state.Region
	// own tells that the region is the FS's.
	own  bool
	step func(opcode uint32, step string)
	// kept are volumes of an earlier daemon that are not served yet; guarded by mu.
	kept     map[string]*volume
	restored restored

	nodes   nodeTable
	dirs    dirCache
	handles handleTable

	kernel  atomic.Pointer[attachment]
	gating  *gating // nil but in TierGate
	sampler sampler
	left    leftFiles

	// mu guards volumes.
	mu      sync.RWMutex
	volumes map[string]*volume
	// changed is when there was a change of which volumes there are, in nanoseconds since 1970; see changedVolumes.
	changed atomic.Int64
}

// New returns an FS without volumes.
func New(o Options) (*FS, error) {
	if o.PoolDir == nil {
		return nil, errors.New("fs: Options.PoolDir is missing")
	}
	if o.Rule.Block == 0 {
		return nil, errors.New("fs: Options.Rule.Block is zero")
	}
	if o.Waits == nil {
		o.Waits = func() func() { return func() {} }
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Step == nil {
		o.Step = func(uint32, string) {}
	}
	own := o.State == nil
	if own {
		var err error
		if o.State, err = state.New("", "", 0); err != nil {
			return nil, fmt.Errorf("fs: %w", err)
		}
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(o.PoolDir.Fd()), &st); err != nil {
		return nil, fmt.Errorf("fs: statfs of the pool: %w", err)
	}
	f := &FS{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		pool:          o.PoolDir,
		rule:          o.Rule,
		log:           o.Logger,
		isExt4:        st.Type == unix.EXT4_SUPER_MAGIC,
		isXFS:         st.Type == unix.XFS_SUPER_MAGIC,
		isBtrfs:       st.Type == unix.BTRFS_SUPER_MAGIC,
		smallBlocks:   uint64(st.Bsize) < o.Rule.Block,
		waits:         o.Waits,
		maxOpen:       openShare(),
		volumes:       make(map[string]*volume),
		state:         o.State,
		own:           own,
		step:          o.Step,
		kept:          make(map[string]*volume),
	}
	f.changed.Store(time.Now().UnixNano())
	f.nodes.init(f.state)
	f.dirs.init(dirCacheSize)
	f.handles.init(f.state)
	if err := f.load(); err != nil {
		return nil, fmt.Errorf("fs: %w", err)
	}
	if err := f.sweepBrakes(); err != nil {
		return nil, fmt.Errorf("fs: inodes that a crash has left braked: %w", err)
	}
	return f, nil
}

// Close closes every descriptor. Call it when the transport has ended.
func (f *FS) Close() error {
	for _, h := range f.handles.drain() {
		h.close()
		h.node.lock()
		if h.writes {
			f.stopWritingLocked(h)
		}
		f.closedLocked(h.node)
		h.node.unlock()
	}
	f.closeLeft()
	err := f.stopGate()
	f.dirs.purge(nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, v := range f.volumes {
		v.removed.Store(true)
		f.closeGraves(v)
		delete(f.volumes, id)
	}
	if f.own {
		err = errors.Join(err, f.state.Close())
	}
	return errors.Join(err, f.pool.Close())
}

// request finds what is kept of a request under work; nil when nothing is.
func (f *FS) request(in *fuse.InHeader) *state.Request { return f.state.Find(in.Unique) }

// String names the filesystem; part of fuse.RawFileSystem.
func (f *FS) String() string { return "croft" }

// SetDebug does nothing: requests are traced by the transport.
func (f *FS) SetDebug(bool) {}

// Init does nothing: the transport answers INIT.
func (f *FS) Init(*fuse.Server) {}

// OnUnmount does nothing: Close ends the filesystem.
func (f *FS) OnUnmount() {}
