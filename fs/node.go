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
	// orphan is the name in the volume's orphans directory; empty when the
	// inode has its names in the tree.
	orphan string
	// exclusive marks a file made with O_TMPFILE|O_EXCL: it may not be linked.
	exclusive bool
	// gone holds the last attributes once the last name went and no orphan was kept.
	gone *unix.Stat_t
	// held is what a removed but open directory is charged until the last close.
	held quota.Usage

	// charged tells that the next four are known.
	charged bool
	// INVARIANT: charge is what the ledger holds for this inode, in bytes.
	charge   uint64
	size     uint64
	prealloc uint64
	// dense tells that exactly the blocks of [0, size) are mapped and charged.
	dense bool
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
	if n := t.byKey[key]; n != nil {
		return n
	}
	return &node{vol: v, key: key, typ: mode & unix.S_IFMT}
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
		n = &node{id: t.next, vol: v, key: key, typ: mode & unix.S_IFMT}
		if made != nil {
			made(n)
		}
		t.byID[n.id] = n
		t.byKey[key] = n
	}
	return n
}

// forget takes back lookups; at zero the node leaves the table.
func (t *nodeTable) forget(id, lookups uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.byID[id]
	if n == nil {
		return
	}
	n.lookups -= min(lookups, n.lookups)
	t.dropLocked(n)
}

func (t *nodeTable) dropLocked(n *node) {
	if n.lookups > 0 || n.pinned {
		return
	}
	delete(t.byID, n.id)
	if t.byKey[n.key] == n {
		delete(t.byKey, n.key)
	}
}

// Forget takes back lookups of a node; it does no I/O.
func (f *FS) Forget(nodeid, nlookup uint64) { f.nodes.forget(nodeid, nlookup) }

// setOrphanLocked records the node's name in the orphans directory; empty when
// it has a name in the tree (again).
func (n *node) setOrphanLocked(name string) {
	n.orphan = name
	n.nameless.Store(name != "" || n.gone != nil)
}

// setGoneLocked records the last attributes of an inode that is no more.
func (n *node) setGoneLocked(st *unix.Stat_t) {
	n.orphan, n.gone = "", st
	n.nameless.Store(true)
}
