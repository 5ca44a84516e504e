package app

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) checkCommand() *cobra.Command {
	var o pool.CheckOptions
	cmd := &cobra.Command{
		Use:   "check [VOLUME...]",
		Short: "Recount the disk and compare it with the ledger",
		Long: "Recount the disk and compare it with the ledger, mounted or not: the volumes that are\n" +
			"named, or all and the pool's own directories. The exit code is 3 when something was found,\n" +
			"also when --repair has mended it.",
		Args:              func(_ *cobra.Command, args []string) error { return names(args) },
		ValidArgsFunction: a.completeVolumes(false),
	}
	dir := a.poolFlag(cmd)
	cmd.Flags().BoolVar(&o.Repair, "repair", false, "set the ledgers to what is on the disk")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o.Volumes = args
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			r, err := p.Check(ctx, o)
			if err != nil {
				return err
			}
			if err := a.writeCheck(output.word, r); err != nil {
				return err
			}
			if !r.Clean() {
				return errFindings
			}
			return nil
		})
	}
	return cmd
}

func (a *App) writeCheck(format string, r pool.CheckResult) error {
	if format == formatJSON {
		if r.Volumes == nil {
			r.Volumes = []pool.VolumeCheck{}
		}
		return writeJSON(a.Stdout, r)
	}
	rows := [][]string{{"NAME", "RESULT", "LEDGER", "DISK", "INODES", "IDISK"}}
	var findings []string
	for _, v := range r.Volumes {
		result := "clean"
		switch {
		case v.Repaired:
			result = "repaired"
		case len(v.Findings) > 0:
			result = "found"
		}
		rows = append(rows, []string{
			v.Name, result,
			human(v.Ledger.Bytes), human(v.Disk.Bytes),
			fmt.Sprint(v.Ledger.Inodes), fmt.Sprint(v.Disk.Inodes),
		})
		for _, f := range v.Findings {
			findings = append(findings, v.Name+": "+f)
		}
	}
	for _, f := range r.Findings {
		findings = append(findings, "pool: "+f)
	}
	if err := writeTable(a.Stdout, rows); err != nil {
		return err
	}
	for _, f := range findings {
		if _, err := fmt.Fprintln(a.Stdout, printable(f)); err != nil {
			return err
		}
	}
	return nil
}
