package pool

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/meta"
)

// strays refuses a name under which something without a record lies in the
// pool: it is somebody's, and not to be served or deleted.
func (p *Pool) strays(name string) error {
	for _, dir := range []*os.File{p.volumesDir, p.orphansDir, p.blocksDir} {
		if err := p.strayIn(dir, name); err != nil {
			return fmt.Errorf("%w: %w", ErrExists, err)
		}
	}
	return nil
}

func (p *Pool) strayIn(dir *os.File, name string) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		return fmt.Errorf("%s/%s is there without a record; move it away", dir.Name(), name)
	}
	return ignoreENOENT(err)
}

// makeTrees makes a volume's two directories, durably.
func (p *Pool) makeTrees(record meta.Volume, o CreateOptions) error {
	mode := o.Mode
	if mode == 0 {
		mode = 0o755
	}
	if err := p.makeDir(p.orphansDir, record.Name, dirOptions{mode: 0o700, wipe: record.Wipe}); err != nil {
		return err
	}
	p.step("create: half made")
	return p.makeDir(p.volumesDir, record.Name, dirOptions{mode: unixMode(mode), uid: o.UID, gid: o.GID, wipe: record.Wipe})
}

func unixMode(mode os.FileMode) uint32 {
	bits := uint32(mode.Perm())
	if mode&os.ModeSetgid != 0 {
		bits |= unix.S_ISGID
	}
	if mode&os.ModeSticky != 0 {
		bits |= unix.S_ISVTX
	}
	return bits
}

// dirOptions describe a directory to make.
type dirOptions struct {
	mode     uint32
	uid, gid int
	wipe     bool // what is in it must be overwritten in place
}

func (p *Pool) makeDir(parent *os.File, name string, o dirOptions) error {
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o700); err != nil {
		return fmt.Errorf("make %s/%s: %w", parent.Name(), name, err)
	}
	d, err := openDirAt(parent, name)
	if err != nil {
		return err
	}
	fd := int(d.Fd())
	if p.fstype == "xfs" {
		p.rule.NoCowAhead(fd) // and with it all that comes into it
	}
	err = unix.Fchown(fd, o.uid, o.gid)
	if err == nil {
		err = unix.Fchmod(fd, o.mode)
	}
	if err == nil && o.wipe {
		err = p.writeInPlace(fd)
	}
	return errors.Join(err, d.Sync(), d.Close(), parent.Sync())
}

// openDirAt opens the directory name, which no symlink may stand for.
func openDirAt(parent *os.File, name string) (*os.File, error) {
	for {
		fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: parent.Name() + "/" + name, Err: err}
		}
		return os.NewFile(uintptr(fd), parent.Name()+"/"+name), nil
	}
}
