package crash_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// TestPowerCut copies the disk under a working pool at random moments and opens
// each copy.
//
// The pool's filesystem is on a loop device, whose file is on btrfs. FICLONE of
// that file is a point in time: btrfs holds back writes to it and takes what is
// under way with it. The device is attached with --direct-io=on, so it has no
// cache between itself and the file: what it has acknowledged to the filesystem
// above is in the file, and what that filesystem still holds in memory (data
// that was not flushed) is not in the copy. That is what a disk keeps when the
// power goes. For the same reason nothing is synced before the copy.
func TestPowerCut(t *testing.T) {
	copies := 12
	if testing.Short() {
		copies = 3
	}
	for _, fstype := range []string{"ext4", "xfs"} {
		t.Run(fstype, func(t *testing.T) { powerCut(t, fstype, copies) })
	}
}

func powerCut(t *testing.T, fstype string, copies int) {
	random := seeded(t)
	host := kit.Backing(t, "btrfs", 12*kit.Gi)
	image := filepath.Join(host, "disk")
	kit.MakeImage(t, image, 1*kit.Gi)
	device := kit.AttachLoop(t, image, "--direct-io=on")
	kit.MakeFS(t, fstype, device)
	p := kit.NewPoolIn(t, kit.MountDevice(t, device, "nodiscard"))
	p.Mount()
	s := newService(p)
	s.create("roomy", 512*kit.Mi)
	s.create("small", 3*kit.Mi)

	stop := make(chan struct{})
	var load sync.WaitGroup
	work := func(fn func(n int) error) {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := fn(n); err != nil {
					t.Errorf("under load: %v", err)
					return
				}
			}
		})
	}
	work(func(n int) error { return s.durableFile(p.Path("roomy"), "a", n) })
	work(func(n int) error { return s.durableFile(p.Path("roomy"), "b", n) })
	mixer := &kit.Mixer{Dir: p.Path("small"), Random: rand.New(rand.NewPCG(random.Uint64(), 0))}
	defer mixer.Close()
	work(func(int) error { return mixer.Step() })
	work(func(n int) error { return s.comeAndGo(n) })

	var taken []promise
	for i := range copies {
		moment(random, 700*time.Millisecond)
		promised := s.promised()
		kit.OK(t, reflink(image, filepath.Join(host, fmt.Sprint("copy", i))))
		taken = append(taken, promised)
	}
	close(stop)
	load.Wait()
	for i, promised := range taken {
		t.Run(fmt.Sprint("copy", i), func(t *testing.T) { openCopy(t, fstype, filepath.Join(host, fmt.Sprint("copy", i)), promised) })
		kit.OK(t, os.Remove(filepath.Join(host, fmt.Sprint("copy", i))))
	}
	t.Logf("%d files were durable and %d volumes had come and gone at the last copy", len(taken[copies-1].files), len(taken[copies-1].deleted))
}

// reflink makes a copy of from that shares its blocks.
func reflink(from, to string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())), dst.Close())
}

// promise is what was acknowledged before a moment.
type promise struct {
	files   map[string]int    // by path in the mount: the seed
	volumes map[string]uint64 // made, with their limit
	deleted map[string]bool
}

// service keeps the record of what was acknowledged.
type service struct {
	p   *kit.Pool
	mu  sync.Mutex
	now promise
}

func newService(p *kit.Pool) *service {
	return &service{p: p, now: promise{files: map[string]int{}, volumes: map[string]uint64{}, deleted: map[string]bool{}}}
}

func (s *service) promised() promise {
	s.mu.Lock()
	defer s.mu.Unlock()
	return promise{files: maps.Clone(s.now.files), volumes: maps.Clone(s.now.volumes), deleted: maps.Clone(s.now.deleted)}
}

func (s *service) create(name string, bytes uint64) {
	s.p.Create(name, bytes)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.volumes[name] = bytes
}

