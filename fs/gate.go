package fs

import (
	"errors"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/quota/gate"
)

// In TierGate the kernel writes by itself as well. What it writes is found out
// afterwards, by a sampler, and while a volume has ample room that is soon
// enough. When it has little the volume is gated: system calls on the files that
// are open for writing are held, and reserve what they need first. See writing.go,
// sampler.go and quota/gate.

var (
	// gateBelow is how much room a volume has at least while it is not gated, in
	// bytes, 64 MiB for 32 GiB/s; ungateAbove is from where on it is not any more. What is between a look of
	// the sampler and its next must fit into the first.
	gateBelow   = writeSpeed / 512
	ungateAbove = 2 * gateBelow

	// Calls that were allowed when a volume is frozen are waited for maxUnderWay: it is the kernel that has to end them. A
	// variable for tests.
	maxUnderWay = 10 * time.Second

	// A call that is under way when a volume is gated goes on, with all that it
	// was asked to write, at most MAX_RW_COUNT (include/linux/fs.h). Where such a one
	// does not fit any more, the first call of each file is held, and only who
	// makes calls of up to calmCall bytes is left alone, until the room is half of that.
	probeBelow = gateBelow + 1<<31
)

const (
	calmCall = 1 << 20

	// maxBelow is how far gateBelow is raised in a volume where it was too little.
	maxBelow = 1 << 30

	// A volume that is frozen is looked at each settlePause until nothing moves, maxSettle times.
	settlePause = 2 * time.Millisecond
	maxSettle   = 100

	// brakeBelow is the room below which an inode is braked that grows without asking;
	// it is let go from twice that on.
	brakeBelow = 8 << 20
	// maxFaults is how many signals a process may survive.
	maxFaults = 50
)

// gating is the gate of a pool; it is nil in the other tiers.
type gating struct {
	gate    *gate.Gate
	callers gate.Callers

	mu     sync.RWMutex
	byIno  map[uint64]*writing
	braked *os.File // the directory of braked inodes

	// later is what decideLater has not answered.
	laterMu sync.Mutex
	later   map[*gate.Event]*writing
}

// writers are the inodes of a volume that the kernel writes by itself.
type writers struct {
	mu  sync.Mutex // after node.mu
	all map[*writing]struct{}
	// gated tells that all of them are held, since when and what has grown all the same.
	gated atomic.Bool // written under mu
	since time.Time
	late  uint64
	// frozen tells that Quiesce holds them as well, and that nothing may let go.
	frozen atomic.Bool // written under mu
	// begun tells that of some inode it is not known that what was begun before it was held is over. ending is
	// closed when that has been waited for, which is done since endingSince; nil when nobody does. See begun.go.
	begun       atomic.Bool // written under mu
	ending      chan struct{}
	endingSince time.Time
	// probed is the room when all were held last, to see what they do.
	probed uint64
	// below is gateBelow, or more where that was too little.
	below atomic.Uint64

	count  atomic.Int64
	brakes atomic.Int64

	// next is when the sampler looks again, cost the processor time that it takes; guarded by sampler.mu.
	next time.Time
	cost time.Duration
	// tempo is how often the sampler can look, in nanoseconds.
	tempo atomic.Int64
	// room is what the sampler has seen last.
	room atomic.Uint64

	// faulting is set while processes are sent SIGBUS; faults, how many each was sent, is its own.
	faulting atomic.Bool
	faults   map[int]int
	// tending is set while a goroutine is about what the sampler has found.
	tending atomic.Bool

	gatings atomic.Uint64
}

func (ws *writers) init() {
	ws.all, ws.faults = make(map[*writing]struct{}), make(map[int]int)
	ws.probed = 2 * probeBelow
	ws.below.Store(gateBelow)
}

// list returns the writings of the volume.
func (ws *writers) list() []*writing {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	return slices.Collect(maps.Keys(ws.all))
}

// gates tells whether writers of the volume are passed through: one that is
// smaller than the room that it needs for that would always be gated.
func (f *FS) gates(v *volume) bool {
	return f.gating != nil && (f.holdAlways || v.ledger.Limit().Bytes > ungateAbove)
}

