package csi

import (
	"fmt"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/fs/pool"
)

// fsTypes are what a volume's filesystem may be asked to be.
var fsTypes = []string{"", "croft"}

// access is what a VolumeCapability asks for.
type access struct {
	kind  pool.Kind
	flags []string
	group *uint32
	mode  csipb.VolumeCapability_AccessMode_Mode
}

// exclusive tells whether a volume is to be published once at a time: CSI spec, second table of NodePublishVolume.
func (a access) exclusive() bool {
	switch a.mode {
	case csipb.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER,
		csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		return true
	}
	return false
}

// readOnly tells whether nobody is to write.
func (a access) readOnly() bool {
	return a.mode == csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY ||
		a.mode == csipb.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
}

// parseAccess reads a VolumeCapability; ErrArgument for what no volume of ours can be.
func parseAccess(c *csipb.VolumeCapability) (access, error) {
	var a access
	if c == nil {
		return a, fmt.Errorf("%w: no volume capability is given", ErrArgument)
	}
	a.mode = c.GetAccessMode().GetMode()
	if _, known := csipb.VolumeCapability_AccessMode_Mode_name[int32(a.mode)]; !known || a.mode == csipb.VolumeCapability_AccessMode_UNKNOWN {
		return a, fmt.Errorf("%w: access mode %d", ErrArgument, a.mode)
	}
	switch c.GetAccessType().(type) {
	case *csipb.VolumeCapability_Block:
		a.kind = pool.KindBlock
		return a, nil
	case *csipb.VolumeCapability_Mount:
	default:
		return a, fmt.Errorf("%w: access type: it is neither mount nor block", ErrArgument)
	}
	m := c.GetMount()
	a.kind, a.flags = pool.KindFilesystem, m.GetMountFlags()
	if t := m.GetFsType(); !slices.Contains(fsTypes, t) {
		return a, fmt.Errorf("%w: fs_type %q: a volume is a directory of the pool's filesystem: leave it out", ErrArgument, t)
	}
	if err := pool.CheckMountFlags(a.flags); err != nil {
		return a, fmt.Errorf("%w: mount flags: %w", ErrArgument, err)
	}
	if g := m.GetVolumeMountGroup(); g != "" {
		id, err := parseOwner(g)
		if err != nil {
			return a, fmt.Errorf("%w: volume_mount_group: %w", ErrArgument, err)
		}
		group := uint32(id)
		a.group = &group
	}
	return a, nil
}

// parseAccesses reads those that a volume is to have all of.
func parseAccesses(all []*csipb.VolumeCapability) (pool.Kind, error) {
	if len(all) == 0 {
		return "", fmt.Errorf("%w: no volume capabilities are given", ErrArgument)
	}
	var kind pool.Kind
	for _, c := range all {
		a, err := parseAccess(c)
		if err != nil {
			return "", err
		}
		if kind != "" && kind != a.kind {
			return "", fmt.Errorf("%w: a volume cannot be both a filesystem and a block device", ErrArgument)
		}
		kind = a.kind
	}
	return kind, nil
}

const (
	// defaultBytes is the size of a volume when none is asked for.
	defaultBytes = 1 << 30
	// blockBytes is what sizes are rounded up to, the largest block of the pools' filesystems.
	blockBytes = 4096
)

// sizes is a capacity range; most is 0 for any.
type sizes struct{ least, most uint64 }

func parseSizes(r *csipb.CapacityRange) (sizes, error) {
	least, most := r.GetRequiredBytes(), r.GetLimitBytes()
	switch {
	case least < 0 || most < 0:
		return sizes{}, fmt.Errorf("%w: capacity range: %d to %d bytes: neither may be negative", ErrArgument, least, most)
	case most > 0 && least > most:
		return sizes{}, fmt.Errorf("%w: capacity range: %d bytes are required, and %d the limit", ErrArgument, least, most)
	case most > 0 && most < pool.MinBytes, least > pool.MaxBytes:
		return sizes{}, fmt.Errorf("%w: %d to %d bytes: a volume has from %d to %d", ErrRange, least, most, pool.MinBytes, uint64(pool.MaxBytes))
	}
	return sizes{uint64(least), uint64(most)}, nil
}

// choose returns the size of a volume that is made: usual unless something is asked for, in whole blocks.
func (s sizes) choose(usual uint64) (uint64, error) {
	bytes := max(s.least, pool.MinBytes)
	if s.least == 0 {
		bytes = usual
		if s.most > 0 {
			bytes = min(bytes, s.most/blockBytes*blockBytes)
		}
	}
	bytes = (bytes + blockBytes - 1) / blockBytes * blockBytes
	if s.most > 0 && bytes > s.most {
		return 0, fmt.Errorf("%w: %d to %d bytes have no multiple of %d between them", ErrRange, s.least, s.most, blockBytes)
	}
	return bytes, nil
}

// has tells whether a size is in the range.
func (s sizes) has(bytes uint64) bool { return bytes >= s.least && (s.most == 0 || bytes <= s.most) }

// page cuts a list at a page: of all, which are in ascending order by id, those after token, at most most of them (0: all).
func page[T any](all []T, id func(T) string, token string, most int32) (part []T, next string, err error) {
	if most < 0 {
		return nil, "", fmt.Errorf("%w: max_entries %d", ErrArgument, most)
	}
	if token != "" {
		if _, _, ok := splitID(token); !ok {
			return nil, "", fmt.Errorf("%w: %q", ErrToken, token)
		}
		from := slices.IndexFunc(all, func(t T) bool { return id(t) > token })
		if from < 0 {
			from = len(all)
		}
		all = all[from:]
	}
	if n := int(most); n > 0 && len(all) > n {
		return all[:n], id(all[n-1]), nil
	}
	return all, "", nil
}
