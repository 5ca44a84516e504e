package fs

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxPeriod = time.Second
	// gatedPeriod is how often it looks at a gated volume at the most, for what grows all the same.
	gatedPeriod = 2 * time.Millisecond
	// closingPeriod is how often it looks at files that nobody has open any more.
	closingPeriod = 20 * time.Millisecond
	// minGated is how long a volume stays gated at least.
	minGated = 20 * time.Millisecond

	// nearRoom is the room below which a volume is looked at so often that it counts what that takes: all volumes with so
	// little share 1/samplerShare of a processor. Each is looked at every slowPeriod all the same, where that is possible.
	nearRoom     = 2 << 30
	samplerShare = 8
	slowPeriod   = 50 * time.Millisecond
	// lookFiles is at how many files of a volume it looks before it sees to the others.
	lookFiles = 256
)

// writeSpeed is how fast this machine writes at the most, in bytes a second. The sampler looks again before the
// room is used up at that.
var writeSpeed = writeSpeedOf(processors())

// writeSpeedOf is what so many processors write at the most: what memory takes in, which is more where there are more than 32.
func writeSpeedOf(processors int) uint64 { return uint64(min(max(processors, 32), 128)) << 30 }

// processors counts those of the machine, whichever of them this process may use: others write on all.
func processors() int {
	online, err := os.ReadFile("/sys/devices/system/cpu/online")
	if n := countList(strings.TrimSpace(string(online))); err == nil && n > 0 {
		return n
	}
	return runtime.NumCPU()
}

// countList counts the members of a list such as "0-3,8"; 0 if it is none.
func countList(list string) (n int) {
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err := strconv.Atoi(first)
		to, errTo := strconv.Atoi(last)
		if err != nil || errTo != nil || from < 0 || to < from {
			return 0
		}
		n += to - from + 1
	}
	return n
}

// sampler finds out what the kernel writes by itself. Its thread looks at the
// volumes that have files open for writing, and sleeps while there are none.
type sampler struct {
	f     *FS
	event int // eventfd that ends its sleep
	quit  atomic.Bool
	ended chan struct{}

	// wakeAt is when it wakes, in Unix nanoseconds.
	wakeAt atomic.Int64

	spent time.Duration // processor time for what it has looked at; its thread's own

	mu      sync.Mutex
	volumes map[*volume]struct{}
	looking map[*volume]time.Time // begun and not ended, with what their next was set to
}

func (s *sampler) start(f *FS) error {
	s.f, s.ended, s.volumes = f, make(chan struct{}), make(map[*volume]struct{})
	s.looking = make(map[*volume]time.Time)
	var err error
	if s.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	go s.run()
	return nil
}

func (s *sampler) stop() {
	s.quit.Store(true)
	s.wake()
	<-s.ended
	unix.Close(s.event)
}

func (s *sampler) wake() {
	s.wakeAt.Store(0)
	_, _ = unix.Write(s.event, binary.NativeEndian.AppendUint64(nil, 1))
}

// add has it look at a volume from now on.
func (s *sampler) add(v *volume) {
	room := v.ledger.Free().Bytes
	v.writers.room.Store(room)
	s.mu.Lock()
	s.volumes[v] = struct{}{}
	s.mu.Unlock()
	if time.Now().Add(v.period(room)).UnixNano() < s.wakeAt.Load() {
		s.wake()
	}
}

// hurry has it look at a volume at once.
func (s *sampler) hurry(v *volume) {
	s.mu.Lock()
	v.writers.next = time.Time{}
	s.mu.Unlock()
	s.wake()
}

// period is until when a volume need not be looked at again.
func (v *volume) period(room uint64) time.Duration {
	return min(max(time.Duration(float64(room)/float64(writeSpeed)*float64(time.Second)), gatedPeriod), maxPeriod)
}

func (s *sampler) run() {
	runtime.LockOSThread()
	defer close(s.ended)
	// Where it may not, it is as prompt as the scheduler has it.
	_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}, 0)
	for !s.quit.Load() {
		s.look()
		s.sleep(s.next())
	}
}

// sleep waits until then, or wake.
func (s *sampler) sleep(until time.Time) {
	s.wakeAt.Store(until.UnixNano())
	fds := []unix.PollFd{{Fd: int32(s.event), Events: unix.POLLIN}}
	d := time.Until(until)
	if d <= 0 {
		return
	}
	timeout := unix.NsecToTimespec(int64(d))
	if n, _ := unix.Ppoll(fds, &timeout, nil); n > 0 {
		var buf [8]byte
		_, _ = unix.Read(s.event, buf[:])
	}
}

// look looks at the volumes whose time has come.
func (s *sampler) look() {
	for _, v := range s.due() {
		if !s.begin(v) {
			continue // seen to while it looked at another
		}
		began, before := threadTime(), s.spent
		now := time.Now()
		period := s.f.sampleVolume(v, s.look)
		cost := threadTime() - began - (s.spent - before) // without the others that it saw to meanwhile
		s.spent += cost
		s.end(v, now.Add(period), cost)
	}
}

// due lists the volumes whose time has come. It finds out how often each can be looked at.
func (s *sampler) due() (due []*volume) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	var near crowd
	for v := range s.volumes {
		ws := &v.writers
		if ws.count.Load() == 0 {
			ws.next, ws.cost = time.Time{}, 0
			ws.tempo.Store(0)
			delete(s.volumes, v)
			continue
		}
		if ws.gated.Load() || ws.room.Load() < nearRoom {
			near.volumes++
			near.cost += ws.cost
		}
	}
	for v := range s.volumes {
		ws := &v.writers
		ws.tempo.Store(int64(near.tempo(ws.cost)))
		if !ws.next.After(now) {
			due = append(due, v)
		}
	}
	if len(s.volumes) == 0 {
		s.f.gating.callers.Close()
	}
	return due
}

