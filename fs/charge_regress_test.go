package fs_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

func openFile(t *testing.T, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A preallocation beyond the end of a sparse file is smaller than the file, and
// is charged all the same.
func TestPreallocBeyondSparseEndIsCharged(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 64 << 20, Inodes: 64})
	fd := openFile(t, filepath.Join(m.dir, "f"), unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(fd)
	must(t, unix.Ftruncate(fd, 1<<30))
	must(t, unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 1<<30, 32<<20))
	if used := m.ledger.Used().Bytes; used != 32<<20 {
		t.Errorf("used %d bytes", used)
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 2<<30, 48<<20); err != unix.ENOSPC {
		t.Errorf("fallocate beyond the limit: %v", err)
	}
	must(t, unix.Ftruncate(fd, 1<<30))
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	if used := m.ledger.Used().Bytes; used != uint64(st.Blocks)*512 {
		t.Errorf("after truncation to the same size: used %d bytes, on disk %d", used, st.Blocks*512)
	}
}

// What does not fit at the write-back of a shared mapping is reported. The
// mapping is used by another process: a page fault in this one would wait for a
// thread that the runtime cannot schedule meanwhile.
func TestWriteBackAtLimitIsReported(t *testing.T) {
	const pathVar = "CROFT_TEST_MAPPED_FILE"
	if path := os.Getenv(pathVar); path != "" {
		dirtyMapping(t, path)
		return
	}
	m := mount(t, quota.Usage{Bytes: 256 << 10, Inodes: 64})
	child := exec.Command(os.Args[0], "-test.run=^TestWriteBackAtLimitIsReported$", "-test.timeout=30s")
	child.Env = append(os.Environ(), pathVar+"="+filepath.Join(m.dir, "f"))
	if out, err := child.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if used := m.ledger.Used().Bytes; used != 256<<10 {
		t.Errorf("used %d bytes: what fits is to be written", used)
	}
}

func dirtyMapping(t *testing.T, path string) {
	fd := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(fd)
	must(t, unix.Ftruncate(fd, 1<<20))
	data, err := unix.Mmap(fd, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	for i := range data {
		data[i] = 1
	}
	if err := unix.Msync(data, unix.MS_SYNC); err != unix.ENOSPC {
		t.Errorf("msync: %v", err)
	}
	must(t, unix.Munmap(data))
}

// An inode whose last name has gone must not be opened any more once its
// charge was given back.
func TestOpenRacesUnlink(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 64 << 20, Inodes: 64})
	path := filepath.Join(m.dir, "f")
	for i := range 300 {
		fd := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
		must(t, unix.Fallocate(fd, 0, 0, 1<<20))
		unix.Close(fd)
		ref := openFile(t, path, unix.O_PATH)
		var wg sync.WaitGroup
		opened := make([]int, 2)
		for j := range opened {
			wg.Add(1)
			go func() {
				defer wg.Done()
				opened[j], _ = unix.Open(fmt.Sprintf("/proc/self/fd/%d", ref), unix.O_RDWR|unix.O_CLOEXEC, 0)
			}()
		}
		must(t, unix.Unlink(path))
		wg.Wait()
		unix.Close(ref)
		open := 0
		for _, fd := range opened {
			if fd >= 0 {
				open++
			}
		}
		if used := m.ledger.Used(); open > 0 && used.Bytes < 1<<20 {
			t.Errorf("round %d: the removed file is open and %v are used", i, used)
		}
		for _, fd := range opened {
			if fd >= 0 {
				_, _ = unix.Pwrite(fd, []byte("x"), 2<<20)
				unix.Close(fd)
			}
		}
		if t.Failed() {
			return
		}
	}
}

// A file that is replaced all the time can always be opened.
func TestOpenRacesReplace(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 64 << 20, Inodes: 64})
	path, tmp := filepath.Join(m.dir, "f"), filepath.Join(m.dir, "tmp")
	must(t, os.WriteFile(path, []byte("hello"), 0o644))
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for {
				select {
				case <-stop:
					return
				default:
				}
				data, err := os.ReadFile(path)
				if err != nil || string(data) != "hello" {
					t.Errorf("read %q: %v", data, err)
					return
				}
			}
		}()
	}
	for range 2000 {
		must(t, os.WriteFile(tmp, []byte("hello"), 0o644))
		must(t, os.Rename(tmp, path))
	}
	close(stop)
	wg.Wait()
}

// What a replaced file had is there for the next write as soon as the kernel has
// told of its last close, which it does behind close(2).
func TestReplaceInFullVolume(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 8 << 20, Inodes: 3})
	path, tmp := filepath.Join(m.dir, "f"), filepath.Join(m.dir, "tmp")
	data := make([]byte, 4<<20)
	must(t, os.WriteFile(path, data, 0o644))
	for i := range 100 {
		must(t, os.WriteFile(tmp, data, 0o644))
		must(t, os.Rename(tmp, path))
		eventually(t, fmt.Sprint("the space is back in round ", i), func() bool {
			var st unix.Statfs_t
			must(t, unix.Statfs(m.dir, &st))
			return st.Bfree*uint64(st.Bsize) == 4<<20
		})
	}
}

