package gate_test

import (
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

const (
	writers  = 16
	longest  = kit.Mi
	appendTo = 0x10 // RWF_APPEND
)

// A filler has writers write until ENOSPC.
type filler struct {
	name  string
	flags int
	file  func(i int) string
	write func(fd, i int, buf []byte, at int64) (int, error)
	jumps bool // some write beyond the end of the file
}

func own(i int) string { return fmt.Sprint("f", i) }
func one(int) string   { return "f" }

func sequential(fd, _ int, buf []byte, _ int64) (int, error) { return unix.Write(fd, buf) }

// striped gives each writer a part of the file of its own, beyond those of the others.
func striped(fd, i int, buf []byte, at int64) (int, error) {
	return unix.Pwrite(fd, buf, int64(i)<<32+at)
}

// next shares the file out among the writers piece by piece.
func next() func(fd, i int, buf []byte, at int64) (int, error) {
	var end atomic.Int64
	return func(fd, _ int, buf []byte, _ int64) (int, error) {
		return unix.Pwrite(fd, buf, end.Add(int64(len(buf)))-int64(len(buf)))
	}
}

func appends(fd, _ int, buf []byte, _ int64) (int, error) {
	vec := unix.Iovec{Base: &buf[0]}
	vec.SetLen(len(buf))
	n, _, errno := unix.Syscall6(unix.SYS_PWRITEV2, uintptr(fd), uintptr(unsafe.Pointer(&vec)), 1, 0, 0, appendTo)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func fillers() []filler {
	return []filler{
		{"a file each", 0, own, sequential, false},
		{"one file, stripes", 0, one, striped, true},
		{"one file, next piece", 0, one, next(), true},
		{"one file, O_APPEND", unix.O_APPEND, one, sequential, false},
		{"one file, RWF_APPEND", 0, one, appends, false},
		{"a file each, O_DIRECT", unix.O_DIRECT, own, sequential, false},
		{"one file, O_DIRECT, stripes", unix.O_DIRECT, one, striped, true},
	}
}

// fill runs a filler; how many bytes it has written is returned.
func (f filler) fill(t *testing.T, dir string) int64 {
	t.Helper()
	var written atomic.Int64
	buf := buffer(t, longest)
	together(t, writers, func(i int) error {
		file, err := os.OpenFile(filepath.Join(dir, f.file(i)), os.O_CREATE|os.O_WRONLY|f.flags, 0o644)
		if err != nil {
			return err
		}
		defer file.Close()
		size := sizes(i)
		var at int64
		for {
			n, err := f.write(int(file.Fd()), i, buf[:size()], at)
			at += int64(max(n, 0)) // -1 with an error
			written.Add(int64(max(n, 0)))
			if err == unix.ENOSPC {
				return nil
			} else if err != nil {
				return fmt.Errorf("writer %d at %d: %w", i, at, err)
			}
		}
	})
	return written.Load()
}

// exact runs a filler in a volume of its own.
func (f filler) exact(t *testing.T, p *kit.Pool, volume string, limit uint64) {
	t.Helper()
	before := heldTotal(t, p)
	dir := p.Create(volume, limit)
	w := watch(p.Tree(volume))
	written := f.fill(t, dir)
	w.end(t, limit)
	wasGated(t, p, volume, before)
	full(t, p, volume, limit, writers*longest)
	t.Logf("%d counts", w.counts)
	// Where the end of a file jumps, xfs keeps the blocks in it that it held ready beyond the last.
	var st unix.Statfs_t
	kit.OK(t, unix.Statfs(p.Dir, &st))
	keeps := st.Type == unix.XFS_SUPER_MAGIC && f.jumps
	if used := onDisk(t, p, volume); used < uint64(written) || used > uint64(written) && !keeps {
		t.Errorf("%d bytes are there, %d were written", used, written)
	}
	removeAll(t, dir)
	p.Idle()
	p.MustVolume("delete", volume)
}

// full checks that a volume that was filled has no more than slack left, and that it is charged exactly.
func full(t *testing.T, p *kit.Pool, volume string, limit, slack uint64) {
	t.Helper()
	p.Idle()
	p.Check()
	used := onDisk(t, p, volume)
	if used > limit || limit-used > slack {
		t.Errorf("%d of %d bytes are used, no more than %d were to be left", used, limit, slack)
	}
	t.Logf("%d bytes are left", int64(limit)-int64(used))
}

// TestExact holds that the limit is never passed, whoever writes how fast.
func TestExact(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 3*kit.Gi)
		for i, f := range fillers() {
			t.Run(f.name, func(t *testing.T) { f.exact(t, p, fmt.Sprint("v", i), 512*kit.Mi) })
		}
	})
}

// TestExactLarge is for a volume in which there is room for a while.
func TestExactLarge(t *testing.T) {
	p := mount(t, "ext4", 7*kit.Gi)
	for i, f := range fillers()[:2] {
		t.Run(f.name, func(t *testing.T) { f.exact(t, p, fmt.Sprint("v", i), 4*kit.Gi) })
	}
}

// TestExactBusy is TestExact where somebody else has a processor.
func TestExactBusy(t *testing.T) {
	p := mount(t, "ext4", 3*kit.Gi)
	s := kit.Process{Helper: "spin"}.Start(t)
	s.Line()
	fillers()[0].exact(t, p, "v", 512*kit.Mi)
	if code := s.Wait(); code != 0 {
		t.Errorf("the busy process ended with %d", code)
	}
}

