package fs

import (
	"hash/maphash"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// maxHandle is the longest file handle that is kept, in bytes: btrfs needs 20
// (struct btrfs_fid), xfs 12, ext4 8. Pools on others are refused by pool.Init.
const maxHandle = 20

// handleKey identifies a backing inode for as long as the filesystem exists:
// handles carry the inode's generation, so a reused number is another key.
type handleKey struct {
	typ  uint8 // enum fid_type ends at 0xff
	len  uint8
	data [maxHandle]byte
}

func (k *handleKey) fileHandle() unix.FileHandle {
	return unix.NewFileHandle(int32(k.typ), k.data[:k.len])
}

// node is one backing inode that the kernel knows, or that an operation holds.
// There may be millions: what few of them need is in rare. TestNodeSize.
//
// What the next daemon must know is in its record, which is the region's as long as
// the kernel knows it or has it open: its id, the kernel's lookups of it (guarded by
// nodeTable.mu), its charge, marks and mode of I/O.
//
// INVARIANT: its charge is what the ledger holds for this inode, in bytes.
type node struct {
	id  uint64
	vol *volume

	record atomic.Pointer[state.Node] // changed with mu held
	next   [2]*node                   // guarded by nodeTable.mu: the chains of byID and byKey
	// pins counts who keeps it known as a lookup does, holds who keeps it in the
	// table only. Guarded by nodeTable.mu.
	pins, holds uint32

	key handleKey
	typ uint8 // S_IFMT bits >> 12; never change

	// io is how the kernel does I/O on the open files, backing what it does it
	// on in ioPassed. See open_mode.go, for mappable, stale and shared as well.
	io      ioMode
	backing backing

	// mu guards what follows and io and backing, and makes a change of the inode
	// and of its charge one.
	mu sync.Mutex
	// rare is noRare until the node needs one of its own; see ownRareLocked.
	*rare
	size uint64
	// opens counts open handles.
	opens uint32

	// charged tells that charge, size, prealloc and dense are known.
	charged bool
	// dense tells that exactly the blocks of [0, size) are mapped and charged.
	dense bool
}

// The marks of a node: bits of its record, which are looked at without the lock and changed
// with node.mu held. The next daemon knows them by these numbers.
const (
	// nameless is set while orphan or gone is.
	nameless = 1 << iota
	// shared tells that mappings may store into the backing file, which has no holes.
	shared
	// stores tells that writing.stores is set.
	stores
	// refused tells that passed writes are refused: see writing.braked.
	refused
	// nocaps tells that the inode has no security.capability.
	nocaps
	// mappable tells that the kernel may have the backing file open, for a mapping
	// or for a close that it has not finished.
	mappable
	// stale tells that the mount's page cache may be behind the file.
	stale
	// These are what rare.orphan, replaced, exclusive, unsure and writing are, and
	// writing.left.
	markOrphan
	markReplaced
	markExclusive
	markUnsure
	markWritten
	markLeft
)

func (n *node) rec() *state.Node { return n.record.Load() }

func (n *node) has(mark uint32) bool { return n.rec().Bits.Load()&mark != 0 }

func (n *node) set(mark uint32, on bool) {
	if bits := &n.rec().Bits; on {
		bits.Or(mark)
	} else {
		bits.And(^mark)
	}
}

// lock takes node.mu. Whoever takes over while it is held measures the inode again.
func (n *node) lock() {
	n.mu.Lock()
	n.rec().Busy = true
}

func (n *node) tryLock() bool {
	if !n.mu.TryLock() {
		return false
	}
	n.rec().Busy = true
	return true
}

func (n *node) unlock() {
	r := n.rec()
	if r.Known && !n.charged && !n.unsure && n.grave < 0 && n.held == (quota.Usage{}) && !n.has(markWritten) {
		r.Known = false // only this change wanted it
	}
	r.Busy = false
	n.mu.Unlock()
}

func (n *node) charge() uint64 { return n.rec().Charge }

// setChargeLocked says what the ledger holds for the inode.
func (n *node) setChargeLocked(charge uint64) {
	r := n.rec()
	r.Charge, r.Known = charge, true
}

func (n *node) setIO(mode ioMode) {
	n.io = mode
	n.rec().IO = uint8(mode)
}

func (n *node) setBacking(b backing) {
	n.backing = b
	n.rec().Backing = b.id
	if b.id > 0 {
		n.vol.state.SetBacking(b.id)
	}
}

// rare is the part of a node that few nodes need, guarded by node.mu.
//
// INVARIANT: only ownRareLocked's result is written to. orphan, gone, prealloc and
// unsure have setters that see to it; the rest is set after orphan or gone was.
type rare struct {
	// orphan is the name in the volume's orphans directory; empty when the
	// inode has its names in the tree.
	orphan string
	// replaced tells that the orphan's name was taken by rename: its last close buries it.
	replaced bool
	// exclusive marks a file made with O_TMPFILE|O_EXCL: it may not be linked.
	exclusive bool
	// lingers tells that the removed inode is still mapped: held is its charge.
	lingers bool
	// unsure tells that the ledger holds charge and the disk may hold less: a
	// recount has failed. charged is false then.
	unsure bool
	// gone holds the last attributes once the last name went and no orphan was kept.
	gone *unix.Stat_t
	// kept is where the next daemon finds it.
	kept *state.Gone
	// held is what a lingering file is charged until it is forgotten.
	held quota.Usage

	// grave is a descriptor (O_PATH) that keeps a replaced inode until the
	// kernel forgets it, so that who was on the way to open it still can; its
	// charge stays in the ledger. -1 when there is none. See grave.go.
	grave int

	// writing is set while the kernel may write the backing file by itself.
	writing *writing

	// prealloc is the end of what is preallocated beyond size; 0 when nothing is.
	prealloc uint64
}

// noRare is what all nodes share that have no rare of their own; never written to.
var noRare = &rare{grave: -1}

// newNode makes a node that is in no table; its record is its own.
func newNode(id uint64, v *volume, key handleKey, mode uint32) *node {
	return makeNode(new(state.Node), id, v, key, mode)
}

func makeNode(r *state.Node, id uint64, v *volume, key handleKey, mode uint32) *node {
	n := &node{id: id, vol: v, key: key, typ: uint8(mode & unix.S_IFMT >> 12), rare: noRare}
	r.HandleType, r.HandleLen, r.HandleData, r.Type = key.typ, key.len, key.data, n.typ
	if v != nil {
		r.Volume = v.index
	}
	n.record.Store(r)
	return n
}

// ownRareLocked makes what is in rare the node's own, which may be written to.
func (n *node) ownRareLocked() *rare {
	if n.rare == noRare {
		own := *noRare
		n.rare = &own
	}
	return n.rare
}

func (n *node) setPreallocLocked(end uint64) {
	if n.prealloc != end {
		n.ownRareLocked().prealloc = end
	}
}

func (n *node) setUnsureLocked(unsure bool) {
	if n.unsure != unsure {
		n.ownRareLocked().unsure = unsure
		n.set(markUnsure, unsure)
	}
}

func (n *node) isDir() bool     { return n.typ == unix.S_IFDIR>>12 }
func (n *node) isSymlink() bool { return n.typ == unix.S_IFLNK>>12 }
func (n *node) isRegular() bool { return n.typ == unix.S_IFREG>>12 }

// nodeTable maps node ids and file handles to nodes.
type nodeTable struct {
	state *state.Region

	mu    sync.RWMutex
	byID  nodeIndex
	byKey nodeIndex
	seed  maphash.Seed
	// asleep are in neither.
	asleep asleep

	// dropped counts the nodes that left since the garbage was last collected;
	// collecting tells that it is going to be.
	dropped    int
	collecting bool
}

// Once so many nodes have left, and half as many as are left, their memory is
// given back, after collectDelay. The runtime would wait two minutes, since nobody
// allocates while the kernel forgets.
const (
	collectAfter = 1 << 14
	collectDelay = time.Second
)

func (t *nodeTable) init(region *state.Region) {
	t.state = region
	t.seed = maphash.MakeSeed()
	t.byID = nodeIndex{link: 0, hash: func(n *node) uint64 { return n.id }}
	t.byKey = nodeIndex{link: 1, hash: func(n *node) uint64 { return t.hash(&n.key) }}
}

func (t *nodeTable) hash(key *handleKey) uint64 { return maphash.Bytes(t.seed, key.data[:key.len]) }

// getLocked and findLocked are for nodes that are awake; t.mu may be held for reading only.
func (t *nodeTable) getLocked(id uint64) *node {
	n := t.byID.first(id)
	for n != nil && n.id != id {
		n = n.next[t.byID.link]
	}
	return n
}

func (t *nodeTable) findLocked(key *handleKey) *node {
	n := t.byKey.first(t.hash(key))
	for n != nil && n.key != *key {
		n = n.next[t.byKey.link]
	}
	return n
}

// get returns the node of an id, nil when there is none.
func (t *nodeTable) get(id uint64) *node {
	t.mu.RLock()
	n, asleep := t.getLocked(id), t.asleep.has(state.Slot(id))
	t.mu.RUnlock()
	if n == nil && asleep {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.awakeLocked(id)
	}
	return n
}

// find returns the node of a backing inode, or a fresh one that is in no table:
// for an operation on an inode that the kernel need not know.
func (t *nodeTable) find(v *volume, key handleKey, mode uint32) *node {
	t.mu.RLock()
	n, asleep := t.findLocked(&key), false
	if n == nil {
		_, asleep = t.sleeperLocked(&key)
	}
	t.mu.RUnlock()
	if asleep {
		t.mu.Lock()
		n = t.awakeKeyLocked(&key)
		t.mu.Unlock()
	}
	if n != nil && n.vol == v {
		return n
	}
	return newNode(0, v, key, mode)
}

// knows tells whether the kernel holds the node.
func (t *nodeTable) knows(n *node) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return n.knownLocked()
}

