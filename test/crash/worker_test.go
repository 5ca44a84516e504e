package crash_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// file is what a worker knows about one of its files: the answers it has heard.
type file struct {
	seed   uint64
	acked  int64 // written, by the answers of write(2)
	synced int64 // of that, what fsync(2) has confirmed
}

// worker changes files in a directory of its own, one operation at a time, and
// records what it was told. The operation that a crash interrupts may have
// happened or not; may tells what else than the record may be found then.
type worker struct {
	dir    string
	random *rand.Rand
	most   int64 // bytes of a file
	files  map[string]*file
	seeds  uint64
	names  int
	may    possible
	open   []*os.File // without a name

	ops, refused int
}

// possible is the outcome of the operation under way.
type possible struct {
	made    string // this name may be there
	gone    string // this name may be gone
	from    string // this name's file may be …
	to      string // … under this name, whatever was there
	seed    uint64
	subject *file
}

func newWorker(dir string, seed uint64, most int64) *worker {
	return &worker{dir: dir, random: rand.New(rand.NewPCG(seed, 1)), most: most, files: map[string]*file{}, seeds: seed << 32}
}

func (w *worker) path(name string) string { return filepath.Join(w.dir, name) }

// run works until the mount is dead or stop is closed; an error is a fault.
func (w *worker) run(stop <-chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		w.may = possible{}
		err := w.step()
		switch {
		case err == nil:
			w.may = possible{}
		case errors.Is(err, unix.ENOSPC):
			w.may = possible{}
			w.refused++
			if err := w.makeRoom(); dead(err) {
				return nil
			} else if err != nil {
				return fmt.Errorf("make room: %w", err)
			}
		case dead(err):
			return nil
		default:
			return err
		}
		w.ops++
	}
}

func (w *worker) step() error {
	steps := []func() error{
		w.create, w.create, w.create, w.write, w.write, w.write, w.write, w.write, w.write, w.write, w.write, w.write, w.write,
		w.rename, w.unlink, w.tmpfile, w.unlinkOpen, w.allocate, w.tree, w.truncate, w.link,
	}
	if len(w.files) > 24 {
		return w.unlink()
	}
	return steps[w.random.IntN(len(steps))]()
}

// pick returns one of the files, the same for the same random numbers.
func (w *worker) pick() (string, *file) {
	if len(w.files) == 0 {
		return "", nil
	}
	names := make([]string, 0, len(w.files))
	for name := range w.files {
		names = append(names, name)
	}
	// A map has no order: the smallest name at or after a random one.
	at := fmt.Sprintf("f%08d", w.random.IntN(w.names+1))
	best, first := "", ""
	for _, name := range names {
		if first == "" || name < first {
			first = name
		}
		if name >= at && (best == "" || name < best) {
			best = name
		}
	}
	if best == "" {
		best = first
	}
	return best, w.files[best]
}

func (w *worker) newName() string {
	w.names++
	return fmt.Sprintf("f%08d", w.names)
}

