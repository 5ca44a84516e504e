package keeper

import (
	"bytes"
	"fmt"
	"net"
	"os"
	"sync"
)

// Client is a daemon's connection to a keeper. Its methods may be called concurrently.
type Client struct {
	mu   sync.Mutex
	conn *net.UnixConn
}

// Dial connects to the keeper at a socket.
func Dial(path string) (*Client, error) {
	c, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	return &Client{conn: c}, nil
}

// NewClient is a client by a connected socket of its keeper, which is the Client's from then on.
func NewClient(socket *os.File) (*Client, error) {
	defer socket.Close()
	c, err := net.FileConn(socket)
	if err != nil {
		return nil, fmt.Errorf("keeper: %w", err)
	}
	unixConn, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, fmt.Errorf("keeper: %s is no unix socket", c.LocalAddr())
	}
	return &Client{conn: unixConn}, nil
}

// Close ends the connection. The keeper holds what it holds.
func (c *Client) Close() error { return c.conn.Close() }

// call returns the answer's body, and its descriptor or nil.
func (c *Client) call(r request, fd int) ([]byte, *os.File, error) {
	message, err := r.encode()
	if err != nil {
		return nil, nil, fmt.Errorf("keeper: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := send(c.conn, message, fd); err != nil {
		return nil, nil, fmt.Errorf("keeper: %w", err)
	}
	answer, got, err := receive(c.conn, answerSize)
	if err != nil {
		return nil, nil, fmt.Errorf("keeper: %w", err)
	}
	var file *os.File
	if got >= 0 {
		file = os.NewFile(uintptr(got), r.name)
	}
	if answer[0] != answerOK {
		if file != nil {
			file.Close()
		}
		return nil, nil, fmt.Errorf("%w: %s", ErrRefused, answer[1:])
	}
	return answer[1:], file, nil
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
	_, _, err := p.client.call(request{op: opHold, pool: p.id, name: name}, fd)
	return err
}

// Take returns duplicates of all that the keeper holds, by name.
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
		_, file, err := p.client.call(request{op: opGet, pool: p.id, name: string(name)}, -1)
		if err == nil && file == nil {
			err = fmt.Errorf("keeper: no descriptor came for %q", name)
		}
		if err != nil {
			for _, f := range files {
				f.Close()
			}
			return nil, err
		}
		files[string(name)] = file
	}
	return files, nil
}

// Drop has the keeper let go of all that it holds.
func (p *Pool) Drop() error {
	_, _, err := p.client.call(request{op: opDrop, pool: p.id}, -1)
	return err
}
