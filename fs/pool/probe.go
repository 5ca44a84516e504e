package pool

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
)

// Feature is something that a filesystem can or cannot do.
type Feature struct {
	Name   string `json:"name"`
	Need   string `json:"need"` // Required or Optional
	OK     bool   `json:"ok"`
	Detail string `json:"detail,omitempty"`
}

// What Feature.Need says.
const (
	Required = "required" // no pool without it
	Optional = "optional" // something is slower or missing without it
)

// HoldingWrites is the Feature that fs.TierGate needs besides FUSE passthrough.
const HoldingWrites = "holding writes (fanotify pre-content)"

// filesystems are those on which the charge rule was proved (docs/decisions.md).
var filesystems = map[int64]string{
	unix.EXT4_SUPER_MAGIC:  "ext4",
	unix.XFS_SUPER_MAGIC:   "xfs",
	unix.BTRFS_SUPER_MAGIC: "btrfs",
}

// fsType names the filesystem of an open directory.
func fsType(fd int) (string, bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return "", false, fmt.Errorf("statfs: %w", err)
	}
	if name, ok := filesystems[st.Type]; ok {
		return name, true, nil
	}
	return fmt.Sprintf("filesystem type %#x", st.Type), false, nil
}

// Suitable returns nil when dir can hold a pool, else ErrUnsuitable with
// everything that is missing. dir exists.
func Suitable(dir string) error {
	fstype, features, err := Probe(dir)
	if err != nil {
		return err
	}
	var missing []string
	for _, f := range features {
		if f.Need == Required && !f.OK {
			missing = append(missing, f.Name+" ("+f.Detail+")")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s: %w: %s lacks %s; use a directory on ext4, xfs or btrfs",
			dir, ErrUnsuitable, fstype, strings.Join(missing, ", "))
	}
	return nil
}

// Probe tries out what the filesystem under dir can do. It works in a temporary
// directory there, which it removes, and needs root.
func Probe(dir string) (fstype string, features []Feature, err error) {
	root, err := os.Open(dir)
	if err != nil {
		return "", nil, err
	}
	defer root.Close()
	fstype, known, err := fsType(int(root.Fd()))
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", dir, err)
	}
	add := func(name, need string, err error) {
		f := Feature{Name: name, Need: need, OK: err == nil}
		if err != nil {
			f.Detail = err.Error()
		}
		features = append(features, f)
	}
	if known {
		add("ext4, xfs or btrfs", Required, nil)
	} else {
		add("ext4, xfs or btrfs", Required, fmt.Errorf("it is %s", fstype))
	}
	tmp, err := os.MkdirTemp(dir, ".croft-probe-")
	if err != nil {
		return "", nil, err
	}
	defer os.RemoveAll(tmp)
	p, err := newProbe(tmp)
	if err != nil {
		return "", nil, err
	}
	defer p.close()
	add("file handles", Required, p.fileHandles())
	add("extent maps (FIEMAP)", Required, p.extentMap())
	add("punching holes", Required, p.punchHole())
	add("O_TMPFILE and linkat", Required, p.tmpfile())
	add("trusted extended attributes", Required, p.trustedXattr())
	add("renameat2 flags", Required, p.renameFlags())
	add("reflinks (FICLONE)", Optional, p.reflink())
	add(HoldingWrites, Optional, holdsWrites(int(p.dir.Fd())))
	return fstype, features, nil
}

// probe is a directory to try things in, with one file of 8 KiB.
type probe struct{ dir, file *os.File }

func newProbe(tmp string) (*probe, error) {
	dir, err := os.Open(tmp)
	if err != nil {
		return nil, err
	}
	file, err := os.OpenFile(tmp+"/file", os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err == nil {
		_, err = file.Write(make([]byte, 8192))
	}
	p := &probe{dir: dir, file: file}
	if err != nil {
		p.close()
		return nil, fmt.Errorf("probe: %w", err)
	}
	return p, nil
}

func (p *probe) close() {
	p.dir.Close()
	p.file.Close()
}

// handleLimit is the longest file handle that package fs keeps, in bytes.
const handleLimit = 20

func (p *probe) fileHandles() error {
	h, _, err := unix.NameToHandleAt(int(p.file.Fd()), "", unix.AT_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("name_to_handle_at: %w", err)
	}
	if h.Size() > handleLimit {
		return fmt.Errorf("handles of %d bytes, at most %d are supported", h.Size(), handleLimit)
	}
	fd, err := unix.OpenByHandleAt(int(p.dir.Fd()), h, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_by_handle_at: %w", err)
	}
	return unix.Close(fd)
}

func (p *probe) extentMap() error {
	rule, err := quota.RuleFor(int(p.dir.Fd()))
	if err != nil {
		return err
	}
	mapped, err := rule.Mapped(int(p.file.Fd()), 0, 8192)
	if err == nil && mapped < 8192 {
		err = fmt.Errorf("8192 bytes were written, %d are shown", mapped)
	}
	return err
}

func (p *probe) punchHole() error {
	return unix.Fallocate(int(p.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
}

func (p *probe) tmpfile() error {
	dir := int(p.dir.Fd())
	fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Linkat(fd, "", dir, "linked", unix.AT_EMPTY_PATH)
}

func (p *probe) trustedXattr() error { return quota.WritePrealloc(int(p.file.Fd()), 4096) }

func (p *probe) renameFlags() error {
	dir := int(p.dir.Fd())
	if err := unix.Mkdirat(dir, "a", 0o700); err != nil {
		return err
	}
	if err := unix.Mkdirat(dir, "b", 0o700); err != nil {
		return err
	}
	if err := unix.Renameat2(dir, "a", dir, "b", unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("RENAME_EXCHANGE: %w", err)
	}
	if err := unix.Renameat2(dir, "a", dir, "b", unix.RENAME_NOREPLACE); !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("RENAME_NOREPLACE onto a name in use: %v", err)
	}
	return nil
}

func (p *probe) reflink() error {
	fd, err := unix.Openat(int(p.dir.Fd()), "clone", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.IoctlFileClone(fd, int(p.file.Fd()))
}
