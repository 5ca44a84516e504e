package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/fs/state"
	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// Options configure a Pool.
type Options struct {
	// Dir is the pool's directory.
	Dir string
	// IdleAfter is how long a volume must not have changed before it is synced
	// and recorded clean. Default 5 s.
	IdleAfter time.Duration
	// Overcommit bounds the sum of all limits, and of what snapshots use: that many times what the pool can hold. With 1 every volume can be
	// filled to its limit. 0, the default, is for any sum.
	Overcommit float64
	// Spare is the share of the disk, from 0 to below 1, that is not for volumes. Default 0.
	Spare float64
	// Logger takes what happens in the background. Default: none.
	Logger *zap.Logger
	// Keeper returns who keeps what is to outlive this process, for the pool of that
	// id. Default: nobody.
	Keeper func(poolID string) Keeper

	// Bind mounts a volume's root directory on a target: transport.Bind, which is the default. A daemon that others are
	// to take over from must do that in another process: one that waits for its own mount does not end.
	Bind func(ctx context.Context, source, target string, flags []string) error

	// Notify is transport.Options.Notify, with the same default.
	Notify func(dev int, message []byte) error

	// RequestStep, when set, is called between the steps of requests that cannot be done twice, so
	// that a test can end the process there: fs.Options.Step and transport.Options.Step.
	RequestStep func(opcode uint32, step string)

	// step is called between the steps of creation, deletion and resizing,
	// so that a test can end the process there.
	step func(name string)
}

