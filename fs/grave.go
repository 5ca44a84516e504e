package fs

import (
	"syscall"

	"github.com/croftfs/croft/quota"
)

// A file that rename(2) replaces is often being looked up by somebody who
// reads it. On a disk such a reader gets the old file or the new one. Here its
// OPEN comes for an inode that has no name any more; ESTALE makes the kernel
// look the name up again, once, and the next replacement may come in between.
// So a replaced inode that the kernel knows is kept by a descriptor until
// the kernel forgets it, which is at once when nobody is on the way. Its charge
// stays in the ledger until then, but gives way when there is no room.

// maxGraves bounds the descriptors of graves, a volume.
const maxGraves = 256

// buryLocked keeps a replaced inode; false when it need not or cannot be kept.
func (f *FS) buryLocked(w *victim) bool {
	n, v := w.n, w.n.vol
	if n.isDir() || w.st.Nlink > 1 || !f.nodes.knows(n) {
		return false
	}
	if v.graveCount() >= maxGraves {
		f.emptyGraves(v, nil)
	}
	v.graveMu.Lock()
	defer v.graveMu.Unlock()
	if len(v.graves) >= maxGraves {
		return false
	}
	n.setGoneLocked(w.lastStat())
	n.grave, w.fd = w.fd, -1
	v.graves[n] = struct{}{}
	return true
}

func (v *volume) graveCount() int {
	v.graveMu.Lock()
	defer v.graveMu.Unlock()
	return len(v.graves)
}

func (v *volume) listGraves() []*node {
	v.graveMu.Lock()
	defer v.graveMu.Unlock()
	if len(v.graves) == 0 {
		return nil
	}
	nodes := make([]*node, 0, len(v.graves))
	for n := range v.graves {
		nodes = append(nodes, n)
	}
	return nodes
}

// emptyGraves frees what is in the volume's graves and not open, in one of them
// when only is not nil. The caller is within a change. It may hold a node.mu, so
// those that are held are passed over.
func (f *FS) emptyGraves(v *volume, only *node) {
	// Whoever comes second finds the work done, not under way.
	v.emptying.Lock()
	defer v.emptying.Unlock()
	for _, n := range v.listGraves() {
		if only != nil && n != only || !n.tryLock() {
			continue
		}
		if n.opens == 0 && n.grave >= 0 {
			f.emptyGraveLocked(n)
		}
		n.unlock()
	}
}

// emptyGraveLocked frees a buried inode that is not open, then credits it.
func (f *FS) emptyGraveLocked(n *node) {
	if err := f.loadLocked(n, n.grave); err != nil {
		f.log.Sugar().Errorw("charge of a replaced file", "volume", n.vol.id, "error", err)
	}
	n.closeGraveLocked()
	f.creditLocked(n)
}

func (n *node) closeGraveLocked() {
	v := n.vol
	v.graveMu.Lock()
	delete(v.graves, n)
	v.graveMu.Unlock()
	syscall.Close(n.grave)
	n.grave = -1
}

// closeGraves lets go of the graves of a volume that is no longer served.
func (f *FS) closeGraves(v *volume) {
	for _, n := range v.listGraves() {
		n.lock()
		if n.grave >= 0 {
			n.closeGraveLocked()
		}
		n.unlock()
	}
}

// buried returns what the graves hold; changes are shut out.
func (f *FS) buried(v *volume) (sum quota.Usage, err error) {
	for _, n := range v.listGraves() {
		n.lock()
		if n.grave >= 0 {
			err = f.loadLocked(n, n.grave)
			sum = sum.Add(quota.Usage{Bytes: n.charge(), Inodes: 1})
		}
		n.unlock()
		if err != nil {
			return sum, err
		}
	}
	return sum, nil
}

// freeGraves is emptyGraves for who is not within a change; it does not wait for Quiesce.
func (f *FS) freeGraves(v *volume) {
	if v.changing.TryRLock() {
		f.emptyGraves(v, nil)
		v.changing.RUnlock()
	}
}

// reserve takes u from what is free in the volume, from the graves as well.
func (f *FS) reserve(v *volume, u quota.Usage) error {
	f.tighten(v, u)
	err := v.ledger.Reserve(u)
	if err == nil {
		return nil
	}
	f.emptyGraves(v, nil)
	return v.ledger.Reserve(u)
}
