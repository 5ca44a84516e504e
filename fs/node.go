package fs

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// maxHandle is the longest file handle that is kept, in bytes: btrfs needs 20
// (struct btrfs_fid), xfs 12, ext4 8. Pools on others are refused by pool.Init.
const maxHandle = 20

// handleKey identifies a backing inode for as long as the filesystem exists:
// handles carry the inode's generation, so a reused number is another key.
type handleKey struct {
	typ  int32
	len  uint8
	data [maxHandle]byte
}

func (k *handleKey) fileHandle() unix.FileHandle {
	return unix.NewFileHandle(k.typ, k.data[:k.len])
}

// node is one backing inode that the kernel knows, or that an operation holds.
type node struct {
	id  uint64
	vol *volume
	key handleKey
	typ uint32 // S_IFMT bits; never change

	lookups uint64 // guarded by nodeTable.mu
	pinned  bool   // guarded by nodeTable.mu: a volume's root, kept until removed

	// nameless is set while orphan or gone is: a glance that spares stat the lock.
	nameless atomic.Bool

	// mu guards the rest, and makes a change of the inode and of its charge one.
	mu sync.Mutex
	// opens counts open handles.
	opens int
	// io is how the kernel does I/O on the open files, backing what it does it
	// on in ioPassed. See open_mode.go, for the next four as well.
	io      ioMode
	backing backing
	// mappable tells that the backing file may have been mapped since the kernel
	// knows the node.
	mappable bool
	// stale tells that the mount's page cache may be behind the file.
	stale bool
	// shared tells that mappings may store into the backing file. It is read without mu.
	shared atomic.Bool
	// lingers tells that the removed inode is still mapped: held is its charge.
	lingers bool
	// orphan is the name in the volume's orphans directory; empty when the
	// inode has its names in the tree.
	orphan string
	// replaced tells that the orphan's name was taken by rename: its last close buries it.
	replaced bool
	// exclusive marks a file made with O_TMPFILE|O_EXCL: it may not be linked.
	exclusive bool
	// gone holds the last attributes once the last name went and no orphan was kept.
	gone *unix.Stat_t
	// held is what a removed but open directory is charged until the last close,
	// and a lingering file until it is forgotten.
	held quota.Usage

	// grave is a descriptor (O_PATH) that keeps a replaced inode until the
	// kernel forgets it, so that who was on the way to open it still can; its
	// charge stays in the ledger. -1 when there is none. See grave.go.
	grave int

	// charged tells that the next four are known.
	charged bool
	// unsure tells that the ledger holds charge and the disk may hold less: a
	// recount has failed. charged is false then.
	unsure bool
	// INVARIANT: charge is what the ledger holds for this inode, in bytes.
	charge   uint64
	size     uint64
	prealloc uint64
	// dense tells that exactly the blocks of [0, size) are mapped and charged.
	dense bool
}

func newNode(id uint64, v *volume, key handleKey, mode uint32) *node {
	return &node{id: id, vol: v, key: key, typ: mode & unix.S_IFMT, grave: -1}
}

func (n *node) isDir() bool     { return n.typ == unix.S_IFDIR }
func (n *node) isRegular() bool { return n.typ == unix.S_IFREG }

// nodeTable maps node ids and file handles to nodes.
type nodeTable struct {
	mu    sync.RWMutex
	byID  map[uint64]*node
	byKey map[handleKey]*node
	next  uint64
}

func (t *nodeTable) init() {
	t.byID = make(map[uint64]*node)
	t.byKey = make(map[handleKey]*node)
	t.next = rootIno
}

// get returns the node of an id, nil when there is none.
func (t *nodeTable) get(id uint64) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.byID[id]
}

// find returns the node of a backing inode, or a fresh one that is in no table:
// for an operation on an inode that the kernel need not know.
func (t *nodeTable) find(v *volume, key handleKey, mode uint32) *node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if n := t.byKey[key]; n != nil && n.vol == v {
		return n
	}
	return newNode(0, v, key, mode)
}

// knows tells whether the kernel holds the node.
func (t *nodeTable) knows(n *node) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return n.lookups > 0
}

// of lists the nodes of a volume.
func (t *nodeTable) of(v *volume) []*node {
	t.mu.RLock()
	defer t.mu.RUnlock()
	var nodes []*node
	for _, n := range t.byID {
		if n.vol == v {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// lookup returns the node of a backing inode and counts one lookup of the
// kernel. made is called on a node that is new, before anyone else sees it.
func (t *nodeTable) lookup(v *volume, key handleKey, mode uint32, made func(*node)) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.getOrAddLocked(v, key, mode, made)
	n.lookups++
	return n
}

func (t *nodeTable) pin(v *volume, key handleKey, mode uint32) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.getOrAddLocked(v, key, mode, nil)
	n.pinned = true
	return n
}

func (t *nodeTable) unpin(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.pinned = false
	t.dropLocked(n)
}

func (t *nodeTable) getOrAddLocked(v *volume, key handleKey, mode uint32, made func(*node)) *node {
	n := t.byKey[key]
	// A node left over from a volume that was removed gives way.
	if n == nil || n.vol != v {
		t.next++
		n = newNode(t.next, v, key, mode)
		if made != nil {
			made(n)
		}
		t.byID[n.id] = n
		t.byKey[key] = n
	}
	return n
}

// forget takes back lookups; at zero the node leaves the table and is returned.
func (t *nodeTable) forget(id, lookups uint64) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byID[id]
	if n == nil {
		return nil
	}
	n.lookups -= min(lookups, n.lookups)
	if !t.dropLocked(n) {
		return nil
	}
	return n
}

func (t *nodeTable) dropLocked(n *node) (dropped bool) {
	if n.lookups > 0 || n.pinned {
		return false
	}
	delete(t.byID, n.id)
	if t.byKey[n.key] == n {
		delete(t.byKey, n.key)
	}
	return true
}

// Forget takes back lookups of a node. With the last one goes what is kept for
// it: a directory's descriptor, which would pin the directory once it is removed
// under another node, and a grave.
func (f *FS) Forget(nodeid, nlookup uint64) {
	n := f.nodes.forget(nodeid, nlookup)
	switch {
	case n == nil:
	case n.isDir():
		f.dirs.drop(n)
	case n.nameless.Load() && n.lingering():
		f.reapForgotten(n)
	case n.nameless.Load() && n.vol.gate.TryRLock(): // else Quiesce empties the graves
		f.emptyGraves(n.vol, n)
		n.mu.Lock() // a last close may have buried it meanwhile
		if n.opens == 0 && n.grave >= 0 {
			f.emptyGraveLocked(n)
		}
		n.mu.Unlock()
		n.vol.gate.RUnlock()
	}
}

// setOrphanLocked records the node's name in the orphans directory; empty when
// it has a name in the tree (again).
func (n *node) setOrphanLocked(name string) {
	n.orphan = name
	n.nameless.Store(name != "" || n.gone != nil)
}

// lostLocked tells that the inode is no more, and its charge given back: it must
// not be used, though a descriptor on it could still be had for a moment.
func (n *node) lostLocked() bool {
	return n.gone != nil && n.grave < 0 && (n.lingers || n.held == (quota.Usage{}))
}

func (n *node) lingering() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lingers
}

// setGoneLocked records the last attributes of an inode that is no more.
func (n *node) setGoneLocked(st *unix.Stat_t) {
	n.orphan, n.gone = "", st
	n.nameless.Store(true)
}
