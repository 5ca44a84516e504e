package app

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/transport"
)

// killEnv names a file, for tests: when it says OPERATION/STEP the daemon removes it and kills itself at that
// step of such a request.
const killEnv = "CROFT_TEST_KILL"

// killStep returns pool.Options.RequestStep; nil unless a test wants it.
func (a *App) killStep() func(opcode uint32, step string) {
	file := a.Getenv(killEnv)
	if file == "" {
		return nil
	}
	return func(opcode uint32, step string) {
		at, err := os.ReadFile(file)
		if err == nil && string(at) == transport.OpcodeName(opcode)+"/"+step && os.Remove(file) == nil {
			_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			select {}
		}
	}
}