// Overwriting what is there needs no room.
func TestOverwriteInFullVolume(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 64 << 10, Inodes: 64})
	path := filepath.Join(m.dir, "f")
	fd := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(fd)
	must(t, unix.Setxattr(path, "user.big", make([]byte, 3000), 0))
	for _, off := range []int64{0, 12 << 10} {
		if _, err := unix.Pwrite(fd, []byte("x"), off); err != nil {
			t.Fatal(err)
		}
	}
	full := openFile(t, filepath.Join(m.dir, "full"), unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(full)
	for off := int64(0); ; off += 4096 {
		if _, err := unix.Pwrite(full, make([]byte, 4096), off); err == unix.ENOSPC {
			break
		} else {
			must(t, err)
		}
	}
	if _, err := unix.Pwrite(fd, []byte("y"), 12<<10); err != nil {
		t.Errorf("overwrite: %v", err)
	}
}

// chown takes file capabilities away, and with them a block that hid a hole.
func TestChownDropsHiddenBlock(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 1 << 20, Inodes: 64})
	path := filepath.Join(m.dir, "f")
	fd := openFile(t, path, unix.O_RDWR|unix.O_CREAT)
	defer unix.Close(fd)
	// Enough attributes beside it that it needs a block of its own; struct vfs_ns_cap_data, revision 2.
	must(t, unix.Ftruncate(fd, 4096))
	caps := make([]byte, 20)
	caps[3], caps[4] = 2, 1
	must(t, unix.Fsetxattr(fd, "user.fill", make([]byte, 56), 0))
	must(t, unix.Fsetxattr(fd, "security.capability", caps, 0))
	must(t, unix.Fchown(fd, 1, 1))
	m.check(t)
	must(t, unix.Fremovexattr(fd, "user.fill"))
}

// Statistics of the mount and of removed files, with the birth time asked for
// as stat(1) does.
func TestStatxWithBirthTime(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 1 << 20, Inodes: 64})
	var stx unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, filepath.Dir(m.dir), 0, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &stx); err != nil {
		t.Errorf("the directory of volumes: %v", err)
	}
	path := filepath.Join(m.dir, "f")
	must(t, os.WriteFile(path, []byte("hello"), 0o644))
	ref := openFile(t, path, unix.O_PATH)
	defer unix.Close(ref)
	must(t, unix.Unlink(path))
	if err := unix.Statx(ref, "", unix.AT_EMPTY_PATH|unix.AT_STATX_FORCE_SYNC, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &stx); err != nil {
		t.Errorf("a removed file: %v", err)
	} else if stx.Size != 5 || stx.Nlink != 0 {
		t.Errorf("a removed file: size %d, %d links", stx.Size, stx.Nlink)
	}
}

