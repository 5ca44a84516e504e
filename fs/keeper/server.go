package keeper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sort"
	"sync"

	"golang.org/x/sys/unix"
)

// What a keeper holds at the most; a pool needs three descriptors.
const (
	maxPools = 4096
	maxNames = 16
)

// Server is a keeper. Its methods may be called concurrently.
type Server struct {
	mu    sync.Mutex
	pools map[string]map[string]int
}

// NewServer returns a keeper of nothing.
func NewServer() *Server { return &Server{pools: make(map[string]map[string]int)} }

// Listen makes the socket, in the place of one that nobody listens on.
func Listen(path string) (*net.UnixListener, error) {
	if c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"}); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: %w: another keeper does", path, unix.EADDRINUSE)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	// Under another name until nobody but its owner can connect.
	private := path + ".new"
	if err := os.Remove(private); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: private, Net: "unixpacket"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err = os.Chmod(private, 0o600); err == nil {
		err = os.Rename(private, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(private))
	}
	return l, nil
}

// Serve answers whoever connects, until the listener is closed.
func (s *Server) Serve(l *net.UnixListener) error {
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		} else if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return err
		}
		go s.ServeConn(c)
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
			if fd >= 0 {
				unix.Close(fd)
			}
			return
		}
		if err := s.answer(c, r, fd); err != nil {
			return
		}
	}
}

// answer does what was asked; fd is the server's.
func (s *Server) answer(c *net.UnixConn, r request, fd int) error {
	if fd >= 0 && r.op != opHold {
		unix.Close(fd)
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
			defer unix.Close(give)
		}
	case opDrop:
		s.drop(r.pool)
	default:
		err = fmt.Errorf("%w: operation %d", unix.EPROTO, r.op)
	}
	if err != nil {
		return send(c, append([]byte{answerFailed}, err.Error()...), -1)
	}
	return send(c, append([]byte{answerOK}, body...), give)
}

func (s *Server) hold(pool, name string, fd int) error {
	if fd < 0 {
		return errors.New("no descriptor to hold")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	names := s.pools[pool]
	old, known := names[name]
	switch {
	case name == "":
		unix.Close(fd)
		return errors.New("no name to hold it under")
	case names == nil && len(s.pools) >= maxPools, !known && len(names) >= maxNames:
		unix.Close(fd)
		return errors.New("it holds too many already")
	case names == nil:
		names = make(map[string]int)
		s.pools[pool] = names
	case known:
		unix.Close(old)
	}
	names[name] = fd
	return nil
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
	defer s.mu.Unlock()
	for _, fd := range s.pools[pool] {
		unix.Close(fd)
	}
	delete(s.pools, pool)
}

// Pools is how many pools it holds something of.
func (s *Server) Pools() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.pools)
}
