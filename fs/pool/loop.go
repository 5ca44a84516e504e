package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	loopControl = "/dev/loop-control"
	// maxLoopTries is how often another free loop device is asked for when somebody was quicker.
	maxLoopTries = 100
	// sectorSize is what the device says of its sectors, in bytes. Left to the kernel it is what direct I/O needs, which is
	// more where blocks are shared on xfs: a filesystem with smaller blocks could not be mounted any more.
	sectorSize = 512
	// A device that was opened for a moment, as udev does to look what is on it, goes when it is closed: it is
	// looked at each loopPause, for loopPatience.
	loopPause    = 5 * time.Millisecond
	loopPatience = 3 * time.Second
)

// AttachOptions say how to attach a block volume.
type AttachOptions struct {
	// ReadOnly refuses writes to the device.
	ReadOnly bool `json:"read_only,omitempty"`
}

// Attachment is a block volume's device.
type Attachment struct {
	Device   string `json:"device"` // such as /dev/loop0
	ReadOnly bool   `json:"read_only"`
	// DirectIO tells that it goes around the page cache of the backing filesystem. It does where that can.
	DirectIO bool `json:"direct_io"`
}

// loop is a loop device that has a file.
type loop struct {
	device             string
	readOnly, directIO bool
}

// loops finds the loop devices by their files. The kernel alone knows them: nothing is recorded, so that a crash
// leaves nothing wrong.
func loops() (map[fileID]loop, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	found := make(map[fileID]loop)
	for _, file := range files {
		device := "/dev/" + strings.Split(file, "/")[3]
		fd, err := unix.Open(device, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // it has gone, or is not ours to open
		}
		info, err := unix.IoctlLoopGetStatus64(fd)
		unix.Close(fd)
		if err != nil {
			continue // ENXIO: it has gone
		}
		found[fileID{dev: info.Device, ino: info.Inode}] = loop{device: device,
			readOnly: info.Flags&unix.LO_FLAGS_READ_ONLY != 0, directIO: info.Flags&unix.LO_FLAGS_DIRECT_IO != 0}
	}
	return found, nil
}

// findLoops is loops for who describes volumes; nothing is looked for when none of them is a block volume.
func (p *Pool) findLoops(volumes ...*volume) map[fileID]loop {
	for _, v := range volumes {
		if v.file != (fileID{}) {
			found, err := loops()
			if err != nil {
				p.log.Warn("loop devices", zap.Error(err))
			}
			return found
		}
	}
	return nil
}

// loopOf returns the device of a block volume.
func (p *Pool) loopOf(v *volume) (l loop, attached bool, err error) {
	found, err := loops()
	if err != nil {
		return l, false, fmt.Errorf("loop devices: %w", err)
	}
	l, attached = found[v.file]
	return l, attached && v.file != (fileID{}), nil
}

// findBlock is find for a block volume whose file is there.
func (p *Pool) findBlock(name string) (*volume, error) {
	v, err := p.find(name)
	switch {
	case err != nil:
	case !p.recordOf(v).Block:
		err = fmt.Errorf("volume %s: %w: it has no device, since it is no block volume", name, ErrKind)
	case v.missing:
		err = fmt.Errorf("volume %s: %w", name, ErrMissing)
	}
	return v, err
}

// Attach makes a block volume a block device. One that is attached already keeps its device; ErrBusy when that is read-only
// and is not asked to be, or the reverse. ErrNotFound, ErrKind.
func (p *Pool) Attach(_ context.Context, name string, o AttachOptions) (Attachment, error) {
	if err := CheckName(name); err != nil {
		return Attachment{}, err
	}
	defer p.names.take(name)()
	v, err := p.findBlock(name)
	if err != nil {
		return Attachment{}, err
	}
	l, attached, err := p.loopOf(v)
	if err == nil && !attached {
		l, err = p.attach(v, o.ReadOnly)
	}
	if err != nil {
		return Attachment{}, fmt.Errorf("volume %s: %w", name, err)
	}
	if l.readOnly != o.ReadOnly {
		return Attachment{}, fmt.Errorf("volume %s: %w: it is attached as %s with read-only %v; detach it first", name, ErrBusy, l.device, l.readOnly)
	}
	return Attachment{Device: l.device, ReadOnly: l.readOnly, DirectIO: l.directIO}, nil
}

func (p *Pool) attach(v *volume, readOnly bool) (loop, error) {
	mode, flags := unix.O_RDWR, uint32(unix.LO_FLAGS_DIRECT_IO)
	if readOnly {
		mode, flags = unix.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
	}
	f, err := openFileAt(p.blocksDir, v.name, mode)
	if err != nil {
		return loop{}, err
	}
	defer f.Close()
	config := unix.LoopConfig{Fd: uint32(f.Fd()), Size: sectorSize}
	config.Info.Flags = flags
	copy(config.Info.File_name[:len(config.Info.File_name)-1], f.Name())
	device, err := configure(&config)
	if err != nil {
		return loop{}, err
	}
	p.log.Info("volume attached", zap.String("volume", v.name), zap.String("device", device))
	l, attached, err := p.loopOf(v)
	if err == nil && !attached {
		err = fmt.Errorf("%s was attached and has gone", device)
	}
	return l, err
}

