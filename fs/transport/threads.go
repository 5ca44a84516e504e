package transport

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// One thread that is always busy serves more requests than several that take
// turns: the kernel gives each request to the one that has waited longest, which
// is the one whose stack and whose place on a processor are coldest. Measured
// with 8 clients on two processors, creating files: 16,400 a second by one
// thread, 11,000 by two, 6,800 by sixty-four. So there are few as long as they
// compute, and as many as it takes while they wait for something:
//   - a handler that is known to wait does not count (slowOpcode, Waits);
//   - nor does one that has run for stuckAfter, which watch looks for;
//   - where most handlers wait, for the disk that is, and take slowAfter or more,
//     there are up to slowThreads. A handler that was only kept from running does
//     not count: more threads would make that worse.

const (
	slowAfter  = 100 * time.Microsecond
	stuckAfter = time.Millisecond
	// quietAfter is how long without a request ends the watch.
	quietAfter = 100 * time.Millisecond
	// defaultLinger is how long a thread stays that was needed.
	defaultLinger = 200 * time.Millisecond

	// slowShare counts in parts of slowScale; each handler weighs slowScale/slowWeight.
	slowScale, slowWeight = 1 << 12, 64
	manySlow              = slowScale / 2
	slowThreads           = 16
)

// maxWaiting is how many threads Waits takes out of MaxThreads: each has its buffers.
const maxWaiting = 512

// crew is what decides how many threads there are.
//
// INVARIANT: 0 <= idle <= threads <= Options.MaxThreads + maxWaiting.
type crew struct {
	threads atomic.Int32 // started and not ended
	waiting atomic.Int32 // of those: in a handler that has called Waits
	slow    atomic.Int32 // of those: in a handler that is known or seen to take long
	idle    atomic.Int32 // of those: waiting for a request, or about to
	running sync.WaitGroup

	slowShare atomic.Int32
	needed    atomic.Int64 // when more than MinThreads were wanted last, in nanoseconds after epoch
	epoch     time.Time
	linger    time.Duration

	working  atomic.Int32  // threads that handle a request
	paused   atomic.Bool   // nobody begins another
	alone    atomic.Uint64 // requests that were taken with nobody left to take the next
	watching atomic.Bool
	mu       sync.Mutex // guards members
	members  map[*thread]struct{}
}

func (w *crew) now() int64 { return int64(time.Since(w.epoch)) }

// serving counts the threads that can be expected to take a request soon. Those
// that wait are found to be slow as well before long.
func (w *crew) serving() int { return int(w.threads.Load() - max(w.waiting.Load(), w.slow.Load())) }

// startThread starts a thread unless there are MaxThreads or the connection has ended.
func (c *Conn) startThread() {
	for {
		n := c.crew.threads.Load()
		if int(n-c.crew.waiting.Load()) >= c.opts.MaxThreads || c.dead.Load() {
			return
		}
		if c.crew.threads.CompareAndSwap(n, n+1) {
			break
		}
	}
	c.crew.idle.Add(1) // from birth, so that those who take requests meanwhile do not start another each
	c.crew.running.Add(1)
	onOwnThread(func() {
		defer c.crew.running.Done()
		c.runThread()
	})
}

// relieve starts a thread if nobody would take the next request and one is wanted.
func (c *Conn) relieve() {
	w := &c.crew
	if w.idle.Load() > 0 {
		return
	}
	if n := w.serving(); n < c.opts.MinThreads {
		if n < int(w.threads.Load()) {
			w.needed.Store(w.now())
		}
		c.startThread()
	} else if n < slowThreads && w.slowShare.Load() >= manySlow {
		w.needed.Store(w.now())
		c.startThread()
	}
}

// Waits is called by a handler that is about to wait for something that takes
// longer than an operation on the disk, and over when the wait has ended. Until
// then its thread does not count as one of MaxThreads, so that those who wait
// for one thing do not hold up everybody else. Beyond maxWaiting at a time it
// changes nothing.
func (c *Conn) Waits() (over func()) {
	if c.crew.waiting.Add(1) > maxWaiting {
		c.crew.waiting.Add(-1)
		return func() {}
	}
	c.relieve()
	return func() { c.crew.waiting.Add(-1) }
}

// runThread is a serving thread's life.
func (c *Conn) runThread() {
	w := &c.crew
	if err := prepareThread(); err != nil {
		c.fail(err)
		w.idle.Add(-1)
		w.threads.Add(-1)
		return
	}
	t, err := newThread(c)
	if err != nil {
		c.fail(err)
		w.idle.Add(-1)
		w.threads.Add(-1)
		return
	}
	defer func() { c.state.FreeRequest(t.request) }()
	w.join(t)
	defer w.leave(t)
	for {
		n, err := t.next()
		idle := w.idle.Add(-1)
		if err != nil {
			w.threads.Add(-1)
			if errors.Is(err, unix.ENODEV) {
				c.dead.Store(true)
			} else {
				c.fail(fmt.Errorf("read from the FUSE device: %w", err))
			}
			return
		}
		if !w.busy() {
			select {} // it is the next daemon's
		}
		panics := c.panics.Load()
		t.serveTimed(n, idle == 0)
		w.working.Add(-1)
		if c.panics.Load() != panics || c.surplus() {
			break
		}
		w.idle.Add(1)
	}
	// The idle threads that were seen may all have taken requests since.
	if left := w.threads.Add(-1); int(left) < c.opts.MinThreads || w.idle.Load() == 0 {
		c.startThread()
	}
}

