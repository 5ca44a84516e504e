package csi

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/croftfs/croft/fs/pool"
)

// The parameters of a StorageClass, and the attributes of an ephemeral inline volume.
const (
	// ParameterPool names the pool, as `croft node` does. Default: the one with the most room.
	ParameterPool = "pool"
	// ParameterInodes is the limit in inodes, more than 0. Default: one for each 16 KiB. Also of a VolumeAttributesClass.
	ParameterInodes = "inodes"
	// ParameterWipe is "true" for a volume that is overwritten before its space is freed.
	ParameterWipe = "wipe"
	// ParameterUID and ParameterGID are who owns the root directory, ParameterMode its permission bits in octal. Default: 0, 0, 0755.
	ParameterUID  = "uid"
	ParameterGID  = "gid"
	ParameterMode = "mode"
	// ParameterSize is the size of an ephemeral inline volume, as Kubernetes writes it: 64Mi. There is no default.
	ParameterSize = "size"

	// kubernetesPrefix is that of what Kubernetes' sidecars and kubelet add: external-provisioner's
	// --extra-create-metadata, CSIDriver.spec.podInfoOnMount.
	kubernetesPrefix = "csi.storage.k8s.io/"
	// kubernetesEphemeral is how kubelet says that a volume is an ephemeral inline one.
	kubernetesEphemeral = kubernetesPrefix + "ephemeral"
)

// parameters are what a StorageClass says, or an inline volume.
type parameters struct {
	pool     string
	size     uint64 // bytes
	inodes   uint64
	wipe     bool
	uid, gid int
	mode     os.FileMode
}

// parse reads parameters into p. Those that are not among known, and have no prefix of Kubernetes, are refused by name.
func (p *parameters) parse(from map[string]string, known ...string) error {
	for _, key := range slices.Sorted(maps.Keys(from)) {
		if strings.HasPrefix(key, kubernetesPrefix) {
			continue
		}
		if !slices.Contains(known, key) {
			slices.Sort(known)
			return fmt.Errorf("%w: parameter %q is unknown: known are %s", ErrArgument, key, strings.Join(known, ", "))
		}
		if err := p.set(key, from[key]); err != nil {
			return fmt.Errorf("%w: parameter %s: %w", ErrArgument, key, err)
		}
	}
	return nil
}

func (p *parameters) set(key, value string) (err error) {
	switch key {
	case ParameterPool:
		if p.pool = value; value == "" {
			err = fmt.Errorf("it is empty: leave it out for any pool")
		}
	case ParameterSize:
		p.size, err = parseSize(value)
	case ParameterInodes:
		if p.inodes, err = strconv.ParseUint(value, 10, 63); err != nil || p.inodes == 0 {
			err = fmt.Errorf("%q is not a number above 0", value)
		}
	case ParameterWipe:
		if p.wipe, err = strconv.ParseBool(value); err != nil {
			err = fmt.Errorf("%q is neither true nor false", value)
		}
	case ParameterUID:
		p.uid, err = parseOwner(value)
	case ParameterGID:
		p.gid, err = parseOwner(value)
	case ParameterMode:
		p.mode, err = parseMode(value)
	}
	return err
}

func parseSize(value string) (uint64, error) {
	q, err := resource.ParseQuantity(value)
	if err != nil || q.Sign() <= 0 || q.CmpInt64(pool.MaxBytes) > 0 { // of what no int64 can hold, Value makes anything
		return 0, fmt.Errorf("%q is not a size such as 64Mi or 10Gi, to 4Ei", value)
	}
	return uint64(q.Value()), nil
}

// parseOwner reads the id of a user or a group, which is below 2^32-1.
func parseOwner(value string) (int, error) {
	id, err := strconv.ParseUint(value, 10, 32)
	if err != nil || id == 1<<32-1 {
		return 0, fmt.Errorf("%q is not an id from 0 to 4294967294", value)
	}
	return int(id), nil
}

func parseMode(value string) (os.FileMode, error) {
	const setGID, sticky = 0o2000, 0o1000
	bits, err := strconv.ParseUint(value, 8, 12)
	if err != nil || bits == 0 || bits&^(0o777|setGID|sticky) != 0 {
		return 0, fmt.Errorf("%q is not permission bits in octal, such as 0770", value)
	}
	mode := os.FileMode(bits & 0o777)
	if bits&setGID != 0 {
		mode |= os.ModeSetgid
	}
	if bits&sticky != 0 {
		mode |= os.ModeSticky
	}
	return mode, nil
}
