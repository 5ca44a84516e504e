package pool_test

import (
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
)

// keeperOfOne keeps what it is given of one pool, in this process.
type keeperOfOne map[string]*os.File

func (k keeperOfOne) Hold(name string, fd int) error {
	held, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if old := k[name]; old != nil {
		err = old.Close()
	}
	k[name] = os.NewFile(uintptr(held), name)
	return err
}

func (k keeperOfOne) Take() (map[string]*os.File, error) {
	taken := make(keeperOfOne)
	for name, f := range k {
		if err := taken.Hold(name, int(f.Fd())); err != nil {
			return nil, err
		}
	}
	return taken, nil
}

func (k keeperOfOne) Drop() (err error) {
	for _, f := range k {
		err = errors.Join(err, f.Close())
	}
	clear(k)
	return err
}

// TestKeptIsClaimed: between two daemons a pool belongs to its keeper, and nobody else opens it.
func TestKeptIsClaimed(t *testing.T) {
	dir, mnt := newPool(t), t.TempDir()
	keeper := make(keeperOfOne)
	t.Cleanup(func() {
		if err := keeper.Drop(); err != nil {
			t.Error(err)
		}
	})
	mount := func() *pool.Pool {
		t.Helper()
		p, err := pool.Open(pool.Options{Dir: dir, Keeper: func(string) pool.Keeper { return keeper }})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Mount(pool.MountOptions{Mountpoint: mnt}); err != nil {
			t.Fatal(err, p.Close())
		}
		return p
	}
	refused := func(says string) {
		t.Helper()
		p, err := pool.Open(pool.Options{Dir: dir})
		if err == nil {
			t.Fatal("it was opened", p.Close())
		}
		wantErr(t, err, pool.ErrInUse, says)
	}

	p := mount()
	refused("by process")
	for takeOvers := range uint64(2) {
		if err := p.HandOver(context.Background()); err != nil {
			t.Fatal(err)
		}
		refused("croft keeper")
		p = mount()
		if got := p.Info().TakeOvers; got != takeOvers+1 {
			t.Errorf("taken over %d times, want %d", got, takeOvers+1)
		}
		refused("by process")
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := open(t, dir).Close(); err != nil { // nobody keeps anything any more
		t.Error(err)
	}
}
