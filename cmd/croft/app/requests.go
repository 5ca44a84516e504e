package app

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool/control"
)

// watchDefault is how often --watch prints when it is not told.
const watchDefault = time.Second

func (a *App) requestsCommand() *cobra.Command {
	var every time.Duration
	cmd := &cobra.Command{
		Use:   "requests",
		Short: "Count what the kernel has asked of a mounted pool",
		Long: "Count the FUSE requests that the kernel has made of a mounted pool since it was mounted.\n" +
			"What the kernel answers from its caches does not come up here.\n\n" +
			"With --watch, print a line with what was asked since the last one, until Ctrl-C.",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usage("%q is too many: an interval is written --watch=5s", args[0])
			}
			return nil
		},
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.Flags().DurationVar(&every, "watch", 0, "print what was asked in each interval (--watch=5s)")
	cmd.Flag("watch").NoOptDefVal = watchDefault.String()
	complete(cmd, "watch", cobra.FixedCompletions([]string{"1s", "5s", "1m"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		watch := cmd.Flag("watch").Changed
		if watch && every <= 0 {
			return usage("--watch: the interval must be more than 0")
		}
		return a.withDaemon(cmd.Context(), *dir, func(ctx context.Context, c *control.Client) error {
			counts, err := mountRequests(ctx, c)
			if err != nil {
				return err
			}
			if watch {
				return a.watchRequests(ctx, c, output.word, every, counts)
			}
			return a.writeRequests(output.word, counts)
		})
	}
	return cmd
}

// withDaemon is withPool for a command that needs the pool to be mounted.
func (a *App) withDaemon(ctx context.Context, dir string, work func(context.Context, *control.Client) error) error {
	if err := a.requireRoot(); err != nil {
		return err
	}
	ctx, stop := interruptible(ctx)
	defer stop()
	c, err := a.findDaemon(ctx, dir)
	if err != nil {
		return err
	}
	return errors.Join(work(ctx, c), c.Close())
}

// mountRequests returns the counts of a mount. A daemon answers on its socket for a moment before
// and after it has one.
func mountRequests(ctx context.Context, c *control.Client) (map[string]uint64, error) {
	counts, err := c.Requests(ctx)
	if err == nil && len(counts) == 0 {
		err = errNotMounted
	}
	return counts, err
}

// requestCounts is what -o json prints.
type requestCounts struct {
	Time     *time.Time        `json:"time,omitempty"`
	Total    uint64            `json:"total"`
	Requests map[string]uint64 `json:"requests"`
}

func total(counts map[string]uint64) (sum uint64) {
	for _, n := range counts {
		sum += n
	}
	return sum
}

// byCount returns the operations, those that occurred most first.
func byCount(counts map[string]uint64) []string {
	names := make([]string, 0, len(counts))
	for name := range counts {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
	return names
}

func (a *App) writeRequests(format string, counts map[string]uint64) error {
	sum := total(counts)
	if format == formatJSON {
		return writeJSON(a.Stdout, requestCounts{Total: sum, Requests: counts})
	}
	rows := [][]string{{"OPERATION", "COUNT", "SHARE"}}
	row := func(name string, n uint64) {
		rows = append(rows, []string{name, strconv.FormatUint(n, 10), fmt.Sprintf("%.1f%%", float64(n)/float64(max(sum, 1))*100)})
	}
	for _, name := range byCount(counts) {
		row(name, counts[name])
	}
	row("total", sum)
	return writeTable(a.Stdout, rows)
}

// watchRequests prints what was asked since last, every so often, until the context ends: that is
// how a user ends it, and no failure.
func (a *App) watchRequests(ctx context.Context, c *control.Client, format string, every time.Duration, last map[string]uint64) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now, err := mountRequests(ctx, c)
		if ctx.Err() != nil {
			return nil
		} else if err != nil {
			return err
		}
		if err := a.writeInterval(format, time.Now(), since(last, now)); err != nil {
			return err
		}
		last = now
	}
}

// since returns what came after last, without what did not occur. Another daemon may have taken
// the socket in between: it has counted from 0.
func since(last, now map[string]uint64) map[string]uint64 {
	diff := make(map[string]uint64)
	for name, n := range now {
		if n < last[name] {
			return now
		}
		if n > last[name] {
			diff[name] = n - last[name]
		}
	}
	return diff
}

func (a *App) writeInterval(format string, at time.Time, counts map[string]uint64) error {
	if format == formatJSON {
		at = at.Round(0)
		return json.NewEncoder(a.Stdout).Encode(requestCounts{Time: &at, Total: total(counts), Requests: counts})
	}
	var line strings.Builder
	fmt.Fprintf(&line, "%s %8d", at.Format(time.TimeOnly), total(counts))
	for _, name := range byCount(counts) {
		fmt.Fprintf(&line, "  %s %d", name, counts[name])
	}
	_, err := fmt.Fprintln(a.Stdout, line.String())
	return err
}
