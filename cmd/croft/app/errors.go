package app

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

// errHandedOver ends a supervised daemon that has left its mounts to the next, errTold one that has told
// its supervisor what is wrong.
var (
	errHandedOver = errors.New("handed over")
	errTold       = errors.New("told")
)

// usageError is an error of the command line.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

// usage makes a usageError; the format is fmt.Errorf's.
func usage(format string, args ...any) error {
	return &usageError{fmt.Errorf(format, args...)}
}

// report prints an error and returns the exit code.
func (a *App) report(cmd *cobra.Command, err error) int {
	var bad *usageError
	switch {
	case err == nil:
		return ExitOK
	case errors.Is(err, errFindings):
		if err != errFindings { // something else has failed besides
			a.notice("%v", err)
		}
		return ExitFindings
	case errors.Is(err, errHandedOver):
		return handedOver
	case errors.Is(err, errTold):
		return ExitFailure
	case errors.As(err, &bad):
		a.notice("%v\nSee '%s --help'.", err, cmd.CommandPath())
		return ExitUsage
	case errors.Is(err, context.Canceled):
		a.notice("interrupted (%v)", err)
		return ExitFailure
	}
	a.notice("%v%s", err, hint(err))
	return ExitFailure
}

// hint says what would be right, for errors whose text does not.
func hint(err error) string {
	for _, h := range []struct {
		err  error
		hint string
	}{
		{pool.ErrNotFound, " (`croft volume list` shows those that exist)"},
		{pool.ErrSnapshotNotFound, " (`croft snapshot list` shows those that exist)"},
		{pool.ErrExists, " (`croft volume resize` changes its limits)"},
		{pool.ErrMissing, " (`croft check` tells more; `croft volume delete` forgets it)"},
		{pool.ErrNoRoom, " (free space on it first)"},
		{errNotMounted, " (`croft mount` does that)"},
		{pool.ErrNewerFormat, " (use that version)"},
	} {
		if errors.Is(err, h.err) {
			return h.hint
		}
	}
	return ""
}