func (f *FS) startGate(k Kernel, group int) error {
	g := &gating{byIno: make(map[uint64]*writing), later: make(map[*gate.Event]*writing)}
	var err error
	ready := make(chan struct{})
	decide := func(ev *gate.Event) gate.Verdict {
		<-ready
		return f.decide(ev)
	}
	o := gate.Options{Decide: decide, Pace: k.Pacer(), State: f.state, Group: group, Logger: f.log}
	if g.gate, err = gate.Open(o); err != nil {
		return err
	}
	if g.braked, err = f.brakes(); err != nil {
		return errors.Join(err, g.gate.Close())
	}
	f.gating = g
	defer close(ready)
	if err := f.sampler.start(f); err != nil {
		f.gating = nil
		return errors.Join(err, g.gate.Close(), g.braked.Close())
	}
	if err := f.restoreWritings(); err != nil {
		f.log.Sugar().Errorw("files that the kernel writes are not held", "error", err)
	}
	return nil
}

func (f *FS) stopGate() error {
	if f.gating == nil {
		return nil
	}
	f.sampler.stop()
	f.gating.mu.RLock()
	left := make([]*writing, 0, len(f.gating.byIno))
	for _, w := range f.gating.byIno {
		left = append(left, w)
	}
	f.gating.mu.RUnlock()
	for _, w := range left {
		w.n.lock()
		if w.n.writing == w {
			f.dropWritingLocked(w)
		}
		w.n.unlock()
	}
	err := errors.Join(f.gating.gate.Close(), f.gating.braked.Close())
	f.gating.callers.Close()
	return err
}

// addWriting marks the inode, held or native as the volume is.
func (f *FS) addWriting(w *writing) error {
	g, v := f.gating, w.n.vol
	ws := &v.writers
	g.mu.Lock()
	g.byIno[w.ino] = w
	g.mu.Unlock()
	ws.mu.Lock()
	if len(ws.all) == 0 { // nobody has looked at it since the last was closed
		ws.gated.Store(v.ledger.Free().Bytes < ws.gateBelow())
	}
	var err error
	if !w.marked {
		err = g.gate.Mark(w.fd)
	}
	w.held.Store(f.holdAlways || ws.gated.Load() || ws.frozen.Load() || v.ledger.Free().Bytes < probeBelow)
	if err == nil && w.held.Load() {
		err = g.gate.Hold(w.fd)
	}
	if err == nil {
		ws.all[w] = struct{}{}
		w.settled = w.held.Load() && !w.marked
		if w.held.Load() && w.marked {
			ws.noteHeldLocked(w)
		}
	}
	ws.mu.Unlock()
	if err != nil {
		g.mu.Lock()
		delete(g.byIno, w.ino)
		g.mu.Unlock()
		return errors.Join(err, g.gate.Unmark(w.fd))
	}
	if ws.count.Add(1) == 1 {
		f.sampler.add(v)
	}
	return nil
}

func (f *FS) removeWriting(w *writing) {
	g, ws := f.gating, &w.n.vol.writers
	ws.mu.Lock()
	delete(ws.all, w)
	err := g.gate.Unmark(w.fd)
	ws.mu.Unlock()
	if err != nil && !errors.Is(err, gate.ErrClosed) {
		f.log.Sugar().Warnw("gate", "volume", w.n.vol.id, "error", err)
	}
	g.mu.Lock()
	delete(g.byIno, w.ino)
	g.mu.Unlock()
	ws.count.Add(-1)
}

// decide answers a held call, or has it answered.
func (f *FS) decide(ev *gate.Event) gate.Verdict {
	f.gating.mu.RLock()
	w := f.gating.byIno[ev.Inode]
	f.gating.mu.RUnlock()
	if w == nil {
		return gate.Allow
	}
	n, v := w.n, w.n.vol
	if !v.changing.TryRLock() {
		go f.decideLater(w, ev)
		return gate.Later
	}
	defer v.changing.RUnlock()
	// What is not exact yet waits for what is being written.
	if !n.tryLock() {
		go f.decideLater(w, ev)
		return gate.Later
	}
	defer n.unlock()
	if !w.exact || w.settlesLocked(f, ev) || v.cramped(ev.Len) {
		go f.decideLater(w, ev)
		return gate.Later
	}
	return f.judgeLocked(w, ev)
}

func (f *FS) decideLater(w *writing, ev *gate.Event) {
	verdict := gate.Deny(unix.EIO)
	defer func() {
		if p := recover(); p != nil {
			f.log.Sugar().Errorw("panic over a held system call", "panic", p)
		}
		f.gating.setLater(ev, nil)
		f.gating.gate.Answer(ev, verdict)
	}()
	f.gating.setLater(ev, w)
	v := w.n.vol
	if v.cramped(ev.Len) && f.gating.callers.CallOf(ev).Access != gate.Reads {
		f.awaitBegun(v)
	}
	v.changing.RLock()
	defer v.changing.RUnlock()
	w.n.lock()
	defer w.n.unlock()
	verdict = f.judgeLocked(w, ev)
}

