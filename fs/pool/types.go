package pool

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// The errors of a pool. Each is wrapped with the name of what it is about.
var (
	// ErrNotPool is returned when a directory is no pool.
	ErrNotPool = errors.New("not a Croft pool")
	// ErrIsPool is returned by Init when the directory is a pool already.
	ErrIsPool = errors.New("is a Croft pool already")
	// ErrNotEmpty is returned by Init when the directory holds something else.
	ErrNotEmpty = errors.New("directory is not empty")
	// ErrUnsuitable is returned when a directory's filesystem lacks something that Croft needs.
	ErrUnsuitable = errors.New("filesystem is not suitable for a pool")
	// ErrNewerFormat is returned when a newer version of Croft wrote the pool.
	ErrNewerFormat = errors.New("pool was written by a newer version of Croft")
	// ErrInUse is returned by Open when another process has the pool.
	ErrInUse = errors.New("pool is in use")
	// ErrClosed is returned when the pool has been closed meanwhile.
	ErrClosed = errors.New("pool is closed")

	// ErrNotFound is returned when there is no volume of that name.
	ErrNotFound = errors.New("no such volume")
	// ErrExists is returned when there is a volume of that name already.
	ErrExists = errors.New("volume exists already")
	// ErrBusy is returned when a volume cannot be deleted because it is in use.
	ErrBusy = errors.New("volume is in use")
	// ErrBelowUse is returned when a limit is to be lowered below what is in use.
	ErrBelowUse = quota.ErrBelowUse
	// ErrInvalid is returned for a name, size or number that cannot be.
	ErrInvalid = errors.New("invalid argument")
	// ErrNoRoom is returned when the disk is too full for what was asked, or for its records.
	ErrNoRoom = meta.ErrNoRoom
	// ErrMissing is returned when a volume's directory is gone from the pool.
	ErrMissing = errors.New("volume's directory is missing")
	// ErrKind is returned for a block volume when a tree is needed, and the reverse.
	ErrKind = errors.New("not that kind of volume")
	// ErrExistsSame is an ErrExists: the volume that exists was made from the source that was named.
	ErrExistsSame = fmt.Errorf("%w, made from the same source", ErrExists)

	// ErrSnapshotNotFound is returned when there is no snapshot of that name.
	ErrSnapshotNotFound = errors.New("no such snapshot")
	// ErrSnapshotExists is returned when there is a snapshot of that name already.
	ErrSnapshotExists = errors.New("snapshot exists already")
	// ErrSnapshotExistsSame is an ErrSnapshotExists: the snapshot that exists is of the volume that was named.
	ErrSnapshotExistsSame = fmt.Errorf("%w, of the same volume", ErrSnapshotExists)
)

const (
	// MaxName is the longest name of a volume in bytes: what CSI demands of names (CSI spec 1.x, "Size Limits").
	MaxName = 128
	// MinBytes is the smallest byte limit.
	MinBytes = 1 << 20
	// MaxBytes is the largest byte limit.
	MaxBytes = 1 << 62
	// MaxOvercommit is the largest Options.Overcommit.
	MaxOvercommit = 1000
	// MaxLabels is how long the names and values of all labels of a volume or a snapshot may be, in bytes.
	MaxLabels = 4 << 10
	// BytesPerInode gives a volume's inode limit where none is named: mkfs.ext4's ratio.
	BytesPerInode = 16 << 10
)

// CheckName returns ErrInvalid, wrapped with why, for what cannot be a volume's
// name: 1 to MaxName letters, digits, dots, dashes and underscores, of which the
// first is a letter or a digit. Such a name is also a safe name of a directory.
func CheckName(name string) error {
	switch {
	case name == "":
		return fmt.Errorf("%w: a volume's name is empty", ErrInvalid)
	case len(name) > MaxName:
		return fmt.Errorf("%w: volume name of %d bytes, at most %d are allowed", ErrInvalid, len(name), MaxName)
	}
	for i := range len(name) {
		c := name[i]
		alnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !alnum && (i == 0 || c != '.' && c != '-' && c != '_') {
			return fmt.Errorf("%w: volume name %q: letters, digits, '.', '-' and '_' are allowed, and the first is a letter or a digit", ErrInvalid, name)
		}
	}
	return nil
}

// Kind is what a volume is.
type Kind string

// The kinds of volumes.
const (
	KindFilesystem Kind = "filesystem" // a tree, served by the mount
	KindBlock      Kind = "block"      // one file of exactly the volume's size, to be attached as a block device
)

func kindOf(block bool) Kind {
	if block {
		return KindBlock
	}
	return KindFilesystem
}

// Source is what a volume was made from: a volume or a snapshot, by its name and when it was created.
type Source = meta.Source

// State is what a volume is doing.
type State string

// The states that a person sees.
const (
	StateReady      State = "ready"
	StateRecounting State = "recounting" // used is what was last known; changes wait
	StateMissing    State = "missing"    // its directory is gone
	StateOverLimit  State = "over-limit" // files were put there behind Croft's back
	StateFailed     State = "failed"     // it could not be recounted; changes answer EIO
)

