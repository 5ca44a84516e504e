package pool

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/transport"
)

// maxTarget is the longest path that the kernel takes, in bytes: PATH_MAX without its NUL.
const maxTarget = 4095

// ResolveTarget returns the path that mountinfo shows for a target, which need not exist: ErrTarget when there can be
// none. It touches neither what is mounted there nor a mount of Croft.
func ResolveTarget(target string) (string, error) {
	at := filepath.Clean(target)
	switch {
	case !filepath.IsAbs(target):
		return "", fmt.Errorf("%w: %q is not an absolute path", ErrTarget, target)
	case len(target) > maxTarget || strings.ContainsRune(target, 0):
		return "", fmt.Errorf("%w: a path of %d bytes, or with a NUL", ErrTarget, len(target))
	case at == "/":
		return "", fmt.Errorf("%w: the root directory", ErrTarget)
	}
	if err := belowNoMount(at); err != nil {
		return "", err
	}
	for dir, rest := filepath.Split(at); ; {
		dir = filepath.Clean(dir)
		there, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, os.ErrNotExist) && dir != "/" {
			dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest)
			continue
		} else if err != nil {
			return "", fmt.Errorf("%w: %w", ErrTarget, err)
		}
		at = filepath.Join(there, rest)
		if !utf8.ValidString(at) { // its record could not be read again
			return "", fmt.Errorf("%w: %q is not UTF-8", ErrTarget, at)
		}
		return at, belowNoMount(at)
	}
}

// resolveTarget is ResolveTarget for a path outside the pool.
func (p *Pool) resolveTarget(target string) (string, error) {
	if err := p.outside(filepath.Clean(target)); err != nil {
		return "", err
	}
	at, err := ResolveTarget(target)
	if err != nil {
		return "", err
	}
	return at, p.outside(at)
}

// outside refuses a path inside the pool.
func (p *Pool) outside(path string) error {
	if path == p.dir || strings.HasPrefix(path, p.dir+"/") {
		return fmt.Errorf("%w: %s is inside the pool %s", ErrTarget, path, p.dir)
	}
	return nil
}

// belowNoMount refuses a path below a mount of Croft.
func belowNoMount(path string) error {
	at, err := mountWhere(func(at string) bool { return strings.HasPrefix(path, at+"/") })
	if err == nil && at != "" {
		err = fmt.Errorf("%w: %s is below %s, a mount of Croft", ErrTarget, path, at)
	}
	return err
}

// checkHides refuses a target above the pool or a mount of Croft: neither could be reached any more.
func (p *Pool) checkHides(target string) error {
	if strings.HasPrefix(p.dir, target+"/") {
		return fmt.Errorf("%w: the pool %s is below %s", ErrTarget, p.dir, target)
	}
	at, err := mountWhere(func(at string) bool { return strings.HasPrefix(at, target+"/") })
	if err == nil && at != "" {
		err = fmt.Errorf("%w: %s, a mount of Croft, is below %s", ErrTarget, at, target)
	}
	return err
}

// mountWhere returns where a mount of Croft is of which is tells so; "" when there is none.
func mountWhere(is func(at string) bool) (string, error) {
	mounts, err := transport.Mounts(transport.MountFilter{})
	for _, m := range mounts {
		if is(m.Mountpoint) {
			return m.Mountpoint, err
		}
	}
	return "", err
}

// asTarget makes an ErrTarget of what the caller's path is to blame for.
func asTarget(err error) error {
	for _, e := range []error{unix.ENOENT, unix.ENOTDIR, unix.ENOTEMPTY, unix.ENAMETOOLONG, unix.ELOOP} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrTarget, err)
		}
	}
	return err
}

// targetMounts is what is mounted on a target.
type targetMounts struct {
	target string
	// device is what the volume's mounts are of: the device number of the pool's mount.
	device uint64
	file   deviceFile
	forced bool                   // what is in use is unmounted too
	ours   []transport.MountEntry // those of the volume, the topmost first
	// foreign describes the topmost mount of something else.
	foreign string
	hidden  bool // the volume is mounted below that
}