// setLater notes whose a call is that is not answered yet, nil once it is.
func (g *gating) setLater(ev *gate.Event, w *writing) {
	g.laterMu.Lock()
	defer g.laterMu.Unlock()
	if g.later[ev] = w; w == nil {
		delete(g.later, ev)
	}
}

// gateVolume has every call on the volume's written files held. What the kernel
// has begun goes on: the sampler sees that.
func (f *FS) gateVolume(v *volume) {
	ws := &v.writers
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.gated.Load() {
		return
	}
	if below := ws.below.Load(); ws.late > below/2 {
		ws.below.Store(min(2*below, maxBelow))
	}
	ws.gated.Store(true)
	ws.since, ws.late = time.Now(), 0
	ws.gatings.Add(1)
	f.holdAllLocked(ws)
}

func (f *FS) holdAllLocked(ws *writers) {
	for w := range ws.all {
		if !w.held.Swap(true) {
			ws.noteHeldLocked(w)
			if err := f.gating.gate.Hold(w.fd); err != nil {
				f.log.Sugar().Errorw("gate", "volume", w.n.vol.id, "error", err)
			}
		}
	}
}

// freeLocked lets a held inode go native; node.mu is held. What its calls may
// still use is not reserved any more: the sampler sees it.
func (f *FS) freeLocked(w *writing) {
	ws := &w.n.vol.writers
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if f.holdAlways || w.left || !w.held.Load() || ws.gated.Load() || ws.frozen.Load() {
		return
	}
	f.dropPermitsLocked(w, w.permits)
	w.exact, w.settled = false, false
	if err := f.gating.gate.Release(w.fd); err != nil {
		f.log.Sugar().Errorw("gate", "volume", w.n.vol.id, "error", err)
		return
	}
	w.held.Store(false)
}

// ungateVolume lets the volume's written files go native. Those that are busy
// stay held until their next call, or the sampler's next look.
func (f *FS) ungateVolume(v *volume) {
	ws := &v.writers
	ws.mu.Lock()
	ws.gated.Store(false)
	ws.probed = max(v.ledger.Free().Bytes, 1)
	ws.mu.Unlock()
	f.freeAll(v)
}

func (f *FS) freeAll(v *volume) {
	for _, w := range v.writers.list() {
		if w.n.tryLock() {
			if w.n.writing == w {
				if w.braked && w.lifts == 0 {
					f.setBrakeLocked(w, false)
				}
				f.freeLocked(w)
			}
			w.n.unlock()
		}
	}
}

// probeVolume holds every file for one call, to see how much it writes at a time.
func (f *FS) probeVolume(v *volume, room uint64) {
	ws := &v.writers
	ws.mu.Lock()
	defer ws.mu.Unlock()
	ws.probed = max(room, 1)
	f.holdAllLocked(ws)
}

// freeze holds every call on the volume's files and reads what they hold; thaw
// must follow. The volume's changes are shut out.
func (f *FS) freeze(v *volume) error {
	ws := &v.writers
	ws.mu.Lock()
	ws.frozen.Store(true)
	f.holdAllLocked(ws)
	ws.mu.Unlock()
	// A call that was let go before may not have begun yet: until nothing moves.
	since := time.Now()
	for looks := 1; ; looks++ {
		underWay := f.underWay(v)
		before := v.ledger.Used()
		if err := f.readAll(v); err != nil {
			return err
		}
		moves := v.ledger.Used() != before && looks < maxSettle
		switch {
		case ws.count.Load() == 0 || !moves && underWay == 0:
			return nil
		case !moves && time.Since(since) > maxUnderWay:
			f.log.Sugar().Warnw("a write does not come to an end", "volume", v.id, "thread", underWay)
			return nil
		}
		time.Sleep(settlePause)
	}
}

