package gate

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// SelfTest tries the gate on the filesystem of an open directory: a marked file is
// written natively, held, refused, allowed and native again. It returns nil, or what
// does not work.
func SelfTest(dir int) error {
	silent, err := unix.Openat(dir, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("a file to try it on: %w", err)
	}
	defer unix.Close(silent)
	t := &trial{verdict: Allow}
	// The trial's own writes are what is to be held.
	t.gate, err = Open(Options{Decide: t.decide, pid: -1})
	if err != nil {
		return err
	}
	err = t.run(silent)
	return errors.Join(err, t.gate.Close())
}

// trial notes events and answers all alike.
type trial struct {
	gate *Gate

	mu      sync.Mutex // guards what follows
	verdict Verdict
	seen    []Event
}

func (t *trial) decide(ev *Event) Verdict {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.seen = append(t.seen, *ev)
	return t.verdict
}

// answer sets the answer to what comes, and returns what has come.
func (t *trial) answer(v Verdict) (seen []Event) {
	t.mu.Lock()
	defer t.mu.Unlock()
	seen, t.seen, t.verdict = t.seen, nil, v
	return seen
}

func (t *trial) run(silent int) error {
	if err := t.gate.Mark(silent); err != nil {
		return err
	}
	fd, err := unix.Open("/proc/self/fd/"+strconv.Itoa(silent), unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the file again: %w", err)
	}
	defer unix.Close(fd)
	steps := []struct {
		name    string
		before  func(int) error
		fd      int
		verdict Verdict
		want    error
		events  int
	}{
		{"a write while events are ignored", nil, fd, Deny(unix.EIO), nil, 0},
		{"a write that is refused", t.gate.Hold, fd, Deny(unix.ENOSPC), unix.ENOSPC, 1},
		{"a write that is allowed", nil, fd, Allow, nil, 1},
		{"a write by a file opened before the mark", nil, silent, Deny(unix.EIO), nil, 0},
		{"a write once events are ignored again", t.gate.Release, fd, Deny(unix.EIO), nil, 0},
		{"a write after the mark", t.gate.Unmark, fd, Deny(unix.EIO), nil, 0},
	}
	page := make([]byte, os.Getpagesize())
	for _, s := range steps {
		if s.before != nil {
			if err := s.before(silent); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
		t.answer(s.verdict)
		_, err := unix.Pwrite(s.fd, page, int64(len(page)))
		seen := t.answer(Allow)
		if !errors.Is(err, s.want) || len(seen) != s.events {
			return fmt.Errorf("%s: error %v and %d events, want %v and %d", s.name, err, len(seen), s.want, s.events)
		}
		for _, ev := range seen {
			if ev.Off != uint64(len(page)) || ev.Len != uint64(len(page)) {
				return fmt.Errorf("%s: held for %d bytes at %d, want %d at %d", s.name, ev.Len, ev.Off, len(page), len(page))
			}
		}
	}
	return nil
}
