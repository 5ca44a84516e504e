package pool

import (
	"errors"
	"fmt"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
)

// ErrTier is returned by Mount when the tier that was asked for cannot be had.
var ErrTier = errors.New("tier cannot be had")

// chooseTier returns the tier that was asked for, or the best one that works
// here when none was, with the reason why it is not a better one.
func (p *Pool) chooseTier(conn *transport.Conn, want fs.Tier) (tier fs.Tier, whyNot error, err error) {
	if want == fs.TierDaemon {
		return want, nil, nil
	}
	whyNot = errors.New("the kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")
	if conn.Passthrough() {
		whyNot = p.fs.TryPassthrough(conn)
	}
	switch {
	case whyNot == nil:
		return fs.TierRead, nil, nil
	case want == "":
		return fs.TierDaemon, whyNot, nil
	}
	return "", nil, fmt.Errorf("%w: %s: %w", ErrTier, want, whyNot)
}