// Volume describes a volume.
type Volume struct {
	Name    string      `json:"name"`
	State   State       `json:"state"`
	Limit   quota.Usage `json:"limit"`
	Used    quota.Usage `json:"used"`
	Created time.Time   `json:"created"`
	// Open counts open files; 0 when the pool is not mounted.
	Open int `json:"open"`
	// Gated tells that it has so little room that every system call on its written
	// files is held (fs.TierGate), Gatings how often that has begun since it is served.
	Gated   bool   `json:"gated"`
	Gatings uint64 `json:"gatings"`

	Kind Kind `json:"kind"`
	// Wipe tells that its data is overwritten before its space is freed, when it is deleted.
	Wipe   bool              `json:"wipe,omitempty"`
	Labels map[string]string `json:"labels,omitempty"`
	// Source is what it was made from; nil when it began empty.
	Source *Source `json:"source,omitempty"`
	// Device is the block device that a block volume is attached as; empty when it is not.
	Device string `json:"device,omitempty"`
	// Published are the targets that it is published on, by Publish.
	Published []string `json:"published,omitempty"`
}

// GateStats is what the gate of a pool's mount does.
type GateStats = fs.GateStats

// CreateOptions describe a new volume.
type CreateOptions struct {
	// Bytes is the limit in bytes, from MinBytes to MaxBytes, rounded up to a block.
	Bytes uint64 `json:"bytes"`
	// Inodes is the limit in inodes; 0 means one for each BytesPerInode, and that it follows the size.
	Inodes uint64 `json:"inodes,omitempty"`
	// Mode is the root directory's permission bits; 0 means 0755.
	Mode os.FileMode `json:"mode,omitempty"`
	// UID and GID own the root directory.
	UID int `json:"uid,omitempty"`
	GID int `json:"gid,omitempty"`
	// Kind is the kind of volume; "" means KindFilesystem. A block volume takes all of its space at once, and has no
	// Inodes, Mode, UID or GID.
	Kind Kind `json:"kind,omitempty"`
	// Wipe has its data overwritten before its space is freed, when it is deleted.
	Wipe bool `json:"wipe,omitempty"`
	// Labels are kept with the volume; at most MaxLabels bytes in all.
	Labels map[string]string `json:"labels,omitempty"`
}

// ResizeOptions are new limits. A zero field stays as it is, but an inode limit
// that was never named follows the size.
type ResizeOptions struct {
	Bytes  uint64 `json:"bytes,omitempty"`
	Inodes uint64 `json:"inodes,omitempty"`
}

// DeleteOptions say how to delete.
type DeleteOptions struct {
	// Force deletes a volume whose files are open: they answer ESTALE from then on, or EIO where the
	// kernel writes them by itself.
	Force bool `json:"force,omitempty"`
}

// CheckOptions say what to check.
type CheckOptions struct {
	// Volumes names the volumes; empty means all, and the pool's own directories.
	Volumes []string `json:"volumes,omitempty"`
	// Repair sets the ledgers to what is on the disk.
	Repair bool `json:"repair,omitempty"`
}

// CheckResult is what a check has found.
type CheckResult struct {
	Volumes []VolumeCheck `json:"volumes"`
	// Findings are faults of the pool itself: directories without a record, leftovers.
	Findings []string `json:"findings,omitempty"`
}

// VolumeCheck is what a check has found in one volume.
type VolumeCheck struct {
	Name     string      `json:"name"`
	Limit    quota.Usage `json:"limit"`
	Ledger   quota.Usage `json:"ledger"`
	Disk     quota.Usage `json:"disk"`
	Findings []string    `json:"findings,omitempty"`
	// Repaired tells that the ledger was set to Disk.
	Repaired bool `json:"repaired,omitempty"`
}

// Clean tells whether nothing was found.
func (r CheckResult) Clean() bool {
	for _, v := range r.Volumes {
		if len(v.Findings) > 0 {
			return false
		}
	}
	return len(r.Findings) == 0
}

// Info describes a pool.
type Info struct {
	ID         string `json:"id"`
	Dir        string `json:"dir"`                  // absolute
	Mountpoint string `json:"mountpoint,omitempty"` // empty when it is not mounted
	Filesystem string `json:"filesystem"`           // of the backing directory: "ext4", …
	PID        int    `json:"pid"`                  // of the process that has the pool open
	Tier       string `json:"tier,omitempty"`       // fs.Tier of the mount
	// WhyNotBetter tells what stands against a better tier; empty when nothing does, or when it
	// was asked for.
	WhyNotBetter string `json:"why_not_better,omitempty"`
	// TakeOvers is how often a daemon has taken this mount over from one before it;
	// TakeOver is how long the last took, from the opening of the pool until it served.
	TakeOvers uint64        `json:"take_overs"`
	TakeOver  time.Duration `json:"take_over_nanoseconds"`
}
