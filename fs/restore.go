package fs

import (
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// A daemon goes on with what an earlier one has left in the state region: load finds
// the nodes, AddVolume finds the volumes again, Restore opens what is open, and Attach
// has the kernel's writers watched. What was under way comes again by itself.

// restored is what of a take-over is not finished.
type restored struct {
	// torn are the nodes to look at: they were being changed, or are more than a
	// name and a charge.
	torn []tornNode
	// unknown are those that the kernel does not know: they were open or pinned.
	unknown []*node
	// written are those that the kernel writes.
	written []*node
	// backings leads from the id of a backing file to the node that has it.
	backings map[int32]uint64
	// opened leads from the unique of a request to the handle that it has made.
	opened map[uint64]uint64
}

type tornNode struct {
	*node
	busy bool // it was being changed
}

// load has the records of the region lead to the volumes and nodes that they are of.
func (f *FS) load() error {
	t := &f.nodes
	t.mu.Lock()
	defer t.mu.Unlock()
	a := &t.asleep
	f.state.Volumes(func(i uint32, r *state.Volume) {
		v := newVolume(f, r.Name(), r, i)
		for int(i) >= len(a.volumes) {
			a.volumes = append(a.volumes, nil)
		}
		a.volumes[i] = v
		if r.Bits.Load()&volumeRemoved != 0 {
			v.removed.Store(true)
			return
		}
		f.kept[v.id] = v
	})
	slots, records := f.state.NodeSlots()
	a.slots, a.keys = make([]uint64, (slots+63)/64), make([]uint64, keyTable(records))
	nodes := make([]int64, len(a.volumes))
	type found struct {
		slot uint32
		busy bool
	}
	var torn []found
	var unknown []uint32
	f.restored.backings = make(map[int32]uint64)
	err := f.state.Nodes(func(slot uint32, r *state.Node) {
		if int(r.Volume) >= len(a.volumes) || a.volumes[r.Volume] == nil { // its record was freed, and the node was not yet
			f.state.RemoveNode(f.state.NodeIn(slot))
			return
		}
		nodes[r.Volume]++
		t.sleepLocked(slot, r)
		if r.Busy || r.Bits.Load()&(nameless|markWritten|markUnsure) != 0 {
			torn = append(torn, found{slot, r.Busy})
		}
		if r.Lookups == 0 {
			unknown = append(unknown, slot)
		}
		if r.Backing > 0 {
			f.restored.backings[r.Backing] = r.ID
		}
	})
	for i, v := range a.volumes {
		if v == nil {
			continue
		}
		v.nodes.Add(nodes[i])
		if v.removed.Load() && nodes[i] == 0 {
			f.state.RemoveVolume(v.index)
		}
	}
	for _, r := range torn {
		f.restored.torn = append(f.restored.torn, tornNode{t.awakeLocked(f.state.NodeIn(r.slot).ID), r.busy})
	}
	for _, slot := range unknown {
		f.restored.unknown = append(f.restored.unknown, t.awakeLocked(f.state.NodeIn(slot).ID))
	}
	return err
}

// Kept tells whether an earlier daemon has left what it knew of a volume, and whether
// that is right: it was not being counted.
func (f *FS) Kept(id string) (used quota.Usage, ok bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	v := f.kept[id]
	if v == nil || v.record.Bits.Load()&volumeCounted == 0 {
		return used, false
	}
	return quota.Usage{Bytes: uint64(v.record.Bytes.Load()), Inodes: uint64(v.record.Inodes.Load())}, true
}

// SetCounted is called when a volume's recount has ended.
func (f *FS) SetCounted(id string) {
	if v, err := f.volume(id); err == nil {
		v.record.Bits.Or(volumeCounted)
	}
}

// Unsettled tells whether more may be charged than is used, since an earlier daemon
// ended while it changed the volume: a recount finds out.
func (f *FS) Unsettled(id string) bool {
	v, err := f.volume(id)
	return err == nil && v.record.Bits.Load()&volumeUnsettled != 0
}

// SetSettled is called inside Quiesce after a recount.
func (f *FS) SetSettled(id string) {
	if v, err := f.volume(id); err == nil {
		v.record.Bits.And(^uint32(volumeUnsettled))
	}
}

// Restore is called when all volumes are added.
func (f *FS) Restore() error {
	f.mu.Lock()
	for id, v := range f.kept { // of which the records tell nothing any more
		v.removed.Store(true)
		v.record.Bits.Or(volumeRemoved)
		delete(f.kept, id)
	}
	volumes := make([]*volume, 0, len(f.volumes))
	for _, v := range f.volumes {
		volumes = append(volumes, v)
	}
	f.mu.Unlock()
	for _, v := range volumes {
		if v.record.Changes.Swap(0) != 0 {
			v.record.Bits.Or(volumeUnsettled)
		}
	}
	gone := make(map[uint64]*unix.Stat_t)
	f.state.Gone(func(g *state.Gone) bool {
		st := *(*unix.Stat_t)(unsafe.Pointer(&g.Stat[0]))
		gone[g.Node] = &st
		return true // those that are needed are kept again
	})
	var mu sync.Mutex
	var errs []error
	together(f.restored.torn, func(n tornNode) {
		n.lock()
		err := f.mendLocked(n.node, gone[n.id], n.busy)
		written := err == nil && n.has(markWritten) && !n.vol.removed.Load()
		n.unlock()
		mu.Lock()
		defer mu.Unlock()
		if written {
			f.restored.written = append(f.restored.written, n.node)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("volume %s: inode of handle %s: %w", n.vol.id, n.key.name(), err))
		}
	})
	f.restored.torn = nil
	f.restored.opened = make(map[uint64]uint64)
	f.state.Handles(func(r *state.Handle) {
		if err := f.reopen(r); err != nil {
			errs = append(errs, fmt.Errorf("open file: %w", err))
		}
	})
	for _, n := range f.restored.unknown {
		f.nodes.hold(n)
		f.forgottenIfUnknown(n)
	}
	f.restored.unknown = nil
	return errors.Join(errs...)
}

