package requests_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestMonitor: of the daemon's threads the runtime's monitor, and no other, may wake late.
func TestMonitor(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	dir := p.Create("v", 64*kit.Mi)
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.Serving()))
	kit.OK(t, err)
	var late []string
	for _, task := range tasks {
		tid := filepath.Base(task)
		if slack, err := os.ReadFile("/proc/" + tid + "/timerslack_ns"); err == nil && strings.TrimSpace(string(slack)) == "4000000" {
			late = append(late, tid)
		}
	}
	if len(late) != 1 {
		t.Fatalf("of the threads %v these may wake late: %v", tasks, late)
	}
	// None but the monitor sleeps by nanosleep(2): usleep in runtime/sys_linux_*.s.
	nanosleep := fmt.Sprint(unix.SYS_NANOSLEEP, " ")
	kit.Poll(t, "the monitor's sleep while there are requests", func() bool {
		kit.Statfs(t, dir)
		call, err := os.ReadFile("/proc/" + late[0] + "/syscall")
		kit.OK(t, err)
		return strings.HasPrefix(string(call), nanosleep)
	})
}