func (n *node) knownLocked() bool { return n.rec().Lookups > 0 || n.pins > 0 }

// of lists the nodes of a volume.
func (t *nodeTable) of(v *volume) []*node {
	t.wakeAll(v)
	t.mu.RLock()
	defer t.mu.RUnlock()
	var nodes []*node
	for n := range t.byID.all {
		if n.vol == v {
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// lookup returns the node of a backing inode and counts one lookup of the
// kernel, which the answer to q gives away. made is called on a node that is new, before anyone else sees it.
func (t *nodeTable) lookup(q *state.Request, v *volume, key handleKey, mode uint32, made func(*node)) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodeLocked(v, key, mode, made)
	t.state.AddLookup(n.rec(), n.id, q)
	return n
}

// pin keeps a node known until unpin, as a lookup does.
func (t *nodeTable) pin(v *volume, key handleKey, mode uint32) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodeLocked(v, key, mode, nil)
	n.rec().ID = n.id
	n.pins++
	return n
}

// hold keeps a node in the table until drop.
func (t *nodeTable) hold(n *node) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.holds++
}

// nodeLocked returns the node of a backing inode, a new one if need be.
func (t *nodeTable) nodeLocked(v *volume, key handleKey, mode uint32, made func(*node)) *node {
	n := t.awakeKeyLocked(&key)
	// A node left over from a volume that was removed gives way.
	if n == nil || n.vol != v {
		if n != nil {
			t.byKey.remove(n)
		}
		r, id, err := t.state.AddNode()
		if err != nil {
			panic(err) // there are more than can be: the request is answered with EIO
		}
		n = makeNode(r, id, v, key, mode)
		v.nodes.Add(1)
		if made != nil {
			made(n)
		}
		t.byID.add(n)
		t.byKey.add(n)
	}
	return n
}

