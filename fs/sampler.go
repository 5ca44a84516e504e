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
	// gatedPeriod is how often it looks at a gated volume, for what grows all the same.
	gatedPeriod = 2 * time.Millisecond
	// closingPeriod is how soon it looks at files that nobody has open any more.
	closingPeriod = 20 * time.Millisecond
	// minGated is how long a volume stays gated at least.
	minGated = 20 * time.Millisecond
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

	mu      sync.Mutex
	volumes map[*volume]struct{}
}

func (s *sampler) start(f *FS) error {
	s.f, s.ended, s.volumes = f, make(chan struct{}), make(map[*volume]struct{})
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

// by makes sure that it looks within d.
func (s *sampler) by(d time.Duration) {
	if time.Now().Add(d).UnixNano() < s.wakeAt.Load() {
		s.wake()
	}
}

// add has it look at a volume from now on.
func (s *sampler) add(v *volume) {
	room := v.ledger.Free().Bytes
	v.writers.room.Store(room)
	s.mu.Lock()
	s.volumes[v] = struct{}{}
	s.mu.Unlock()
	s.by(v.period(room))
}

// hurry has it look at a volume at once.
func (s *sampler) hurry(v *volume) {
	s.mu.Lock()
	v.writers.next = time.Time{}
	s.mu.Unlock()
	s.wake()
}

// closing tells that a file which may be mapped was closed.
func (s *sampler) closing() { s.by(closingPeriod) }

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
		s.sleep(s.look())
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

// look looks at the volumes whose time has come, and returns when the next's will.
func (s *sampler) look() (next time.Time) {
	now := time.Now()
	next = now.Add(time.Hour)
	s.mu.Lock()
	due := make([]*volume, 0, len(s.volumes))
	for v := range s.volumes {
		if v.writers.count.Load() == 0 {
			v.writers.next = time.Time{}
			delete(s.volumes, v)
			continue
		}
		if !v.writers.next.After(now) {
			due = append(due, v)
		} else if v.writers.next.Before(next) {
			next = v.writers.next
		}
	}
	if len(s.volumes) == 0 {
		s.f.gating.callers.Close()
	}
	s.mu.Unlock()
	for _, v := range due {
		period := s.f.sampleVolume(v)
		at := now.Add(period)
		s.mu.Lock()
		v.writers.next = at
		s.mu.Unlock()
		if at.Before(next) {
			next = at
		}
	}
	return next
}

// sampleVolume charges what the kernel has written by itself, and gates the
// volume, or no longer. It returns until when that is good.
func (f *FS) sampleVolume(v *volume) time.Duration {
	ws := &v.writers
	var closing bool
	var busy []*writing
	for _, w := range ws.list() {
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
	since, below, probed := ws.since, ws.below, ws.probed
	ws.mu.Unlock()
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
	if gated {
		period = gatedPeriod
	}
	f.tend(v, busy)
	if closing {
		period = min(period, closingPeriod)
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