// TestExactCrowded is TestExact where looking at another volume takes long: thousands of its files are open for writing, and it has
// so little room that it should be looked at all the time.
func TestExactCrowded(t *testing.T) {
	const files, limit, otherLimit = 8000, 512 * kit.Mi, 256 * kit.Mi
	p := mount(t, "ext4", 4*kit.Gi)
	other := p.Create("other", otherLimit)
	opened := make([]*os.File, files)
	closeAll := func() {
		for _, f := range opened {
			f.Close()
		}
	}
	defer closeAll()
	for i := range opened {
		var err error
		opened[i], err = os.Create(filepath.Join(other, fmt.Sprint(i)))
		kit.OK(t, err)
	}
	kit.OK(t, unix.Fallocate(int(opened[0].Fd()), 0, 0, otherLimit-72*kit.Mi))
	start, began := time.Now(), cpuTime(t, p)
	time.Sleep(2 * time.Second)
	share := (cpuTime(t, p) - began).Seconds() / time.Since(start).Seconds()
	t.Logf("%d idle files: %.2f of a processor", files, share)
	if share > 0.7 { // half of one, by the sampler's own count, and what comes on top
		t.Errorf("looking at %d idle files takes %.2f of a processor", files, share)
	}

	before := heldTotal(t, p)
	f := fillers()[0]
	dir := p.Create("v", limit)
	w := watch(p.Tree("v"))
	f.fill(t, dir)
	w.end(t, limit)
	wasGated(t, p, "v", before)
	closeAll()
	full(t, p, "v", limit, writers*longest)
}

// TestExactHuge holds that what one system call writes does not pass the limit.
func TestExactHuge(t *testing.T) {
	for _, c := range []struct {
		limit   uint64
		writers int
	}{{2 * kit.Gi, 1}, {3 * kit.Gi, 2}} {
		t.Run(fmt.Sprint(c.limit>>30, " GiB, ", c.writers, " writers"), func(t *testing.T) {
			p := mount(t, "ext4", 5*kit.Gi)
			before := heldTotal(t, p)
			dir := p.Create("v", c.limit)
			buf, err := unix.Mmap(-1, 0, kit.Gi, unix.PROT_READ, unix.MAP_ANON|unix.MAP_PRIVATE)
			kit.OK(t, err)
			defer func() { _ = unix.Munmap(buf) }()
			w := watch(p.Tree("v"))
			together(t, c.writers, func(i int) error {
				f, err := os.Create(filepath.Join(dir, own(i)))
				if err != nil {
					return err
				}
				defer f.Close()
				for {
					if _, err := unix.Write(int(f.Fd()), buf); err == unix.ENOSPC {
						return nil
					} else if err != nil {
						return err
					}
				}
			})
			w.end(t, c.limit)
			if heldTotal(t, p) == before {
				t.Errorf("no system call was held")
			}
			full(t, p, "v", c.limit, uint64(c.writers)*kit.Gi)
		})
	}
}

// TestExactFio has fio fill a volume, by writes that no system call waits for.
func TestExactFio(t *testing.T) {
	const limit, jobs, depth, piece = 512 * kit.Mi, 4, 16, 64 * kit.Ki
	kit.EachFS(t, func(t *testing.T, fstype string) {
		kit.Need(t, "fio")
		p := mount(t, fstype, 3*kit.Gi)
		n := 0
		for _, engine := range []string{"libaio", "io_uring"} {
			for _, direct := range []int{0, 1} {
				for _, rw := range []string{"write", "randwrite"} {
					if fstype != "ext4" && (rw == "randwrite") != (direct == 1) {
						continue
					}
					t.Run(fmt.Sprint(engine, ",direct=", direct, ",", rw), func(t *testing.T) {
						volume := fmt.Sprint("v", n)
						n++
						before := heldTotal(t, p)
						dir := p.Create(volume, limit)
						w := watch(p.Tree(volume))
						kit.Must(t, "fio", "--name=f", "--directory="+dir, "--ioengine="+engine, fmt.Sprint("--direct=", direct), "--rw="+rw,
							fmt.Sprint("--numjobs=", jobs), "--thread", fmt.Sprint("--iodepth=", depth), fmt.Sprint("--bs=", piece),
							"--size=256m", "--fallocate=none", "--fill_fs=1", "--group_reporting")
						w.end(t, limit)
						wasGated(t, p, volume, before)
						// Nobody can tell where such a write goes, nor when it is over: each
						// may have as much again reserved.
						full(t, p, volume, limit, jobs*depth*piece*2)
						removeAll(t, dir)
						p.Idle()
						p.MustVolume("delete", volume)
					})
				}
			}
		}
	})
}

// TestFioVerify reads back what was written while the kernel did it all.
func TestFioVerify(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		kit.Need(t, "fio")
		p := mount(t, fstype, 3*kit.Gi)
		dir := p.Create("v", kit.Gi)
		for _, engine := range []string{"psync", "libaio", "io_uring"} {
			kit.Must(t, "fio", "--name="+engine, "--directory="+dir, "--ioengine="+engine, "--rw=randwrite", "--bs=4k-64k", "--size=32m",
				"--numjobs=2", "--thread", "--iodepth=8", "--fallocate=none", "--aux-path="+kit.TempDir(t), "--verify=crc32c", "--do_verify=1", "--verify_fatal=1")
		}
		if used := onDisk(t, p, "v"); used < 3*2*24*kit.Mi {
			t.Errorf("%d bytes are there", used)
		}
		p.Idle()
		p.Check()
	})
}