// begin takes a volume to be looked at, if its time has come and nobody does already.
func (s *sampler) begin(v *volume) bool {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, already := s.looking[v]; already || v.writers.next.After(now) {
		return false
	}
	v.writers.next = now.Add(time.Hour)
	s.looking[v] = v.writers.next
	return true
}

// end has the volume that was looked at be looked at again then, unless somebody wants it sooner.
func (s *sampler) end(v *volume, then time.Time, cost time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ws := &v.writers
	if ws.next.Equal(s.looking[v]) || then.Before(ws.next) {
		ws.next = then
	}
	delete(s.looking, v)
	// What there was to look at once may be there again.
	ws.cost = max(cost, ws.cost-ws.cost/8)
}

// next is when the next volume's time comes.
func (s *sampler) next() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := time.Now().Add(time.Hour)
	for v := range s.volumes {
		if v.writers.next.Before(next) {
			next = v.writers.next
		}
	}
	return next
}

// crowd is what volumes with little room have in common: the sampler's time.
type crowd struct {
	volumes int
	cost    time.Duration // of looking at each once
}

// tempo is after what time a volume may be looked at again that takes the sampler so long: such volumes get equal parts of its
// share of a processor, and those that need more, 0.5 of a processor at the most.
func (c crowd) tempo(cost time.Duration) time.Duration {
	fair := samplerShare * time.Duration(max(c.volumes, 1)) * cost
	return max(gatedPeriod, min(fair, max(slowPeriod, 2*cost, 2*c.cost)))
}

// threadTime is the processor time that the calling thread has had.
func threadTime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts)
	return time.Duration(ts.Nano())
}

// gateBelow is how much room the volume has at least while it is not gated, in bytes: what is written until the sampler looks
// again must fit into it.
func (ws *writers) gateBelow() uint64 {
	below := ws.below.Load()
	if tempo := time.Duration(ws.tempo.Load()); tempo > gatedPeriod {
		below = max(below, uint64(tempo.Seconds()*float64(writeSpeed)))
	}
	return below
}

// sampleVolume charges what the kernel has written by itself, and gates the
// volume, or no longer. It returns until when that is good. between is called now and then meanwhile.
func (f *FS) sampleVolume(v *volume, between func()) time.Duration {
	ws := &v.writers
	var closing bool
	var busy []*writing
	for i, w := range ws.list() {
		if i%lookFiles == lookFiles-1 {
			between()
		}
		n := w.n
		if !n.tryLock() {
			continue // somebody is about it, and changes it himself
		}
		if n.writing == w && !ws.frozen.Load() { // what Quiesce has read stays
			grown := f.sampleLocked(w)
			held := w.held.Load()
			if grown > 0 && held {
				f.brakeLocked(w, grown)
			}
			if w.braked && w.lifts == 0 && v.ledger.Free().Bytes >= 2*brakeBelow {
				f.setBrakeLocked(w, false)
			}
			if w.opens == 0 || held && !w.exact || len(w.permits) > 0 {
				busy = append(busy, w)
			}
			closing = closing || w.opens == 0
		}
		n.unlock()
	}
	room := v.ledger.Free().Bytes
	ws.room.Store(room)
	ws.mu.Lock()
	since, probed := ws.since, ws.probed
	ws.mu.Unlock()
	below := ws.gateBelow()
	gated := ws.gated.Load()
	period := v.period(room)
	switch {
	case ws.frozen.Load():
	case !gated && room < below:
		f.gateVolume(v)
		period = 0 // what was begun before goes on
	case !gated && room < probeBelow && room < probed/2:
		f.probeVolume(v, room)
	case gated && room >= max(ungateAbove, 2*below) && time.Since(since) >= minGated:
		f.ungateVolume(v)
		gated = false
	case !gated && room > probed:
		ws.mu.Lock()
		ws.probed = min(room, 2*probeBelow)
		ws.mu.Unlock()
	}
	tempo := max(gatedPeriod, time.Duration(ws.tempo.Load()))
	if gated {
		period = tempo
	}
	f.tend(v, busy)
	if closing {
		period = min(period, max(closingPeriod, tempo))
	}
	return period
}

// tend reads what cannot be read on the sampler's thread, since it waits for what is
// being written: what a held inode has, what its calls have used of their permits,
// and whether a file that nobody has open is mapped.
func (f *FS) tend(v *volume, busy []*writing) {
	if len(busy) == 0 || !v.writers.tending.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer v.writers.tending.Store(false)
		for _, w := range busy {
			v.changing.RLock()
			w.n.lock()
			if err := f.tendLocked(w); err != nil {
				f.log.Sugar().Errorw("charge of a written file", "volume", v.id, "error", err)
			}
			w.n.unlock()
			v.changing.RUnlock()
		}
	}()
}

func (f *FS) tendLocked(w *writing) error {
	switch {
	case w.n.writing != w:
	case w.opens == 0 && f.unmappedWritingLocked(w.n):
	case w.held.Load() && !w.exact:
		return f.readWrittenLocked(w)
	case slices.ContainsFunc(w.permits, f.over):
		return f.foldLocked(w, f.over)
	}
	return nil
}
