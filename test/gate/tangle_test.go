package gate_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestTangle changes and asks about files on which system calls are held: everything ends.
func TestTangle(t *testing.T) {
	const limit, rounds = 256 * kit.Mi, 40
	kit.EachFS(t, func(t *testing.T, fstype string) {
		p := mount(t, fstype, 3*kit.Gi)
		dir := p.Create("v", limit)
		before := heldTotal(t, p)
		var hammers []*kit.Running
		for i := range 4 {
			h := kit.Process{Helper: "hammer", Args: []string{fmt.Sprint(dir, "/h", i), "2"}}.Start(t)
			h.Line()
			hammers = append(hammers, h)
		}
		kit.Poll(t, "held system calls", func() bool { return heldTotal(t, p) > before+100 })
		croft := func(args ...string) error {
			if out, err := p.Command(args...).CombinedOutput(); err != nil {
				return fmt.Errorf("croft %v: %w: %s", args, err, out)
			}
			return nil
		}
		no := func(err error) error { // no room is as good an answer
			if err == unix.ENOSPC {
				return nil
			}
			return err
		}
		onFile := func(i int, fn func(fd int) error) error {
			f, err := os.OpenFile(fmt.Sprint(dir, "/h", i), os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return no(fn(int(f.Fd())))
		}
		steps := []func(i int) error{
			func(i int) error {
				return onFile(0, func(fd int) error { return unix.Fallocate(fd, 0, int64(i)*kit.Mi, 2*kit.Mi) })
			},
			func(i int) error {
				return onFile(1, func(fd int) error { return unix.Ftruncate(fd, int64(i)*kit.Mi/4) })
			},
			func(i int) error {
				return onFile(2, func(fd int) error {
					from, to := int64(0), int64(kit.Mi)
					_, err := unix.CopyFileRange(fd, &from, fd, &to, 64*kit.Ki, 0)
					return err
				})
			},
			func(i int) error {
				err := os.WriteFile(fmt.Sprint(dir, "/n", i), nil, 0o600)
				if err == nil {
					err = os.Rename(fmt.Sprint(dir, "/n", i), dir+"/n")
				}
				return err
			},
			func(i int) error {
				if i == rounds/2 {
					return os.Remove(dir + "/h3") // it is written on
				}
				return nil
			},
			func(int) error { var st unix.Statfs_t; return unix.Statfs(dir, &st) },
			func(i int) error {
				if i%8 > 0 {
					return nil
				}
				return croft("check", "--pool", p.Dir)
			},
			func(i int) error {
				return croft("volume", "resize", "--pool", p.Dir, "v", "--size", fmt.Sprint(limit+i*kit.Mi))
			},
			func(int) error {
				return exec.CommandContext(context.Background(), "df", dir).Run()
			},
		}
		together(t, len(steps), func(n int) error {
			for i := range rounds {
				if err := steps[n](i); err != nil {
					return fmt.Errorf("step %d, round %d: %w", n, i, err)
				}
			}
			return nil
		})
		for i, h := range hammers {
			kit.Within(t, fmt.Sprint("the end of writer ", i), func() {
				if code := h.Wait(); code != 0 {
					t.Errorf("writer %d ended with %d", i, code)
				}
			})
		}
		p.Idle()
		p.Check()
	})
}
