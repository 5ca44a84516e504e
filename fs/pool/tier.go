package pool

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/quota/gate"
)

// ErrTier is returned by Mount when the tier that was asked for cannot be had.
var ErrTier = errors.New("tier cannot be had")

// ErrNoPassthrough tells why there is no better tier than fs.TierDaemon.
var ErrNoPassthrough = errors.New("the kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)")

// holdsWrites tells why there is no fs.TierGate on the filesystem of an open directory.
func holdsWrites(dir int) error {
	if err := gate.SelfTest(dir); err != nil {
		return fmt.Errorf("writes cannot be held (Linux 6.14, CONFIG_FANOTIFY_ACCESS_PERMISSIONS): %w", err)
	}
	if fstype, _, err := fsType(dir); err != nil || fstype != "ext4" {
		return err
	}
	// There a call that was begun before goes on for long: it is stopped by FS_IMMUTABLE_FL.
	fd, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("a file to try it on: %w", err)
	}
	defer unix.Close(fd)
	if err := errors.Join(gate.Brake(fd, true), gate.Brake(fd, false)); err != nil {
		return fmt.Errorf("a file cannot be made immutable (CAP_LINUX_IMMUTABLE): %w", err)
	}
	return nil
}

// describeTier returns the tier and why there is no better one, for people.
func (m *mount) describeTier() (tier, whyNot string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.whyNot != nil {
		whyNot = m.whyNot.Error()
	}
	return string(m.tier), whyNot
}

// chooseTier returns the tier that was asked for, or the best one that works
// here when none was, with the reason why it is not a better one.
func (p *Pool) chooseTier(conn *transport.Conn, want fs.Tier) (tier fs.Tier, whyNot error, err error) {
	if want == fs.TierDaemon {
		return want, nil, nil
	}
	whyNot = ErrNoPassthrough
	if conn.Passthrough() {
		whyNot = p.fs.TryPassthrough(conn)
	}
	tier = fs.TierDaemon
	if whyNot == nil {
		if tier = fs.TierRead; want == tier {
			return tier, nil, nil
		}
		if whyNot = holdsWrites(int(p.root.Fd())); whyNot == nil {
			tier = fs.TierGate
		}
	}
	switch {
	case want == "" || want == tier:
		return tier, whyNot, nil
	case want == fs.TierHold && tier == fs.TierGate:
		return want, nil, nil
	}
	return "", nil, fmt.Errorf("%w: %s: %w", ErrTier, want, whyNot)
}
