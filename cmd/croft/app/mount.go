package app

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	croftfs "github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/fs/transport"
)

const defaultLogFile = "/var/log/croft.log"

// place is a pool and where to mount it, both absolute and without links.
type place struct{ dir, mountpoint string }

// mountOptions are the flags of croft mount.
type mountOptions struct {
	pools     []string
	daemon    bool
	readyFD   int // in the background process: where to tell the foreground one; else -1
	logFile   string
	log       logOptions
	idleAfter time.Duration
	promise   promise
	tier      *choice
	wakeups   *choice
	keeper    string // keeperAuto, keeperNone or a socket
	keeperFD  int    // of a supervised daemon: its keeper; else -1
	watchdog  time.Duration
	restart   bool   // with a keeper elsewhere: as with keeperAuto, another daemon is started when one dies
	child     bool   // of the command that does that
	metrics   string // the address that Prometheus asks; "" for none

	node *nodeOptions // of croft node; else nil
}

// promise bounds the sum of the limits of a pool's volumes: pool.Options.
type promise struct {
	overcommit float64
	spare      float64 // percent
}

const (
	tierAuto = "auto"

	keeperAuto = "auto"
	keeperNone = "none"
)

func (a *App) mountCommand() *cobra.Command {
	o := newMountOptions()
	cmd := &cobra.Command{
		Use:   "mount --pool DIR... MOUNTPOINT...",
		Short: "Mount pools and serve them: all volumes, one directory each",
		Long: "Mount pools and serve them: all volumes, one directory each. The first mountpoint is for\n" +
			"the first --pool, and so on. It runs until all are unmounted, by umount(8) or by SIGTERM or\n" +
			"SIGINT; a mount that is in use then is detached, and served until its last user has gone. A\n" +
			"second signal does not wait for that. Under systemd it is a service of Type=notify.\n\n" +
			"The command runs the daemon as its child. When that dies, or does not answer for a minute, another\n" +
			"takes over: what is asked of the mounts waits for it, and no operation fails. SIGHUP has the daemon hand over to one of the program\n" +
			"as it is on the disk now: an upgrade. With --keeper SOCKET, of a `croft keeper`, there is no child:\n" +
			"SIGTERM hands over to the command that is started next, SIGINT unmounts.",
		Example: "  croft mount --pool /srv/croft /mnt/croft\n" +
			"  croft mount --daemon --pool /srv/a --pool /srv/b /mnt/a /mnt/b",
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveFilterDirs
		},
	}
	cmd.Flags().StringArrayVar(&o.pools, "pool", nil, "a pool's directory, once for each pool (default $"+PoolEnv+")")
	complete(cmd, "pool", a.completePools)
	o.flags(cmd)
	cmd.Args = func(_ *cobra.Command, args []string) error { return a.checkMountArgs(&o, args) }
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return a.runMount(cmd, &o, args) }
	return cmd
}

func newMountOptions() mountOptions {
	return mountOptions{
		log:     newLogOptions(),
		wakeups: newChoice(string(transport.WakeupsAuto), string(transport.WakeupsFast), string(transport.WakeupsPlain)),
		tier:    newChoice(tierAuto, string(croftfs.TierDaemon), string(croftfs.TierRead), string(croftfs.TierHold), string(croftfs.TierGate)),
	}
}

// flags adds the flags of the commands that mount.
func (o *mountOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.BoolVar(&o.daemon, "daemon", false, "return when all is mounted, and serve in the background")
	f.StringVar(&o.logFile, "log-file", "", "append the log to this file (default stderr; "+defaultLogFile+" with --daemon)")
	f.DurationVar(&o.idleAfter, "idle-after", 5*time.Second, "after that long without changes a volume is synced and recorded clean")
	f.Float64Var(&o.promise.overcommit, "overcommit", o.promise.overcommit, "how many times what a pool can hold the limits of its volumes may be in all; with 1\nevery volume can be filled; 0: any sum")
	f.Float64Var(&o.promise.spare, "spare", o.promise.spare, "percent of a pool's disk that --overcommit does not promise")
	f.IntVar(&o.readyFD, "ready-fd", -1, "")
	f.IntVar(&o.keeperFD, "keeper-fd", -1, "")
	f.DurationVar(&o.watchdog, "watchdog", time.Minute, "")
	f.BoolVar(&o.child, "restarted", false, "")
	for _, name := range []string{"ready-fd", "keeper-fd", "watchdog", "restarted"} {
		if err := f.MarkHidden(name); err != nil {
			panic(err) // there is no such flag
		}
	}
	f.StringVar(&o.keeper, "keeper", keeperAuto, "who keeps the mounts when the daemon dies, for the next: the command itself, which\nstarts it (auto); the keeper at that socket; nobody (none)")
	f.BoolVar(&o.restart, "restart", false, "with --keeper SOCKET, too, run the daemon as a child, and start another at once when it\ndies or does not answer for a minute: where who started the command would be slow")
	f.StringVar(&o.metrics, "metrics-address", "", "answer Prometheus at http://ADDRESS/metrics, and at /healthz whether the mounts answer, to\nwhoever reaches it: :9808, 127.0.0.1:9808 (default: at none)")
	o.log.flags(cmd)
	o.tier.flag(cmd, "tier", "", "what the kernel reads and writes by itself: nothing (daemon); files opened for\nreading only (read); files opened for writing as well (gate), whose system calls\nare held while their volume has less than 64 MiB of room; the same, but always\nheld (hold), for tests. auto is gate, read or daemon, the first that works here")
	o.wakeups.flag(cmd, "wakeups", "", "fast: while requests come fast, idle processors poll instead of sleeping;\nplain: they do not; auto is fast where sleeping costs most, in a virtual machine")
	for _, name := range []string{"idle-after", "overcommit", "spare", "metrics-address"} {
		complete(cmd, name, cobra.NoFileCompletions)
	}
}

