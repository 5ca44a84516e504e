package fs

import (
	"encoding/hex"
	"errors"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota/gate"
)

// brakedName is the pool's directory with a name for each inode that is braked: its
// file handle. The name is there before the flag is set and until it is cleared;
// a journal keeps that order across a power cut.
const brakedName = "braked"

func (f *FS) brakes() (*os.File, error) {
	err := unix.Mkdirat(int(f.pool.Fd()), brakedName, 0o700)
	if err != nil && err != unix.EEXIST {
		return nil, &os.PathError{Op: "mkdir", Path: brakedName, Err: err}
	}
	fd, err := openat(int(f.pool.Fd()), brakedName, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: brakedName, Err: err}
	}
	return os.NewFile(uintptr(fd), brakedName), nil
}

func (k *handleKey) name() string {
	return hex.EncodeToString(append([]byte{k.typ}, k.data[:k.len]...))
}

func parseHandle(name string) (k handleKey, ok bool) {
	b, err := hex.DecodeString(name)
	if err != nil || len(b) < 2 || len(b) > 1+maxHandle {
		return k, false
	}
	k.typ, k.len = b[0], uint8(len(b)-1)
	copy(k.data[:], b[1:])
	return k, true
}

// setBrakeLocked brakes an inode or lets it go. On ext4 it is made immutable. xfs
// and btrfs look at that when a file is opened only, so there the mount's inode is
// said to have file capabilities: before each write and splice the kernel asks to
// remove them (file_remove_privs, by backing_file_write_iter and
// backing_file_splice_write), and is refused. It asks once it has seen new attributes.
func (f *FS) setBrakeLocked(w *writing, on bool) {
	n := w.n
	if !f.isExt4 {
		n.set(refused, on)
		if on {
			go func() {
				if err := f.kernel.Load().Refresh(n.id); err != nil {
					f.log.Sugar().Warnw("brake", "volume", n.vol.id, "error", err)
				}
			}()
		}
		f.brakedLocked(w, on)
		return
	}
	name, dir := n.key.name(), int(f.gating.braked.Fd())
	if on {
		fd, err := openat(dir, name, unix.O_CREAT|unix.O_WRONLY, 0o600)
		if err != nil {
			f.log.Sugar().Errorw("brake", "volume", n.vol.id, "error", err)
			return
		}
		syscall.Close(fd)
	}
	if err := gate.Brake(w.fd, on); err != nil {
		f.log.Sugar().Errorw("brake", "volume", n.vol.id, "on", on, "error", err)
		return
	}
	if !on {
		_ = unix.Unlinkat(dir, name, 0) // what stays is swept
	}
	f.brakedLocked(w, on)
}

func (f *FS) brakedLocked(w *writing, on bool) {
	if w.braked != on {
		w.braked = on
		w.n.vol.writers.brakes.Add(map[bool]int64{true: 1, false: -1}[on])
	}
}

// brakeLocked brakes a held inode that has grown without asking, in a volume that
// is about full.
func (f *FS) brakeLocked(w *writing, grown uint64) {
	v := w.n.vol
	v.writers.mu.Lock()
	v.writers.late += grown
	v.writers.mu.Unlock()
	room := v.ledger.Free().Bytes
	switch {
	case w.lifts > 0 || v.removed.Load() || room >= brakeBelow && room/2 >= grown:
	case !w.braked:
		f.setBrakeLocked(w, true)
	case !f.isExt4 && room == 0:
		f.fault(w)
	}
}

// fault ends what the brake does not: stores into the holes of a mapped file, which
// on a full disk are answered by SIGBUS. Who survives that is killed in the end.
func (f *FS) fault(w *writing) {
	v := w.n.vol
	if !v.writers.faulting.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer v.writers.faulting.Store(false)
		device, err := f.kernel.Load().Device()
		if err != nil {
			f.log.Sugar().Errorw("brake", "volume", v.id, "error", err)
			return
		}
		mappers, err := gate.Mappers(device, w.ino)
		if err != nil {
			f.log.Sugar().Errorw("brake", "volume", v.id, "error", err)
		}
		for _, m := range mappers {
			v.writers.faults[m.PID]++
			signal := unix.SIGBUS
			if v.writers.faults[m.PID] > maxFaults {
				signal = unix.SIGKILL
			}
			err := m.Signal(signal)
			m.Close()
			f.log.Sugar().Warnw("stores into the holes of a mapped file in a full volume", "volume", v.id, "inode", w.ino,
				"pid", m.PID, "signal", unix.SignalName(signal), "error", err)
		}
	}()
}

// lift lets go of an inode's brake for an operation of ours, until done is called.
func (f *FS) lift(n *node) (done func()) {
	if n.vol == nil || n.vol.writers.brakes.Load() == 0 {
		return func() {}
	}
	n.lock()
	defer n.unlock()
	lifted := f.liftLocked(n)
	return func() {
		n.lock()
		defer n.unlock()
		lifted()
	}
}

// liftName is lift for what a name leads to, which is about to be renamed.
func (f *FS) liftName(d *dirFD, name string) (done func()) {
	if d.node.vol.writers.brakes.Load() == 0 {
		return func() {}
	}
	key, st, err := describeAt(d.fd, name)
	if err != nil {
		return func() {} // the rename says so
	}
	return f.lift(f.nodes.find(d.node.vol, key, st.Mode))
}

func (f *FS) liftLocked(n *node) (doneLocked func()) {
	w := n.writing
	if w == nil || !w.braked || !f.isExt4 {
		return func() {}
	}
	if w.lifts++; w.lifts == 1 {
		if err := gate.Brake(w.fd, false); err != nil {
			f.log.Sugar().Errorw("brake", "volume", n.vol.id, "error", err)
		}
	}
	return func() {
		if w.lifts--; w.lifts == 0 && w.braked && n.writing == w {
			if err := gate.Brake(w.fd, true); err != nil {
				f.log.Sugar().Errorw("brake", "volume", n.vol.id, "error", err)
			}
		}
	}
}

// sweepBrakes lets go of what a crash has left braked.
func (f *FS) sweepBrakes() error {
	fd, err := openat(int(f.pool.Fd()), brakedName, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err == unix.ENOENT {
		return nil
	} else if err != nil {
		return &os.PathError{Op: "open", Path: brakedName, Err: err}
	}
	dir := os.NewFile(uintptr(fd), brakedName)
	defer dir.Close()
	names, err := dir.Readdirnames(0)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		key, ok := parseHandle(name)
		if ok {
			err := f.letGo(key)
			if err != nil && !isGone(err) {
				errs = append(errs, err)
				continue
			}
		}
		if err := unix.Unlinkat(fd, name, 0); err != nil {
			errs = append(errs, &os.PathError{Op: "unlink", Path: brakedName + "/" + name, Err: err})
		}
	}
	return errors.Join(errs...)
}

func (f *FS) letGo(key handleKey) error {
	fd, err := unix.OpenByHandleAt(int(f.pool.Fd()), key.fileHandle(), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	return gate.Brake(fd, false)
}
