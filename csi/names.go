package csi

import (
	"crypto/sha256"
	"encoding/hex"
	"strings"

	"github.com/croftfs/croft/fs/pool"
)

// The labels of what was made by CSI.
const (
	// LabelName is the name that the CO gave to a volume or a snapshot.
	LabelName = "csi.croft.dev/name"
	// LabelEphemeral is the target of an ephemeral inline volume.
	LabelEphemeral = "csi.croft.dev/ephemeral"
)

const (
	// maxID is the longest id in bytes: CSI spec, "Size Limits".
	maxID = 128
	// maxOwnName is the longest name that an id has room for beside a pool's id and the slash, in bytes.
	maxOwnName = maxID - poolIDLength - 1
	// poolIDLength is how long a pool's id is, in bytes.
	poolIDLength = 16
	// hashed marks a name that was made of another one. 32 hexadecimal digits follow.
	hashed = "csi-"
	// hashedInline is hashed for ephemeral inline volumes.
	hashedInline = hashed + "inline-"
)

// ownName returns the name in the pool of what the CO calls so.
func ownName(name string) string {
	if len(name) <= maxOwnName && !strings.HasPrefix(name, hashed) && pool.CheckName(name) == nil {
		return name
	}
	return hashOf(hashed, name)
}

func hashOf(prefix, name string) string {
	sum := sha256.Sum256([]byte(name))
	return prefix + hex.EncodeToString(sum[:16])
}

func idOf(poolID, name string) string { return poolID + "/" + name }

// splitID returns the parts of an id; ok is false for what cannot be one.
func splitID(id string) (poolName, name string, ok bool) {
	poolName, name, ok = strings.Cut(id, "/")
	return poolName, name, ok && poolName != "" && len(id) <= maxID && pool.CheckName(name) == nil
}