// forget takes back lookups. At zero the node is returned, and held: whoever takes over finds it
// until what hangs on it is dealt with, and drop is called.
func (t *nodeTable) forget(id, lookups uint64) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.awakeLocked(id)
	if n == nil || !n.knownLocked() {
		return nil
	}
	r := n.rec()
	r.Lookups -= min(lookups, r.Lookups)
	return n.unknownLocked()
}

// unpin ends pin; it returns what forget does.
func (t *nodeTable) unpin(n *node) *node {
	t.mu.Lock()
	defer t.mu.Unlock()
	n.pins--
	return n.unknownLocked()
}

func (n *node) unknownLocked() *node {
	if n.knownLocked() {
		return nil
	}
	n.holds++
	return n
}

// drop ends hold. A node that nobody holds and that the kernel does not know leaves the table.
func (t *nodeTable) drop(n *node) {
	t.mu.Lock()
	if n.holds--; n.holds > 0 || n.knownLocked() {
		t.mu.Unlock()
		return
	}
	t.byID.remove(n)
	t.byKey.remove(n)
	t.dropped++
	if !t.collecting && t.dropped >= max(collectAfter, t.byID.len()/2) {
		t.collecting = true
		time.AfterFunc(collectDelay, t.collect)
	}
	t.mu.Unlock()
	if n.vol.nodes.Add(-1) == 0 && n.vol.removed.Load() {
		t.state.RemoveVolume(n.vol.index)
	}
	// Who has the node still, has it with a record of its own.
	n.mu.Lock()
	if n.kept != nil {
		t.state.RemoveGone(n.kept)
		n.kept = nil
	}
	r, own := n.rec(), new(state.Node)
	*own = state.Node{Charge: r.Charge, Known: r.Known, Busy: true}
	own.Bits.Store(r.Bits.Load())
	n.record.Store(own)
	n.mu.Unlock()
	t.state.RemoveNode(r)
}

