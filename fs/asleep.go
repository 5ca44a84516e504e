package fs

import (
	"math"
	"math/bits"

	"github.com/croftfs/croft/fs/state"
)

// asleep are the nodes of an earlier daemon that nobody has asked for yet. A take-over reads their records once, in order, and
// makes of each what leads to it: a node is made when it is wanted. There may be millions, and everybody waits for the
// take-over.
type asleep struct {
	volumes []*volume // by the index of their record
	slots   []uint64  // a bit for each record
	left    int
	// keys is a hash table of records by their file handle, with open addressing: 32 bits of the hash, so that few records
	// are looked at in vain, and 32 of the record's slot, plus one. A record that is awake stays in it and is passed over.
	keys []uint64
}

// keyTable is how many places keys has for so many records: a power of two, and a fifth of them empty.
func keyTable(records int) int { return 1 << bits.Len(uint(records+records/4)) }

func (a *asleep) has(slot uint32) bool {
	return a.left > 0 && int(slot/64) < len(a.slots) && a.slots[slot/64]&(1<<(slot%64)) != 0
}

func keyOfRecord(r *state.Node) handleKey {
	return handleKey{typ: r.HandleType, len: r.HandleLen, data: r.HandleData}
}

// entry is what leads to a record in keys.
func entry(hash uint64, slot uint32) uint64 { return hash&^math.MaxUint32 | uint64(slot+1) }

// placeLocked returns where in keys the record of a handle is, or is to be when there is none.
func (t *nodeTable) placeLocked(key *handleKey, hash uint64) (at *uint64, there bool) {
	for i := hash; ; i++ {
		at = &t.asleep.keys[i&uint64(len(t.asleep.keys)-1)]
		if *at == 0 {
			return at, false
		}
		slot := uint32(*at) - 1
		if *at == entry(hash, slot) && t.asleep.has(slot) && keyOfRecord(t.state.NodeIn(slot)) == *key {
			return at, true
		}
	}
}

// sleeperLocked returns the slot of the record that is asleep and found by a handle.
func (t *nodeTable) sleeperLocked(key *handleKey) (slot uint32, ok bool) {
	if t.asleep.left == 0 {
		return 0, false
	}
	at, ok := t.placeLocked(key, t.hash(key))
	return uint32(*at) - 1, ok
}

// sleepLocked has a record lead to its node. Of two with the same handle that of a volume which is there is found by it.
func (t *nodeTable) sleepLocked(slot uint32, r *state.Node) {
	a, key := &t.asleep, keyOfRecord(r)
	hash := t.hash(&key)
	at, there := t.placeLocked(&key, hash)
	if !there || a.volumes[t.state.NodeIn(uint32(*at)-1).Volume].removed.Load() {
		*at = entry(hash, slot)
	}
	a.slots[slot/64] |= 1 << (slot % 64)
	a.left++
}

// wakeLocked makes the node of a record that is asleep.
func (t *nodeTable) wakeLocked(slot uint32) *node {
	a, r := &t.asleep, t.state.NodeIn(slot)
	key := keyOfRecord(r)
	n := &node{id: r.ID, vol: a.volumes[r.Volume], key: key, typ: r.Type, rare: noRare, io: ioMode(r.IO)}
	n.backing = backing{id: r.Backing, fd: -1}
	n.record.Store(r)
	t.byID.add(n)
	if by, found := t.sleeperLocked(&key); found && by == slot && t.findLocked(&key) == nil {
		t.byKey.add(n)
	}
	a.slots[slot/64] &^= 1 << (slot % 64)
	if a.left--; a.left == 0 {
		*a = asleep{}
	}
	return n
}

// awakeLocked returns the node of an id, awakeKeyLocked that of a file handle; nil when there is none.
func (t *nodeTable) awakeLocked(id uint64) *node {
	if n := t.getLocked(id); n != nil {
		return n
	}
	if slot := state.Slot(id); t.asleep.has(slot) && t.state.NodeIn(slot).ID == id {
		return t.wakeLocked(slot)
	}
	return nil
}

func (t *nodeTable) awakeKeyLocked(key *handleKey) *node {
	if n := t.findLocked(key); n != nil {
		return n
	}
	if slot, asleep := t.sleeperLocked(key); asleep {
		return t.wakeLocked(slot)
	}
	return nil
}

// wakeAll makes the nodes of a volume that are asleep.
func (t *nodeTable) wakeAll(v *volume) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for slot := uint32(0); int(slot/64) < len(t.asleep.slots); slot++ {
		if t.asleep.has(slot) && t.asleep.volumes[t.state.NodeIn(slot).Volume] == v {
			t.wakeLocked(slot)
		}
	}
}
