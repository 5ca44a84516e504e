package keeper

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	version = 1

	opHold = 1
	opList = 2
	opGet  = 3
	opDrop = 4

	poolSize, nameSize = 64, 32
	requestSize        = 2 + poolSize + nameSize
	answerSize         = 4096

	answerOK, answerFailed = 0, 1
)

// ErrRefused is returned, wrapped, when the keeper does not do what was asked.
var ErrRefused = errors.New("the keeper refuses")

type request struct {
	op         byte
	pool, name string
}

func (r request) encode() ([]byte, error) {
	if len(r.pool) == 0 || len(r.pool) > poolSize || len(r.name) > nameSize || strings.Contains(r.pool+r.name, "\x00") {
		return nil, fmt.Errorf("%w: pool %q, name %q", unix.EINVAL, r.pool, r.name)
	}
	b := make([]byte, requestSize)
	b[0], b[1] = version, r.op
	copy(b[2:], r.pool)
	copy(b[2+poolSize:], r.name)
	return b, nil
}

func decode(b []byte) (request, error) {
	if len(b) != requestSize || b[0] != version {
		return request{}, fmt.Errorf("%w: a request of %d bytes", unix.EPROTO, len(b))
	}
	text := func(b []byte) string { return string(bytes.TrimRight(b, "\x00")) }
	r := request{op: b[1], pool: text(b[2 : 2+poolSize]), name: text(b[2+poolSize:])}
	if r.pool == "" || strings.Contains(r.pool+r.name, "\x00") {
		return r, fmt.Errorf("%w: a request for pool %q, name %q", unix.EPROTO, r.pool, r.name)
	}
	return r, nil
}

// errEnded tells that the other end has closed the connection.
var errEnded = fmt.Errorf("the connection has ended: %w", io.EOF)

// send writes a message, with a descriptor if fd is one.
func send(c *net.UnixConn, message []byte, fd int) error {
	var oob []byte
	if fd >= 0 {
		oob = unix.UnixRights(fd)
	}
	_, _, err := c.WriteMsgUnix(message, oob, nil)
	return err
}

// receive reads a message of at most size bytes, and a descriptor if there is one with it: -1 if
// not. More than one are closed, and an error.
func receive(c *net.UnixConn, size int) (message []byte, fd int, err error) {
	message = make([]byte, size+1)
	oob := make([]byte, unix.CmsgSpace(4*4)) // more than one is asked for
	n, oobn, flags, _, err := c.ReadMsgUnix(message, oob)
	fds := rights(oob[:oobn])
	if n == 0 && len(fds) == 0 && (err == nil || errors.Is(err, io.EOF)) {
		return nil, -1, errEnded
	}
	if err == nil && (n == 0 || n > size || len(fds) > 1 || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0) {
		err = fmt.Errorf("%w: a message of %d bytes with %d descriptors", unix.EPROTO, n, len(fds))
	}
	if err != nil {
		for _, fd := range fds {
			closeFD(fd)
		}
		return nil, -1, err
	}
	if len(fds) == 1 {
		return message[:n], fds[0], nil
	}
	return message[:n], -1, nil
}

// rights returns the descriptors of control messages; net has set close-on-exec.
func rights(oob []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for i := range messages {
		if got, err := unix.ParseUnixRights(&messages[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	return fds
}

// uid is the user at the other end.
func uid(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(ctlErr, err); err != nil {
		return 0, os.NewSyscallError("getsockopt", err)
	}
	return cred.Uid, nil
}

func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}
