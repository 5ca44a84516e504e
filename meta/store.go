package meta

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/options"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	formatKey        = "f"
	volumePrefix     = "v/"
	checkpointPrefix = "c/"
	snapshotPrefix   = "s/"

	publicationPrefix = "p/"

	memTableSize = 8 << 20
)

// Options configure a Store.
type Options struct {
	// Dir is the store's directory; it is made when absent. Ignored with InMemory.
	Dir string
	// InMemory keeps the records in memory only.
	InMemory bool
	// Logger takes Badger's messages. Default: none.
	Logger *zap.Logger
}

// Store holds a pool's records. Its methods may be called concurrently.
type Store struct {
	db  *badger.DB
	dir string // "" in memory
	log *zap.Logger

	space space
}

// Open opens the store and makes it when it is not there. ErrInUse when it is open
// already, in this process or another, ErrNewerFormat when a newer program
// wrote it, ErrNoRoom when the disk is so full that it could not be opened safely.
func Open(o Options) (*Store, error) {
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.InMemory {
		o.Dir = ""
	}
	s := &Store{log: o.Logger, dir: o.Dir}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("record store %s: %w", s.dir, err)
	}
	return s, nil
}

func (s *Store) open() error {
	bo := badger.DefaultOptions("").WithInMemory(true)
	if s.dir != "" {
		if err := os.MkdirAll(s.dir, 0o700); err != nil {
			return err
		}
		if err := s.prepareOpen(); err != nil {
			return err
		}
		bo = badger.DefaultOptions(s.dir)
	}
	db, err := badger.Open(bo.WithLogger(badgerLogger{s.log.Sugar()}).
		WithMemTableSize(memTableSize).
		WithNumMemtables(2).
		WithCompression(options.None).
		WithBlockCacheSize(0).
		WithValueLogFileSize(16 << 20).
		WithNumCompactors(2).
		WithNumVersionsToKeep(1).
		WithMetricsEnabled(false).
		WithSyncWrites(false))
	if err != nil {
		// Badger has no error value for it (dir_unix.go, acquireDirectoryLock):
		// ask for the lock ourselves.
		if s.dir != "" && lockedByAnother(s.dir) {
			err = ErrInUse
		}
		return err
	}
	s.db = db
	if err := s.checkFormat(); err != nil {
		return errors.Join(err, db.Close())
	}
	return nil
}

// lockedByAnother tells whether Badger's directory lock (flock on the directory
// itself) is held.
func lockedByAnother(dir string) bool {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK
}

func (s *Store) checkFormat() error {
	return s.update(func(txn *badger.Txn) error {
		item, err := txn.Get([]byte(formatKey))
		if errors.Is(err, badger.ErrKeyNotFound) {
			return txn.Set([]byte(formatKey), []byte{recordVersion})
		} else if err != nil {
			return err
		}
		return item.Value(func(b []byte) error {
			if len(b) != 1 {
				return fmt.Errorf("store format: %w", ErrCorrupt)
			}
			return checkVersion("store", b[0])
		})
	})
}

// Close ends the store; every record is durable after it. With ErrNoRoom the disk
// is too full for Badger to end tidily: the records are durable all the same, and will be
// read back, but the store remains in use until the process ends.
func (s *Store) Close() error {
	if s.db.IsClosed() {
		return nil
	}
	if s.dir != "" {
		if err := s.needRoom(s.unflushed()); err != nil {
			return fmt.Errorf("close record store %s: %w", s.dir, errors.Join(err, s.sync()))
		}
	}
	return s.db.Close()
}

// update runs fn in a transaction until it does not conflict; fn has no side effects.
func (s *Store) update(fn func(*badger.Txn) error) error {
	if err := s.prepare(); err != nil {
		return err
	}
	for {
		if err := s.db.Update(fn); !errors.Is(err, badger.ErrConflict) {
			return err
		}
	}
}

// durable is update, and on disk before it returns.
func (s *Store) durable(fn func(*badger.Txn) error) error {
	if err := s.update(fn); err != nil {
		return err
	}
	return s.sync()
}

func put(txn *badger.Txn, key string, record any) error {
	b, err := encode(record)
	if err != nil {
		return err
	}
	return txn.Set([]byte(key), b)
}

func get(txn *badger.Txn, key string, read func([]byte) error) error {
	item, err := txn.Get([]byte(key))
	if errors.Is(err, badger.ErrKeyNotFound) {
		return ErrNotFound
	} else if err != nil {
		return err
	}
	return item.Value(read)
}

func getVolume(txn *badger.Txn, name string, v *Volume) error {
	return get(txn, volumePrefix+name, func(b []byte) error { return decodeVolume(b, name, v) })
}

func getCheckpoint(txn *badger.Txn, name string, c *Checkpoint) error {
	return get(txn, checkpointPrefix+name, func(b []byte) error { return decode(b, c) })
}

