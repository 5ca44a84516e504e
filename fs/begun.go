package fs

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// When an inode is held, the write(2) goes on that has its lock, with all that it was asked to write: at most calmCall bytes,
// as far as is known (see probeVolume). It may be long about that, where its thread is not let run or waits for
// what it writes. So the last of a volume's room is granted to nobody before such calls are over and what they wrote is charged.

// maxBegun is how long a held call waits for that. Then it gets what they all leave.
const maxBegun = time.Second

// noteHeldLocked notes that the inode is held from now on; writers.mu is held.
func (ws *writers) noteHeldLocked(w *writing) {
	w.holds.Add(1)
	ws.begun.Store(true)
}

// mayGrow tells whether a call that was begun before the inode was held may go on.
func (w *writing) mayGrow() bool { return w.held.Load() && w.ended.Load() != w.holds.Load() }

// cramped tells whether what calls that were begun before may still take could be wanted for a call of so many bytes.
func (v *volume) cramped(length uint64) bool {
	ws := &v.writers
	return ws.begun.Load() && v.ledger.Free().Bytes < length+calmCall*uint64(ws.count.Load())
}

// aside is how many bytes calls that were begun before may still take, but for those on an inode of which none is left.
func (ws *writers) aside(but *writing) (bytes uint64) {
	if !ws.begun.Load() {
		return 0
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := range ws.all {
		if w != but && w.mayGrow() {
			bytes += calmCall
		}
	}
	return bytes
}

// awaitBegun waits until what was begun before is over, maxBegun at the most. No lock is held.
func (f *FS) awaitBegun(v *volume) {
	ws := &v.writers
	ws.mu.Lock()
	if ws.ending == nil {
		ws.ending, ws.endingSince = make(chan struct{}), time.Now()
		go f.endBegun(v)
	}
	ended, until := ws.ending, ws.endingSince.Add(maxBegun)
	ws.mu.Unlock()
	select {
	case <-ended:
	case <-time.After(time.Until(until)):
	}
}

// endBegun waits until what was begun before is over on all inodes, and charges it.
func (f *FS) endBegun(v *volume) {
	ws := &v.writers
	for _, w := range ws.list() {
		if w.mayGrow() {
			f.endBegunOf(w)
		}
	}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	begun := false
	for w := range ws.all {
		begun = begun || w.mayGrow()
	}
	ws.begun.Store(begun)
	close(ws.ending)
	ws.ending = nil
}

func (f *FS) endBegunOf(w *writing) {
	n, holds := w.n, w.holds.Load()
	n.lock()
	fd, err := -1, error(nil)
	if n.writing == w {
		fd, err = unix.FcntlInt(uintptr(w.fd), unix.F_DUPFD_CLOEXEC, 0)
	}
	n.unlock()
	if fd < 0 || err != nil {
		return
	}
	quota.AwaitWrite(fd)
	unix.Close(fd)
	n.vol.changing.RLock()
	defer n.vol.changing.RUnlock()
	n.lock()
	defer n.unlock()
	if n.writing == w && f.readWrittenLocked(w) == nil {
		w.ended.Store(holds)
	}
}