// configure gives a free loop device its file, and returns its name.
func configure(config *unix.LoopConfig) (string, error) {
	control, err := os.OpenFile(loopControl, os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("no loop devices here (`modprobe loop`): %w", err)
	}
	defer control.Close()
	for range maxLoopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return "", fmt.Errorf("a free loop device: %w", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", &os.PathError{Op: "open", Path: name, Err: err}
		}
		err = unix.IoctlLoopConfigure(fd, config)
		unix.Close(fd)
		if err == nil {
			return name, nil
		}
		if err != unix.EBUSY { // somebody was quicker
			return "", fmt.Errorf("attach %s: %w", name, err)
		}
	}
	return "", fmt.Errorf("attach: %w: others take every free loop device", unix.EBUSY)
}

// Detach takes a block volume's device away. No error when it has none. ErrBusy while it is mounted, open or published;
// ErrNotFound, ErrKind.
func (p *Pool) Detach(_ context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	defer p.names.take(name)()
	v, err := p.findBlock(name)
	if err == nil {
		err = p.prune(v)
	}
	if err != nil {
		return err
	}
	// Its targets would show whatever is attached as that device next.
	if at := p.publicationsOf(name); len(at) > 0 {
		return fmt.Errorf("volume %s: %w: it is published on %s; unpublish it first", name, ErrBusy, at[0].Target)
	}
	return p.detach(v)
}

func (p *Pool) detach(v *volume) error {
	l, attached, err := p.loopOf(v)
	if err != nil || !attached {
		return err
	}
	if err := l.clear(v.file); err != nil {
		return fmt.Errorf("volume %s: %w", v.name, err)
	}
	p.log.Info("volume detached", zap.String("volume", v.name), zap.String("device", l.device))
	return nil
}

// clear detaches the device from the file, or leaves it as it is and returns ErrBusy.
func (l loop) clear(file fileID) error {
	// Who has mounted it, or has it in a device of its own, has it for itself (bd_prepare_to_claim, block/bdev.c).
	fd, err := unix.Open(l.device, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err == unix.EBUSY {
		return fmt.Errorf("%w: %s is mounted, or part of another device; unmount it first", ErrBusy, l.device)
	} else if err != nil {
		return &os.PathError{Op: "open", Path: l.device, Err: err}
	}
	// With another opener it is detached when that one closes (loop_clr_fd, drivers/block/loop.c).
	err = unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0)
	unix.Close(fd)
	if err != nil && err != unix.ENXIO {
		return fmt.Errorf("detach %s: %w", l.device, err)
	}
	for deadline := time.Now().Add(loopPatience); ; time.Sleep(loopPause) {
		found, err := loops()
		if err != nil {
			return err
		}
		if now, still := found[file]; !still || now.device != l.device {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("%w: %s is open; close it first", ErrBusy, l.device), l.keep(file))
		}
	}
}

// keep takes back that the device goes with its last opener.
func (l loop) keep(file fileID) error {
	fd, err := unix.Open(l.device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info, err := unix.IoctlLoopGetStatus64(fd)
	if err != nil || file != (fileID{dev: info.Device, ino: info.Inode}) {
		return err
	}
	info.Flags &^= unix.LO_FLAGS_AUTOCLEAR
	return unix.IoctlLoopSetStatus64(fd, info)
}

// checkDetached refuses to delete a block volume that is attached, unless forced: then its device goes with its last user.
func (p *Pool) checkDetached(v *volume, force bool) error {
	l, attached, err := p.loopOf(v)
	switch {
	case err != nil || !attached:
		return err
	case !force:
		return fmt.Errorf("%w: it is attached as %s; `croft volume detach %s` first, or use --force", ErrBusy, l.device, v.name)
	}
	fd, err := unix.Open(l.device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: l.device, Err: err}
	}
	defer unix.Close(fd)
	if err := unix.IoctlSetInt(fd, unix.LOOP_CLR_FD, 0); err != nil && err != unix.ENXIO {
		return fmt.Errorf("detach %s: %w", l.device, err)
	}
	return nil
}

// grow makes the device as large as its file.
func (l loop) grow() error {
	fd, err := unix.Open(l.device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.IoctlSetInt(fd, unix.LOOP_SET_CAPACITY, 0)
	}
	if err != nil {
		return fmt.Errorf("grow %s: %w", l.device, err)
	}
	return nil
}

// flush writes back what was written to the device and is in its page cache.
func (l loop) flush() error {
	fd, err := unix.Open(l.device, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Fsync(fd)
	}
	if err != nil {
		return fmt.Errorf("flush %s: %w", l.device, err)
	}
	return nil
}
