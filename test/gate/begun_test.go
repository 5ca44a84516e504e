package gate_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// Of include/uapi/linux/userfaultfd.h.
const (
	uffdAPI             = 0xaa
	uffdioAPI           = 0xc018aa3f
	uffdioRegister      = 0xc020aa00
	uffdioZeropage      = 0xc020aa04
	uffdRegisterMissing = 1
)

// slow writes 4 KiB to the file args[0], and then 1 MiB of memory that is not there before its standard input has a line.
func slow(args []string) int {
	fd, err := unix.Open(args[0], unix.O_CREAT|unix.O_WRONLY, 0o644)
	if err == nil {
		_, err = unix.Write(fd, make([]byte, block))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	const length = kit.Mi
	mem, err := unix.Mmap(-1, 0, length, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	start := uint64(uintptr(unsafe.Pointer(&mem[0])))
	faults, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	ask := func(request uintptr, arg *[4]uint64) {
		if errno == 0 {
			_, _, errno = unix.Syscall(unix.SYS_IOCTL, faults, request, uintptr(unsafe.Pointer(arg)))
		}
	}
	ask(uffdioAPI, &[4]uint64{uffdAPI})
	ask(uffdioRegister, &[4]uint64{start, length, uffdRegisterMissing})
	if errno != 0 {
		fmt.Fprintln(os.Stderr, "userfaultfd:", errno)
		return 1
	}
	wrote := make(chan error)
	go func() {
		n, err := unix.Write(fd, mem)
		if err == nil && n != length {
			err = fmt.Errorf("wrote %d bytes", n)
		}
		wrote <- err
	}()
	// The first of them is missed when the write has begun.
	var event [32]byte
	if n, err := unix.Read(int(faults), event[:]); err != nil || n != len(event) {
		fmt.Fprintln(os.Stderr, "userfaultfd:", n, err)
		return 1
	}
	fmt.Println("has begun")
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	ask(uffdioZeropage, &[4]uint64{start, length})
	if err := <-wrote; err != nil || errno != 0 {
		fmt.Fprintln(os.Stderr, err, errno)
		return 1
	}
	return 0
}

// TestBegun holds that what a write(2) may still take that was begun before the volume was gated is granted to nobody else,
// however long it takes.
func TestBegun(t *testing.T) {
	const limit uint64 = 256 * kit.Mi
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, kit.Gi)
		dir := p.Create("v", limit)
		s := kit.Process{Helper: "slow", Args: []string{filepath.Join(dir, "slow")}}.Start(t)
		if line := s.Line(); line != "has begun" {
			t.Fatalf("%q", line)
		}
		fillUp(t, dir, "f") // nobody may count meanwhile: that waits for the write
		st, err := os.Stat(p.Tree("v", "f"))
		kit.OK(t, err)
		if least := int64(limit) - 2*kit.Mi; st.Size() < least {
			t.Errorf("%d bytes were written, at least %d should be", st.Size(), least)
		}
		s.Say("go on")
		w := watch(p.Tree("v"))
		if code := s.Wait(); code != 0 {
			t.Errorf("the slow write: exit %d", code)
		}
		fillUp(t, dir, "g") // with what was set aside and not taken
		w.end(t, limit)
		full(t, p, "v", limit, 0)
	})
}
