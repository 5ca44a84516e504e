package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
)

// Client manages the pool whose daemon listens on a socket. Its methods do what
// those of pool.Pool do and return the same errors, besides ErrNoServer,
// ErrRequest and ErrForbidden. They may be called concurrently; none has a time limit but ctx.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client for the socket. It does not connect yet.
func NewClient(socket string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}
	return &Client{path: socket, http: &http.Client{
		Transport:     &http.Transport{DialContext: dial},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close drops idle connections.
func (c *Client) Close() error {
	c.http.CloseIdleConnections()
	return nil
}

// Info describes the pool.
func (c *Client) Info(ctx context.Context) (pool.Info, error) {
	var info pool.Info
	return info, c.call(ctx, http.MethodGet, "/v1/info", nil, &info)
}

// Requests counts the kernel's requests of the mount, by operation.
func (c *Client) Requests(ctx context.Context) (map[string]uint64, error) {
	var counts map[string]uint64
	return counts, c.call(ctx, http.MethodGet, "/v1/requests", nil, &counts)
}

// Metrics returns what the daemon tells Prometheus, in its text form.
func (c *Client) Metrics(ctx context.Context) (string, error) {
	var text string
	return text, c.call(ctx, http.MethodGet, metricsPath, nil, &text)
}

// Volumes lists the volumes by name.
func (c *Client) Volumes(ctx context.Context) ([]pool.Volume, error) {
	var volumes []pool.Volume
	return volumes, c.call(ctx, http.MethodGet, "/v1/volumes", nil, &volumes)
}

// Volume returns one volume.
func (c *Client) Volume(ctx context.Context, name string) (pool.Volume, error) {
	var v pool.Volume
	return v, c.callVolume(ctx, http.MethodGet, name, nil, &v)
}

// Create makes a volume.
func (c *Client) Create(ctx context.Context, name string, o pool.CreateOptions) (pool.Volume, error) {
	var v pool.Volume
	return v, c.callVolume(ctx, http.MethodPost, name, o, &v)
}

// Resize gives a volume new limits.
func (c *Client) Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error) {
	var v pool.Volume
	return v, c.callVolume(ctx, http.MethodPatch, name, o, &v)
}

// Delete deletes a volume.
func (c *Client) Delete(ctx context.Context, name string, o pool.DeleteOptions) error {
	return c.callVolume(ctx, http.MethodDelete, name, o, nil)
}

// Check compares ledgers and disk.
func (c *Client) Check(ctx context.Context, o pool.CheckOptions) (pool.CheckResult, error) {
	var r pool.CheckResult
	return r, c.call(ctx, http.MethodPost, "/v1/check", o, &r)
}

func (c *Client) callVolume(ctx context.Context, method, name string, in, out any) error {
	path, err := volumePath(name)
	if err != nil {
		return err
	}
	return c.call(ctx, method, path, in, out)
}

func volumePath(name string) (string, error) { return namePath("/v1/volumes/", name) }

// namePath returns the path of what has that name.
func namePath(prefix, name string) (string, error) {
	// http.ServeMux takes no segment that is empty or a slash, net/http no line of any length.
	if name == "" || name == "/" || len(name) > pool.MaxName {
		return "", pool.CheckName(name)
	}
	// PathEscape leaves dots alone, and "." and ".." would be cleaned away.
	return prefix + strings.ReplaceAll(url.PathEscape(name), ".", "%2E"), nil
}

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("control request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	// The host names nobody: the transport dials the socket.
	req, err := http.NewRequestWithContext(ctx, method, "http://croft"+path, body)
	if err != nil {
		return fmt.Errorf("control request: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return readFailure(resp)
	}
	if out == nil {
		return nil
	}
	if text, ok := out.(*string); ok {
		body, readErr := io.ReadAll(resp.Body)
		*text, err = string(body), readErr
	} else {
		err = json.NewDecoder(resp.Body).Decode(out)
	}
	if err != nil {
		return fmt.Errorf("the daemon's answer on %s: %w", c.path, err)
	}
	return nil
}

// transportError says what a failed round trip means.
func (c *Client) transportError(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the made-up URL
	}
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("%w %s", ErrNoServer, c.path)
	case errors.Is(err, io.EOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return fmt.Errorf("the daemon on %s ended before it answered: %w", c.path, err)
	}
	return err
}

// readFailure returns the error that a reply carries.
func readFailure(resp *http.Response) error {
	const most = 1 << 20 // bytes
	b, err := io.ReadAll(io.LimitReader(resp.Body, most))
	if err != nil {
		return fmt.Errorf("the daemon answered %s: %w", resp.Status, err)
	}
	var f failure
	if err := json.Unmarshal(b, &f); err != nil || f.Message == "" {
		return fmt.Errorf("%w: the daemon answered %s", ErrRequest, resp.Status)
	}
	return decode(f)
}
