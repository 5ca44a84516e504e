package transport

import (
	"encoding/binary"
	"math"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A request is two wake-ups: of a serving thread, and of whoever waits for the
// reply. Where they run on two processors, each finds an idle one, and waking
// that costs more than everything else: in a virtual machine an idle processor
// has left the guest. While requests come fast, the processors are therefore
// asked not to sleep (PM QoS, Documentation/power/pm_qos_interface.rst). They
// poll then, at the cost of their idle time.

const (
	// awakeRate is how many requests a second, on one thread, are worth it.
	awakeRate = 2000
	// awakeSample is after how many requests a thread looks at its rate.
	awakeSample = 64
	// awakeHold is how long it stays so after the last fast sample.
	awakeHold = 20 * time.Millisecond

	latencyDevice = "/dev/cpu_dma_latency"
	cpuidleDriver = "/sys/devices/system/cpu/cpuidle/current_driver"
)

// Wakeups says whether processors are kept from sleeping while requests come fast.
type Wakeups string

const (
	// WakeupsAuto does it where it pays for sure: in a guest that leaves the
	// processor to its host when idle, which is where the cpuidle driver is haltpoll.
	WakeupsAuto Wakeups = "auto"
	// WakeupsFast always does it.
	WakeupsFast Wakeups = "fast"
	// WakeupsPlain never does.
	WakeupsPlain Wakeups = "plain"
)

func (w Wakeups) wanted() bool {
	if w != WakeupsAuto {
		return w == WakeupsFast
	}
	driver, _ := os.ReadFile(cpuidleDriver)
	return strings.TrimSpace(string(driver)) == "haltpoll"
}

// waker keeps the processors awake; nil does nothing.
type waker struct {
	device *os.File
	epoch  time.Time
	// fast is when a sample was fast last, in nanoseconds after epoch.
	fast  atomic.Int64
	awake atomic.Bool

	mu sync.Mutex // is held while awake is changed and the device told
}

func newWaker(w Wakeups) (*waker, error) {
	if !w.wanted() {
		return nil, nil
	}
	device, err := os.OpenFile(latencyDevice, os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	// Opening it is a request for 0 already.
	k := &waker{device: device, epoch: time.Now()}
	return k, k.set(false)
}

func (k *waker) set(awake bool) error {
	latency := uint32(math.MaxInt32) // microseconds
	if awake {
		latency = 0
	}
	_, err := k.device.Write(binary.NativeEndian.AppendUint32(nil, latency))
	return err
}

// sampled is told how long awakeSample requests took a thread.
func (k *waker) sampled(took time.Duration) {
	if took*awakeRate > awakeSample*time.Second {
		return
	}
	k.fast.Store(int64(time.Since(k.epoch)))
	if !k.awake.Load() {
		k.wake()
	}
}

func (k *waker) wake() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.awake.Load() || k.set(true) != nil {
		return
	}
	k.awake.Store(true)
	time.AfterFunc(awakeHold, k.rest)
}

// rest lets the processors sleep again, unless there was a fast sample lately.
func (k *waker) rest() {
	if left := awakeHold - (time.Since(k.epoch) - time.Duration(k.fast.Load())); left > 0 {
		time.AfterFunc(left, k.rest)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.awake.Store(false)
	_ = k.set(false)
}

func (k *waker) close() {
	if k == nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.awake.Store(true) // nobody wakes any more
	_ = k.device.Close()
}

// pace tells the waker of one thread's requests.
type pace struct {
	waker *waker
	n     int
	since time.Time
}

// Pacer returns what a thread of another kind that wakes the mount's callers calls for each.
func (c *Conn) Pacer() func() { return (&pace{waker: c.waker}).count }

func (p *pace) count() {
	if p.waker == nil {
		return
	}
	if p.n++; p.n < awakeSample {
		return
	}
	now := time.Now()
	p.waker.sampled(now.Sub(p.since))
	p.n, p.since = 0, now
}
