package gate_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestFull holds that in a full volume all goes on but what needs room, by a
// descriptor from before.
func TestFull(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 3*kit.Gi)
		dir := p.Create("v", 256*kit.Mi)
		f := open(t, os.O_CREATE|os.O_RDWR, dir, "f")
		_, err := f.Write(make([]byte, kit.Mi))
		kit.OK(t, err)
		reader := open(t, os.O_RDONLY, dir, "f")
		fillUp(t, dir, "rest")
		if !p.Show("v").Gated {
			t.Fatal("the full volume is not gated")
		}
		before := heldTotal(t, p)
		fd, buf := int(f.Fd()), make([]byte, 64*kit.Ki)
		for _, from := range []int{fd, int(reader.Fd())} {
			for at, want := range map[int64]int{0: len(buf), kit.Mi - 100: 100, kit.Mi: 0, 2 * kit.Mi: 0} {
				_, err := unix.Seek(from, at, unix.SEEK_SET)
				kit.OK(t, err)
				read := map[string]func() (int, error){
					"read":    func() (int, error) { return unix.Read(from, buf) },
					"readv":   func() (int, error) { return unix.Readv(from, [][]byte{buf[:100], buf[100:]}) },
					"pread":   func() (int, error) { return unix.Pread(from, buf, at) },
					"preadv":  func() (int, error) { return unix.Preadv(from, [][]byte{buf}, at) },
					"preadv2": func() (int, error) { return unix.Preadv2(from, [][]byte{buf}, at, 0) },
				}
				for name, fn := range read {
					if _, err := unix.Seek(from, at, unix.SEEK_SET); err != nil {
						t.Error(err)
					}
					if n, err := fn(); err != nil || n != want {
						t.Errorf("%s at %d: %d, %v, want %d", name, at, n, err, want)
					}
				}
			}
		}
		if n, err := unix.Pwrite(fd, buf, kit.Mi/2); err != nil || n != len(buf) {
			t.Errorf("pwrite in place: %d, %v", n, err)
		}
		_, err = unix.Pwrite(fd, buf, kit.Mi)
		kit.IsErr(t, "append", err, unix.ENOSPC)
		_, err = unix.Pwritev2(fd, [][]byte{buf}, 0, appendTo)
		kit.IsErr(t, "RWF_APPEND", err, unix.ENOSPC)
		if heldTotal(t, p) == before {
			t.Error("no system call was held")
		}
		// Of these nobody can tell whether they read: inside of the file it does not matter. At
		// its end a read may be refused as a write would be.
		if n := aioRead(t, fd, buf, kit.Mi); n != 0 && n != -int64(unix.ENOSPC) {
			t.Errorf("aio read at the end: %d", n)
		}
		if n := aioRead(t, fd, buf, 0); n != int64(len(buf)) {
			t.Errorf("aio read inside: %d", n)
		}
		for _, engine := range []string{"libaio", "io_uring"} {
			for _, rw := range []string{"randread", "randwrite"} {
				if r := kit.Exec(t, "fio", "--name=f", "--filename="+dir+"/f", "--ioengine="+engine, "--rw="+rw, "--bs=16k", "--size=1m", "--iodepth=4",
					"--overwrite=1", "--fallocate=none", "--allow_file_create=0"); r.Code != 0 {
					t.Errorf("%s by %s: %s", rw, engine, r.Stderr)
				}
			}
		}
		if fi, err := f.Stat(); err != nil || fi.Size() != kit.Mi {
			t.Errorf("%v, %v", fi.Size(), err)
		}
		f.Close()
		reader.Close()
		full(t, p, "v", 256*kit.Mi, 64*kit.Ki)
	})
}

// aioRead reads by io_submit(2) and returns what the event says: a length, or an errno below 0.
func aioRead(t *testing.T, fd int, buf []byte, at int64) int64 {
	t.Helper()
	var ctx uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, 1, uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		t.Fatalf("io_setup: %v", errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ctx, 0, 0)
	// struct iocb and struct io_event of include/uapi/linux/aio_abi.h
	cb := &struct {
		data       uint64
		key, flags uint32
		op, prio   uint16
		fd         uint32
		buf        *byte
		len        uint64
		off        int64
		_          uint64
		_, _       uint32
	}{fd: uint32(fd), buf: &buf[0], len: uint64(len(buf)), off: at}
	list := []unsafe.Pointer{unsafe.Pointer(cb)}
	if _, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, 1, uintptr(unsafe.Pointer(&list[0]))); errno != 0 {
		return -int64(errno)
	}
	var event struct {
		_, _   uint64
		res, _ int64
	}
	if _, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ctx, 1, 1, uintptr(unsafe.Pointer(&event)), 0, 0); errno != 0 {
		t.Fatalf("io_getevents: %v", errno)
	}
	return event.res
}

