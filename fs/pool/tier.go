package pool

import (
	"errors"
	"fmt"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/quota/gate"
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
	tier = fs.TierDaemon
	if whyNot == nil {
		if tier = fs.TierRead; want == tier {
			return tier, nil, nil
		}
		if whyNot = gate.SelfTest(int(p.root.Fd())); whyNot == nil {
			tier = fs.TierGate
		} else {
			whyNot = fmt.Errorf("writes cannot be held (Linux 6.14, CONFIG_FANOTIFY_ACCESS_PERMISSIONS): %w", whyNot)
		}
	}
	if want == "" || want == tier {
		return tier, whyNot, nil
	}
	return "", nil, fmt.Errorf("%w: %s: %w", ErrTier, want, whyNot)
}