// busy counts a thread as working, unless the crew is paused.
func (w *crew) busy() bool {
	w.working.Add(1)
	if w.paused.Load() {
		w.working.Add(-1)
		return false
	}
	return true
}

func (w *crew) join(t *thread) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.members[t] = struct{}{}
}

func (w *crew) leave(t *thread) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.members, t)
}

// serveTimed serves the request of n bytes; last tells that nobody is idle.
func (t *thread) serveTimed(n int, last bool) {
	c, w := t.c, &t.c.crew
	began := w.now()
	t.since.Store(began)
	slow := slowOpcode(requestOpcode(t.in))
	if slow {
		t.isSlow.Store(true)
		w.slow.Add(1)
	}
	if slow || last {
		c.relieve()
	}
	if last && w.idle.Load() == 0 {
		w.alone.Add(1)
		if !w.watching.Load() && w.watching.CompareAndSwap(false, true) {
			go c.watch()
		}
	}
	doubt := w.slowShare.Load() > 0
	var waits int64
	if doubt {
		waits = timesWaited()
	}
	t.serve(n)
	t.since.Store(0)
	t.countAgain()
	if !slow {
		took := w.now() - began
		w.weigh(took >= int64(slowAfter) && (!doubt || timesWaited() > waits))
	}
}

// timesWaited counts how often this thread has given up its processor to wait.
func timesWaited() int64 {
	var usage unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_THREAD, &usage)
	return usage.Nvcsw
}

// countAgain takes the thread out of crew.slow.
func (t *thread) countAgain() {
	if t.isSlow.Load() && t.isSlow.CompareAndSwap(true, false) {
		t.c.crew.slow.Add(-1)
	}
}

// weigh counts a handler into slowShare. Of two at a time one may be lost.
func (w *crew) weigh(slow bool) {
	old := w.slowShare.Load()
	share := old - old/slowWeight
	if share == old && old > 0 {
		share = 0
	}
	if slow {
		share += slowScale / slowWeight
	}
	if share != old {
		w.slowShare.Store(share)
	}
}

// watch looks for handlers that have run for long, as long as there are requests that
// leave nobody to take the next. While somebody is idle it is not needed, and it wakes a processor.
func (c *Conn) watch() {
	w := &c.crew
	seen, quiet := w.alone.Load(), time.Duration(0)
	for !c.dead.Load() {
		time.Sleep(stuckAfter)
		busy := w.idle.Load() == 0 && c.findSlow()
		if n := w.alone.Load(); busy || n != seen {
			seen, quiet = n, 0
		} else if quiet += stuckAfter; quiet >= quietAfter {
			break
		}
	}
	w.watching.Store(false)
	// One that was read meanwhile may not have seen that.
	if w.alone.Load() != seen && w.watching.CompareAndSwap(false, true) {
		go c.watch()
	}
}

// findSlow relieves handlers that have run for long. It tells whether any runs.
func (c *Conn) findSlow() (busy bool) {
	w := &c.crew
	w.mu.Lock()
	defer w.mu.Unlock()
	for t := range w.members {
		since := t.since.Load()
		if since == 0 {
			continue
		}
		busy = true
		if w.now()-since < int64(stuckAfter) || w.idle.Load() > 0 || !t.isSlow.CompareAndSwap(false, true) {
			continue
		}
		w.slow.Add(1)
		if t.since.Load() != since { // it has ended meanwhile, perhaps without having seen that
			t.countAgain()
		}
		c.relieve()
	}
	return busy
}

// Answered waits until all requests that handlers are working on when it is called have
// been answered, at most for limit: true when they have. It must not be called by a
// handler, nor with anything held that one waits for.
func (c *Conn) Answered(limit time.Duration) bool {
	w, working := &c.crew, make(map[*thread]int64)
	w.mu.Lock()
	for t := range w.members {
		if since := t.since.Load(); since != 0 {
			working[t] = since
		}
	}
	w.mu.Unlock()
	for deadline := time.Now().Add(limit); ; time.Sleep(stuckAfter) {
		maps.DeleteFunc(working, func(t *thread, since int64) bool { return t.since.Load() != since })
		if len(working) == 0 || time.Now().After(deadline) {
			return len(working) == 0
		}
	}
}

// surplus tells a thread that has replied whether it may end.
func (c *Conn) surplus() bool {
	w := &c.crew
	return int(w.idle.Load()) >= c.opts.MinThreads && w.now()-w.needed.Load() >= int64(w.linger)
}
