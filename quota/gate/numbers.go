package gate

import (
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// numbers sees to it that an answer reaches the event that it is for. The kernel
// finds that by its number alone, the first that it has given out of several
// (process_access_response in fs/notify/fanotify/fanotify_user.c), and a number is
// given again once it is free here: also when an event has it that an earlier daemon has read.
type numbers struct {
	spare int // a descriptor to keep numbers in use with

	mu sync.Mutex
	// loose are events that something else of ours has the number of, and may free it.
	loose []*Event
}

// turn is an event's place among those of its number; numbers.mu guards it.
type turn struct {
	isLeft bool // its number is not ours
	over   bool
	ahead  *Event // is answered before
	behind *Event // waits for this one, with its answer
	answer Verdict
}

// keep puts the number of an event to use that an earlier daemon has left.
func (n *numbers) keep(ev *Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ev.turn.isLeft = true
	if !n.tryLocked(ev) {
		n.loose = append(n.loose, ev)
	}
}

// keepAgain does so with those whose number was in use.
func (n *numbers) keepAgain() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loose = slices.DeleteFunc(n.loose, n.tryLocked)
}

func (n *numbers) tryLocked(ev *Event) bool {
	fd, err := unix.FcntlInt(uintptr(n.spare), unix.F_DUPFD_CLOEXEC, ev.fd)
	if err != nil { // EINVAL, EMFILE: it is beyond the limit, or in use
		return false
	}
	if fd == ev.fd {
		ev.turn.isLeft = false
		return true
	}
	unix.Close(fd)
	return false
}

// hasNumber is called for each event that was read: its number may have been free for an instant.
func (n *numbers) hasNumber(ev *Event) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, other := range n.loose {
		if other.fd == ev.fd {
			ev.turn.ahead = other
		}
	}
}

// isTurn tells whether an event can be answered now. If not its answer is kept for letGo.
func (n *numbers) isTurn(ev *Event, v Verdict) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	ahead := ev.turn.ahead
	if ahead == nil || ahead.turn.over {
		return true
	}
	ahead.turn.behind, ahead.turn.answer = ev, v
	return false
}

// letGo frees the number of an event that was answered, and returns whose turn is next.
func (n *numbers) letGo(ev *Event) (next *Event, v Verdict) {
	n.mu.Lock()
	defer n.mu.Unlock()
	ev.turn.over = true
	if ev.turn.isLeft {
		n.loose = slices.DeleteFunc(n.loose, func(other *Event) bool { return other == ev })
	} else {
		unix.Close(ev.fd)
	}
	return ev.turn.behind, ev.turn.answer
}
