package kit

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Serving is the process that serves: the daemon itself, or the child of one that keeps
// its mounts. 0 when there is none right now.
func (p *Pool) Serving() int {
	d := p.Daemon()
	if p.Keeper != "auto" && !slices.Contains(p.MountArgs, "--restart") {
		return d.Pid
	}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.Pid))
	for _, path := range threads {
		body, _ := os.ReadFile(path)
		for _, field := range strings.Fields(string(body)) {
			pid, err := strconv.Atoi(field)
			// There are others that only look whether it answers.
			if args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && (strings.Contains(string(args), "\x00--keeper-fd=") || strings.Contains(string(args), "\x00--restarted\x00")) {
				return pid
			}
		}
	}
	return 0
}

// KillServing kills the process that serves with SIGKILL, and waits until another does.
func (p *Pool) KillServing() {
	p.t.Helper()
	pid := p.Serving()
	if pid == 0 {
		p.t.Fatal("nobody serves")
	}
	OK(p.t, syscall.Kill(pid, syscall.SIGKILL))
	p.AwaitNext(pid)
	Poll(p.t, "its answer", p.serves)
}

// AwaitNext waits until another process than pid is there to serve.
func (p *Pool) AwaitNext(pid int) {
	p.t.Helper()
	Poll(p.t, "another daemon", func() bool { next := p.Serving(); return next != 0 && next != pid })
}

// Log is what the daemon has logged.
func (p *Pool) Log() string {
	p.t.Helper()
	body, err := os.ReadFile(p.Daemon().log)
	OK(p.t, err)
	return string(body)
}
