package app

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

const (
	formatTable = "table"
	formatJSON  = "json"
)

// choice is a flag that takes one of several words; the first is the default.
type choice struct {
	words []string
	word  string
}

func newChoice(words ...string) *choice { return &choice{words: words, word: words[0]} }

func (c *choice) Set(s string) error {
	for _, w := range c.words {
		if s == w {
			c.word = s
			return nil
		}
	}
	return fmt.Errorf("it must be one of %s", strings.Join(c.words, ", "))
}

func (c *choice) Type() string   { return strings.Join(c.words, "|") }
func (c *choice) String() string { return c.word }

// flag adds c to cmd, with its completion.
func (c *choice) flag(cmd *cobra.Command, name, short, help string) {
	cmd.Flags().VarP(c, name, short, help)
	complete(cmd, name, cobra.FixedCompletions(c.words, cobra.ShellCompDirectiveNoFileComp))
}

// outputFlag adds -o.
func outputFlag(cmd *cobra.Command) *choice {
	c := newChoice(formatTable, formatJSON)
	c.flag(cmd, "output", "o", "form of the output")
	return c
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// writeTable writes rows in columns; the first row is the head. The cells' control
// characters are shown and not sent to the terminal.
func writeTable(w io.Writer, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(t, "\t")
			}
			fmt.Fprint(t, printable(cell))
		}
		fmt.Fprintln(t)
	}
	return t.Flush()
}

// printable escapes what a terminal or a table would take for more than text.
func printable(s string) string {
	q := fmt.Sprintf("%q", s)
	return strings.ReplaceAll(strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`), `\\`, `\`)
}

func writeVolumes(w io.Writer, format string, volumes []pool.Volume) error {
	if format == formatJSON {
		if volumes == nil {
			volumes = []pool.Volume{}
		}
		return writeJSON(w, volumes)
	}
	rows := [][]string{{"NAME", "SIZE", "USED", "USE%", "INODES", "IUSED", "STATE"}}
	for _, v := range volumes {
		inodes, used, state := fmt.Sprint(v.Limit.Inodes), fmt.Sprint(v.Used.Inodes), string(v.State)
		if v.Kind == pool.KindBlock {
			inodes, used = "-", "-"
			state += ", block"
			if v.Device != "" {
				state += " " + v.Device
			}
		}
		rows = append(rows, []string{
			v.Name,
			human(v.Limit.Bytes), human(v.Used.Bytes), percent(v.Used.Bytes, v.Limit.Bytes),
			inodes, used, state,
		})
	}
	return writeTable(w, rows)
}

func writeVolume(w io.Writer, format string, v pool.Volume) error {
	if format == formatJSON {
		return writeJSON(w, v)
	}
	return writeVolumes(w, format, []pool.Volume{v})
}