// forgottenIfUnknown lets go of a node that is held, unless it is known or wanted otherwise.
func (f *FS) forgottenIfUnknown(n *node) {
	if f.nodes.knows(n) {
		f.nodes.drop(n)
	} else {
		f.forgotten(n)
	}
}

// mendLocked finds out what has become of a node. st is what it was when it lost its last name; busy tells that it was being
// changed.
func (f *FS) mendLocked(n *node, st *unix.Stat_t, busy bool) error {
	r := n.rec()
	if n.vol.record.Bits.Load()&volumeCounted == 0 {
		// It is going to be counted, and only what a daemon before the earlier one has
		// left can be open for writing: that is found again.
		r.Known = false
		n.set(markWritten|markLeft, false)
	}
	known := r.Known
	n.set(refused, false) // the sampler says so again
	if n.vol.removed.Load() {
		return nil
	}
	if !busy && !n.has(nameless|markUnsure) { // it is written, and restoreWritings' to look at
		return nil
	}
	fd, err := f.openNode(n, unix.O_PATH)
	if isGone(err) {
		if st == nil {
			st = &unix.Stat_t{Mode: uint32(n.typ)<<12 | 0o600}
		}
		n.setGoneLocked(st)
		n.set(markWritten, false)
		if known {
			f.creditAllLocked(n, quota.Usage{Bytes: r.Charge, Inodes: 1})
		}
		return nil
	} else if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var now unix.Stat_t
	if err := unix.Fstat(fd, &now); err != nil {
		return err
	}
	orphan := orphanName(now.Ino)
	err = f.withFD(n.vol.orphans, func(orphans int) error {
		switch there := !n.isDir() && exists(orphans, orphan); {
		case there && now.Nlink == 1:
			n.setOrphanLocked(orphan)
			n.replaced, n.exclusive = n.has(markReplaced), n.has(markExclusive)
		case there: // a second name, for a replacement that has not come to it
			return unix.Unlinkat(orphans, orphan, 0)
		case n.has(markOrphan):
			n.setOrphanLocked("")
		}
		return nil
	})
	if err != nil {
		return err
	}
	if now.Nlink == 0 && !n.isDir() && n.orphan == "" { // it is mapped
		n.setGoneLocked(&now)
		if known {
			n.lingers = true
			n.held = quota.Usage{Bytes: r.Charge, Inodes: 1}
			n.vol.float(n.held, 1)
		}
	}
	if known && !n.has(markWritten) {
		n.setUnsureLocked(true)
		return f.recountLocked(n, fd, 0)
	}
	return nil
}

// reopen opens the file of a handle again.
func (f *FS) reopen(r *state.Handle) error {
	if r.Request != 0 {
		f.restored.opened[r.Request] = r.ID
	}
	h := &file{flags: r.Flags, record: r, fd: -1}
	n := f.nodes.get(r.Node)
	if n == nil {
		f.state.RemoveHandle(r)
		return nil
	}
	h.node = n
	f.handles.open[r.ID] = h
	n.opens++
	f.nodes.hold(n)
	n.vol.openings.Add(1)
	var err error
	switch {
	case r.Bits&handleWrites != 0:
		h.writes = true // its descriptor is the writing's
	case n.io == ioPassed && !isWriter(r.Flags):
		if n.backing.fd < 0 {
			n.backing.fd, err = f.openNode(n, unix.O_RDONLY)
		}
		h.fd, h.borrowed = n.backing.fd, true
	default:
		h.fd, err = f.openNode(n, openFlags(r.Flags))
	}
	if isGone(err) {
		return nil // all that is asked of it is answered as of one that is gone
	}
	return err
}