// TestRoomComesBack holds that a writer goes on when there is room again, and
// that nothing is held when there is plenty.
func TestRoomComesBack(t *testing.T) {
	p := mount(t, "ext4", 3*kit.Gi)
	dir := p.Create("v", 512*kit.Mi)
	f := open(t, os.O_CREATE|os.O_WRONLY|os.O_APPEND, dir, "f")
	buf := buffer(t, kit.Mi)
	write := func() error {
		_, err := unix.Write(int(f.Fd()), buf)
		return err
	}
	kit.OK(t, write())
	rest := open(t, os.O_CREATE|os.O_WRONLY, dir, "other")
	_, err := rest.Write(make([]byte, 200*kit.Mi))
	kit.OK(t, err)
	kit.OK(t, rest.Close())
	for _, c := range []struct {
		name string
		free func()
	}{
		{"a cut", func() { kit.OK(t, os.Truncate(dir+"/other", 190*kit.Mi)) }},
		{"a larger limit", func() {
			if r := p.Resize("v", 530*kit.Mi); r.Code != 0 {
				t.Fatal(r)
			}
		}},
		{"a removal", func() { kit.OK(t, os.Remove(dir+"/other")) }},
	} {
		for err = nil; err == nil; {
			err = write()
		}
		kit.IsErr(t, "the full volume", err, unix.ENOSPC)
		if !p.Show("v").Gated {
			t.Error("the full volume is not gated")
		}
		c.free()
		if err := write(); err != nil {
			t.Errorf("after %s: %v", c.name, err)
		}
	}
	kit.Poll(t, "an end of the gating", func() bool { return !p.Show("v").Gated })
	kit.Poll(t, "an end of the holding", func() bool {
		before := heldTotal(t, p)
		for i := range 100 {
			if _, err := unix.Pwrite(int(f.Fd()), buf[:block], int64(i)*block); err != nil {
				t.Fatal(err)
			}
		}
		return heldTotal(t, p) == before
	})
	f.Close()
	p.Idle()
	p.Check()
}

// TestStat holds that what the kernel has written is seen at once.
func TestStat(t *testing.T) {
	p := mount(t, "ext4", 3*kit.Gi)
	dir := p.Create("v", 512*kit.Mi)
	path := dir + "/f"
	f := open(t, os.O_CREATE|os.O_RDWR, path)
	past := time.Unix(1_000_000_000, 0)
	var size int64
	for _, flags := range []int{0, unix.O_SYNC, unix.O_DSYNC} {
		w := open(t, os.O_WRONLY|os.O_APPEND|flags, path)
		for range 50 {
			kit.OK(t, os.Chtimes(path, past, past))
			n, err := w.Write(make([]byte, 10_000))
			kit.OK(t, err)
			size += int64(n)
			if st := kit.Stat(t, path); st.Size != size || st.Mtim.Sec == past.Unix() {
				t.Fatalf("size %d, want %d; mtime %v", st.Size, size, st.Mtim)
			}
			out, err := exec.Command("stat", "-c", "%s %Y", path).Output()
			kit.OK(t, err)
			if s := strings.Fields(string(out)); len(s) != 2 || s[1] == "1000000000" {
				t.Fatalf("another process sees %s", out)
			}
		}
		kit.OK(t, w.Sync())
		kit.OK(t, unix.Fdatasync(int(w.Fd())))
	}
	kit.OK(t, os.Chtimes(path, past, past))
	mem, err := unix.Mmap(int(f.Fd()), 0, 64*kit.Ki, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	kit.OK(t, err)
	mem[100] = 'x'
	kit.OK(t, unix.Msync(mem, unix.MS_SYNC))
	kit.Poll(t, "the time of a store", func() bool { return kit.Stat(t, path).Mtim.Sec != past.Unix() })
	kit.OK(t, unix.Munmap(mem))
}
