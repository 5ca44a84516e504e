package fs

import (
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota/gate"
)

// What an earlier daemon has passed through stays open after its death, and after
// its mount was cut off: the kernel goes on writing it. Whoever recounts a volume
// then looks for such files. They get a writing at once, which is held always: all
// that may write them is refused, unless others open them anew, from whom their old
// writers cannot be told. It is charged once the volume has been counted.

// leftFiles are those of all volumes.
type leftFiles struct {
	mu       sync.Mutex // a leaf lock; guards what follows, and what Left says
	all      []*Left
	attached bool
	closed   bool
	ends     sync.WaitGroup
}

// Left are the files of a volume that were opened for writing before this daemon's life.
type Left struct {
	f *FS
	v *volume

	// Guarded by leftFiles.mu.

	// files are those that are not settled.
	files map[handleKey]*leftFile
	// counted tells that the ledger holds their charges.
	counted bool
}

type leftFile struct {
	key    handleKey
	mode   uint32
	orphan string // its name there, when it is one
	// charge is what the ledger holds for it.
	charge uint64
	w      *writing // nil until it is held
}

// Left begins the search for files that an earlier daemon has left open in a volume
// that is being counted. Settle must follow. ErrNoVolume.
func (f *FS) Left(id string) (*Left, error) {
	v, err := f.volume(id)
	if err != nil {
		return nil, err
	}
	l := &Left{f: f, v: v, files: make(map[handleKey]*leftFile)}
	f.left.mu.Lock()
	defer f.left.mu.Unlock()
	f.left.all = append(f.left.all, l)
	v.left.Store(l)
	return l, nil
}

// Watch is quota.ScanOptions.Watch for the volume's tree: a file that is open for
// writing is held from then on.
func (l *Left) Watch(dirFD int, name string) (counted func(charge uint64)) {
	return l.watch(dirFD, name, "")
}

// WatchOrphan is that for its orphans.
func (l *Left) WatchOrphan(dirFD int, name string) (counted func(charge uint64)) {
	return l.watch(dirFD, name, name)
}

func (l *Left) watch(dirFD int, name, orphan string) func(charge uint64) {
	const flags = unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NOATIME | unix.O_NOCTTY
	fd, err := openat(dirFD, name, flags|unix.O_NONBLOCK, 0)
	if err == unix.EAGAIN { // somebody has a lease: see aloneWith
		fd, err = openat(dirFD, name, flags, 0)
	}
	if err != nil {
		l.warn("file that may be open for writing", err)
		return nil
	}
	defer syscall.Close(fd)
	left := &l.f.left
	left.mu.Lock()
	defer left.mu.Unlock()
	open := written(fd)
	if !open && len(l.files) == 0 {
		return nil
	}
	key, st, err := describe(fd)
	if err != nil {
		l.warn("file that may be open for writing", err)
		return nil
	}
	file := l.files[key]
	if file == nil && !open {
		return nil
	}
	if file == nil {
		file = &leftFile{key: key, mode: st.Mode, orphan: orphan}
		l.files[key] = file
		if left.attached && !left.closed && l.f.gating != nil {
			l.holdLocked(file)
		}
	}
	return func(charge uint64) {
		left.mu.Lock()
		defer left.mu.Unlock()
		file.charge = charge
	}
}

// written tells whether somebody has the file open for writing, or maps it so: then
// the kernel grants no lease for reading (check_conflicting_open in fs/locks.c).
// fd is open for reading only.
func written(fd int) bool {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return err == unix.EAGAIN
	}
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK)
	return err != nil
}

func (l *Left) warn(what string, err error) {
	l.f.log.Sugar().Warnw(what, "volume", l.v.id, "error", err)
}

// holdLocked has what is done to the file refused from now on. Its node is kept until
// the writing ends.
func (l *Left) holdLocked(file *leftFile) {
	f := l.f
	n := f.nodes.pin(l.v, file.key, file.mode)
	fd, err := f.openNode(n, unix.O_RDWR)
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstat(fd, &st)
	}
	w := &writing{n: n, ino: st.Ino, fd: fd, left: true, stores: true, appends: true}
	if err == nil {
		g := f.gating
		g.mu.Lock()
		g.byIno[w.ino] = w
		g.mu.Unlock()
		w.held.Store(true)
		if err = g.gate.Mark(fd); err == nil {
			err = g.gate.Hold(fd)
		}
		if err != nil {
			g.mu.Lock()
			delete(g.byIno, w.ino)
			g.mu.Unlock()
			_ = g.gate.Unmark(fd)
		}
	}
	if err != nil {
		l.warn("file that is open for writing cannot be held", err)
		if fd >= 0 {
			syscall.Close(fd)
		}
		f.forgotten(f.nodes.unpin(n))
		return
	}
	file.w = w
}

// Settle is called when the ledger was set to what the volume was counted to hold,
// or when that has failed, and before changes go on.
func (l *Left) Settle() {
	l.f.left.mu.Lock()
	l.counted = true
	held := l.takeLocked()
	l.f.left.mu.Unlock()
	l.settle(held)
}

