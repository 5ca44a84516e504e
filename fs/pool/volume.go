package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// minRoom is how much must be free on the pool's disk for a new volume, in
// bytes: what Badger may need for its logs and tables before it is compacted.
const minRoom = 32 << 20

// limitOf checks what was asked for and rounds it: bytes up to a block.
func (p *Pool) limitOf(bytes, inodes uint64) (quota.Usage, error) {
	switch {
	case bytes < MinBytes:
		return quota.Usage{}, fmt.Errorf("%w: a size of %d bytes, at least %d (1Mi) are needed", ErrInvalid, bytes, MinBytes)
	case bytes > MaxBytes:
		return quota.Usage{}, fmt.Errorf("%w: a size of %d bytes, at most %d (4Ei) are possible", ErrInvalid, bytes, uint64(MaxBytes))
	case inodes > math.MaxInt64:
		return quota.Usage{}, fmt.Errorf("%w: %d inodes, at most %d are possible", ErrInvalid, inodes, uint64(math.MaxInt64))
	}
	bytes = (bytes + p.rule.Block - 1) / p.rule.Block * p.rule.Block
	if inodes == 0 {
		inodes = defaultInodes(bytes)
	}
	return quota.Usage{Bytes: bytes, Inodes: inodes}, nil
}

func defaultInodes(bytes uint64) uint64 { return max(1, bytes/BytesPerInode) }

// Create makes a volume and serves it. It is durable when Create returns.
// ErrExists when there is one, ErrInvalid, ErrNoRoom.
func (p *Pool) Create(_ context.Context, name string, o CreateOptions) (Volume, error) {
	if err := CheckName(name); err != nil {
		return Volume{}, err
	}
	block, err := o.check()
	limit := quota.Usage{}
	if err == nil {
		limit, err = p.limitOf(o.Bytes, o.Inodes)
	}
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	record := meta.Volume{
		Name:        name,
		Limit:       limit,
		InodesFixed: o.Inodes != 0,
		Created:     now(),
		Block:       block,
		Wipe:        o.Wipe,
		Labels:      o.Labels,
	}
	fill := func(*meta.Volume) (quota.Usage, error) { return quota.Usage{}, p.makeTrees(record, o) }
	if block {
		record.Limit.Inodes = 1
		fill = func(*meta.Volume) (quota.Usage, error) { return record.Limit, p.makeBlock(record) }
	}
	defer p.names.take(name)()
	if _, err := p.find(name); err == nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, ErrExists)
	} else if !errors.Is(err, ErrNotFound) {
		return Volume{}, err
	}
	var need quota.Usage
	if block {
		need.Bytes = limit.Bytes
	}
	if err := p.needRoom(need); err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	release, err := p.promise(limit.Bytes)
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	defer release()
	v, err := p.create(record, fill)
	if err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	return p.describe(v), nil
}

// check reports what is wrong with the options, but the limits.
func (o CreateOptions) check() (block bool, err error) {
	switch o.Kind {
	case "", KindFilesystem:
	case KindBlock:
		block = true
	default:
		return false, fmt.Errorf("%w: kind %q: %q and %q are known", ErrInvalid, o.Kind, KindFilesystem, KindBlock)
	}
	if o.Mode&^os.ModePerm&^(os.ModeSetgid|os.ModeSticky) != 0 {
		return block, fmt.Errorf("%w: mode %v is not permission bits", ErrInvalid, o.Mode)
	}
	if o.UID < 0 || o.GID < 0 || o.UID >= math.MaxUint32 || o.GID >= math.MaxUint32 {
		return block, fmt.Errorf("%w: owner %d:%d", ErrInvalid, o.UID, o.GID)
	}
	if block && (o.Inodes != 0 || o.Mode != 0 || o.UID != 0 || o.GID != 0) {
		return block, fmt.Errorf("%w: a block volume has no inodes, mode or owner", ErrInvalid)
	}
	return block, checkLabels(o.Labels)
}

func checkLabels(labels map[string]string) error {
	size := 0
	for name, value := range labels {
		size += len(name) + len(value)
	}
	if size > MaxLabels {
		return fmt.Errorf("%w: labels of %d bytes, at most %d are possible", ErrInvalid, size, MaxLabels)
	}
	return nil
}

// spareInodes are what the pool itself may need on a filesystem that has a number of them.
const spareInodes = 1000

