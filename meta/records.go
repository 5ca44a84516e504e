package meta

import (
	"bytes"
	"encoding/json"
	"fmt"
	"time"

	"github.com/croftfs/croft/quota"
)

// State is where a volume is in its life.
type State string

// The states of the record of a volume or a snapshot. A crash leaves creating and deleting behind;
// the next start finishes them.
const (
	StateCreating State = "creating"
	StateReady    State = "ready"
	StateDeleting State = "deleting"
)

// Volume is the record of a volume.
type Volume struct {
	Name  string      `json:"name"`
	Limit quota.Usage `json:"limit"`
	// InodesFixed tells that the inode limit was named, and does not follow the size.
	InodesFixed bool      `json:"inodesFixed,omitempty"`
	State       State     `json:"state"`
	Created     time.Time `json:"created"`
	// Block tells that it is one file of exactly the limit's bytes, and no tree.
	Block bool `json:"block,omitempty"`
	// Wipe tells that its data is overwritten before its space is freed.
	Wipe   bool              `json:"wipe,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	// Source is what it was made from, nil when it began empty.
	Source *Source `json:"source,omitempty"`
	// Family is common to all that were copied from one volume, or from copies of it; empty in that volume itself.
	Family string `json:"family,omitempty"`
}

// Source names the volume or the snapshot that something was made from; one of the names is empty.
type Source struct {
	Volume   string `json:"volume,omitempty"`
	Snapshot string `json:"snapshot,omitempty"`
	// Created is when the source was: it tells it from another of that name.
	Created time.Time `json:"created"`
	// Held is how long the writers of the volume were held while it was copied.
	Held time.Duration `json:"held,omitempty"`
}

// Snapshot is the record of a snapshot.
type Snapshot struct {
	Name   string `json:"name"`
	State  State  `json:"state"`
	Source Source `json:"source"`
	// Family is the volume's, as in Volume; never empty.
	Family string `json:"family"`
	// Created is the moment that it shows.
	Created time.Time `json:"created"`
	// Used is what its tree is charged, Limit the source's at that moment.
	Used  quota.Usage `json:"used"`
	Limit quota.Usage `json:"limit"`
	// InodesFixed is the source's.
	InodesFixed bool              `json:"inodesFixed,omitempty"`
	Block       bool              `json:"block,omitempty"`
	Wipe        bool              `json:"wipe,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Checkpoint is what is known of a volume's use. While Dirty, Used is only what
// it was before the changes began.
type Checkpoint struct {
	Used   quota.Usage `json:"used"`
	Dirty  bool        `json:"dirty"`
	BootID string      `json:"bootID"`
	Taken  time.Time   `json:"taken"`
}

// recordVersion is the version that records are written with, and the newest
// that is read.
const recordVersion = 1

func encode(record any) ([]byte, error) {
	body, err := json.Marshal(record)
	if err != nil {
		return nil, err
	}
	return append([]byte{recordVersion}, body...), nil
}

func decode(b []byte, record any) error {
	if len(b) == 0 {
		return fmt.Errorf("%w: it is empty", ErrCorrupt)
	}
	if err := checkVersion("record", b[0]); err != nil {
		return err
	}
	if !bytes.HasPrefix(b[1:], []byte("{")) { // a null would pass for a record
		return fmt.Errorf("%w: it is no object", ErrCorrupt)
	}
	if err := json.Unmarshal(b[1:], record); err != nil {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil
}

// decodeVolume decodes the record that is kept under name.
func decodeVolume(b []byte, name string, v *Volume) error {
	if err := decode(b, v); err != nil {
		return err
	}
	return checkNamed("volume", v.Name, name)
}

// decodeSnapshot decodes the record that is kept under name.
func decodeSnapshot(b []byte, name string, s *Snapshot) error {
	if err := decode(b, s); err != nil {
		return err
	}
	return checkNamed("snapshot", s.Name, name)
}

// decodePublication decodes the record that is kept under name.
func decodePublication(b []byte, name string, p *Publication) error {
	if err := decode(b, p); err != nil {
		return err
	}
	return checkNamed("publication", p.name(), name)
}

func checkNamed(kind, got, want string) error {
	if got != want {
		return fmt.Errorf("%w: it is of %s %q", ErrCorrupt, kind, got)
	}
	return nil
}

func checkVersion(what string, version byte) error {
	switch {
	case version > recordVersion:
		return fmt.Errorf("%s format %d, this program reads up to %d: %w", what, version, recordVersion, ErrNewerFormat)
	case version == 0:
		return fmt.Errorf("%s format 0: %w", what, ErrCorrupt)
	}
	return nil
}