// takeLocked returns what is held and counted.
func (l *Left) takeLocked() (held []*leftFile) {
	if !l.counted {
		return nil
	}
	for key, file := range l.files {
		if file.w != nil {
			held = append(held, file)
			l.v.writers.count.Add(1)
			delete(l.files, key)
		}
	}
	if n := len(l.files); n > 0 && l.f.left.attached {
		l.f.log.Sugar().Warnw("files that were open for writing when the daemon ended go on without a limit",
			"volume", l.v.id, "files", n)
	}
	return held
}

// settle makes the writings what those of the volume's other files are.
func (l *Left) settle(held []*leftFile) {
	f, v := l.f, l.v
	ws := &v.writers
	for _, file := range held {
		w, n := file.w, file.w.n
		v.changing.RLock()
		n.lock()
		n.setChargeLocked(file.charge)
		n.charged, n.dense = true, false
		n.setUnsureLocked(false)
		if file.orphan != "" {
			n.setOrphanLocked(file.orphan)
		}
		n.ownRareLocked().writing = w
		n.set(stores|mappable|markWritten|markLeft, true)
		ws.mu.Lock()
		if len(ws.all) == 0 {
			ws.gated.Store(v.ledger.Free().Bytes < ws.gateBelow())
		}
		ws.all[w] = struct{}{}
		ws.mu.Unlock()
		// With what came after it was counted.
		if err := f.readWrittenLocked(w); err != nil {
			l.warn("charge of a written file", err)
		}
		n.unlock()
		v.changing.RUnlock()
	}
	if len(held) > 0 {
		f.sampler.add(v)
		f.log.Sugar().Warnw("files that were open for writing when the daemon ended are held: writes to them fail",
			"volume", v.id, "files", len(held))
	}
}

// holdLeft is called once it is known whether there is a gate.
func (f *FS) holdLeft() {
	left := &f.left
	left.mu.Lock()
	left.attached = true
	all := left.all
	held := make([][]*leftFile, len(all))
	for i, l := range all {
		if f.gating != nil {
			for _, file := range l.files {
				l.holdLocked(file)
			}
		}
		held[i] = l.takeLocked()
	}
	left.mu.Unlock()
	for i, l := range all {
		l.settle(held[i])
	}
}

// judgeLeftLocked answers a held call on a file that was left; Later when it is as
// any other.
func (f *FS) judgeLeftLocked(w *writing, ev *gate.Event) gate.Verdict {
	if !w.left || w.opens > 0 || ev.Len == 0 {
		return gate.Later
	}
	switch f.gating.callers.CallOf(ev).Access {
	case gate.Reads:
		return gate.Allow
	case gate.Unknown:
		if w.n.opens > 0 && w.n.writing == w { // who reads it by io_uring now
			return gate.Later
		}
	}
	return gate.Deny(unix.EIO)
}

// leftEndedLocked is called when the writing of such a file ends.
func (f *FS) leftEndedLocked(n *node) {
	f.left.mu.Lock()
	defer f.left.mu.Unlock()
	if f.left.closed {
		return
	}
	f.left.ends.Go(func() {
		if n.has(nameless) && n.vol.begin() == nil {
			n.lock()
			if n.opens == 0 && n.orphan != "" {
				if err := f.removeOrphanLocked(n); err != nil {
					f.log.Sugar().Errorw("reap orphan", "volume", n.vol.id, "orphan", n.orphan, "error", err)
				}
			}
			n.unlock()
			n.vol.end()
		}
		f.forgotten(f.nodes.unpin(n))
	})
}

// pending counts the files that are not settled. What has ended as it was counted is
// not one any more; what has grown is one until the volume is counted again.
func (l *Left) pending() int {
	l.f.left.mu.Lock()
	defer l.f.left.mu.Unlock()
	if !l.counted {
		return len(l.files)
	}
	for key, file := range l.files {
		if file.w == nil && l.overLocked(file) {
			delete(l.files, key)
		}
	}
	return len(l.files)
}

func (l *Left) overLocked(file *leftFile) bool {
	fd, err := unix.OpenByHandleAt(int(l.f.pool.Fd()), file.key.fileHandle(), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NOATIME)
	if err != nil {
		return isGone(err)
	}
	defer syscall.Close(fd)
	if written(fd) {
		return false
	}
	_, charge, _, err := l.f.measure(fd)
	return err == nil && charge == file.charge
}

// reset is ResetCharges for what is not settled.
func (l *Left) reset() {
	l.f.left.mu.Lock()
	defer l.f.left.mu.Unlock()
	for _, file := range l.files {
		fd, err := unix.OpenByHandleAt(int(l.f.pool.Fd()), file.key.fileHandle(), unix.O_PATH|unix.O_CLOEXEC)
		if err == nil {
			var charge uint64
			if _, charge, _, err = l.f.measure(fd); err == nil {
				file.charge = charge
			}
			syscall.Close(fd)
		}
		if err != nil && !isGone(err) {
			l.warn("charge of a written file", err)
		}
	}
}

// closeLeft lets go of what is not settled.
func (f *FS) closeLeft() {
	left := &f.left
	left.mu.Lock()
	left.closed = true
	for _, l := range left.all {
		for key, file := range l.files {
			if file.w != nil {
				f.gating.mu.Lock()
				delete(f.gating.byIno, file.w.ino)
				f.gating.mu.Unlock()
				syscall.Close(file.w.fd)
			}
			delete(l.files, key)
		}
	}
	left.mu.Unlock()
	left.ends.Wait()
}
