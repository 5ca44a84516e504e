package app

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"time"

	"go.uber.org/zap"
)

// tuneRuntime fits Go's runtime to a process that is in system calls nearly always.
func (a *App) tuneRuntime(log *zap.Logger) {
	a.spareProcs()
	if err := calmSysmon(); err != nil {
		log.Warn("the Go runtime's monitor cannot be told to wake late (CAP_SYS_NICE): requests are slower", zap.Error(err))
	}
}

// spareProcs gives the scheduler more processors than there are. As long as another one
// is idle, the runtime leaves a thread in a system call its own (retake in
// runtime/proc.go), and it need not fight for one with each reply.
func (a *App) spareProcs() {
	const each, least = 4, 8
	if a.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(each*runtime.NumCPU(), least))
	}
}

// sysmonSlack is by how much the runtime's monitor may wake late.
const sysmonSlack = 4 * time.Millisecond

// calmSysmon has the runtime's monitor (sysmon in runtime/proc.go) wake when a processor
// is awake anyhow, or sysmonSlack late. As long as there are requests it would wake one
// each 120 microseconds, which delays whoever else does: with a request for each fsync(2)
// the disk's interrupt and the reply among them. What it does is needed after 10 ms and more, except for
// taking a processor from a system call when goroutines wait, of which spareProcs leaves enough.
//
// It is the first thread that the runtime starts (main in runtime/proc.go), and
// the kernel lists threads in the order of their creation (next_tid in fs/proc/base.c).
// To write another thread's slack takes CAP_SYS_NICE (timerslack_ns_write, ibid.).
func calmSysmon() error {
	tasks, err := os.Open("/proc/self/task")
	if err != nil {
		return err
	}
	defer tasks.Close()
	names, err := tasks.Readdirnames(-1)
	if err != nil {
		return err
	}
	first := slices.IndexFunc(names, func(tid string) bool { return tid != strconv.Itoa(os.Getpid()) })
	if first < 0 {
		return fmt.Errorf("%s has no thread but the first", tasks.Name())
	}
	// The kernel has this file for a process, and finds a thread's by its id as well.
	return os.WriteFile(fmt.Sprintf("/proc/%s/timerslack_ns", names[first]), strconv.AppendInt(nil, int64(sysmonSlack), 10), 0)
}
