package app

import (
	"context"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/croftfs/croft/fs/pool"
)

func (a *App) volumeCreateCommand() *cobra.Command {
	var size sizeValue
	var inodes inodesValue
	mode, owner := modeValue(0o755), ownerValue{}
	var block, wipe bool
	cmd := &cobra.Command{
		Use:   "create --size SIZE NAME",
		Short: "Create a volume",
		Example: "  croft volume create --pool /srv/croft --size 10Gi web-0\n" +
			"  croft volume create --size 1.5Gi --inodes 50000 --owner 1000:1000 --mode 0750 home\n" +
			"  croft volume create --size 20Gi --block vm-disk",
		Args:              oneName,
		ValidArgsFunction: cobra.NoFileCompletions,
	}
	dir := a.poolFlag(cmd)
	cmd.Flags().Var(&size, "size", "limit in bytes, such as 64Mi, 10Gi, 1T (required)")
	cmd.Flags().Var(&inodes, "inodes", "limit in inodes (default one for each 16Ki of the size, following it)")
	cmd.Flags().Var(&mode, "mode", "permission bits of the volume's root directory, octal")
	cmd.Flags().Var(&owner, "owner", "owner of the volume's root directory, UID:GID in numbers")
	cmd.Flags().BoolVar(&block, "block", false, "a raw block volume, which takes all of its space at once; `croft volume attach` gives it a device")
	wipeFlag(cmd, &wipe)
	for _, flag := range []string{"size", "inodes", "mode", "owner"} {
		complete(cmd, flag, cobra.NoFileCompletions)
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if size == 0 {
			return usage("volume %s: --size is missing: give it a limit, such as --size 10Gi", args[0])
		}
		o := pool.CreateOptions{Bytes: uint64(size), Wipe: wipe}
		if block {
			o.Kind = pool.KindBlock
			for _, flag := range []string{"inodes", "mode", "owner"} {
				if cmd.Flags().Changed(flag) {
					return usage("volume %s: a block volume has no --%s", args[0], flag)
				}
			}
		} else {
			o.Inodes, o.Mode, o.UID, o.GID = uint64(inodes), os.FileMode(mode), owner.uid, owner.gid
		}
		return a.withPool(cmd.Context(), *dir, func(ctx context.Context, p *access) error {
			_, err := p.Create(ctx, args[0], o)
			return err
		})
	}
	return cmd
}

// wipeFlag adds --wipe.
func wipeFlag(cmd *cobra.Command, wipe *bool) {
	cmd.Flags().BoolVar(wipe, "wipe", false, "overwrite its data before its space is freed, when it is deleted")
}

// modeValue is a flag with permission bits, set-gid and sticky; octal.
type modeValue os.FileMode

func (v *modeValue) Set(s string) error {
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "0o"), 8, 32)
	switch {
	case err != nil:
		return fmt.Errorf("mode %q is not octal: write it as 0755", s)
	case n == 0:
		return fmt.Errorf("mode 0 would shut everybody out but root: write 0700")
	case n&^0o3777 != 0:
		return fmt.Errorf("mode %q has bits that a directory does not: at most 3777", s)
	}
	mode := os.FileMode(n & 0o777)
	if n&0o2000 != 0 {
		mode |= os.ModeSetgid
	}
	if n&0o1000 != 0 {
		mode |= os.ModeSticky
	}
	*v = modeValue(mode)
	return nil
}

func (v *modeValue) Type() string { return "mode" }

func (v *modeValue) String() string { return fmt.Sprintf("%04o", uint32(os.FileMode(*v).Perm())) }

// ownerValue is a flag with two numbers.
type ownerValue struct{ uid, gid int }

func (v *ownerValue) Set(s string) error {
	u, g, ok := strings.Cut(s, ":")
	uid, errU := strconv.ParseUint(u, 10, 32)
	gid, errG := strconv.ParseUint(g, 10, 32)
	// 2^32-1 is no id: chown(2) takes it for "unchanged".
	if !ok || errU != nil || errG != nil || uid == math.MaxUint32 || gid == math.MaxUint32 {
		return fmt.Errorf("owner %q is not UID:GID in numbers, such as 1000:1000", s)
	}
	v.uid, v.gid = int(uid), int(gid)
	return nil
}

func (v *ownerValue) Type() string   { return "UID:GID" }
func (v *ownerValue) String() string { return fmt.Sprintf("%d:%d", v.uid, v.gid) }
