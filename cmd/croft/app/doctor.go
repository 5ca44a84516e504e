package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/quota"
)

// diagnosis is what the doctor has to say.
type diagnosis struct {
	Kernel string         `json:"kernel"`
	Dir    string         `json:"dir,omitempty"`        // that was tested
	FS     string         `json:"filesystem,omitempty"` // of Dir
	Checks []pool.Feature `json:"checks"`
	Tier   fs.Tier        `json:"tier"`
	WhyNot []string       `json:"why_not_more"` // reasons for no better tier
}

func (d *diagnosis) add(name, need string, err error, detail string) bool {
	f := pool.Feature{Name: name, Need: need, OK: err == nil, Detail: detail}
	if err != nil {
		f.Detail = err.Error()
	}
	d.Checks = append(d.Checks, f)
	return f.OK
}

// missing names the required checks that failed.
func (d *diagnosis) missing() []string {
	var names []string
	for _, c := range d.Checks {
		if c.Need == pool.Required && !c.OK {
			names = append(names, c.Name)
		}
	}
	return names
}

func (a *App) doctorCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor [DIR]",
		Short: "Show what this host can do, and why not more",
		Long: "Show what this host can do, and why not more: the kernel, privileges, FUSE, and the\n" +
			"filesystem of DIR, a pool or a directory to make one of. Without DIR it is the pool of\n" +
			"--pool, $" + PoolEnv + " or, when just one is mounted, that one. The exit code is 1 when\n" +
			"something required is missing.",
		Args: asUsage(cobra.MaximumNArgs(1)),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	dir := a.poolFlag(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 && *dir != "" {
			return usage("name a directory or --pool, not both")
		}
		if *dir != "" {
			if _, err := pool.ReadID(*dir); err != nil {
				return err
			}
			args = []string{*dir}
		}
		d := a.diagnose(cmd.Context(), append(args, a.doctorDir(cmd.Context()))[0])
		if err := a.writeDiagnosis(output.word, d); err != nil {
			return err
		}
		if missing := d.missing(); len(missing) > 0 {
			return fmt.Errorf("this is required, and missing: %s", strings.Join(missing, "; "))
		}
		return nil
	}
	return cmd
}

// doctorDir returns the pool that commands without --pool work on, or "".
func (a *App) doctorDir(ctx context.Context) string {
	if dir := a.Getenv(PoolEnv); dir != "" {
		return dir
	}
	if found, _ := a.daemons(ctx); len(found) == 1 {
		return found[0].info.Dir
	}
	return ""
}

func (a *App) diagnose(ctx context.Context, dir string) diagnosis {
	d := diagnosis{Kernel: kernelRelease(), Dir: dir, Tier: fs.TierDaemon}
	d.add("root", pool.Required, a.requireRoot(), "")
	d.checkPrivileges()
	d.add("/dev/fuse", pool.Required, openFuse(), "")
	a.checkKeeper(&d)
	bits, err := negotiated(ctx)
	passthrough := false
	if d.add("FUSE mount", pool.Required, err, "") {
		passthrough = d.checkFuse(bits)
	}
	var holds error // why writes cannot be held in dir
	if dir == "" {
		holds = errors.New("whether writes can be held depends on the pool: name it with --pool, or a directory")
	} else {
		var features []pool.Feature
		d.FS, features, err = pool.Probe(dir)
		d.Checks = append(d.Checks, features...)
		if err != nil {
			d.add("filesystem of "+dir, pool.Required, err, "")
		}
		holds = whyNotHeld(features, err)
	}
	d.Tier, d.WhyNot = bestTier(passthrough, holds)
	return d
}

// whyNotHeld returns why writes cannot be held, by what Probe says.
func whyNotHeld(features []pool.Feature, err error) error {
	for _, f := range features {
		if f.Name == pool.HoldingWrites && f.OK {
			return nil
		} else if f.Name == pool.HoldingWrites {
			return errors.New(f.Detail)
		}
	}
	return err
}

// bestTier returns the best tier, and what stands against a better one.
func bestTier(passthrough bool, holds error) (tier fs.Tier, whyNot []string) {
	tier, whyNot = fs.TierGate, []string{}
	if holds != nil {
		tier, whyNot = fs.TierRead, append(whyNot, holds.Error())
	}
	if !passthrough {
		tier, whyNot = fs.TierDaemon, append([]string{pool.ErrNoPassthrough.Error()}, whyNot...)
	}
	return tier, whyNot
}

func kernelRelease() string {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "unknown: " + err.Error()
	}
	return unix.ByteSliceToString(u.Release[:])
}

// privileges are the capabilities that serving takes, and for what.
var privileges = []privilege{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "mounting, trusted extended attributes, holding writes"},
	{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH", "opening files by handle"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "serving every user's files"},
	{unix.CAP_CHOWN, "CAP_CHOWN", "owners of files"},
	{unix.CAP_FOWNER, "CAP_FOWNER", "modes and times of files"},
	{unix.CAP_FSETID, "CAP_FSETID", "set-id bits"},
	{unix.CAP_LEASE, "CAP_LEASE", "finding out which files are mapped"},
	{unix.CAP_SETUID, "CAP_SETUID", "creating as the caller"},
	{unix.CAP_SETGID, "CAP_SETGID", "creating as the caller"},
	{unix.CAP_SETPCAP, "CAP_SETPCAP", "serving threads keep their capabilities"},
	{unix.CAP_MKNOD, "CAP_MKNOD", "device nodes"},
}