// needRoom returns ErrNoRoom unless the disk has so much, and what the records need.
func (p *Pool) needRoom(need quota.Usage) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(p.root.Fd()), &st); err != nil {
		return fmt.Errorf("statfs: %w", err)
	}
	if room := st.Bavail * uint64(st.Bsize); room < minRoom || room-minRoom < need.Bytes {
		return fmt.Errorf("%w: %d bytes are free, %d are needed", ErrNoRoom, room, need.Bytes+minRoom)
	}
	// btrfs says 0 of 0.
	if st.Files > 0 && st.Ffree < need.Inodes+spareInodes {
		return fmt.Errorf("%w: %d inodes are free, %d are needed", ErrNoRoom, st.Ffree, need.Inodes+spareInodes)
	}
	return nil
}

// create performs the steps of the package's documentation, and takes them back on failure. fill makes what the volume
// holds, says what that uses, and may add to the record. The name is locked and free.
func (p *Pool) create(record meta.Volume, fill func(*meta.Volume) (quota.Usage, error)) (*volume, error) {
	name := record.Name
	if err := p.strays(name); err != nil {
		return nil, err
	}
	record.State = meta.StateCreating
	if err := p.store.CreateVolume(record); err != nil {
		return nil, err
	}
	p.step("create: recorded")
	undo := func(err error) error { return errors.Join(err, p.remove(record)) }
	used, err := fill(&record)
	if err != nil {
		return nil, undo(err)
	}
	p.step("create: made")
	if err := p.store.PutCheckpoint(name, meta.Checkpoint{Used: used, BootID: p.bootID, Taken: time.Now().UTC()}, false); err != nil {
		return nil, undo(err)
	}
	record.State = meta.StateReady
	if err := p.store.PutVolume(record); err != nil {
		return nil, undo(err)
	}
	p.step("create: ready")
	v := &volume{name: name, record: record, ledger: quota.NewLedger(record.Limit, used), count: counted()}
	if err := p.serve(v); err != nil {
		return nil, undo(err)
	}
	p.mu.Lock()
	p.volumes[name] = v
	p.mu.Unlock()
	p.log.Info("volume created", zap.String("volume", name), zap.Stringer("limit", record.Limit))
	return v, nil
}

// serve has the filesystem serve a volume; a block volume needs none.
func (p *Pool) serve(v *volume) error {
	if v.record.Block {
		return p.openBlock(v)
	}
	return p.fs.AddVolume(fs.VolumeConfig{
		ID:           v.name,
		Root:         fs.Dir{At: p.volumesDir, Name: v.name},
		Orphans:      fs.Dir{At: p.orphansDir, Name: v.name},
		Ledger:       v.ledger,
		BeforeChange: func() error { return p.markDirty(v) },
		Counted:      v.count.ended,
		Group:        p.groupOf(v.name),
	})
}

// The kernel tells of a file's last close after close(2) has returned (fuse_file_put in fs/fuse/file.c): a deletion waits so long for
// what may be closed already, and looks so often.
const (
	releaseGrace = 500 * time.Millisecond
	releaseLook  = 10 * time.Millisecond
)

// Delete deletes a volume. It returns when the volume is gone for good; its
// space is freed in the background. ErrBusy when it is in use, unless forced.
func (p *Pool) Delete(_ context.Context, name string, o DeleteOptions) error {
	if err := CheckName(name); err != nil {
		return err
	}
	defer p.names.take(name)()
	v, err := p.find(name)
	if err != nil {
		return err
	}
	if err := p.delete(v, o.Force); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	p.log.Info("volume deleted", zap.String("volume", name))
	return nil
}

func (p *Pool) delete(v *volume, force bool) error {
	if err := p.checkUnpublished(v, force); err != nil {
		return err
	}
	switch {
	case v.missing:
	case v.record.Block:
		if err := p.checkDetached(v, force); err != nil {
			return err
		}
	default:
		if !force {
			if err := p.checkBinds(v.name); err != nil {
				return err
			}
		}
		err := p.fs.RemoveVolume(v.name, force)
		for end := time.Now().Add(releaseGrace); errors.Is(err, fs.ErrBusy) && time.Now().Before(end); {
			time.Sleep(releaseLook)
			err = p.fs.RemoveVolume(v.name, force)
		}
		if errors.Is(err, fs.ErrBusy) {
			return fmt.Errorf("%w: %d open files or directories; close them, or use --force", ErrBusy, p.fs.OpenFiles(v.name))
		} else if err != nil && !errors.Is(err, fs.ErrNoVolume) {
			return err
		}
	}
	_, err := p.store.UpdateVolume(v.name, func(r *meta.Volume) error { r.State = meta.StateDeleting; return nil })
	if err != nil {
		if !v.missing {
			err = errors.Join(err, p.serve(v))
		}
		return err
	}
	// From here on it is gone, whatever happens.
	p.step("delete: recorded")
	v.count.stop()
	p.mu.Lock()
	delete(p.volumes, v.name)
	p.mu.Unlock()
	return p.remove(v.record)
}

