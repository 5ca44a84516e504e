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

// The states of a volume's record. A crash leaves creating and deleting behind;
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
	InodesFixed bool              `json:"inodesFixed,omitempty"`
	State       State             `json:"state"`
	Created     time.Time         `json:"created"`
	Parameters  map[string]string `json:"parameters,omitempty"`
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
	if v.Name != name {
		return fmt.Errorf("%w: it is of volume %q", ErrCorrupt, v.Name)
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
