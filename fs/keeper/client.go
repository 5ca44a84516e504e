package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone is returned, wrapped, when there is no keeper at the moment.
var ErrGone = errors.New("the keeper has gone")

// redialEvery is how often a keeper that has gone is looked for.
const redialEvery = 200 * time.Millisecond

// Client is a daemon's connection to a keeper. Its methods may be called concurrently.
//
// A Client by Dial outlives the keeper: when another one listens, it holds what the
// last one held. A Client by NewClient has no other when its keeper is gone.
type Client struct {
	path    string
	changed func(up bool, err error)
	closed  chan struct{}
	over    sync.WaitGroup // of attend

	mu   sync.Mutex // makes one call at a time; guards what follows
	link *link      // nil while there is no keeper
	held map[heldName]int
}

// heldName names a duplicate of what the keeper is to hold; there are none by NewClient.
type heldName struct{ pool, name string }

// Dial connects to the keeper at a socket. changed is called, unless nil, when the keeper has gone, with the
// reason, and when there is one again that holds everything.
func Dial(path string, changed func(up bool, err error)) (*Client, error) {
	l, err := dial(path)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	return newClient(path, l, changed), nil
}

// NewClient is a client by a connected socket of its keeper, which is the Client's from then on. changed is Dial's.
func NewClient(socket *os.File, changed func(up bool, err error)) (*Client, error) {
	defer socket.Close()
	c, err := net.FileConn(socket)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	conn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("keeper: %s is no unix socket", c.LocalAddr())
	}
	return newClient("", newLink(conn), changed), nil
}

func newClient(path string, l *link, changed func(up bool, err error)) *Client {
	if changed == nil {
		changed = func(bool, error) {}
	}
	c := &Client{path: path, changed: changed, closed: make(chan struct{}), link: l, held: make(map[heldName]int)}
	c.over.Go(func() { c.attend(l) })
	return c
}

// attend waits for the keeper's end, and for another.
func (c *Client) attend(l *link) {
	for {
		<-l.gone
		c.mu.Lock()
		c.link = nil
		c.mu.Unlock()
		l.conn.Close()
		if c.isClosed() {
			return
		}
		c.changed(false, l.err)
		if c.path == "" {
			return
		}
		if l = c.redial(); l == nil {
			return
		}
		c.changed(true, nil)
	}
}

// redial returns nil when the client was closed meanwhile.
func (c *Client) redial() *link {
	for {
		select {
		case <-c.closed:
			return nil
		case <-time.After(redialEvery):
		}
		l, err := dial(c.path)
		if err != nil {
			continue
		}
		if err := c.resume(l); err == nil {
			return l
		}
		l.conn.Close()
	}
}

// resume has a new keeper hold what the last one held.
func (c *Client) resume(l *link) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed() {
		return ErrGone
	}
	for at, fd := range c.held {
		if _, _, err := l.call(request{op: opHold, pool: at.pool, name: at.name}, fd); err != nil {
			return err
		}
	}
	c.link = l
	return nil
}

func (c *Client) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// Up tells whether there is a keeper at the moment.
func (c *Client) Up() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link != nil
}

// Close ends the connection. The keeper holds what it holds.
func (c *Client) Close() error {
	c.mu.Lock()
	var err error
	if !c.isClosed() {
		close(c.closed)
	}
	if c.link != nil {
		err = c.link.conn.Close()
	}
	for at, fd := range c.held {
		unix.Close(fd)
		delete(c.held, at)
	}
	c.mu.Unlock()
	c.over.Wait()
	return err
}

// call returns the answer's body, and its descriptor or nil.
func (c *Client) call(r request, fd int) ([]byte, *os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.callLocked(r, fd)
}

func (c *Client) callLocked(r request, fd int) ([]byte, *os.File, error) {
	if c.link == nil {
		return nil, nil, fmt.Errorf("keeper: %w", ErrGone)
	}
	body, file, err := c.link.call(r, fd)
	if err != nil {
		return nil, nil, fmt.Errorf("keeper: %w", err)
	}
	return body, file, nil
}

// Pool is what the keeper holds of one pool; it is a pool.Keeper.
func (c *Client) Pool(id string) *Pool { return &Pool{client: c, id: id} }

// Pool is a keeper, for one pool.
type Pool struct {
	client *Client
	id     string
}

// Hold has the keeper hold a duplicate of fd.
func (p *Pool) Hold(name string, fd int) error {
	c := p.client
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, _, err := c.callLocked(request{op: opHold, pool: p.id, name: name}, fd); err != nil {
		return err
	}
	return c.rememberLocked(heldName{p.id, name}, fd)
}

func (c *Client) rememberLocked(at heldName, fd int) error {
	if c.path == "" {
		return nil
	}
	duplicate, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: %w", os.NewSyscallError("fcntl", err))
	}
	if old, ok := c.held[at]; ok {
		unix.Close(old)
	}
	c.held[at] = duplicate
	return nil
}

// Take returns duplicates of all that the keeper holds, by name. They are the caller's.
func (p *Pool) Take() (map[string]*os.File, error) {
	list, _, err := p.client.call(request{op: opList, pool: p.id}, -1)
	if err != nil {
		return nil, err
	}
	files := make(map[string]*os.File)
	for name := range bytes.SplitSeq(list, []byte{0}) {
		if len(name) == 0 {
			continue
		}
		if files[string(name)], err = p.get(string(name)); err != nil {
			delete(files, string(name))
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
	}
	return files, nil
}

func (p *Pool) get(name string) (*os.File, error) {
	c := p.client
	c.mu.Lock()
	defer c.mu.Unlock()
	_, file, err := c.callLocked(request{op: opGet, pool: p.id, name: name}, -1)
	switch {
	case err != nil:
		return nil, err
	case file == nil:
		return nil, fmt.Errorf("keeper: no descriptor came for %q", name)
	}
	if err := c.rememberLocked(heldName{p.id, name}, int(file.Fd())); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

// Drop has the keeper let go of all that it holds. One that has gone holds nothing.
func (p *Pool) Drop() error {
	c := p.client
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.held, func(at heldName, fd int) bool {
		if at.pool != p.id {
			return false
		}
		unix.Close(fd)
		return true
	})
	if _, _, err := c.callLocked(request{op: opDrop, pool: p.id}, -1); !errors.Is(err, ErrGone) {
		return err
	}
	return nil
}