// durableFile writes a file and fsyncs it and its directory: from then on it is promised.
func (s *service) durableFile(dir, kind string, n int) error {
	const most = 400 // files, so that the volume is not full
	if n >= most {
		return churn(dir, n)
	}
	name := filepath.Join(dir, fmt.Sprint(kind, n))
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(pattern(uint64(n), 0, durableSize(n))); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.now.files[name] = n
	return nil
}

func durableSize(n int) int { return 1 + (n*7919)%120_000 }

// churn writes, allocates and removes, near the limit and without a promise.
func churn(dir string, n int) error {
	path := filepath.Join(dir, fmt.Sprint("churn", n%13))
	if n%3 == 0 {
		return ignoreNotExist(os.Remove(path))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return ignoreFull(err)
	}
	defer f.Close()
	if n%7 == 0 {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, int64(n*4321%700_000)+1)
	} else {
		_, err = f.WriteAt(make([]byte, n*1237%500_000+1), int64(n*5557%300_000))
	}
	if n%5 == 0 {
		err = errors.Join(err, f.Sync())
	}
	return ignoreFull(err)
}

func ignoreFull(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return nil
	}
	return err
}

func ignoreNotExist(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// comeAndGo creates, resizes and deletes volumes.
func (s *service) comeAndGo(n int) error {
	name := fmt.Sprint("v", n)
	command := func(verb string, args ...string) error {
		out, err := s.p.Command(append([]string{"volume", verb, "--pool", s.p.Dir, name}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("volume %s %s: %w: %s", verb, name, err, out)
		}
		return nil
	}
	record := func(fn func()) {
		s.mu.Lock()
		defer s.mu.Unlock()
		fn()
	}
	if err := command("create", "--size", "1Mi"); err != nil {
		return err
	}
	record(func() { s.now.volumes[name] = kit.Mi })
	if err := os.WriteFile(s.p.Path(name, "f"), make([]byte, 300_000), 0o644); err != nil {
		return err
	}
	if n%3 == 0 {
		record(func() { s.now.volumes[name] = 0 }) // either limit, for now
		if err := command("resize", "--size", "2Mi"); err != nil {
			return err
		}
		record(func() { s.now.volumes[name] = 2 * kit.Mi })
	}
	if n%2 == 0 {
		record(func() { delete(s.now.volumes, name) }) // there or not, for now
		if err := command("delete"); err != nil {
			return err
		}
		record(func() { s.now.deleted[name] = true })
	}
	return nil
}

// openCopy opens a copy of the disk and looks for all that was promised.
func openCopy(t *testing.T, fstype, image string, promised promise) {
	options := "nodiscard"
	if fstype == "xfs" {
		options += ",nouuid" // the original is mounted too
	}
	p := kit.PoolAt(t, kit.MountImage(t, image, options))
	p.Mount()
	p.Check()
	volumes := p.List()
	for name, limit := range promised.volumes {
		v, ok := volumes[name]
		if !ok {
			t.Errorf("volume %s is lost", name)
			continue
		}
		if limit != 0 && v.Limit.Bytes != limit {
			t.Errorf("volume %s has the limit %d, %d was acknowledged", name, v.Limit.Bytes, limit)
		}
		if !v.Used.Fits(v.Limit) {
			t.Errorf("volume %s uses %v of %v", name, v.Used, v.Limit)
		}
	}
	for name := range promised.deleted {
		if _, ok := volumes[name]; ok {
			t.Errorf("volume %s was deleted and is there", name)
		}
	}
	for path, seed := range promised.files {
		volume := filepath.Base(filepath.Dir(path))
		body, err := os.ReadFile(p.Path(volume, filepath.Base(path)))
		if err != nil || !bytes.Equal(body, pattern(uint64(seed), 0, durableSize(seed))) {
			t.Errorf("%s was fsynced and has %d bytes that are not right, %v", path, len(body), err)
		}
	}
	// It can be used.
	for name := range volumes {
		if err := os.WriteFile(p.Path(name, "after"), []byte("after"), 0o644); ignoreFull(err) != nil {
			t.Errorf("volume %s: %v", name, err)
		}
	}
	p.Idle()
	p.Check()
}
