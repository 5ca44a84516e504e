package state

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newRegion(t *testing.T) *Region {
	t.Helper()
	r, err := New("pool", "boot", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// again opens the region as the next daemon does.
func again(t *testing.T, r *Region) *Region {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(r.FD()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	next, err := Open(os.NewFile(uintptr(fd), "state"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { next.Close() })
	return next
}

// TestSizes pins what is kept of an inode and of an open file, as ARCHITECTURE.md states it.
func TestSizes(t *testing.T) {
	if n := unsafe.Sizeof(Node{}); n != 64 {
		t.Errorf("a node's record takes %d bytes", n)
	}
	if n := unsafe.Sizeof(Handle{}); n != 32 {
		t.Errorf("a handle's record takes %d bytes", n)
	}
}

// TestNodes compares what the next daemon finds with a map, while nodes come and go.
func TestNodes(t *testing.T) {
	r := newRegion(t)
	want := map[uint64]uint64{} // lookups by id
	records := map[uint64]*Node{}
	var ids []uint64
	for range 50_000 {
		if len(ids) == 0 || rand.IntN(3) > 0 {
			n, id, err := r.AddNode()
			if err != nil {
				t.Fatal(err)
			}
			if want[id] != 0 || id <= 1 {
				t.Fatalf("id %d was given before", id)
			}
			r.AddLookup(n, id, nil)
			want[id], records[id] = 1, n
			ids = append(ids, id)
			continue
		}
		i := rand.IntN(len(ids))
		id := ids[i]
		if rand.IntN(2) == 0 {
			r.AddLookup(records[id], id, nil)
			want[id]++
			continue
		}
		ids[i] = ids[len(ids)-1]
		ids = ids[:len(ids)-1]
		r.RemoveNode(records[id])
		delete(want, id)
	}
	next := again(t, r)
	found := map[uint64]uint64{}
	if err := next.Nodes(func(_ uint32, n *Node) { found[n.ID] = n.Lookups }); err != nil {
		t.Fatal(err)
	}
	if len(found) != len(want) || next.nodes.used != len(want) {
		t.Fatalf("%d nodes are found, and %d counted, of %d", len(found), next.nodes.used, len(want))
	}
	for id, lookups := range want {
		if found[id] != lookups {
			t.Fatalf("node %d: %d lookups, want %d", id, found[id], lookups)
		}
	}
	if _, id, err := next.AddNode(); err != nil || found[id] != 0 {
		t.Fatalf("the next daemon gives %d again: %v", id, err)
	}
}

// TestTrim: the memory of nodes that are no more is given back.
func TestTrim(t *testing.T) {
	r := newRegion(t)
	memory := func() int64 {
		n, err := r.Memory()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := memory()
	var nodes []*Node
	for range 100_000 {
		n, id, err := r.AddNode()
		if err != nil {
			t.Fatal(err)
		}
		r.AddLookup(n, id, nil)
		nodes = append(nodes, n)
	}
	full := memory() - before
	t.Logf("%d bytes a node", full/int64(len(nodes)))
	if full > 70*int64(len(nodes)) {
		t.Errorf("%d nodes take %d bytes", len(nodes), full)
	}
	for _, n := range nodes[10:] {
		r.RemoveNode(n)
	}
	r.TrimNodes()
	if left := memory() - before; left > 64<<10 {
		t.Errorf("%d bytes are left of %d", left, full)
	}
	if n := again(t, r).nodes.used; n != 10 {
		t.Errorf("%d nodes are left of 10", n)
	}
}

// TestLookupTorn: a lookup of which a killed daemon has made one store only is there as a whole.
func TestLookupTorn(t *testing.T) {
	r := newRegion(t)
	q, _, err := r.TakeRequest(80)
	if err != nil {
		t.Fatal(err)
	}
	n, id, err := r.AddNode()
	if err != nil {
		t.Fatal(err)
	}
	redo := &r.head.redo
	redo.id, redo.lookups, redo.request, redo.given = id, 1, r.requestIndex(q)+1, 0
	redo.node.Store(uint32(id) - firstNode + 1)
	n.Lookups = 1 // and no more
	next := again(t, r)
	found := 0
	err = next.Nodes(func(_ uint32, n *Node) {
		if found++; n.ID != id || n.Lookups != 1 {
			t.Errorf("node %d with %d lookups, want %d with 1", n.ID, n.Lookups, id)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	given := 0
	next.Requests(80, func(q *Request, _ Message) { given += len(q.Given()) })
	if found != 1 || given != 1 {
		t.Errorf("%d nodes and %d lookups that are given away", found, given)
	}
}

func TestRequests(t *testing.T) {
	r := newRegion(t)
	const lead = 80
	q, m, err := r.TakeRequest(lead)
	if err != nil {
		t.Fatal(err)
	}
	if len(m) != lead+r.RequestSize() || uintptr(unsafe.Pointer(&m[lead]))%uintptr(os.Getpagesize()) != 0 {
		t.Errorf("a message of %d bytes, data at %p", len(m), &m[lead])
	}
	for i := range m {
		m[i] = byte(i)
	}
	r.Bind(q, 1<<63|42)
	q.Effect.Store(Trying)
	if r.Find(42) != q || r.Find(1<<63|42) != q || r.Find(44) != nil {
		t.Error("the request is not found by its unique")
	}
	next := again(t, r)
	left := 0
	next.Requests(lead, func(nq *Request, nm Message) {
		left++
		if !bytes.Equal(nm, m) || nq.Effect.Load() != Trying || nq.Unique() != 42 {
			t.Error("the request is not what it was")
		}
		nq.Clear(nm)
		next.FreeRequest(nq)
	})
	if left != 1 {
		t.Errorf("%d requests are left of 1", left)
	}
}

func TestOpenRefuses(t *testing.T) {
	r := newRegion(t)
	dup := func() *os.File {
		fd, err := unix.FcntlInt(uintptr(r.FD()), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "state")
	}
	r.head.version++
	if _, err := Open(dup()); !errors.Is(err, ErrNewer) {
		t.Errorf("a newer layout: %v", err)
	}
	r.head.version--
	r.head.magic++
	if _, err := Open(dup()); !errors.Is(err, ErrForeign) {
		t.Errorf("something else: %v", err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(null); !errors.Is(err, ErrForeign) {
		t.Errorf("no memory at all: %v", err)
	}
}

func TestGoneAndVolumes(t *testing.T) {
	r := newRegion(t)
	v, i, err := r.AddVolume("data")
	if err != nil {
		t.Fatal(err)
	}
	v.Bytes.Store(4096)
	g, err := r.SetGone(7, []byte("stat"))
	if err != nil {
		t.Fatal(err)
	}
	h, err := r.AddHandle(7, unix.O_RDWR, 1, 1<<63|9)
	if err != nil {
		t.Fatal(err)
	}
	next := again(t, r)
	next.Volumes(func(at uint32, v *Volume) {
		if at != i || v.Name() != "data" || v.Bytes.Load() != 4096 {
			t.Errorf("volume %q at %d", v.Name(), at)
		}
	})
	next.Gone(func(g *Gone) bool {
		if g.Node != 7 || string(g.Stat[:4]) != "stat" {
			t.Errorf("gone: %d %q", g.Node, g.Stat[:4])
		}
		return false
	})
	next.Handles(func(nh *Handle) {
		if *nh != *h || nh.Request != 9 {
			t.Errorf("handle %+v, want %+v", *nh, *h)
		}
	})
	r.RemoveGone(g)
	r.RemoveHandle(h)
	r.RemoveVolume(i)
	last := again(t, r)
	last.Gone(func(*Gone) bool { t.Error("what is gone stays"); return false })
	last.Handles(func(*Handle) { t.Error("the handle stays") })
	last.Volumes(func(uint32, *Volume) { t.Error("the volume stays") })
	if _, _, err := r.AddVolume(string(make([]byte, MaxName+1))); !errors.Is(err, ErrFull) {
		t.Errorf("a name that is too long: %v", err)
	}
}