// EnsureDefaults puts the default where a field is zero.
func (o *Options) EnsureDefaults() {
	if o.IdleAfter == 0 {
		o.IdleAfter = 5 * time.Second
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.Bind == nil {
		o.Bind = func(_ context.Context, source, target string, flags []string) error {
			return transport.Bind(source, target, flags)
		}
	}
	if o.RequestStep == nil {
		o.RequestStep = func(uint32, string) {}
	}
	if o.step == nil {
		o.step = func(string) {}
	}
}

// Validate reports every fault of the options, after EnsureDefaults.
func (o *Options) Validate() error {
	var faults []error
	if o.Dir == "" {
		faults = append(faults, fmt.Errorf("%w: no pool directory given", ErrInvalid))
	}
	if o.IdleAfter < 0 {
		faults = append(faults, fmt.Errorf("%w: idle time %s is negative", ErrInvalid, o.IdleAfter))
	}
	if o.Overcommit != 0 && !(o.Overcommit >= 1 && o.Overcommit <= MaxOvercommit) {
		faults = append(faults, fmt.Errorf("%w: overcommit %v: it is from 1 to %d, or 0 for any sum of limits", ErrInvalid, o.Overcommit, MaxOvercommit))
	}
	if !(o.Spare >= 0 && o.Spare < 1) {
		faults = append(faults, fmt.Errorf("%w: spare share %v: it is from 0 to below 1", ErrInvalid, o.Spare))
	}
	return errors.Join(faults...)
}

// Pool is an open pool. Its methods may be called concurrently.
type Pool struct {
	id, dir, fstype string
	log             *zap.Logger
	idleAfter       time.Duration
	bootID          string
	overcommit      float64
	spare           float64
	step            func(name string)
	requestStep     func(opcode uint32, step string)
	bind            func(ctx context.Context, source, target string, flags []string) error
	notify          func(dev int, message []byte) error

	lock, claim             *os.File
	root                    *os.File
	volumesDir, orphansDir  *os.File
	snapshotsDir, blocksDir *os.File
	trash                   trash
	rule                    quota.Rule
	store                   *meta.Store
	fs                      *fs.FS
	names                   nameLocks
	mount                   mount
	keeper                  Keeper // nil when nobody keeps anything
	state                   *state.Region
	kept                    *kept           // nil when there was nothing to go on with
	ctx                     context.Context // ends with Close
	cancel                  context.CancelFunc
	background              sync.WaitGroup
	counting                chan struct{} // holds a token for each recount that may run at a time
	checkpointing, closing  sync.Mutex    // one at a time each

	mu      sync.Mutex         // guards what follows
	volumes map[string]*volume // those that are recorded as ready
	snaps   map[string]*snap   // likewise
	copying map[*operation]struct{}
	closed  bool
	// promised is what is committed and not recorded yet, in bytes.
	promised  uint64
	published publications
}

// volume is a volume of an open pool.
type volume struct {
	name   string
	ledger *quota.Ledger
	// record is what is stored; guarded by the volume's name lock for writing and Pool.mu for both.
	record meta.Volume
	idle   idleState

	missing bool   // its directory is not there; never served
	file    fileID // of a block volume; zero when it is none
	// used tells that it was in use in this boot when the pool was last closed.
	used  bool
	count *count
}

// Open opens the pool in o.Dir and finishes what a crash has left: half-made
// volumes are taken back, half-deleted ones deleted. Volumes that were in use at
// the crash are recounted in the background. ErrInUse when another process has
// the pool, ErrNotPool, ErrNewerFormat.
func Open(o Options) (*Pool, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	id, err := ReadID(dir)
	if err != nil {
		return nil, err
	}
	p := &Pool{
		id:        id,
		dir:       dir,
		log:       o.Logger.With(zap.String("pool", dir)),
		idleAfter: o.IdleAfter,
		step:      o.step,

		overcommit:  o.Overcommit,
		spare:       o.Spare,
		requestStep: o.RequestStep,
		bind:        o.Bind,
		notify:      o.Notify,
		counting:    make(chan struct{}, countsAtATime),
		volumes:     make(map[string]*volume),
		snaps:       make(map[string]*snap),
		copying:     make(map[*operation]struct{}),
		published:   make(publications),
	}
	if o.Keeper != nil {
		p.keeper = o.Keeper(id)
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	if err := p.open(); err != nil {
		return nil, errors.Join(fmt.Errorf("pool %s: %w", dir, err), p.release())
	}
	p.trash.wake()
	p.background.Go(p.reapTrash)
	p.background.Go(p.watchIdle)
	p.startCounts()
	return p, nil
}

func (p *Pool) open() (err error) {
	if p.lock, err = lockFile(filepath.Join(p.dir, lockName)); err != nil {
		return err
	}
	begun := time.Now()
	files, err := p.take()
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err := p.openClaim(takeFrom(files, keptClaim)); err != nil {
		return err
	}
	open := func(name string) *os.File {
		if err != nil {
			return nil
		}
		var d *os.File
		d, err = os.OpenFile(filepath.Join(p.dir, name), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
		return d
	}
	// A pool of an older version has no directory of block volumes.
	if err := os.Mkdir(filepath.Join(p.dir, blocksName), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	p.root, p.volumesDir, p.orphansDir, p.trash.dir = open("."), open(volumesName), open(orphansName), open(trashName)
	p.snapshotsDir, p.blocksDir = open(snapshotName), open(blocksName)
	poolDir := open(".") // belongs to the FS
	if err != nil {
		return err
	}
	p.trash.init(p.log)
	if p.fstype, _, err = fsType(int(p.root.Fd())); err == nil {
		p.rule, err = quota.RuleFor(int(p.root.Fd()))
	}
	if err == nil {
		p.bootID, err = readBootID()
	}
	if err != nil {
		return errors.Join(err, poolDir.Close())
	}
	// Beside each other: everybody waits for a daemon that takes over.
	var opening errgroup.Group
	var found records
	opening.Go(func() (err error) {
		found, err = p.openStore()
		return err
	})
	err = p.openState(files, begun)
	if err == nil {
		p.fs, err = fs.New(fs.Options{PoolDir: poolDir, Rule: p.rule, State: p.state, Step: p.requestStep, Waits: p.mount.waits, Logger: p.log})
	}
	storeErr := opening.Wait()
	if err != nil {
		return errors.Join(err, poolDir.Close())
	}
	switch {
	case errors.Is(storeErr, meta.ErrNewerFormat):
		return fmt.Errorf("%w: %w", ErrNewerFormat, storeErr)
	case errors.Is(storeErr, meta.ErrInUse):
		return fmt.Errorf("%w: %w", ErrInUse, storeErr)
	case storeErr != nil:
		return storeErr
	}
	if err := p.recover(found); err != nil {
		return err
	}
	if err := p.fs.Restore(); err != nil {
		p.log.Error("not all could be taken over as it was", zap.Error(err))
	}
	return nil
}

func readBootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// lockFile takes the pool's lock and writes who has it. The lock ends with the process.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock: %w", err)
		}
		if holder, _ := os.ReadFile(path); len(holder) > 0 {
			return nil, fmt.Errorf("%w by process %s", ErrInUse, strings.TrimSpace(string(holder)))
		}
		return nil, ErrInUse
	}
	if err := f.Truncate(0); err == nil {
		_, err = fmt.Fprintf(f, "%d\n", os.Getpid())
		if err != nil && !errors.Is(err, unix.ENOSPC) { // a full disk: the lock holds without the name
			f.Close()
			return nil, fmt.Errorf("lock: %w", err)
		}
	}
	return f, nil
}

// Close takes the mount away (lazily: whoever uses it then gets ENOTCONN),
// records the use of every volume that it knows, and lets go of the pool. What
// it could not finish, the next Open does.
func (p *Pool) Close() error {
	p.closing.Lock()
	defer p.closing.Unlock()
	if !p.shut() {
		return nil
	}
	err := p.endMount()
	if conn, _ := p.mount.get(); conn != nil && p.keeper != nil {
		err = errors.Join(err, p.keeper.Drop())
	}
	p.cancel()
	p.background.Wait()
	return errors.Join(err, p.checkpoint(p.all()), p.release())
}

// shut has calls that come fail with ErrClosed; false when they do already.
func (p *Pool) shut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	was := p.closed
	p.closed = true
	return !was
}