func about(kind, name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", kind, name, err)
}

// CreateVolume records a new volume, durably. ErrExists when there is one.
func (s *Store) CreateVolume(v Volume) error {
	return about("volume", v.Name, s.durable(func(txn *badger.Txn) error {
		return create(txn, volumePrefix+v.Name, v)
	}))
}

func create(txn *badger.Txn, key string, record any) error {
	_, err := txn.Get([]byte(key))
	switch {
	case err == nil:
		return ErrExists
	case !errors.Is(err, badger.ErrKeyNotFound):
		return err
	}
	return put(txn, key, record)
}

// PutVolume records a volume, durably, whether or not there was one.
func (s *Store) PutVolume(v Volume) error {
	return about("volume", v.Name, s.durable(func(txn *badger.Txn) error {
		return put(txn, volumePrefix+v.Name, v)
	}))
}

// UpdateVolume changes a volume's record by fn, durably, and returns what came
// of it. fn may run more than once; an error of it changes nothing.
func (s *Store) UpdateVolume(name string, fn func(*Volume) error) (v Volume, err error) {
	err = s.durable(func(txn *badger.Txn) error {
		v = Volume{}
		if err := getVolume(txn, name, &v); err != nil {
			return err
		}
		if err := fn(&v); err != nil {
			return err
		}
		return put(txn, volumePrefix+name, v)
	})
	return v, about("volume", name, err)
}

// Volume returns a volume's record, or ErrNotFound.
func (s *Store) Volume(name string) (v Volume, err error) {
	err = s.db.View(func(txn *badger.Txn) error { return getVolume(txn, name, &v) })
	return v, about("volume", name, err)
}

// Volumes returns every volume's record, by name.
func (s *Store) Volumes() ([]Volume, error) {
	return list(s, "volume", volumePrefix, decodeVolume)
}

// list returns every record below prefix, by name.
func list[T any](s *Store, kind, prefix string, decode func([]byte, string, *T) error) ([]T, error) {
	var all []T
	err := s.db.View(func(txn *badger.Txn) error {
		it := txn.NewIterator(badger.IteratorOptions{PrefetchValues: true, PrefetchSize: 100, Prefix: []byte(prefix)})
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() { // ascending
			var record T
			name := strings.TrimPrefix(string(it.Item().Key()), prefix)
			if err := it.Item().Value(func(b []byte) error { return decode(b, name, &record) }); err != nil {
				return about(kind, name, err)
			}
			all = append(all, record)
		}
		return nil
	})
	return all, err
}

// DeleteVolume removes a volume's record and checkpoint, durably. No error when
// there is none.
func (s *Store) DeleteVolume(name string) error {
	return about("volume", name, s.durable(func(txn *badger.Txn) error {
		if err := txn.Delete([]byte(volumePrefix + name)); err != nil {
			return err
		}
		return txn.Delete([]byte(checkpointPrefix + name))
	}))
}

// Checkpoints returns every volume's checkpoint, by its name.
func (s *Store) Checkpoints() (map[string]Checkpoint, error) {
	all := make(map[string]Checkpoint)
	_, err := list(s, "checkpoint of volume", checkpointPrefix, func(b []byte, name string, c *Checkpoint) error {
		err := decode(b, c)
		all[name] = *c
		return err
	})
	return all, err
}

// PutCheckpoint records a volume's checkpoint; with durable, on disk before it returns.
func (s *Store) PutCheckpoint(name string, c Checkpoint, durable bool) error {
	write := s.update
	if durable {
		write = s.durable
	}
	return about("checkpoint of volume", name, write(func(txn *badger.Txn) error {
		return put(txn, checkpointPrefix+name, c)
	}))
}

// SetDirty marks a volume as changing, durably. What the checkpoint says of its
// use stays; a volume without one gets one.
func (s *Store) SetDirty(name, bootID string) error {
	return about("checkpoint of volume", name, s.durable(func(txn *badger.Txn) error {
		var c Checkpoint
		if err := getCheckpoint(txn, name, &c); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
		c.Dirty, c.BootID = true, bootID
		return put(txn, checkpointPrefix+name, c)
	}))
}

// badgerLogger hands Badger's messages to zap. What Badger calls information is
// of interest to its developers only.
type badgerLogger struct{ log *zap.SugaredLogger }

func (l badgerLogger) Errorf(f string, a ...any)   { l.log.Errorf(strings.TrimSpace(f), a...) }
func (l badgerLogger) Warningf(f string, a ...any) { l.log.Warnf(strings.TrimSpace(f), a...) }
func (l badgerLogger) Infof(f string, a ...any)    { l.log.Debugf(strings.TrimSpace(f), a...) }
func (l badgerLogger) Debugf(f string, a ...any)   { l.log.Debugf(strings.TrimSpace(f), a...) }