// gatePrivileges are those without which writes are held less well.
var gatePrivileges = []privilege{
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "telling a held read from a write"},
	{unix.CAP_LINUX_IMMUTABLE, "CAP_LINUX_IMMUTABLE", "the brake on ext4"},
	{unix.CAP_SYS_NICE, "CAP_SYS_NICE", "a prompt sampler"},
	{unix.CAP_KILL, "CAP_KILL", "SIGBUS to who stores into a full volume"},
}

type privilege struct {
	bit  uint
	name string
	why  string
}

func (d *diagnosis) checkPrivileges() {
	d.add("capabilities", pool.Required, lacks(privileges), "")
	d.add("capabilities for the gate", pool.Optional, lacks(gatePrivileges), "")
}

// lacks says which of the privileges this process has not.
func lacks(privileges []privilege) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	err := unix.Capget(&header, &data[0])
	var lacking []string
	for _, p := range privileges {
		if data[p.bit/32].Effective&(1<<(p.bit%32)) == 0 {
			lacking = append(lacking, p.name+" ("+p.why+")")
		}
	}
	if err == nil && len(lacking) > 0 {
		err = fmt.Errorf("lacking %s", strings.Join(lacking, ", "))
	}
	return err
}

func openFuse() error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: modprobe fuse", err)
	case err != nil:
		return err
	}
	return unix.Close(fd)
}

// fuseFeatures are FUSE_INIT flags of include/uapi/linux/fuse.h that make a difference.
var fuseFeatures = []struct {
	bit  uint
	name string
	lack string // what it means to be without
}{
	{37, "PASSTHROUGH", "all reads and writes go through the daemon (Linux 6.9)"},
	{28, "HANDLE_KILLPRIV_V2", "one more request for each write"},
	{18, "PARALLEL_DIROPS", "one lookup at a time in a directory"},
	{13, "READDIRPLUS", "one more request for each listed file"},
	{20, "POSIX_ACL", "no access control lists"},
	{6, "DONT_MASK", "default ACLs come out wrong"},
	{22, "MAX_PAGES", "requests of 128 KiB at most"},
	{25, "EXPLICIT_INVAL_DATA", "cached data is dropped more often"},
	{36, "DIRECT_IO_ALLOW_MMAP", "no shared mappings beside direct I/O"},
	{39, "HAS_RESEND", "requests under way are lost when the daemon dies"},
	{40, "ALLOW_IDMAP", "no idmapped mounts, as for pods with user namespaces (Linux 6.12)"},
}

// checkFuse reports what the kernel has agreed to, and whether passthrough is part of it.
func (d *diagnosis) checkFuse(bits uint64) (passthrough bool) {
	for i, f := range fuseFeatures {
		var err error
		if bits&(1<<f.bit) == 0 {
			err = errors.New(f.lack)
		}
		if ok := d.add("FUSE "+f.name, pool.Optional, err, ""); i == 0 {
			passthrough = ok
		}
	}
	return passthrough
}

// negotiated mounts a filesystem without volumes on a temporary directory for a moment
// and returns the FUSE_INIT flags that came of it. Nobody uses the mount, this
// process least of all, and nothing is left of it.
func negotiated(ctx context.Context) (bits uint64, err error) {
	dir, err := os.MkdirTemp("", "croft-doctor-")
	if err != nil {
		return 0, err
	}
	// Not RemoveAll: should the mount still be there it must not be entered.
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	anchor, err := os.Open("/")
	if err != nil {
		return 0, err
	}
	empty, err := fs.New(fs.Options{PoolDir: anchor, Rule: quota.Rule{Block: 4096}})
	if err != nil {
		return 0, errors.Join(err, anchor.Close())
	}
	defer func() { err = errors.Join(err, empty.Close()) }()
	conn, err := transport.Mount(empty, transport.Options{Name: "croft-doctor", Mountpoint: dir})
	if err != nil {
		return 0, err
	}
	served := make(chan error, 1)
	go func() { served <- conn.Serve() }()
	bits = conn.Capabilities()
	err = conn.Unmount(false)
	if errors.Is(err, unix.EBUSY) { // somebody looks into everything that is mounted
		err = conn.Unmount(true)
	}
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	select {
	case err := <-served:
		return bits, err
	case <-ctx.Done():
		return 0, fmt.Errorf("the test mount did not end: %w", ctx.Err())
	}
}

func (a *App) writeDiagnosis(format string, d diagnosis) error {
	if format == formatJSON {
		return writeJSON(a.Stdout, d)
	}
	fmt.Fprintf(a.Stdout, "kernel: %s\n", d.Kernel)
	if d.Dir != "" {
		fmt.Fprintf(a.Stdout, "directory: %s (%s)\n", d.Dir, d.FS)
	}
	fmt.Fprintf(a.Stdout, "tier: %s\n", d.Tier)
	for _, reason := range d.WhyNot {
		fmt.Fprintf(a.Stdout, "  - %s\n", reason)
	}
	fmt.Fprintln(a.Stdout)
	rows := [][]string{{"CHECK", "NEED", "RESULT", "DETAIL"}}
	for _, c := range d.Checks {
		result := "ok"
		switch {
		case !c.OK && c.Need == pool.Required:
			result = "MISSING"
		case !c.OK:
			result = "no"
		}
		rows = append(rows, []string{c.Name, c.Need, result, c.Detail})
	}
	return writeTable(a.Stdout, rows)
}