func (t *nodeTable) collect() {
	t.mu.Lock()
	t.dropped, t.collecting = 0, false
	t.mu.Unlock()
	runtime.GC()
	t.state.TrimNodes()
}

// Forget takes back lookups of a node. With the last one goes what is kept for
// it: a directory's descriptor, which would pin the directory once it is removed
// under another node, and a grave.
func (f *FS) Forget(nodeid, nlookup uint64) { f.forgotten(f.nodes.forget(nodeid, nlookup)) }

// forgotten is called with what forget and unpin return.
func (f *FS) forgotten(n *node) {
	if n == nil {
		return
	}
	defer f.nodes.drop(n)
	if n.has(stores) {
		f.forgetWriting(n)
	}
	switch {
	case n.isDir():
		f.dirs.drop(n)
	case n.has(nameless) && n.lingering():
		f.reapForgotten(n)
	case n.has(nameless) && n.vol.changing.TryRLock(): // else Quiesce empties the graves
		f.emptyGraves(n.vol, n)
		n.lock() // a last close may have buried it meanwhile
		if n.opens == 0 && n.grave >= 0 {
			f.emptyGraveLocked(n)
		}
		n.unlock()
		n.vol.changing.RUnlock()
	}
}

// forgetWriting ends the writing of an inode that the kernel does not know any
// more, so that nobody maps it.
func (f *FS) forgetWriting(n *node) {
	if !n.vol.changing.TryRLock() {
		return // the sampler will find it
	}
	defer n.vol.changing.RUnlock()
	n.lock()
	defer n.unlock()
	if n.writing != nil && n.opens == 0 && !n.lingers {
		f.endWritingLocked(n.writing)
	}
}

// setOrphanLocked records the node's name in the orphans directory; empty when
// it has a name in the tree (again).
func (n *node) setOrphanLocked(name string) {
	n.ownRareLocked().orphan = name
	n.set(markOrphan, name != "")
	n.set(nameless, name != "" || n.gone != nil)
}

// keepStat keeps an inode's last attributes for the next daemon, once: what of it cannot be kept
// is answered with fewer.
func (n *node) keepStat(st *unix.Stat_t) {
	if n.id == 0 || n.kept != nil {
		return
	}
	if g, err := n.vol.state.SetGone(n.id, (*[unsafe.Sizeof(*st)]byte)(unsafe.Pointer(st))[:]); err == nil {
		n.ownRareLocked().kept = g
	}
}

// lostLocked tells that the inode is no more, and its charge given back, or kept for mappings only: it must
// not be used, though a descriptor on it could still be had for a moment.
func (n *node) lostLocked() bool {
	return n.gone != nil && n.grave < 0
}

func (n *node) lingering() bool {
	n.lock()
	defer n.unlock()
	return n.lingers
}

// setGoneLocked records the last attributes of an inode that is no more.
func (n *node) setGoneLocked(st *unix.Stat_t) {
	own := n.ownRareLocked()
	own.orphan, own.gone = "", st
	n.set(markOrphan, false)
	n.set(nameless, true)
	n.keepStat(st)
}
