package pool

import (
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// fileID tells a file from all others that exist.
type fileID struct{ dev, ino uint64 }

func idOf(st *unix.Stat_t) fileID { return fileID{dev: st.Dev, ino: st.Ino} }

// openFileAt opens a regular file, which no symlink may stand for.
func openFileAt(parent *os.File, name string, flags int) (*os.File, error) {
	path := parent.Name() + "/" + name
	fd, err := unix.Openat(int(parent.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file", path))
	}
	return f, nil
}

// makeFile makes the file of a block volume, which is overwritten in place.
func (p *Pool) makeFile(at place) (*os.File, error) {
	const flags = unix.O_CREAT | unix.O_EXCL | unix.O_RDWR | unix.O_NOFOLLOW | unix.O_CLOEXEC
	path := at.parent.Name() + "/" + at.name
	fd, err := unix.Openat(int(at.parent.Fd()), at.name, flags, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "create", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := p.writeInPlace(fd); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// makeBlock makes a block volume's file with all of its blocks, durably.
func (p *Pool) makeBlock(r meta.Volume) error {
	f, err := p.makeFile(place{parent: p.blocksDir, name: r.Name})
	if err != nil {
		return err
	}
	if err := errors.Join(f.Close(), p.growBlock(r.Name, r.Limit.Bytes)); err != nil {
		return err
	}
	return p.blocksDir.Sync()
}

// growBlock gives a block volume's file that many bytes, every one with its block, durably.
func (p *Pool) growBlock(name string, bytes uint64) error {
	f, err := openFileAt(p.blocksDir, name, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, int64(bytes))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return asNoRoom(fmt.Errorf("allocate %d bytes: %w", bytes, err))
		}
		return f.Sync()
	}
}

// openBlock finds the file of a block volume.
func (p *Pool) openBlock(v *volume) error {
	f, err := openFileAt(p.blocksDir, v.name, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	v.file = idOf(&st)
	// A crash has come between the file's growth and its record, or its growth has failed half way.
	if size := int64(v.record.Limit.Bytes); st.Size > size {
		return f.Truncate(size)
	}
	return nil
}

// loadBlock finds a block volume that is recorded as ready. One whose file has gone is kept, to be seen and deleted.
func (p *Pool) loadBlock(r meta.Volume) error {
	v := &volume{name: r.Name, record: r, ledger: quota.NewLedger(r.Limit, r.Limit), count: counted()}
	err := p.openBlock(v)
	if errors.Is(err, unix.ENOENT) {
		p.log.Error("the file of a block volume is missing", zap.String("volume", r.Name))
		v.missing, err = true, nil
	}
	p.loaded(v)
	return err
}

// resizeBlock is resize for a block volume: it grows only, and so does its device.
func (p *Pool) resizeBlock(v *volume, o ResizeOptions) error {
	if v.missing {
		return ErrMissing
	}
	if o.Inodes != 0 {
		return fmt.Errorf("%w: a block volume has no inodes", ErrInvalid)
	}
	old := v.ledger.Limit()
	limit, err := p.limitOf(max(o.Bytes, MinBytes), 1)
	if err != nil {
		return err
	}
	if limit.Bytes < old.Bytes {
		return fmt.Errorf("%w: a block volume cannot become smaller, and it has %d bytes: whoever has it formatted uses all of it", ErrInvalid, old.Bytes)
	}
	if limit.Bytes > old.Bytes {
		if err := p.needRoom(quota.Usage{Bytes: limit.Bytes - old.Bytes}); err != nil {
			return err
		}
		release, err := p.promise(limit.Bytes - old.Bytes)
		if err != nil {
			return err
		}
		defer release()
		if err := p.growBlock(v.name, limit.Bytes); err != nil {
			return errors.Join(err, p.openBlock(v)) // takes back what was allocated
		}
		p.step("resize: grown")
		record := v.record
		record.Limit = limit
		if err := p.store.PutVolume(record); err != nil {
			return errors.Join(err, p.openBlock(v))
		}
		p.step("resize: recorded")
		p.mu.Lock()
		v.record = record
		p.mu.Unlock()
		v.ledger.Reset(limit)
		if err := v.ledger.SetLimit(limit); err != nil {
			return err
		}
		p.log.Info("volume resized", zap.String("volume", v.name), zap.Stringer("limit", limit))
	}
	// Also when it has that size already: a crash may have come before.
	l, attached, err := p.loopOf(v)
	if err != nil || !attached {
		return err
	}
	return l.grow()
}

// compareBlock is compare for a block volume.
func (p *Pool) compareBlock(v *volume, c *VolumeCheck) error {
	f, err := openFileAt(p.blocksDir, v.name, unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	mapped, err := p.rule.Mapped(int(f.Fd()), 0, uint64(st.Size()))
	if err != nil {
		return err
	}
	c.Ledger, c.Disk = v.ledger.Used(), quota.Usage{Bytes: mapped, Inodes: 1}
	if uint64(st.Size()) != c.Limit.Bytes {
		c.Findings = append(c.Findings, fmt.Sprintf("its file has %d bytes, not %d", st.Size(), c.Limit.Bytes))
	}
	if mapped < c.Limit.Bytes {
		c.Findings = append(c.Findings, fmt.Sprintf("its file has holes: %d bytes of it have blocks", mapped))
	}
	return nil
}
