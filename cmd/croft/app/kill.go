package app

import (
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/transport"
)

// killEnv has a daemon kill itself within a request, for tests: OPERATION/STEP:FILE, at the first
// of that step at which FILE can be removed.
const killEnv = "CROFT_TEST_KILL"

// killStep returns pool.Options.RequestStep; nil unless a test wants it.
func (a *App) killStep() func(opcode uint32, step string) {
	at, file, ok := strings.Cut(a.Getenv(killEnv), ":")
	if !ok {
		return nil
	}
	return func(opcode uint32, step string) {
		if at == transport.OpcodeName(opcode)+"/"+step && os.Remove(file) == nil {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
}