// release closes what open has opened.
func (p *Pool) release() error {
	var errs []error
	p.cancel()
	if p.fs != nil {
		errs = append(errs, p.fs.Close())
	}
	if p.store != nil {
		errs = append(errs, p.store.Close())
	}
	if p.state != nil {
		errs = append(errs, p.state.Close())
	}
	if p.kept != nil {
		p.kept.close()
	}
	for _, f := range []*os.File{p.trash.dir, p.orphansDir, p.volumesDir, p.snapshotsDir, p.blocksDir, p.root, p.claim, p.lock} { // the lock last
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Info describes the pool.
func (p *Pool) Info() Info {
	i := Info{ID: p.id, Dir: p.dir, Mountpoint: p.mount.point(), Filesystem: p.fstype, PID: os.Getpid()}
	if i.Mountpoint != "" {
		i.Tier, i.WhyNotBetter = p.mount.describeTier()
		i.TakeOvers, i.TakeOver = p.mount.describeTakeOvers()
	}
	return i
}

// find returns an existing volume.
func (p *Pool) find(name string) (*volume, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	v := p.volumes[name]
	if v == nil {
		return nil, fmt.Errorf("volume %s: %w", name, ErrNotFound)
	}
	return v, nil
}

// all returns the volumes by name.
func (p *Pool) all() []*volume {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := make([]*volume, 0, len(p.volumes))
	for _, v := range p.volumes {
		all = append(all, v)
	}
	slices.SortFunc(all, func(a, b *volume) int { return strings.Compare(a.name, b.name) })
	return all
}

func (p *Pool) describe(v *volume) Volume { return p.describeWith(v, p.findLoops(v)) }

// describeWith is describe for who has looked for loop devices already.
func (p *Pool) describeWith(v *volume, loops map[fileID]loop) Volume {
	record := p.recordOf(v)
	p.fs.Refresh(v.name)
	d := Volume{
		Name:    v.name,
		State:   StateReady,
		Limit:   v.ledger.Limit(),
		Used:    v.ledger.Used(),
		Created: record.Created,
		Open:    p.fs.OpenFiles(v.name),
		Kind:    kindOf(record.Block),
		Wipe:    record.Wipe,
		Labels:  record.Labels,
		Source:  record.Source,
		Device:  loops[v.file].device,
	}
	for _, r := range p.publicationsOf(v.name) {
		d.Published = append(d.Published, r.Target)
	}
	d.Gated, d.Gatings = p.fs.Gated(v.name)
	switch {
	case v.missing:
		d.State = StateMissing
	case !v.count.done():
		d.State = StateRecounting
	case v.count.failure() != nil:
		d.State = StateFailed
	case !d.Used.Fits(d.Limit):
		d.State = StateOverLimit
	}
	return d
}

// Volume describes a volume. ErrNotFound when there is none of that name.
func (p *Pool) Volume(_ context.Context, name string) (Volume, error) {
	v, err := p.find(name)
	if err != nil {
		return Volume{}, err
	}
	return p.describe(v), nil
}

// Volumes describes every volume, by name.
func (p *Pool) Volumes(context.Context) ([]Volume, error) {
	all := p.all()
	loops := p.findLoops(all...)
	list := make([]Volume, 0, len(all))
	for _, v := range all {
		list = append(list, p.describeWith(v, loops))
	}
	return list, nil
}

// nameLocks serialises the lifecycle calls of one name.
type nameLocks struct {
	mu   sync.Mutex // guards held and every nameLock.users
	held map[string]*nameLock
}

type nameLock struct {
	sync.Mutex
	users int
}

// take locks a name; call what it returns to unlock it.
func (l *nameLocks) take(name string) (unlock func()) {
	l.mu.Lock()
	if l.held == nil {
		l.held = make(map[string]*nameLock)
	}
	n := l.held[name]
	if n == nil {
		n = new(nameLock)
		l.held[name] = n
	}
	n.users++
	l.mu.Unlock()
	n.Lock()
	return func() {
		n.Unlock()
		l.mu.Lock()
		defer l.mu.Unlock()
		if n.users--; n.users == 0 {
			delete(l.held, name)
		}
	}
}
