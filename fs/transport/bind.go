package transport

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrBindFlag is returned for a flag that a bind mount cannot have.
var ErrBindFlag = errors.New("not a flag of a bind mount")

// bindFlags are the flags of mount(8) that hold for one mount and not for its filesystem, and what they set and
// clear of it: mount_setattr(2). "rw" sets nothing: a mount can be made read-only only.
var bindFlags = map[string]struct{ set, clear uint64 }{
	"rw":          {},
	"ro":          {set: unix.MOUNT_ATTR_RDONLY},
	"nosuid":      {set: unix.MOUNT_ATTR_NOSUID},
	"nodev":       {set: unix.MOUNT_ATTR_NODEV},
	"noexec":      {set: unix.MOUNT_ATTR_NOEXEC},
	"nodiratime":  {set: unix.MOUNT_ATTR_NODIRATIME},
	"nosymfollow": {set: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"noatime":     {set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME},
	"relatime":    {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"strictatime": {set: unix.MOUNT_ATTR_STRICTATIME, clear: unix.MOUNT_ATTR__ATIME},
}

// CheckBindFlags returns ErrBindFlag, with those that are known, for a flag that Bind would refuse.
func CheckBindFlags(flags []string) error {
	_, err := bindAttributes(flags)
	return err
}

func bindAttributes(flags []string) (unix.MountAttr, error) {
	var attr unix.MountAttr
	for _, name := range flags {
		f, ok := bindFlags[name]
		if !ok {
			known := make([]string, 0, len(bindFlags))
			for name := range bindFlags {
				known = append(known, name)
			}
			slices.Sort(known)
			return attr, fmt.Errorf("%w: %q: known are %s", ErrBindFlag, name, strings.Join(known, ", "))
		}
		attr.Attr_set |= f.set
		attr.Attr_clr |= f.clear
	}
	return attr, nil
}

// Bind mounts source, a directory or a file, on target, which exists and is of the same sort. The mount has its flags
// from the first moment on. It looks source up: in a daemon's own mount only another process may do that.
func Bind(source, target string, flags []string) error {
	attr, err := bindAttributes(flags)
	if err != nil {
		return err
	}
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("open %s: %w", source, err)
	}
	defer unix.Close(tree)
	if attr != (unix.MountAttr{}) {
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return fmt.Errorf("mount flags %s: %w", strings.Join(flags, ","), err)
		}
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount on %s: %w", target, err)
	}
	return nil
}
