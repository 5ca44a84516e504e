package app

import (
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool/control"
)

// addCompletion adds `croft completion` for the shells of Linux.
func addCompletion(root *cobra.Command) {
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() {
		if cmd.Name() != "completion" {
			continue
		}
		group(cmd)
		for _, shell := range cmd.Commands() {
			if shell.Name() == "powershell" {
				cmd.RemoveCommand(shell)
				continue
			}
			shell.Args = asUsage(cobra.NoArgs)
		}
	}
}

// complete registers a flag's completion. It panics when there is no such flag, or it has one: a programming error.
func complete(cmd *cobra.Command, flag string, fn cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, fn); err != nil {
		panic(err)
	}
}

// completePools offers the pools that daemons have, and directories.
func (a *App) completePools(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	var dirs []cobra.Completion
	if dir := a.Getenv(PoolEnv); dir != "" {
		dirs = append(dirs, dir)
	}
	found, _ := a.daemons(cmd.Context())
	for _, d := range found {
		dirs = append(dirs, d.info.Dir)
	}
	if len(dirs) > 0 {
		return dirs, cobra.ShellCompDirectiveDefault
	}
	return nil, cobra.ShellCompDirectiveFilterDirs
}

// completeVolumes offers the volumes of the pool that --pool or its absence names, but
// not those that are on the command line already; at most one when one is asked for.
func (a *App) completeVolumes(one bool) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if one && len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		given := make(map[string]bool)
		for _, name := range args {
			given[name] = true
		}
		var left []cobra.Completion
		for _, name := range a.volumeNames(cmd) {
			if !given[name] {
				left = append(left, name)
			}
		}
		return left, cobra.ShellCompDirectiveNoFileComp
	}
}

// completionDaemon returns the daemon of the pool that --pool or its absence names; nil when there is none.
func (a *App) completionDaemon(cmd *cobra.Command) *control.Client {
	p, _ := a.findDaemon(cmd.Context(), cmd.Flag("pool").Value.String())
	return p
}

// volumeNames asks the daemon. Without one it looks into the pool's directories: a key
// press must neither take the pool's lock nor start a recovery.
func (a *App) volumeNames(cmd *cobra.Command) []string {
	var names []string
	if p := a.completionDaemon(cmd); p != nil {
		defer p.Close()
		list, _ := p.Volumes(cmd.Context())
		for _, v := range list {
			names = append(names, v.Name)
		}
		return names
	}
	dir := cmd.Flag("pool").Value.String()
	if dir == "" {
		dir = a.Getenv(PoolEnv)
	}
	if dir == "" {
		return nil
	}
	for _, below := range []string{"volumes", "blocks"} {
		entries, _ := os.ReadDir(filepath.Join(dir, below))
		for _, e := range entries {
			names = append(names, e.Name())
		}
	}
	return names
}
