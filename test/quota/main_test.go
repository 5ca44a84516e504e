// Package quota_test shows that a volume's limit is exact: whatever fills it,
// the use never passes the limit and comes up to it.
package quota_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/quota"
	"github.com/croftfs/croft/test/kit"
)

const (
	block = quota.MinBlock
	limit = 64 * kit.Mi
)

func TestMain(m *testing.M) {
	kit.Main(m, map[string]kit.Helper{"append": appendHelper})
}

// appendHelper appends pieces of args[1] bytes to the file args[0] until
// ENOSPC, then smaller and smaller ones down to a byte.
func appendHelper(args []string) int {
	piece, err := strconv.Atoi(args[1])
	if err == nil {
		err = appendUntilFull(args[0], piece)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func appendUntilFull(path string, piece int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	return fill(piece, func(n int) error {
		_, err := f.Write(make([]byte, n))
		return err
	})
}

// fill calls add with piece until it answers ENOSPC, then with half of it, and
// so on down to 1.
func fill(piece int, add func(n int) error) error {
	for ; piece > 0; piece /= 2 {
		for {
			err := add(piece)
			if errors.Is(err, unix.ENOSPC) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// together runs fn in n goroutines and fails the test when one fails.
func together(t *testing.T, n int, fn func(i int) error) {
	t.Helper()
	errs := make(chan error, n)
	for i := range n {
		go func() { errs <- fn(i) }()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// overwrite makes sure that what is there can still be changed in a full volume.
func overwrite(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	kit.OK(t, err)
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, block), 0); err != nil {
		t.Errorf("overwriting in a full volume: %v", err)
	}
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		t.Error(err)
	}
}
