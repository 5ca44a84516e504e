package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sort"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// What a keeper holds at the most; a pool needs three descriptors.
const (
	maxPools   = 4096
	maxNames   = 16
	maxClients = 1024
)

const (
	// sendTimeout is how long a client may take to take an answer.
	sendTimeout = 10 * time.Second
	// acceptPause is the pause after a connection that could not be taken.
	acceptPause = 100 * time.Millisecond
)

// Server is a keeper. Its methods may be called concurrently.
type Server struct {
	clients  chan struct{} // one in it for each
	patience time.Duration // sendTimeout

	mu    sync.Mutex // guards pools
	pools map[string]map[string]int
}

// NewServer returns a keeper of nothing.
func NewServer() *Server {
	return &Server{clients: make(chan struct{}, maxClients), patience: sendTimeout, pools: make(map[string]map[string]int)}
}

// Serve answers whoever connects, until the listener is closed.
func (s *Server) Serve(l *Listener) error {
	for {
		c, err := l.unix.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		} else if err != nil {
			time.Sleep(acceptPause) // no descriptors, no memory: it comes and goes
			continue
		}
		select {
		case s.clients <- struct{}{}:
		default:
			c.Close()
			continue
		}
		go func() {
			defer func() { <-s.clients }()
			s.ServeConn(c)
		}()
	}
}

// ServeConn answers one client, until it goes.
func (s *Server) ServeConn(c *net.UnixConn) {
	defer c.Close()
	if id, err := uid(c); err != nil || id != uint32(os.Geteuid()) {
		return
	}
	for {
		message, fd, err := receive(c, requestSize)
		if err != nil {
			return
		}
		r, err := decode(message)
		if err != nil {
			closeFD(fd)
			return
		}
		if err := s.answer(c, r, fd); err != nil {
			return
		}
	}
}

// answer does what was asked; fd is the server's.
func (s *Server) answer(c *net.UnixConn, r request, fd int) error {
	if r.op != opHold {
		closeFD(fd)
	}
	var body []byte
	var err error
	give := -1
	switch r.op {
	case opHold:
		err = s.hold(r.pool, r.name, fd)
	case opList:
		for _, name := range s.names(r.pool) {
			body = append(append(body, name...), 0)
		}
	case opGet:
		if give, err = s.duplicate(r.pool, r.name); err == nil {
			defer closeFD(give)
		}
	case opDrop:
		s.drop(r.pool)
	default:
		err = fmt.Errorf("%w: operation %d", unix.EPROTO, r.op)
	}
	if err := c.SetWriteDeadline(time.Now().Add(s.patience)); err != nil {
		return err
	}
	if err != nil {
		return send(c, append([]byte{answerFailed}, err.Error()...), -1)
	}
	return send(c, append([]byte{answerOK}, body...), give)
}

func (s *Server) hold(pool, name string, fd int) error {
	switch {
	case fd < 0:
		return errors.New("no descriptor to hold")
	case name == "":
		closeFD(fd)
		return errors.New("no name to hold it under")
	}
	unwanted, err := s.put(pool, name, fd)
	closeFD(unwanted) // not under the lock: the last close of a descriptor may take long
	return err
}

// put returns the descriptor that is not wanted, or -1: the one before, or this one when it holds too many.
func (s *Server) put(pool, name string, fd int) (unwanted int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	names := s.pools[pool]
	old, known := names[name]
	switch {
	case names == nil && len(s.pools) >= maxPools, !known && len(names) >= maxNames:
		return fd, errors.New("it holds too many already")
	case names == nil:
		names = make(map[string]int)
		s.pools[pool] = names
	}
	names[name] = fd
	if known {
		return old, nil
	}
	return -1, nil
}

func (s *Server) names(pool string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names []string
	for name := range s.pools[pool] {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

func (s *Server) duplicate(pool, name string) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fd, ok := s.pools[pool][name]
	if !ok {
		return -1, fmt.Errorf("nothing is held as %q", name)
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

func (s *Server) drop(pool string) {
	s.mu.Lock()
	names := s.pools[pool]
	delete(s.pools, pool)
	s.mu.Unlock()
	for _, fd := range names {
		closeFD(fd)
	}
}

// Pools is how many pools it holds something of.
func (s *Server) Pools() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pools)
}
