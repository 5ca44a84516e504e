package fs

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// VolumeConfig describes a volume to serve.
type VolumeConfig struct {
	// ID is the volume's name in the mount.
	ID string
	// Root is the volume's tree and Orphans its directory of unlinked but
	// open files. A volume at rest holds no descriptor of them.
	Root, Orphans Dir
	// Ledger holds the volume's limit and use.
	Ledger *quota.Ledger
	// BeforeChange makes the volume's dirty mark durable. It is called before
	// the first change after AddVolume or SetClean; when it fails, the change
	// fails with EIO.
	BeforeChange func() error
	// Counted is closed once the ledger's use is right; changes wait for it.
	// Nil means that it is right.
	Counted <-chan struct{}
	// Group is whose the volume's files are seen as from the first request on; nil is
	// as they are on the disk. It must be what an earlier SetGroup has made of it.
	Group *uint32
}

// Dir is a directory: At itself, or what has that name in it. At remains the caller's.
type Dir struct {
	At   *os.File
	Name string
}

// describe is describeAt for a directory. ENOTDIR for something else.
func (d Dir) describe() (key handleKey, st unix.Stat_t, err error) {
	if d.Name == "" {
		key, st, err = describe(int(d.At.Fd()))
	} else {
		key, st, err = describeAt(int(d.At.Fd()), d.Name)
	}
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	return key, st, err
}

// volume is a served volume.
type volume struct {
	id       string
	state    *state.Region
	index    uint32 // of its record
	record   *state.Volume
	nodes    atomic.Int64 // in the table
	orphans  *node        // of its directory; in no table
	ledger   *quota.Ledger
	mark     func() error
	counted  <-chan struct{}
	root     *node
	ino      uint64 // of the root directory
	openings atomic.Int64

	// changing is held shared by every change and exclusively by Quiesce and
	// RemoveVolume.
	changing sync.RWMutex
	removed  atomic.Bool
	changes  atomic.Uint64

	// dirtyMu serialises the first change's call of mark.
	dirtyMu sync.Mutex
	dirty   atomic.Bool

	// floatMu guards floating: what removed files still hold that are mapped.
	floatMu  sync.Mutex
	floating quota.Usage

	// graveMu guards graves: the nodes that have one.
	graveMu sync.Mutex
	graves  map[*node]struct{}
	// emptying is held while graves are emptied; after node.mu.
	emptying sync.Mutex

	unchecked unchecked

	writers writers // in TierGate
	left    atomic.Pointer[Left]

	waits func() (over func()) // Options.Waits
}

// begin opens a change of the volume; end must follow when it returns nil. It
// waits for a recount and for Quiesce, and makes the dirty mark durable first.
func (v *volume) begin() error {
	if v.counted != nil {
		select {
		case <-v.counted:
		default:
			over := v.waits()
			<-v.counted
			over()
		}
	}
	v.enter()
	if v.removed.Load() {
		v.end()
		return unix.ESTALE
	}
	if !v.dirty.Load() {
		if err := v.markDirty(); err != nil {
			v.end()
			return err
		}
	}
	v.changes.Add(1)
	return nil
}

// enter is begin for what changes no file and must not make the volume dirty.
func (v *volume) enter() {
	if !v.changing.TryRLock() {
		over := v.waits()
		v.changing.RLock()
		over()
	}
	v.record.Changes.Add(1)
}

// end ends begin and enter.
func (v *volume) end() {
	v.record.Changes.Add(-1)
	v.changing.RUnlock()
}

func (v *volume) markDirty() error {
	v.dirtyMu.Lock()
	defer v.dirtyMu.Unlock()
	if v.dirty.Load() {
		return nil
	}
	if v.mark != nil {
		if err := v.mark(); err != nil {
			return fmt.Errorf("volume %s: dirty mark: %w", v.id, err)
		}
	}
	v.dirty.Store(true)
	return nil
}

// float moves the charge of a removed but mapped file in (sign 1) or out
// (sign -1) of the volume's floating charges.
func (v *volume) float(u quota.Usage, sign int64) {
	v.floatMu.Lock()
	defer v.floatMu.Unlock()
	v.floating.Bytes += uint64(sign) * u.Bytes
	v.floating.Inodes += uint64(sign) * u.Inodes
}

func newVolume(f *FS, id string, r *state.Volume, index uint32) *volume {
	v := &volume{id: id, state: f.state, record: r, index: index, graves: make(map[*node]struct{}), waits: f.waits}
	v.writers.init()
	return v
}

// AddVolume serves a volume. ErrExists when one of that id is served already.
func (f *FS) AddVolume(c VolumeConfig) error {
	key, st, err := c.Root.describe()
	if err != nil {
		return fmt.Errorf("volume %s: root: %w", c.ID, err)
	}
	orphansKey, orphansStat, err := c.Orphans.describe()
	if err != nil {
		return fmt.Errorf("volume %s: orphans: %w", c.ID, err)
	}
	w, err := viewOf(c.Group)
	if err != nil {
		return fmt.Errorf("volume %s: %w", c.ID, err)
	}
	defer f.changedVolumes()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.volumes[c.ID] != nil {
		return fmt.Errorf("volume %s: %w", c.ID, ErrExists)
	}
	v := f.kept[c.ID]
	kept := v != nil
	if delete(f.kept, c.ID); !kept {
		r, index, err := f.state.AddVolume(c.ID)
		if err != nil {
			return fmt.Errorf("volume %s: %w", c.ID, err)
		}
		v = newVolume(f, c.ID, r, index)
	}
	v.ledger, v.mark, v.counted = c.Ledger, c.BeforeChange, c.Counted
	v.startView(w, kept)
	v.ledger.KeepIn(&v.record.Bytes, &v.record.Inodes)
	if c.Counted == nil || isClosed(c.Counted) {
		v.record.Bits.Or(volumeCounted)
	}
	v.orphans = newNode(0, v, orphansKey, orphansStat.Mode)
	v.root, v.ino = f.nodes.pin(v, key, st.Mode), st.Ino
	f.volumes[c.ID] = v
	return nil
}

