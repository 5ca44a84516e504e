package fs

import (
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/quota"
)

// attempt is one try at an operation that cannot be done twice: what makes a name, or
// takes one away. The kernel sends a request again that the daemon has died over, and
// nobody knows then how far that one has come. But as long as the request is under way
// the kernel holds the lock of the directory, so that the names in it tell.
type attempt struct {
	f       *FS
	opcode  uint32
	request *state.Request // nil when nothing is kept of it
	// again tells that an earlier daemon may have made the change.
	again bool
	// settled tells that it has, and that the ledger holds it. Else claimed is reserved for it.
	settled bool
	claimed quota.Usage
}

func (f *FS) try(in *fuse.InHeader) *attempt {
	t := &attempt{f: f, opcode: in.Opcode, request: f.request(in)}
	if q := t.request; q != nil {
		effect := q.Effect.Load()
		t.again, t.settled = effect != state.Begun, effect == state.Done
		t.claimed = quota.Usage{Bytes: q.Bytes, Inodes: q.Inodes}
	}
	t.step("begun")
	return t
}

// reserve takes what the change can cost, unless that was done before.
func (t *attempt) reserve(v *volume, u quota.Usage) (quota.Usage, error) {
	if t.again {
		return t.claimed, nil
	}
	if err := t.f.reserve(v, u); err != nil {
		return quota.Usage{}, err
	}
	if q := t.request; q != nil {
		q.Volume, q.Bytes, q.Inodes = v.index, u.Bytes, u.Inodes
	}
	return u, nil
}

// trying is called right before the change.
func (t *attempt) trying() {
	if t.request != nil && !t.settled {
		t.request.Effect.Store(state.Trying)
	}
	t.step("trying")
}

// failed is called when it was not made, and gives back what was reserved.
func (t *attempt) failed(v *volume, reserved quota.Usage) {
	if q := t.request; q != nil {
		q.Effect.Store(state.Begun)
		q.Bytes, q.Inodes = 0, 0
	}
	v.ledger.Settle(reserved, quota.Delta{})
}

// settle charges the change.
func (t *attempt) settle(v *volume, reserved quota.Usage, change quota.Delta) {
	if t.settled {
		return
	}
	v.ledger.Settle(reserved, change)
	if q := t.request; q != nil {
		q.Bytes, q.Inodes = 0, 0
		q.Effect.Store(state.Done)
	}
	t.settled = true
	t.step("settled")
}

// note keeps the number of the inode that the change is about.
func (t *attempt) note(ino uint64) {
	if t.request != nil {
		t.request.Inode = ino
	}
}

func (t *attempt) noteOrphan(ino uint64) {
	if t.request != nil {
		t.request.Orphan = ino
	}
}

// moved tells whether the inode that was noted has come to a name.
func (t *attempt) moved(dirfd int, name string) bool {
	var st unix.Stat_t
	return t.request.Inode != 0 && unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Ino == t.request.Inode
}

// step is called where a test may end the process.
func (t *attempt) step(name string) { t.f.step(t.opcode, name) }