// checkMountArgs refuses what is wrong whatever the host looks like.
func (a *App) checkMountArgs(o *mountOptions, mountpoints []string) error {
	if dir := a.Getenv(PoolEnv); len(o.pools) == 0 && dir != "" {
		o.pools = []string{dir}
	}
	switch {
	case len(o.pools) == 0:
		return usage("which pool? Name its directory with --pool DIR or $%s", PoolEnv)
	case len(mountpoints) != len(o.pools):
		return usage("%d pools and %d mountpoints: name one for each", len(o.pools), len(mountpoints))
	case o.keeper == "":
		return usage("--keeper: %s, %s, or the socket of a `croft keeper`", keeperAuto, keeperNone)
	case o.restart && o.keeper == keeperNone:
		return usage("--restart with --keeper %s: a mount that nobody keeps ends with its daemon", keeperNone)
	case o.watchdog < 0:
		return usage("--watchdog %s: how long a mount may not answer, or 0", o.watchdog)
	case o.promise.overcommit != 0 && !(o.promise.overcommit >= 1 && o.promise.overcommit <= pool.MaxOvercommit):
		return usage("--overcommit %v: it is from 1 to %d, or 0 for any sum of limits", o.promise.overcommit, pool.MaxOvercommit)
	case !(o.promise.spare >= 0 && o.promise.spare < 100):
		return usage("--spare %v: percent, from 0 to below 100", o.promise.spare)
	case o.idleAfter <= 0:
		return usage("--idle-after %s: it must be more than 0", o.idleAfter)
	}
	if err := checkMetricsAddress(o.metrics); err != nil {
		return err
	}
	if o.keeper != keeperAuto && o.keeper != keeperNone {
		socket, err := filepath.Abs(o.keeper)
		if err != nil {
			return err
		}
		o.keeper = socket
	}
	for _, path := range append(mountpoints, o.pools...) {
		if path == "" {
			return usage("an empty name of a directory")
		}
	}
	return nil
}

func (a *App) runMount(cmd *cobra.Command, o *mountOptions, args []string) (err error) {
	ready := func(error) {}
	if o.readyFD >= 0 {
		unix.CloseOnExec(o.readyFD)
		ready = tellParent(os.NewFile(uintptr(o.readyFD), "ready"))
		defer func() {
			if err != nil {
				ready(err)
			}
		}()
	}
	if err := a.requireRoot(); err != nil {
		return err
	}
	places, err := resolvePlaces(o.pools, args)
	if err != nil {
		return err
	}
	if o.daemon && o.logFile == "" {
		o.logFile = defaultLogFile
	}
	if o.logFile != "" {
		if o.logFile, err = resolveLogFile(o.logFile, places); err != nil {
			return err
		}
	}
	if o.daemon {
		return a.startDaemon(cmd.Context(), o, places)
	}
	log := a.Stderr
	if o.logFile != "" {
		file, err := openLog(o.logFile)
		if err != nil {
			return err
		}
		defer file.Close()
		log = file
	}
	logger, err := o.log.logger(log)
	if err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil { // keep no directory busy, least of all a mountpoint
		return fmt.Errorf("chdir /: %w", err)
	}
	if o.keeper == keeperAuto && o.keeperFD < 0 || o.keeper != keeperAuto && o.restart {
		return a.supervise(cmd.Context(), o, places, logger, ready)
	}
	d := &server{
		app:       a,
		log:       logger,
		idleAfter: o.idleAfter,
		promise:   o.promise,
		address:   o.metrics,
		ready:     ready,
		wakeups:   transport.Wakeups(o.wakeups.word),
	}
	if d.keeper, err = a.findKeeper(cmd.Context(), o, logger); err != nil {
		return err
	}
	if d.keeper != nil {
		defer d.keeper.Close()
	}
	if o.node != nil {
		d.serve = func() (func(), error) { return a.serveCSI(o.node, d) }
	}
	if d.supervised = o.keeperFD >= 0; d.supervised || o.child {
		a.notify = func(string) {} // the supervisor's business
	}
	if o.tier.word != tierAuto {
		d.tier = croftfs.Tier(o.tier.word)
	}
	raiseLimits(d.log)
	a.tuneRuntime(d.log)
	err = d.run(cmd.Context(), places)
	if err != nil && d.supervised && !errors.Is(err, errHandedOver) && !d.began {
		ready(err)
		return errTold
	}
	return err
}

func openLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, fmt.Errorf("log file: %w", err)
	}
	return f, nil
}

// resolvePlaces makes paths absolute, and refuses pools that are none and mountpoints that cannot be.
func resolvePlaces(pools, mountpoints []string) ([]place, error) {
	places := make([]place, 0, len(pools))
	for i := range pools {
		dir, err := resolvePool(pools[i])
		if err != nil {
			return nil, err
		}
		at, err := resolveParent(mountpoints[i])
		if err != nil {
			return nil, missingMountpoint(mountpoints[i], err)
		}
		places = append(places, place{dir, at})
	}
	for i, p := range places {
		for j, other := range places {
			switch {
			case i < j && p.dir == other.dir:
				return nil, usage("pool %s is named twice", p.dir)
			case i < j && (within(p.mountpoint, other.mountpoint) || within(other.mountpoint, p.mountpoint)):
				return nil, usage("mountpoints %s and %s: one hides the other", p.mountpoint, other.mountpoint)
			case within(other.dir, p.mountpoint):
				return nil, usage("mountpoint %s would hide the pool %s", p.mountpoint, other.dir)
			}
		}
		if err := checkMountpoint(p); err != nil {
			return nil, err
		}
	}
	return places, nil
}

// checkMountpoint wants a directory outside every pool. It asks nothing of a mount
// that is there already: that one may be dead.
func checkMountpoint(p place) error {
	for dir := p.mountpoint; ; dir = filepath.Dir(dir) {
		if dir != p.mountpoint { // the place itself is not touched
			if _, err := pool.ReadID(dir); err == nil {
				return usage("mountpoint %s is inside the pool %s: use a directory outside", p.mountpoint, dir)
			}
		}
		if dir == p.dir {
			return usage("mountpoint %s is inside the pool %s: use a directory outside", p.mountpoint, p.dir)
		}
		if dir == "/" {
			break
		}
	}
	stale, err := transport.StaleMounts(p.mountpoint)
	if err != nil {
		return err
	}
	if len(stale) > 0 {
		return nil // the pool knows whether it is its own
	}
	fi, err := os.Lstat(p.mountpoint)
	switch {
	case err != nil:
		return missingMountpoint(p.mountpoint, err)
	case fi.Mode()&os.ModeSymlink != 0:
		return fmt.Errorf("mountpoint %s is a symbolic link: name the directory itself", p.mountpoint)
	case !fi.IsDir():
		return fmt.Errorf("mountpoint %s is not a directory", p.mountpoint)
	}
	if _, err := pool.ReadID(p.mountpoint); err == nil {
		return usage("mountpoint %s is a pool itself: use another directory", p.mountpoint)
	}
	return nil
}

func missingMountpoint(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("mountpoint %s does not exist: mkdir -p %s", path, path)
	}
	return fmt.Errorf("mountpoint %s: %w", path, err)
}

// resolveParent makes a path absolute and resolves the links above its last part.
func resolveParent(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	parent, err := filepath.EvalSymlinks(filepath.Dir(abs))
	if err != nil {
		return "", err
	}
	return filepath.Join(parent, filepath.Base(abs)), nil
}

// within tells whether path is dir or below it; both are clean and absolute.
func within(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// resolveLogFile refuses a log on a mount that the process is to serve: it would wait for itself.
func resolveLogFile(path string, places []place) (string, error) {
	abs, err := resolveParent(path)
	if err != nil {
		return "", fmt.Errorf("log file: %w", err)
	}
	if target, err := filepath.EvalSymlinks(abs); err == nil {
		abs = target
	}
	for _, p := range places {
		if within(abs, p.mountpoint) {
			return "", usage("the log file %s is on the mount %s: use a file outside", abs, p.mountpoint)
		}
	}
	return abs, nil
}

// raiseLimits lifts the limit of file sizes, and lets the process open as many files as the kernel allows a process, or, where
// it may not raise its hard limit, as many as that.
func raiseLimits(log *zap.Logger) {
	// A caller's own limit of file sizes is the kernel's business; ours must not cut it.
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}); err != nil {
		log.Warn("the limit of file sizes cannot be lifted", zap.Error(err))
	}
	most, err := readNumber("/proc/sys/fs/nr_open")
	if err == nil {
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: most, Max: most})
	}
	if err == nil {
		return
	}
	var limit unix.Rlimit
	if getErr := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); getErr == nil {
		limit.Cur = limit.Max
		err = errors.Join(err, unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
	}
	log.Warn("the limit of open files cannot be raised further", zap.Uint64("limit", limit.Cur), zap.Error(err))
}

func readNumber(path string) (uint64, error) {
	body, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(body)), 10, 64)
}

// tellParent returns a function that tells the foreground process, once, how mounting went.
func tellParent(pipe io.WriteCloser) func(error) {
	told := false
	return func(err error) {
		if told {
			return
		}
		told = true
		message := daemonReady
		if err != nil {
			message = err.Error() + hint(err)
		}
		// When the foreground process has gone nobody wants to know.
		_, _ = io.WriteString(pipe, message)
		_ = pipe.Close()
	}
}