// RemoveVolume stops serving a volume: its nodes answer ESTALE from then on.
// ErrBusy when files of it are open and force is false,
// ErrNoVolume when it is not served.
func (f *FS) RemoveVolume(id string, force bool) error {
	v, err := f.volume(id)
	if err != nil {
		return err
	}
	v.changing.Lock()
	if n := v.openings.Load(); n > 0 && !force {
		v.changing.Unlock()
		return fmt.Errorf("volume %s: %d open: %w", id, n, ErrBusy)
	}
	gone := v.removed.Swap(true)
	v.changing.Unlock()
	if gone {
		return fmt.Errorf("volume %s: %w", id, ErrNoVolume)
	}
	f.mu.Lock()
	delete(f.volumes, id)
	f.mu.Unlock()
	f.changedVolumes()
	if k := f.kernel.Load(); k != nil {
		// ENOENT: the kernel has not heard of it, which is as good.
		if err := k.NotifyInvalEntry(rootIno, id); err != nil && !errors.Is(err, unix.ENOENT) {
			f.log.Sugar().Warnw("invalidate volume", "volume", id, "error", err)
		}
	}
	if f.gating != nil {
		f.shut(v)
	}
	f.dirs.purge(v)
	f.forgotten(f.nodes.unpin(v.root))
	f.closeGraves(v)
	if v.record.Bits.Or(volumeRemoved); v.nodes.Load() == 0 {
		f.state.RemoveVolume(v.index)
	}
	return nil
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// The bits of state.Volume. The next daemon knows them by these numbers.
const (
	// volumeRemoved: it is not served any more, and nodes of it may be left.
	volumeRemoved = 1 << iota
	// volumeCounted: its use is known.
	volumeCounted
	// volumeUnsettled: more may be charged than is used.
	volumeUnsettled
)

func (f *FS) volume(id string) (*volume, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	v := f.volumes[id]
	if v == nil {
		return nil, fmt.Errorf("volume %s: %w", id, ErrNoVolume)
	}
	return v, nil
}

// OpenFiles counts a volume's open files; 0 when it is not served.
func (f *FS) OpenFiles(id string) int {
	v, err := f.volume(id)
	if err != nil {
		return 0
	}
	return int(v.openings.Load())
}

// Changes counts the changing operations begun on a volume since it was added.
func (f *FS) Changes(id string) uint64 {
	v, err := f.volume(id)
	if err != nil {
		return 0
	}
	return v.changes.Load()
}

// Quiesce calls fn while no change of the volume is under way; changes that
// come wait. floating is what removed but mapped files and replaced files
// hold: it is in the ledger but in no tree. fn must not touch the mount.
func (f *FS) Quiesce(id string, fn func(floating quota.Usage) error) error {
	v, err := f.volume(id)
	if err != nil {
		return err
	}
	v.changing.Lock()
	defer v.changing.Unlock()
	if v.removed.Load() {
		return fmt.Errorf("volume %s: %w", id, ErrNoVolume)
	}
	if f.gating != nil {
		defer f.thaw(v)
		if err := f.freeze(v); err != nil {
			return fmt.Errorf("volume %s: %w", id, err)
		}
	}
	f.emptyGraves(v, nil)
	buried, err := f.buried(v)
	if err != nil {
		return fmt.Errorf("volume %s: %w", id, err)
	}
	v.floatMu.Lock()
	floating := v.floating.Add(buried)
	v.floatMu.Unlock()
	return fn(floating)
}

// ResetCharges makes every inode's charge be read from the disk when it is next
// needed. Call it inside Quiesce, after the ledger was set to what the disk
// holds: what is remembered may be what made the two differ. What removed but
// mapped files hold is not read again; it is in Quiesce's floating.
func (f *FS) ResetCharges(id string) {
	v, err := f.volume(id)
	if err != nil {
		return
	}
	if l := v.left.Load(); l != nil {
		l.reset()
	}
	nodes := f.nodes.of(v)
	// The kernel may have forgotten a node whose RELEASE is still to come.
	nodes = append(nodes, f.handles.nodesOf(v)...)
	for _, n := range nodes {
		n.lock()
		n.charged, n.dense = false, false
		n.setUnsureLocked(false)
		if n.writing != nil {
			f.resetWritingLocked(n.writing)
		}
		n.unlock()
	}
}

// SetClean makes the next change call BeforeChange again. Call it inside Quiesce.
func (f *FS) SetClean(id string) {
	if v, err := f.volume(id); err == nil {
		v.dirty.Store(false)
	}
}