func (p *Pool) mountedOn(volume, target string) (targetMounts, error) {
	t := targetMounts{target: target, device: p.mount.deviceNumber()}
	entries, err := transport.MountsOn(target)
	if err != nil || len(entries) == 0 {
		return t, err
	}
	if t.file, err = p.deviceFile(volume); err != nil {
		return t, err
	}
	recorded := p.isPublished(volume, target)
	for _, m := range entries {
		tree := m.Source == p.source() && (m.Root == "/"+volume || strings.HasPrefix(m.Root, "/"+volume+"/"))
		switch ours := tree || t.file.is(m) || recorded && t.file.was(m); {
		case t.foreign != "":
			t.hidden = t.hidden || ours
		case ours:
			t.ours = append(t.ours, m)
		default:
			t.foreign = fmt.Sprintf("%s of %s (%s)", m.Root, m.Source, m.Type)
		}
	}
	return t, nil
}

// deviceFile is what mountinfo shows of a mount of a block volume's device.
type deviceFile struct {
	devices uint64 // the filesystem of the devices; 0 when it is no block volume
	root    string // "" when the volume has no device
}

func (d deviceFile) is(m transport.MountEntry) bool {
	return d.root != "" && m.Device == d.devices && m.Root == d.root
}

// was tells whether m is of another such device: that of the volume, before somebody has detached it by hand.
func (d deviceFile) was(m transport.MountEntry) bool {
	return d.devices != 0 && m.Device == d.devices && strings.HasPrefix(m.Root, "/loop")
}

func (p *Pool) deviceFile(volume string) (d deviceFile, err error) {
	v, err := p.find(volume)
	if errors.Is(err, ErrNotFound) {
		return d, nil
	} else if err != nil {
		return d, err
	}
	if !v.record.Block {
		return d, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(loopControl, &st); errors.Is(err, unix.ENOENT) {
		return d, nil
	} else if err != nil {
		return d, &os.PathError{Op: "stat", Path: loopControl, Err: err}
	}
	d.devices = st.Dev
	l, attached, err := p.loopOf(v)
	if err == nil && attached {
		d.root = "/" + filepath.Base(l.device)
	}
	return d, err
}

func (t targetMounts) isTree(e transport.MountEntry) bool { return strings.HasPrefix(e.Type, "fuse.") }

// live tells whether the volume is mounted there, once, and by the daemon that serves it.
func (t targetMounts) live() bool {
	if len(t.ours) != 1 || t.foreign != "" {
		return false
	}
	m := t.ours[0]
	return t.file.is(m) || t.isTree(m) && m.Device == t.device && strings.Count(m.Root, "/") == 1
}

// gone tells whether nothing of the volume is mounted there.
func (t targetMounts) gone() bool { return len(t.ours) == 0 && !t.hidden }

// unmount takes away what is the volume's. A dead mount goes also when somebody uses it.
func (t targetMounts) unmount() error {
	for _, m := range t.ours {
		flags := unix.UMOUNT_NOFOLLOW
		if t.forced || t.isTree(m) && m.Device != t.device {
			flags |= unix.MNT_DETACH
		}
		err := unix.Unmount(t.target, flags)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: files or directories are in use on %s", ErrBusy, t.target)
		} else if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: somebody was quicker
			return fmt.Errorf("unmount %s: %w", t.target, err)
		}
	}
	return nil
}

// makeTarget makes a directory or a file to mount on. One that is there is used; nothing may be mounted there.
func makeTarget(target string, kind os.FileMode) error {
	var err error
	if kind.IsDir() {
		err = os.Mkdir(target, 0o750)
	} else {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			err = f.Close()
		}
	}
	if !errors.Is(err, os.ErrExist) {
		return asTarget(err)
	}
	fi, err := os.Lstat(target)
	if err == nil && fi.Mode().Type() != kind {
		err = fmt.Errorf("%w: %s is a %s", ErrTarget, target, fi.Mode().Type())
	}
	if err == nil && kind.IsRegular() {
		err = checkTargetFile(target, fi)
	}
	return err
}

// removeTarget removes a directory or a file that something was mounted on: never what is in it. It may be asked for any
// path, so what was not made to mount on stays.
func removeTarget(target string) error {
	fi, err := os.Lstat(target)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !fi.IsDir():
		if err := checkTargetFile(target, fi); err != nil {
			return err
		}
	}
	if err := os.Remove(target); !errors.Is(err, os.ErrNotExist) {
		return asTarget(err)
	}
	return nil
}

func checkTargetFile(target string, fi os.FileInfo) error {
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is a %s", ErrTarget, target, fi.Mode().Type())
	case fi.Size() > 0:
		return fmt.Errorf("%w: %s is a file of %d bytes", ErrTarget, target, fi.Size())
	}
	return nil
}