// underWay returns a thread of the frozen volume that may still do what it was allowed, 0 when there is none.
func (f *FS) underWay(v *volume) (tid int) {
	g := f.gating
	// Who is held anew has ended the call before.
	ended, locked := make(map[int]bool), make(map[*writing]bool)
	g.laterMu.Lock()
	for ev, w := range g.later {
		if w.n.vol == v {
			ended[ev.TID] = true
			locked[w] = locked[w] || g.callers.Of(ev.TID).HasLock()
		}
	}
	g.laterMu.Unlock()
	for _, w := range v.writers.list() {
		w.n.lock()
		if w.n.writing == w && !locked[w] {
			for _, p := range w.permits {
				if p.tid > 0 && p.reserved() > 0 && !ended[p.tid] && !f.over(p) {
					tid = p.tid
				}
			}
		}
		w.n.unlock()
	}
	return tid
}

func (f *FS) thaw(v *volume) {
	ws := &v.writers
	ws.mu.Lock()
	ws.frozen.Store(false)
	ws.mu.Unlock()
	if !ws.gated.Load() {
		f.freeAll(v)
	}
}

// readAll makes the charges of the volume's written files what the disk holds.
func (f *FS) readAll(v *volume) error {
	var errs []error
	for _, w := range v.writers.list() {
		w.n.lock()
		if w.n.writing == w {
			errs = append(errs, f.readWrittenLocked(w))
		}
		w.n.unlock()
	}
	return errors.Join(errs...)
}

// Refresh brings a volume's use up to date with what the kernel has written by itself.
func (f *FS) Refresh(id string) {
	if v, err := f.volume(id); err == nil {
		f.refresh(v)
	}
}

func (f *FS) refresh(v *volume) {
	if v.writers.count.Load() == 0 || !v.changing.TryRLock() {
		return
	}
	defer v.changing.RUnlock()
	for _, w := range v.writers.list() {
		if w.n.tryLock() {
			if w.n.writing == w {
				_ = f.readWrittenLocked(w) // it stays what it was
			}
			w.n.unlock()
		}
	}
}

// shut has every call on the files of a removed volume fail.
func (f *FS) shut(v *volume) {
	f.gateVolume(v)
	for _, w := range v.writers.list() {
		w.n.lock()
		if w.n.writing == w && w.braked {
			f.setBrakeLocked(w, false)
		}
		w.n.unlock()
	}
}

// Writers counts the inodes of a volume that the kernel may write without asking.
func (f *FS) Writers(id string) int {
	v, err := f.volume(id)
	if err != nil {
		return 0
	}
	count := int(v.writers.count.Load())
	if l := v.left.Load(); l != nil {
		count += l.pending()
	}
	return count
}

// squeeze gets room in a full volume by finding out what was permitted and not
// used. but is locked already.
func (f *FS) squeeze(v *volume, but *writing) {
	for _, w := range v.writers.list() {
		if w == but || !w.n.tryLock() {
			continue
		}
		switch {
		case w.n.writing != w:
		case !w.exact:
			_ = f.readWrittenLocked(w)
		default:
			_ = f.foldLocked(w, f.over)
		}
		w.n.unlock()
	}
}

// over tells whether the call has ended for sure.
func (f *FS) over(p *permit) bool { return p.tid > 0 && f.gating.callers.Over(p.tid, p.call) }

// tighten is called before u is reserved in a volume that is not gated: what is left
// then must still be enough for what the kernel writes until the sampler looks.
func (f *FS) tighten(v *volume, u quota.Usage) {
	ws := &v.writers
	if u.Bytes == 0 || ws.count.Load() == 0 || ws.gated.Load() {
		return
	}
	free := v.ledger.Free().Bytes
	left := free - min(free, u.Bytes)
	below := ws.gateBelow()
	if left >= ws.room.Load()/2 && left >= below {
		return
	}
	if left < below {
		f.gateVolume(v)
	}
	f.sampleVolume(v, func() {})
	f.sampler.hurry(v)
}

// setLimit changes the limit of a volume that is served.
func (f *FS) setLimit(v *volume, limit quota.Usage) error {
	ws := &v.writers
	if ws.count.Load() > 0 && limit.Bytes < v.ledger.Limit().Bytes {
		f.gateVolume(v)
		if err := f.readAll(v); err != nil {
			return err
		}
	}
	err := v.ledger.SetLimit(limit)
	if ws.count.Load() > 0 {
		f.sampler.hurry(v)
	}
	return err
}

// SetLimit changes a volume's limit as quota.Ledger.SetLimit does, while the kernel
// writes its files by itself.
func (f *FS) SetLimit(id string, limit quota.Usage) error {
	v, err := f.volume(id)
	if err != nil {
		return err
	}
	return f.setLimit(v, limit)
}
