package meta

import (
	"time"

	"github.com/dgraph-io/badger/v4"
)

// Publication is the record of a place outside the pool that a volume is mounted on, as a directory or as a
// device's file. It is there before the mount is, and until that has gone.
type Publication struct {
	Volume string `json:"volume"`
	// Target is the place: an absolute path without links.
	Target   string `json:"target"`
	ReadOnly bool   `json:"readOnly,omitempty"`
	// Flags are those of mount(8), such as noexec.
	Flags []string `json:"flags,omitempty"`
	// Exclusive tells that the volume may have no other one beside this.
	Exclusive bool `json:"exclusive,omitempty"`
	// Group is the group that the volume is shown as belonging to, nil for none.
	Group *uint32 `json:"group,omitempty"`
	// Attached tells that the volume was attached as a device for this, and is detached with the last such one.
	Attached bool      `json:"attached,omitempty"`
	Created  time.Time `json:"created"`
}

// key is unique: a volume's name has no slash, and a target begins with one.
func (p Publication) key() string { return publicationPrefix + p.name() }

func (p Publication) name() string { return p.Volume + p.Target }

// PutPublication records a publication, durably, whether or not there was one.
func (s *Store) PutPublication(r Publication) error {
	return about("publication", r.name(), s.durable(func(txn *badger.Txn) error { return put(txn, r.key(), r) }))
}

// Publications returns every publication's record, by volume and target.
func (s *Store) Publications() ([]Publication, error) {
	return list(s, "publication", publicationPrefix, decodePublication)
}

// DeletePublication removes the record of a volume's publication on a target, durably. No error when there is none.
func (s *Store) DeletePublication(volume, target string) error {
	r := Publication{Volume: volume, Target: target}
	return about("publication", r.name(), s.durable(func(txn *badger.Txn) error { return txn.Delete([]byte(r.key())) }))
}
