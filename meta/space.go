package meta

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	ballastName = "ballast"

	// ballastSize covers a log, the table of a memtable, and a compaction, in bytes.
	ballastSize = 32 << 20

	// plenty is the room with which the ballast is made, in bytes.
	plenty = 4 * ballastSize

	// spareRoom is what must be free beside what a step is known to write: the
	// beginnings of logs, the manifest, the tables of a compaction.
	spareRoom = 2 << 20

	// logSuffix is what Badger's logs of memtables end with (memtable.go, memFileExt).
	logSuffix = ".mem"

	// valueLogSuffix is what the names of value logs end with (value.go, vlogFilePath).
	valueLogSuffix = ".vlog"

	// logRoom is how much of a log can be written: Badger changes to the next one behind
	// memTableSize, and one transaction is at most 15% of that (options.go, maxBatchSize).
	logRoom = memTableSize * 5 / 4

	// logAhead is what must be allocated of a log ahead of its end, for updates that have begun.
	logAhead = 256 << 10

	// lookEvery is after how many updates the log in use is looked at.
	lookEvery = 64
)

// space is what a Store knows of its files. It is unused in memory.
type space struct {
	mu        sync.Mutex // guards what follows, backing I/O included: files change as one
	log       string     // name of the log in use
	allocated int64      // bytes of it that have blocks, whether written or not
	filled    bool       // it is so full that the next one may be due
	updates   uint64     // begun
	ballast   bool       // the ballast is there

	dirMu  sync.Mutex // guards synced, the directory's fsync included
	synced string     // the names in the directory when it was last synced
}

// Room returns the free bytes of the filesystem that the store is on; the
// largest number when it is in memory.
func (s *Store) Room() (uint64, error) {
	if s.dir == "" {
		return ^uint64(0), nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return 0, fmt.Errorf("record store %s: %w", s.dir, err)
	}
	return st.Bavail * uint64(st.Bsize), nil
}

// files returns the names in the directory, ascending, and the logs among them,
// the one in use last.
func (s *Store) files() (all, logs []string, err error) {
	dir, err := os.Open(s.dir)
	if err != nil {
		return nil, nil, err
	}
	defer dir.Close()
	if all, err = dir.Readdirnames(-1); err != nil {
		return nil, nil, err
	}
	sort.Strings(all)
	for _, name := range all {
		if strings.HasSuffix(name, logSuffix) {
			logs = append(logs, name)
		}
	}
	return all, logs, nil
}

// logged returns how many bytes of a log have been written, to a block.
func (s *Store) logged(log string) (end int64) {
	f, err := os.Open(filepath.Join(s.dir, log))
	if err != nil {
		return 0
	}
	defer f.Close()
	for {
		data, err := f.Seek(end, unix.SEEK_DATA) // ENXIO when there is no more
		if err != nil {
			return end
		}
		if end, err = f.Seek(data, unix.SEEK_HOLE); err != nil {
			return memTableSize
		}
	}
}

// unflushed returns how many bytes the tables may take of what is in logs only.
func (s *Store) unflushed() (bytes uint64) {
	_, logs, err := s.files()
	if err != nil {
		return memTableSize
	}
	for _, log := range logs {
		bytes += uint64(s.logged(log))
	}
	return bytes
}

// prepareOpen makes it safe to open: see the package documentation. Nobody else has the
// store open meanwhile.
func (s *Store) prepareOpen() error {
	lock, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if err == unix.EWOULDBLOCK {
			err = ErrInUse
		}
		return err
	}
	if err := s.removeUnborn(); err != nil {
		return err
	}
	// What a process that was killed had allocated is of no use now: its logs become tables.
	_, logs, err := s.files()
	if err != nil {
		return err
	}
	for _, log := range logs {
		if err := s.trim(log); err != nil {
			s.log.Warn("a log of records not trimmed", zap.String("log", log), zap.Error(err))
		}
	}
	s.keepBallast()
	return s.needRoom(s.unflushed())
}

