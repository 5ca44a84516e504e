package tenant_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// race works in args[0]: one goroutine swaps the directory "dir" for a symbolic
// link to args[1], the others use names below it with O_NOFOLLOW. args[2] is the
// number of swaps, or "until-gone": until the volume has been deleted.
func race(args []string) error {
	rounds, err := strconv.Atoi(args[2])
	untilGone := err != nil
	root, err := unix.Open(args[0], unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	r := &racers{root: root, untilGone: untilGone}
	for _, name := range []string{"dir", "away"} {
		if err := r.populate(name, name == "away", args[1]); err != nil {
			return fmt.Errorf("populate: %w", err)
		}
	}
	var wg sync.WaitGroup
	for _, racer := range []func(*rand.Rand) error{r.create, r.remove, r.renameBelow, r.mkdirs} {
		wg.Go(func() {
			random := rand.New(rand.NewPCG(1, 2))
			for !r.stop.Load() {
				r.note(racer(random))
			}
		})
	}
	if untilGone {
		fmt.Println("racing")
	}
	for i := 0; (untilGone || i < rounds) && !r.stop.Load(); i++ {
		// dir ↔ away: the one is a directory, the other the link out.
		r.note(unix.Renameat2(root, "dir", root, "away", unix.RENAME_EXCHANGE))
	}
	r.stop.Store(true)
	wg.Wait()
	if untilGone && !r.gone.Load() {
		r.fault(errors.New("the racers stopped before the volume was gone"))
	}
	return errors.Join(r.faults...)
}

type racers struct {
	root int
	stop atomic.Bool
	gone atomic.Bool
	// untilGone tells that the volume is to be deleted; then a passed write fails with EIO.
	untilGone bool

	mu     sync.Mutex
	faults []error
}

func (r *racers) populate(name string, link bool, target string) error {
	if link {
		return ignore(unix.Symlinkat(target, r.root, name), unix.EEXIST)
	}
	return ignore(unix.Mkdirat(r.root, name, 0o777), unix.EEXIST)
}

func ignore(err error, errs ...error) error {
	for _, e := range errs {
		if errors.Is(err, e) {
			return nil
		}
	}
	return err
}

func (r *racers) fault(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.faults = append(r.faults, err)
}

// note takes the outcome of an operation: what a race explains is no fault, a
// volume that is gone ends the race.
func (r *racers) note(err error) {
	switch {
	case err == nil:
	case errors.Is(err, unix.ESTALE), r.untilGone && errors.Is(err, unix.EIO):
		r.gone.Store(true)
		r.stop.Store(true)
	case ignore(err, unix.ENOENT, unix.EEXIST, unix.ELOOP, unix.ENOTDIR, unix.ENOTEMPTY, unix.EISDIR, unix.ENOSPC) != nil:
		r.fault(err)
		r.stop.Store(true)
	}
}

// dir opens "dir" if it is the directory at this moment.
func (r *racers) dir(fn func(fd int) error) error {
	fd, err := unix.Openat(r.root, "dir", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return fn(fd)
}

func pick(random *rand.Rand) string { return []string{"file", "sub", "x", "y"}[random.IntN(4)] }

func (r *racers) create(random *rand.Rand) error {
	return r.dir(func(dir int) error {
		fd, err := unix.Openat(dir, pick(random), unix.O_CREAT|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_TRUNC, 0o666)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("written by the race"))
		return err
	})
}

func (r *racers) remove(random *rand.Rand) error {
	return r.dir(func(dir int) error {
		name := pick(random)
		if err := unix.Unlinkat(dir, name, 0); err != unix.EISDIR {
			return err
		}
		return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
	})
}

func (r *racers) renameBelow(random *rand.Rand) error {
	return r.dir(func(dir int) error { return unix.Renameat(dir, pick(random), dir, pick(random)) })
}

func (r *racers) mkdirs(random *rand.Rand) error {
	return r.dir(func(dir int) error { return unix.Mkdirat(dir, pick(random), 0o777) })
}