// checkBinds refuses a volume that is bind-mounted somewhere.
func (p *Pool) checkBinds(name string) error {
	mounts, err := transport.Mounts(transport.MountFilter{Source: p.source()})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.Root == "/"+name || len(m.Root) > len(name)+1 && m.Root[:len(name)+2] == "/"+name+"/" {
			return fmt.Errorf("%w: it is mounted on %s; unmount it, or use --force", ErrBusy, m.Mountpoint)
		}
	}
	return nil
}

// remove moves a volume's trees into the trash and removes its record. It may
// be repeated after a crash at any step.
func (p *Pool) remove(r meta.Volume) error {
	var err error
	if r.Block {
		err = p.trash.take(p.blocksDir, r.Name, r.Wipe)
	} else {
		err = p.trash.take(p.volumesDir, r.Name, r.Wipe)
		p.step("remove: tree moved")
		err = errors.Join(err, p.trash.take(p.orphansDir, r.Name, r.Wipe))
	}
	p.step("remove: moved")
	if err == nil {
		err = p.store.DeleteVolume(r.Name)
	}
	p.step("remove: forgotten")
	p.trash.wake()
	return err
}

// Resize changes a volume's limits at once, while it is in use. ErrBelowUse
// with the figure when a limit would be below what is in use; then nothing changes.
func (p *Pool) Resize(ctx context.Context, name string, o ResizeOptions) (Volume, error) {
	if err := CheckName(name); err != nil {
		return Volume{}, err
	}
	defer p.names.take(name)()
	v, err := p.find(name)
	if err == nil {
		err = v.count.wait(ctx)
	}
	if err != nil {
		return Volume{}, err
	}
	resize := p.resize
	if v.record.Block {
		resize = p.resizeBlock
	}
	if err := resize(v, o); err != nil {
		return Volume{}, fmt.Errorf("volume %s: %w", name, err)
	}
	return p.describe(v), nil
}

func (p *Pool) resize(v *volume, o ResizeOptions) error {
	old := v.ledger.Limit()
	bytes := old.Bytes
	if o.Bytes != 0 {
		bytes = o.Bytes
	}
	record := v.record
	inodes := o.Inodes
	switch {
	case inodes != 0:
		record.InodesFixed = true
	case record.InodesFixed || o.Bytes == 0:
		inodes = old.Inodes
	default:
		// It follows the size, but what is in use may stay.
		inodes = max(defaultInodes(bytes), min(old.Inodes, v.ledger.Used().Add(v.ledger.Reserved()).Inodes))
	}
	limit, err := p.limitOf(bytes, inodes)
	if err != nil {
		return err
	}
	if limit.Bytes > old.Bytes {
		release, err := p.promise(limit.Bytes - old.Bytes)
		if err != nil {
			return err
		}
		defer release()
	}
	lowered := quota.Usage{Bytes: min(old.Bytes, limit.Bytes), Inodes: min(old.Inodes, limit.Inodes)}
	if err := p.setLimit(v, lowered); err != nil {
		return err
	}
	p.step("resize: lowered")
	record.Limit = limit
	if err := p.store.PutVolume(record); err != nil {
		return errors.Join(err, p.setLimit(v, old))
	}
	p.step("resize: recorded")
	p.mu.Lock()
	v.record = record
	p.mu.Unlock()
	p.log.Info("volume resized", zap.String("volume", v.name), zap.Stringer("limit", limit))
	return p.setLimit(v, limit)
}

func (p *Pool) setLimit(v *volume, limit quota.Usage) error {
	if v.missing {
		return v.ledger.SetLimit(limit)
	}
	return p.fs.SetLimit(v.name, limit)
}