func (w *worker) create() error {
	name := w.newName()
	w.seeds++
	w.may = possible{made: name, seed: w.seeds}
	f, err := os.OpenFile(w.path(name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	w.files[name] = &file{seed: w.seeds}
	return f.Close()
}

// write appends to a file, and fsyncs it half of the time.
func (w *worker) write() error {
	name, known := w.pick()
	if known == nil || known.acked > w.most {
		return nil
	}
	f, err := os.OpenFile(w.path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for range 1 + w.random.IntN(4) {
		n, err := unix.Pwrite(int(f.Fd()), pattern(known.seed, known.acked, 1+w.random.IntN(40_000)), known.acked)
		if err != nil {
			return err
		}
		known.acked += int64(n)
	}
	if w.random.IntN(2) == 0 {
		if err := f.Sync(); err != nil {
			return err
		}
		known.synced = known.acked
	}
	return nil
}

// rename gives a file a new name, or the name of another file.
func (w *worker) rename() error {
	from, subject := w.pick()
	if subject == nil {
		return nil
	}
	to := w.newName()
	if w.random.IntN(2) == 0 {
		to, _ = w.pick()
	}
	if from == to {
		return nil
	}
	w.may = possible{from: from, to: to, subject: subject}
	if err := os.Rename(w.path(from), w.path(to)); err != nil {
		return err
	}
	delete(w.files, from)
	w.files[to] = subject
	return nil
}

func (w *worker) unlink() error {
	name, known := w.pick()
	if known == nil {
		return nil
	}
	w.may = possible{gone: name}
	if err := unix.Unlink(w.path(name)); err != nil {
		return err
	}
	delete(w.files, name)
	return nil
}

// unlinkOpen removes a file that stays open for a while and is written to.
func (w *worker) unlinkOpen() error {
	name, known := w.pick()
	if known == nil {
		return nil
	}
	f, err := os.OpenFile(w.path(name), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	w.keep(f)
	if err := w.unlinkName(name); err != nil {
		return err
	}
	_, err = f.WriteAt(make([]byte, 5000), 10_000)
	return err
}

func (w *worker) unlinkName(name string) error {
	w.may = possible{gone: name}
	if err := unix.Unlink(w.path(name)); err != nil {
		return err
	}
	delete(w.files, name)
	return nil
}

func (w *worker) tmpfile() error {
	fd, err := unix.Open(w.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "tmpfile")
	w.keep(f)
	_, err = f.Write(make([]byte, 1+w.random.IntN(30_000)))
	return err
}

// keep holds a nameless file open; the oldest is closed.
func (w *worker) keep(f *os.File) {
	w.open = append(w.open, f)
	if len(w.open) > 3 {
		w.open[0].Close()
		w.open = w.open[1:]
	}
}

func (w *worker) closeAll() {
	for _, f := range w.open {
		f.Close()
	}
	w.open = nil
}

// allocate works on a file whose content nobody looks at.
func (w *worker) allocate() error {
	f, err := os.OpenFile(w.path("scratch"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	at, length := w.random.Int64N(w.most), 1+w.random.Int64N(60_000)
	switch w.random.IntN(5) {
	case 0:
		return unix.Fallocate(int(f.Fd()), 0, at, length)
	case 1:
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, at, length)
	case 2:
		return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, length)
	case 3:
		_, err := f.WriteAt(make([]byte, length), at)
		return err
	default:
		return f.Truncate(at)
	}
}

// tree makes and removes directories, symbolic links and FIFOs.
func (w *worker) tree() error {
	dir := w.path("tree")
	if w.random.IntN(3) == 0 {
		return os.RemoveAll(dir)
	}
	sub := filepath.Join(dir, fmt.Sprint(w.random.IntN(5)))
	if err := os.MkdirAll(sub, 0o755); err != nil {
		return err
	}
	name := filepath.Join(sub, fmt.Sprint(w.names))
	switch w.random.IntN(3) {
	case 0:
		return ignoreExist(unix.Mkfifo(name+"p", 0o600))
	case 1:
		return ignoreExist(os.Symlink("/nowhere", name+"l"))
	default:
		return ignoreExist(unix.Renameat2(unix.AT_FDCWD, sub, unix.AT_FDCWD, filepath.Join(dir, "renamed"), unix.RENAME_NOREPLACE))
	}
}

func ignoreExist(err error) error {
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// truncate cuts a file, which forgets what was fsynced beyond.
func (w *worker) truncate() error {
	name, known := w.pick()
	if known == nil || known.acked == 0 || w.random.IntN(3) > 0 {
		return nil
	}
	size := w.random.Int64N(known.acked)
	was := known.acked
	// From here on less than was promised may be there.
	known.acked, known.synced = size, min(known.synced, size)
	err := os.Truncate(w.path(name), size)
	if errors.Is(err, unix.ENOSPC) {
		known.acked = was // see conformance.md: small sparse files
	}
	return err
}

// link makes and removes a further name, outside of the record.
func (w *worker) link() error {
	name, known := w.pick()
	if known == nil {
		return nil
	}
	extra := w.path("extra")
	if err := unix.Unlink(extra); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Link(w.path(name), extra)
}

// makeRoom removes until a volume at its limit has room again.
func (w *worker) makeRoom() error {
	w.closeAll()
	for _, name := range []string{"scratch", "extra"} {
		if err := unix.Unlink(w.path(name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	for range 3 {
		if name, known := w.pick(); known != nil {
			if err := w.unlinkName(name); err != nil {
				return err
			}
			w.may = possible{}
		}
	}
	return nil
}

// verify compares what is there with the record, takes over what the
// interrupted operation has done, and returns what is wrong.
func (w *worker) verify() error {
	w.closeAll()
	found := map[string]bool{}
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name := e.Name(); name != "scratch" && name != "extra" && name != "tree" {
			found[name] = true
		}
	}
	m := w.may
	w.may = possible{}
	switch {
	case m.made != "" && found[m.made]:
		w.files[m.made] = &file{seed: m.seed}
	case m.gone != "" && !found[m.gone]:
		delete(w.files, m.gone)
	case m.from != "" && !found[m.from]:
		delete(w.files, m.from)
		w.files[m.to] = m.subject
	}
	var errs []error
	for name, known := range w.files {
		if !found[name] {
			errs = append(errs, fmt.Errorf("%s is lost: %d bytes, %d of them fsynced", w.path(name), known.acked, known.synced))
			continue
		}
		delete(found, name)
		errs = append(errs, w.verifyFile(name, known))
	}
	for name := range found {
		errs = append(errs, fmt.Errorf("%s is there and was removed, or never made", w.path(name)))
	}
	return errors.Join(errs...)
}

func (w *worker) verifyFile(name string, known *file) error {
	content, err := os.ReadFile(w.path(name))
	if err != nil {
		return err
	}
	size := int64(len(content))
	if size < known.acked {
		return fmt.Errorf("%s has %d bytes, %d were written, %d of them fsynced", w.path(name), size, known.acked, known.synced)
	}
	if !bytes.Equal(content[:known.acked], pattern(known.seed, 0, int(known.acked))) {
		return fmt.Errorf("%s: the content is not what was written (%d bytes, %d of them fsynced)", w.path(name), known.acked, known.synced)
	}
	// The write under way may have reached the file.
	if !bytes.Equal(content, pattern(known.seed, 0, len(content))) {
		// … or the truncation under way may not have.
		return fmt.Errorf("%s: what is behind the %d written bytes was never written", w.path(name), known.acked)
	}
	known.acked, known.synced = size, min(known.synced, size)
	return nil
}
