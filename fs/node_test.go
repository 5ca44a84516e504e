package fs

import (
	"encoding/binary"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
)

// The bytes of a known inode, as ARCHITECTURE.md states them.
const (
	nodeSize  = 120
	knownSize = 160 // with its share of the tables
)

func keyOf(i uint64) (k handleKey) {
	k.typ, k.len = 1, 8
	binary.NativeEndian.PutUint64(k.data[:], i)
	return k
}

func testTable() (*nodeTable, *volume) {
	region, err := state.New("", "", 0)
	if err != nil {
		panic(err)
	}
	t := new(nodeTable)
	t.init(region)
	return t, &volume{id: "v", state: region}
}

// forgets is forget, and that nothing hangs on the node.
func (t *nodeTable) forgets(id uint64) *node {
	n := t.forget(id, 1)
	if n != nil {
		t.drop(n)
	}
	return n
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what the first one's sweep has freed counts now
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestNodeSize(t *testing.T) {
	if size := unsafe.Sizeof(node{}); size != nodeSize {
		t.Errorf("a node takes %d bytes, not %d: the allocator rounds up to 128, and from there to 144", size, nodeSize)
	}
}

// TestKnownInodesInMemory pins what a known inode costs, and that FORGET gives it back.
func TestKnownInodesInMemory(t *testing.T) {
	const nodes, kept = 100_000, 100
	table, v := testTable()
	before := heap()
	ids := make([]uint64, nodes)
	for i := range ids {
		ids[i] = table.lookup(nil, v, keyOf(uint64(i)), unix.S_IFREG, nil).id
	}
	ofIDs := int64(8 * nodes)
	each := (heap() - before - ofIDs) / nodes
	t.Logf("%d bytes a known inode", each)
	if each > knownSize {
		t.Errorf("a known inode takes %d bytes, more than %d", each, knownSize)
	}
	for _, id := range ids[kept:] {
		table.forgets(id)
	}
	if left := heap() - before - ofIDs; left > 100<<10 {
		t.Errorf("%d bytes are left of %d inodes after %d were forgotten", left, nodes, nodes-kept)
	}
	for _, id := range ids[:kept] {
		if n := table.get(id); n == nil || n.rec().Lookups != 1 {
			t.Fatalf("node %d is %+v", id, n)
		}
	}
	runtime.KeepAlive(ids)
}

// TestForgottenNodesAreCollected wants the garbage gone though nobody allocates.
func TestForgottenNodesAreCollected(t *testing.T) {
	table, v := testTable()
	ids := make([]uint64, 2*collectAfter)
	for i := range ids {
		ids[i] = table.lookup(nil, v, keyOf(uint64(i)), unix.S_IFREG, nil).id
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	before := m.NumForcedGC
	for _, id := range ids {
		table.forgets(id)
	}
	for deadline := time.Now().Add(10 * time.Second); m.NumForcedGC == before; runtime.ReadMemStats(&m) {
		if time.Now().After(deadline) {
			t.Fatal("no garbage was collected")
		}
		time.Sleep(time.Millisecond)
	}
}

// TestNodeIndex compares the table with a map while nodes come and go.
func TestNodeIndex(t *testing.T) {
	table, v := testTable()
	want := map[uint64]uint64{} // id by key
	r := rand.New(rand.NewPCG(1, 2))
	for _, keys := range []uint64{10, 50_000, 3000, 1} {
		for range 100_000 {
			i := r.Uint64N(keys)
			if id, known := want[i]; known && r.Uint64N(3) > 0 {
				delete(want, i)
				if n := table.forgets(id); n == nil || n.id != id {
					t.Fatalf("forget(%d) is %+v", id, n)
				}
			} else if known {
				if n := table.find(v, keyOf(i), 0); n.id != id || table.get(id) != n {
					t.Fatalf("key %d is node %+v, not %d", i, n, id)
				}
			} else {
				if n := table.find(v, keyOf(i), 0); n.id != 0 {
					t.Fatalf("key %d is node %+v", i, n)
				}
				want[i] = table.lookup(nil, v, keyOf(i), unix.S_IFREG, nil).id
			}
		}
		nodes := table.of(v)
		if len(nodes) != len(want) || table.byID.len() != len(want) || table.byKey.len() != len(want) {
			t.Fatalf("%d nodes, %d by id, %d by key, not %d", len(nodes), table.byID.len(), table.byKey.len(), len(want))
		}
		for i, id := range want {
			if keys != 50_000 { // leave nothing behind for the next, with fewer keys
				if table.forgets(id) == nil {
					t.Fatalf("node %d is not known", id)
				}
				delete(want, i)
			}
		}
	}
}

// TestNodeOfRemovedVolumeGivesWay covers an inode that another volume shows now.
func TestNodeOfRemovedVolumeGivesWay(t *testing.T) {
	table, old := testTable()
	v := &volume{id: "v", state: old.state}
	left := table.lookup(nil, old, keyOf(1), unix.S_IFDIR, nil)
	n := table.lookup(nil, v, keyOf(1), unix.S_IFDIR, nil)
	if n == left || table.get(left.id) != left {
		t.Fatal("the nodes are one, or the old one is lost")
	}
	if table.forgets(left.id) != left {
		t.Fatal("the old one is not forgotten")
	}
	if table.find(v, keyOf(1), 0) != n || table.get(n.id) != n {
		t.Fatal("the new one went with the old")
	}
}

// TestRootStaysKnown: the kernel forgets a volume's root, which is served all the same.
func TestRootStaysKnown(t *testing.T) {
	table, v := testTable()
	root := table.pin(v, keyOf(1), unix.S_IFDIR)
	if table.lookup(nil, v, keyOf(1), unix.S_IFDIR, nil) != root || table.forgets(root.id) != nil {
		t.Fatal("the root is forgotten while it is pinned")
	}
	table.drop(table.unpin(root))
	if table.get(root.id) != nil {
		t.Fatal("the root is known after unpin")
	}
}

// TestRareIsTheNodesOwn: what one node is set to must not show in another.
func TestRareIsTheNodesOwn(t *testing.T) {
	_, v := testTable()
	for name, set := range map[string]func(*node){
		"orphan":   func(n *node) { n.setOrphanLocked("x") },
		"gone":     func(n *node) { n.setGoneLocked(&unix.Stat_t{}) },
		"prealloc": func(n *node) { n.setPreallocLocked(1) },
		"unsure":   func(n *node) { n.setUnsureLocked(true) },
	} {
		n, other := newNode(1, v, keyOf(1), unix.S_IFREG), newNode(2, v, keyOf(2), unix.S_IFREG)
		set(n)
		if n.rare == noRare || *other.rare != (rare{grave: -1}) {
			t.Errorf("%s: it is set for all nodes", name)
		}
	}
}

// TestAsleep has a table go on with the records of another, in part: whatever is asked for is found as it was.
func TestAsleep(t *testing.T) {
	const nodes = 2000
	region, err := state.New("", "", 0)
	if err != nil {
		t.Fatal(err)
	}
	next := func() *FS {
		f := &FS{state: region, kept: map[string]*volume{}}
		f.nodes.init(region)
		if err := f.load(); err != nil {
			t.Fatal(err)
		}
		return f
	}
	// The third is removed, and half of its inodes have come to be of the first.
	var volumes []*volume
	for _, id := range []string{"a", "b", "removed"} {
		r, index, err := region.AddVolume(id)
		if err != nil {
			t.Fatal(err)
		}
		volumes = append(volumes, &volume{id: id, state: region, record: r, index: index})
	}
	table := new(nodeTable)
	table.init(region)
	ids := map[uint64]uint64{} // by key
	for i := range uint64(nodes) {
		ids[i] = table.lookup(nil, volumes[i%3], keyOf(i), unix.S_IFREG, nil).id
	}
	volumes[2].removed.Store(true)
	volumes[2].record.Bits.Or(volumeRemoved)
	taken := map[uint64]uint64{} // by key: the ids that gave way
	for i := uint64(2); i < nodes; i += 6 {
		taken[i] = ids[i]
		ids[i] = table.lookup(nil, volumes[0], keyOf(i), unix.S_IFREG, nil).id
	}

	f := next()
	if asleep := f.nodes.asleep.left; asleep != nodes+len(taken) {
		t.Fatalf("%d are asleep, want %d", asleep, nodes+len(taken))
	}
	volume := func(i uint64) *volume {
		if _, gave := taken[i]; gave {
			return f.kept["a"]
		}
		return f.nodes.asleep.volumes[volumes[i%3].index]
	}
	order := rand.Perm(nodes)
	for _, at := range order[:nodes/2] {
		i := uint64(at)
		var n *node
		switch at % 5 {
		case 0, 1:
			n = f.nodes.get(ids[i])
		case 2:
			n = f.nodes.find(volume(i), keyOf(i), unix.S_IFREG)
		case 3:
			n = f.nodes.lookup(nil, volume(i), keyOf(i), unix.S_IFREG, nil)
			f.nodes.forgets(n.id)
		case 4:
			if f.nodes.forgets(ids[i]) == nil || f.nodes.get(ids[i]) != nil {
				t.Fatalf("node %d is not forgotten", i)
			}
			delete(ids, i)
			continue
		}
		if n == nil || n.id != ids[i] || n.vol != volume(i) || n.rec().Lookups != 1 || f.nodes.get(ids[i]) != n {
			t.Fatalf("key %d: %+v, want node %d", i, n, ids[i])
		}
	}
	// The next finds those that were asleep throughout, and the others.
	f = next()
	if asleep := f.nodes.asleep.left; asleep != len(ids)+len(taken) {
		t.Errorf("%d are asleep, want %d", asleep, len(ids)+len(taken))
	}
	want, of := 0, 0
	for i := range ids {
		if _, gave := taken[i]; gave || i%3 != 2 {
			want++
		}
	}
	for _, v := range f.kept {
		of += len(f.nodes.of(v))
	}
	if of != want {
		t.Errorf("%d are of volumes that are there, want %d", of, want)
	}
	for i, id := range ids {
		if n := f.nodes.get(id); n == nil || n.key != keyOf(i) {
			t.Errorf("key %d: %+v, want node %d", i, n, id)
		}
	}
	for i, id := range taken {
		if n := f.nodes.get(id); n == nil || n.key != keyOf(i) || !n.vol.removed.Load() {
			t.Errorf("key %d: %+v, want node %d of the removed volume", i, n, id)
		}
	}
	if left := f.nodes.asleep.left; left != 0 || f.nodes.asleep.keys != nil {
		t.Errorf("%d are asleep still", left)
	}
	if all := f.nodes.byID.len(); all != len(ids)+len(taken) {
		t.Errorf("%d are in the table, want %d", all, len(ids)+len(taken))
	}
}
