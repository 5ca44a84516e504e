package meta

import "github.com/dgraph-io/badger/v4"

// CreateSnapshot records a new snapshot, durably. ErrExists when there is one.
func (s *Store) CreateSnapshot(r Snapshot) error {
	return about("snapshot", r.Name, s.durable(func(txn *badger.Txn) error {
		return create(txn, snapshotPrefix+r.Name, r)
	}))
}

// PutSnapshot records a snapshot, durably, whether or not there was one.
func (s *Store) PutSnapshot(r Snapshot) error {
	return about("snapshot", r.Name, s.durable(func(txn *badger.Txn) error {
		return put(txn, snapshotPrefix+r.Name, r)
	}))
}

// Snapshots returns every snapshot's record, by name.
func (s *Store) Snapshots() ([]Snapshot, error) {
	return list(s, "snapshot", snapshotPrefix, decodeSnapshot)
}

// DeleteSnapshot removes a snapshot's record, durably. No error when there is none.
func (s *Store) DeleteSnapshot(name string) error {
	return about("snapshot", name, s.durable(func(txn *badger.Txn) error {
		return txn.Delete([]byte(snapshotPrefix + name))
	}))
}