// removeUnborn removes the logs of no bytes that a process leaves which is killed
// between making a file and giving it its size: Badger refuses to open a store
// with one of them (z.OpenMmapFile reports z.NewFile for it, and valueLog.open and
// openMemTables take that for an error). They hold nothing.
func (s *Store) removeUnborn() error {
	all, _, err := s.files()
	if err != nil {
		return err
	}
	for _, name := range all {
		if ext := filepath.Ext(name); ext != logSuffix && ext != valueLogSuffix {
			continue
		}
		path := filepath.Join(s.dir, name)
		if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() || st.Size() > 0 {
			continue
		}
		s.log.Info("removing an empty log that a killed process has left", zap.String("log", name))
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}

// trim frees the blocks behind what was written into a log.
func (s *Store) trim(log string) error {
	f, err := os.OpenFile(filepath.Join(s.dir, log), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	end := s.logged(log)
	if end >= st.Size() {
		return nil
	}
	return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, end, st.Size()-end)
}

// prepare makes it safe to write: see the package documentation.
func (s *Store) prepare() error {
	if s.dir == "" {
		return nil
	}
	_, logs, err := s.files()
	if err != nil {
		return fmt.Errorf("record store: %w", err)
	}
	s.space.mu.Lock()
	defer s.space.mu.Unlock()
	if n := len(logs); n > 0 && logs[n-1] != s.space.log {
		s.space.log, s.space.allocated, s.space.filled = logs[n-1], 0, false
	}
	s.space.updates++
	if s.space.allocated < logRoom || s.space.updates%lookEvery == 0 {
		end := s.logged(s.space.log)
		s.space.filled = end > memTableSize/2
		if err := s.allocateLocked(min(end+logAhead, logRoom)); err != nil {
			return err
		}
		if !s.space.ballast {
			s.keepBallastLocked()
		}
	}
	if s.space.filled {
		return s.needRoomLocked(memTableSize)
	}
	return nil
}

// allocateLocked gives the log blocks for all that can be written into it, or if the
// disk is too full for that, for at least need bytes.
func (s *Store) allocateLocked(need int64) error {
	if s.space.allocated >= need {
		return nil
	}
	f, err := os.OpenFile(filepath.Join(s.dir, s.space.log), os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil // full and gone: there is another one
	} else if err != nil {
		return err
	}
	defer f.Close()
	for n := int64(logRoom); ; n = max(n/2, need) {
		room, err := s.Room()
		if err != nil {
			return err
		}
		err = unix.ENOSPC
		if room >= uint64(n-s.space.allocated) { // else it would take what there is, and fail
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, n)
		}
		switch {
		case err == nil:
			s.space.allocated = n
			return nil
		case err == unix.EOPNOTSUPP:
			s.log.Warn("the filesystem cannot allocate ahead: on a full disk Badger may end this process")
			s.space.allocated = logRoom
			return nil
		case err != unix.ENOSPC:
			return fmt.Errorf("allocate %s: %w", s.space.log, err)
		case s.giveBallastLocked():
			n = 2 * logRoom // again
		case n == need:
			return fmt.Errorf("%w: %d bytes free for a log", ErrNoRoom, room)
		}
	}
}

// needRoom returns ErrNoRoom unless there are so many bytes free, without the
// ballast if need be.
func (s *Store) needRoom(bytes uint64) error {
	s.space.mu.Lock()
	defer s.space.mu.Unlock()
	return s.needRoomLocked(bytes)
}

func (s *Store) needRoomLocked(bytes uint64) error {
	for {
		room, err := s.Room()
		if err != nil {
			return err
		}
		if room >= bytes+spareRoom {
			return nil
		}
		if !s.giveBallastLocked() {
			return fmt.Errorf("%w: %d bytes free, %d needed", ErrNoRoom, room, bytes+spareRoom)
		}
	}
}

// keepBallast makes the ballast when it is not there and the disk has room for it.
func (s *Store) keepBallast() {
	s.space.mu.Lock()
	defer s.space.mu.Unlock()
	s.keepBallastLocked()
}

func (s *Store) keepBallastLocked() {
	path := filepath.Join(s.dir, ballastName)
	var st unix.Stat_t
	if unix.Stat(path, &st) == nil && st.Size == ballastSize && st.Blocks*512 >= ballastSize {
		s.space.ballast = true
		return
	}
	if room, err := s.Room(); err != nil || room < plenty {
		return
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = errors.Join(unix.Fallocate(int(f.Fd()), 0, 0, ballastSize), f.Close())
	}
	if err != nil {
		s.log.Warn("no ballast beside the records", zap.Error(err))
		return
	}
	s.space.ballast = true
}

// giveBallastLocked frees the ballast, and returns false if there was none.
func (s *Store) giveBallastLocked() bool {
	s.space.ballast = false
	path := filepath.Join(s.dir, ballastName)
	st, err := os.Stat(path)
	if err != nil || st.Size() == 0 {
		return false
	}
	if err := os.Truncate(path, 0); err != nil {
		s.log.Warn("ballast beside the records not freed", zap.Error(err))
		return false
	}
	s.log.Warn("the disk is full: ballast beside the records freed")
	return true
}

// sync makes all that was written durable: see the package documentation.
func (s *Store) sync() error {
	if s.dir == "" {
		return nil
	}
	if err := s.db.Sync(); err != nil {
		return err
	}
	all, logs, err := s.files()
	if err != nil {
		return err
	}
	for _, log := range logs[:max(0, len(logs)-1)] {
		// Gone: it is in a table now, which was synced before it went.
		if err := syncFile(filepath.Join(s.dir, log)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	names := strings.Join(all, "/")
	s.space.dirMu.Lock()
	defer s.space.dirMu.Unlock()
	if names == s.space.synced {
		return nil
	}
	if err := syncFile(s.dir); err != nil {
		return err
	}
	s.space.synced = names
	return nil
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