// O_CREAT of a name that the kernel takes for absent still needs permission
// for the file that is there.
func TestCreateOfExistingChecksPermission(t *testing.T) {
	m := mount(t, quota.Usage{Bytes: 1 << 20, Inodes: 64})
	must(t, os.Chmod(m.dir, 0o777))
	path := filepath.Join(m.dir, "secret")
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	must(t, os.WriteFile(filepath.Join(m.tree, "secret"), nil, 0o600))
	m.ledger.Settle(quota.Usage{}, quota.Delta{Inodes: 1})
	dir := openFile(t, m.dir, unix.O_PATH) // the way there is closed to the user
	defer unix.Close(dir)
	err := asUser(1000, func() error {
		fd, err := unix.Openat(dir, "secret", unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
	if err != unix.EACCES {
		t.Errorf("open: %v", err)
	}
}

// TestChargeRandom does random things to a few files, in a volume with room and
// in one that is always nearly full, and compares ledger and disk all along.
// CROFT_TEST_SEED in the environment picks other sequences.
func TestChargeRandom(t *testing.T) {
	first, _ := strconv.ParseUint(os.Getenv("CROFT_TEST_SEED"), 10, 64)
	for seed := first; seed < first+2; seed++ {
		for _, limit := range []uint64{48 << 10, 400 << 10, 64 << 20} {
			t.Run(fmt.Sprintf("%d/%d", limit, seed), func(t *testing.T) {
				m := mount(t, quota.Usage{Bytes: limit, Inodes: 12})
				r := &randomOps{m: m, rand: rand.New(rand.NewPCG(seed, limit)), span: int64(limit / 2)}
				if seed%2 == 0 {
					r.span = 40 << 10
				}
				defer r.closeAll()
				for i := range 400 {

					what := r.step()
					used := m.ledger.Used()
					if !used.Fits(m.ledger.Limit()) || m.ledger.Overruns()+m.ledger.Underruns() > 0 {
						t.Fatalf("step %d, %s: used %v, overruns %d, underruns %d", i, what, used, m.ledger.Overruns(), m.ledger.Underruns())
					}
					m.check(t)
					if i%7 == 0 {
						must(t, m.fs.Quiesce("v", func(quota.Usage) error {
							m.fs.ResetCharges("v")
							return nil
						}))
					}
					if t.Failed() {
						t.Fatalf("at step %d: %s", i, what)
					}
				}
			})
		}
	}
}

// TestChargeConcurrent does the same by several at a time; what is open at the
// end is closed by the next round's check at the latest.
func TestChargeConcurrent(t *testing.T) {
	for seed := range uint64(3) {
		m := mount(t, quota.Usage{Bytes: 400 << 10, Inodes: 12})
		var wg sync.WaitGroup
		for worker := range uint64(4) {
			wg.Add(1)
			go func() {
				defer wg.Done()
				r := &randomOps{m: m, rand: rand.New(rand.NewPCG(seed, worker)), span: 200 << 10}
				defer r.closeAll()
				for range 600 {
					what := r.step()
					if used := m.ledger.Used(); !used.Fits(m.ledger.Limit()) {
						t.Errorf("%s: used %v", what, used)
						return
					}
				}
			}()
		}
		wg.Wait()
		m.check(t)
		if m.ledger.Overruns()+m.ledger.Underruns() > 0 {
			t.Errorf("overruns %d, underruns %d", m.ledger.Overruns(), m.ledger.Underruns())
		}
	}
}

type randomOps struct {
	m    *mounted
	rand *rand.Rand
	span int64
	fds  []int
}

func (r *randomOps) name() string {
	return filepath.Join(r.m.dir, string(rune('a'+r.rand.IntN(5))))
}

func (r *randomOps) fd() int {
	if len(r.fds) == 0 {
		return -1
	}
	return r.fds[r.rand.IntN(len(r.fds))]
}

func (r *randomOps) offset() int64 {
	off := r.rand.Int64N(r.span)
	if r.rand.IntN(2) == 0 {
		off = off / 4096 * 4096
	}
	return off
}

func (r *randomOps) closeAll() {
	for _, fd := range r.fds {
		unix.Close(fd)
	}
}

func (r *randomOps) step() string {
	off, length, fd := r.offset(), r.offset()/2+1, r.fd()
	does := func(what string, err error) string {
		return fmt.Sprintf("%s fd %d off %d length %d: %v", what, fd, off, length, err)
	}
	switch r.rand.IntN(20) {
	case 0, 1:
		fd, err := unix.Open(r.name(), unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o644)
		if err == nil {
			r.fds = append(r.fds, fd)
		}
		return does("open", err)
	case 2:
		fd, err := unix.Open(r.m.dir, unix.O_RDWR|unix.O_TMPFILE|unix.O_CLOEXEC, 0o644)
		if err == nil {
			r.fds = append(r.fds, fd)
		}
		return does("tmpfile", err)
	case 3:
		if len(r.fds) < 4 {
			return "nothing"
		}
		i := r.rand.IntN(len(r.fds))
		unix.Close(r.fds[i])
		r.fds = append(r.fds[:i], r.fds[i+1:]...)
		return "close"
	case 4, 5, 6:
		_, err := unix.Pwrite(fd, make([]byte, length), off)
		return does("pwrite", err)
	case 7:
		return does("ftruncate", unix.Ftruncate(fd, off))
	case 8:
		return does("truncate", unix.Truncate(r.name(), off))
	case 9:
		return does("fallocate", unix.Fallocate(fd, 0, off, length))
	case 10, 11:
		return does("fallocate keep", unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, length))
	case 12:
		return does("punch", unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, off, length))
	case 13:
		return does("zero", unix.Fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|uint32(r.rand.IntN(2)), off, length))
	case 14:
		from, at := r.fd(), r.offset()
		if r.rand.IntN(2) == 0 {
			at, off, length = at/4096*4096, off/4096*4096, (length+4095)/4096*4096
		}
		_, err := unix.CopyFileRange(from, &at, fd, &off, int(length), 0)
		return does("copy", err)
	case 15:
		return does("link", unix.Link(r.name(), r.name()))
	case 16:
		if r.rand.IntN(2) == 0 {
			return does("linkat", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, r.name(), unix.AT_SYMLINK_FOLLOW))
		}
		return does("unlink", unix.Unlink(r.name()))
	case 17:
		flags := []uint{0, 0, unix.RENAME_NOREPLACE, unix.RENAME_EXCHANGE, unix.RENAME_WHITEOUT}[r.rand.IntN(5)]
		return does("rename", unix.Renameat2(unix.AT_FDCWD, r.name(), unix.AT_FDCWD, r.name(), flags))
	case 18:
		if r.rand.IntN(2) == 0 {
			return does("setxattr", unix.Fsetxattr(fd, "user.x", make([]byte, 3000), 0))
		}
		return does("removexattr", unix.Fremovexattr(fd, "user.x"))
	default:
		if r.rand.IntN(2) == 0 {
			return does("symlink", unix.Symlink(string(make([]byte, 0))+fmt.Sprintf("%0*d", 1+r.rand.IntN(200), 0), r.name()))
		}
		return does("fsync", unix.Fsync(fd))
	}
}

// asUser runs fn on a thread of its own under an unprivileged identity.
func asUser(uid int, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its identity
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			result <- errno
			return
		}
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			result <- errno
			return
		}
		result <- fn()
	}()
	return <-result
}
