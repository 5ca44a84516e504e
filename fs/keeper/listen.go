package keeper

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path of a socket: sun_path of unix(7), without its zero.
const maxPath = 107

// Listener is a keeper's socket.
type Listener struct {
	path string
	unix *net.UnixListener
	lock *os.File
}

// Listen makes the socket, in the place of one that a dead keeper has left. Beside it is a
// lock, PATH.lock, which stays. EADDRINUSE, wrapped, when another keeper listens there.
func Listen(path string) (*Listener, error) {
	// Under another name until nobody but its owner can connect.
	private := path + ".new"
	if len(private) > maxPath {
		return nil, fmt.Errorf("listen on %s: %w: it is %d bytes long, at most %d are possible", path, unix.ENAMETOOLONG, len(path), maxPath-len(".new"))
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w: another keeper does", unix.EADDRINUSE)
		}
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l, err := listen(private, path)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return &Listener{path: path, unix: l, lock: lock}, nil
}

func listen(private, path string) (*net.UnixListener, error) {
	for _, old := range []string{private, path} {
		fi, err := os.Lstat(old)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err == nil && fi.Mode()&os.ModeSocket == 0 {
			err = fmt.Errorf("%w: %s is there, and no socket", unix.ENOTSOCK, old)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := os.Remove(private); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: private, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(private, 0o600); err == nil {
		err = os.Rename(private, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(private))
	}
	return l, nil
}

// Close takes the socket away.
func (l *Listener) Close() error {
	return errors.Join(os.Remove(l.path), l.unix.Close(), l.lock.Close())
}
