package control

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// DefaultRunDir is where the sockets are.
	DefaultRunDir = "/run/croft"
	// RunDirEnv names the environment variable that replaces DefaultRunDir.
	RunDirEnv = "CROFT_RUN_DIR"

	socketSuffix = ".sock"

	// maxSocketPath is sun_path's size without its NUL: unix(7).
	maxSocketPath = 107
)

// RunDir returns the run directory: what RunDirEnv says, else DefaultRunDir.
func RunDir() string {
	if dir := os.Getenv(RunDirEnv); dir != "" {
		return dir
	}
	return DefaultRunDir
}

// SocketPath returns where the daemon of the pool with that id listens.
func SocketPath(runDir, id string) string {
	return filepath.Join(runDir, id+socketSuffix)
}

// Sockets returns the paths of all sockets in the run directory, by name. Some of them may be
// stale. A directory that does not exist has none.
func Sockets(runDir string) ([]string, error) {
	entries, err := os.ReadDir(runDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("control sockets: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 && strings.HasSuffix(e.Name(), socketSuffix) {
			paths = append(paths, filepath.Join(runDir, e.Name()))
		}
	}
	return paths, nil
}

// prepareRunDir makes the run directory. One that exists is not changed, but
// refused when others could put sockets of their own there.
func prepareRunDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("run directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("run directory %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("run directory %s: not a directory", dir)
	case st.Uid != uint32(os.Geteuid()):
		return fmt.Errorf("run directory %s belongs to user %d: it must be the daemon's own", dir, st.Uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("run directory %s can be written by others (mode %04o): make it 0700", dir, st.Mode&0o7777)
	}
	return nil
}

// listen binds the socket, 0600, in place of a stale one.
func listen(path string) (*net.UnixListener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("control socket %s: the path has %d bytes, at most %d are possible", path, len(path), maxSocketPath)
	}
	addr := &net.UnixAddr{Name: path, Net: "unix"}
	l, err := net.ListenUnix("unix", addr)
	if errors.Is(err, unix.EADDRINUSE) {
		conn, dialErr := net.DialUnix("unix", nil, addr)
		if dialErr == nil {
			conn.Close()
			return nil, fmt.Errorf("control socket %s: another process listens there: %w", path, err)
		}
		if !errors.Is(dialErr, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("control socket %s: %w", path, dialErr)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("stale control socket: %w", err)
		}
		l, err = net.ListenUnix("unix", addr)
	}
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// peerUID returns the user id of the process at the other end.
func peerUID(conn net.Conn) (uint32, error) {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return 0, fmt.Errorf("peer credentials: %T is no unix socket", conn)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err := errors.Join(err, credErr); err != nil {
		return 0, fmt.Errorf("peer credentials: %w", err)
	}
	return cred.Uid, nil
}