// together calls f with each of items, on every processor.
func together[T any](items []T, f func(T)) {
	var all sync.WaitGroup
	for share := range slices.Chunk(items, len(items)/runtime.GOMAXPROCS(0)+1) {
		all.Go(func() {
			for _, item := range share {
				f(item)
			}
		})
	}
	all.Wait()
}

// restoreWritings has the gate go on with what the kernel writes, several volumes at a time.
func (f *FS) restoreWritings() error {
	written := make(map[*volume][]*node)
	for _, n := range f.restored.written {
		written[n.vol] = append(written[n.vol], n)
	}
	f.restored.written = nil
	writers := f.handles.writers()
	var mu sync.Mutex
	var errs []error
	together(slices.Collect(maps.Keys(written)), func(v *volume) {
		for _, n := range written[v] {
			n.lock()
			err := f.restoreWritingLocked(n, writers[n])
			n.unlock()
			if err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("volume %s: inode of handle %s: %w", v.id, n.key.name(), err))
				mu.Unlock()
			}
		}
		if ws := &v.writers; v.ledger.Free().Bytes < ws.gateBelow() {
			f.gateVolume(v)
		} else {
			f.freeAll(v)
		}
	})
	return errors.Join(errs...)
}

func (f *FS) restoreWritingLocked(n *node, handles []*file) error {
	fd, err := f.openNode(n, unix.O_RDWR)
	if isGone(err) {
		return f.mendLocked(n, nil, true)
	} else if err != nil {
		return err
	}
	w := &writing{n: n, fd: fd, marked: true, left: n.has(markLeft), stores: n.has(stores)}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		syscall.Close(fd)
		return err
	}
	w.ino = st.Ino
	if w.left { // see holdLocked
		w.appends = true
		f.nodes.mu.Lock()
		n.pins++
		f.nodes.mu.Unlock()
	}
	for _, h := range handles {
		h.fd, h.borrowed = fd, true
		w.opens++
		w.appends = w.appends || h.flags&unix.O_APPEND != 0
	}
	// It is held until what it has grown by is known.
	n.vol.writers.frozen.Store(true)
	defer n.vol.writers.frozen.Store(false)
	if err := f.addWriting(w); err != nil {
		return err
	}
	n.ownRareLocked().writing = w
	n.charged, n.dense = false, false
	if err := f.readWrittenLocked(w); err != nil {
		return err
	}
	if w.opens == 0 && !w.stores && !w.left {
		f.endWritingLocked(w)
	}
	return nil
}

// TakeBack takes back what the answer to a request was to give away, and did not;
// it is called before the request is worked on again.
func (f *FS) TakeBack(q *state.Request) {
	if fh, ok := f.restored.opened[q.Unique()]; ok {
		f.release(fh)
	}
	for _, id := range q.Given() {
		f.Forget(id, 1)
	}
	q.TakeBack()
	if q.Effect.Load() == state.Begun {
		return
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, v := range f.volumes {
		if v.index != q.Volume {
			continue
		}
		if q.Effect.Load() == state.Trying {
			v.ledger.Claim(quota.Usage{Bytes: q.Bytes, Inodes: q.Inodes})
		}
		if q.Orphan != 0 {
			f.takeBackOrphan(q, v)
		}
	}
}

// takeBackOrphan removes a file without a name that nobody has heard of: another is made. If it is
// charged, that one is not, unless the end of its handle has reaped it.
func (f *FS) takeBackOrphan(q *state.Request, v *volume) {
	err := f.withFD(v.orphans, func(orphans int) error { return unix.Unlinkat(orphans, orphanName(q.Orphan), 0) })
	switch {
	case err == unix.ENOENT && q.Effect.Load() == state.Done:
		q.Effect.Store(state.Begun)
	case err != nil && err != unix.ENOENT:
		f.log.Sugar().Errorw("orphan", "volume", v.id, "error", err)
	}
	q.Orphan = 0
}

// closeLeaked gives up the backing files that an earlier daemon may have registered and
// not noted: the kernel counts their ids up (idr_alloc_cyclic in fs/fuse/backing.c).
func (f *FS) closeLeaked(k Kernel) {
	const atOnce = 1 << 10 // more threads there are not
	last := f.state.LastBacking()
	for id := max(last-atOnce, 1); last > 0 && id <= last+atOnce; id++ {
		if node, ok := f.restored.backings[id]; ok {
			if r := f.state.NodeIn(state.Slot(node)); r.ID == node && r.Backing == id {
				continue
			}
		}
		_ = k.CloseBacking(id) // ENOENT: it is none
	}
	f.restored.backings = nil
}

// Leave ends what the FS does by itself and lets go of nothing: the next daemon goes
// on. No request is under way, and none comes.
func (f *FS) Leave() error {
	if f.gating == nil {
		return nil
	}
	f.sampler.stop()
	return f.gating.gate.Detach()
}
