package keeper

import (
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// link is one connection to a keeper. Somebody reads it always, so that the keeper's end is seen.
type link struct {
	conn    *net.UnixConn
	answers chan answer // at most one: each is waited for
	gone    chan struct{}
	err     error // why; set before gone is closed
}

type answer struct {
	body []byte // with its first byte
	fd   int    // -1 when none came
}

func dial(path string) (*link, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	return newLink(c), nil
}

func newLink(c *net.UnixConn) *link {
	l := &link{conn: c, answers: make(chan answer, 1), gone: make(chan struct{})}
	go l.read()
	return l
}

func (l *link) read() {
	defer close(l.gone)
	for {
		body, fd, err := receive(l.conn, answerSize)
		if err != nil {
			l.err = err
			return
		}
		select {
		case l.answers <- answer{body, fd}:
		default:
			closeFD(fd)
			l.err = fmt.Errorf("%w: an answer that nobody has asked for", unix.EPROTO)
			return
		}
	}
}

// call sends a request and waits for its answer: its body, and its descriptor or nil.
// It is called by one at a time.
func (l *link) call(r request, fd int) ([]byte, *os.File, error) {
	message, err := r.encode()
	if err != nil {
		return nil, nil, err
	}
	if err := send(l.conn, message, fd); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	var a answer
	select {
	case a = <-l.answers:
	case <-l.gone:
		select {
		case a = <-l.answers: // its last words
		default:
			return nil, nil, fmt.Errorf("%w: %w", ErrGone, l.err)
		}
	}
	if a.body[0] != answerOK {
		closeFD(a.fd)
		return nil, nil, fmt.Errorf("%w: %s", ErrRefused, a.body[1:])
	}
	if a.fd < 0 {
		return a.body[1:], nil, nil
	}
	return a.body[1:], os.NewFile(uintptr(a.fd), r.name), nil
}
