package csi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"

	"github.com/croftfs/croft/fs/pool"
)

const (
	// DriverName is what the CO calls the driver.
	DriverName = "csi.croft.dev"
	// TopologyKey is the key of the topology segment that says on which node a volume is.
	TopologyKey = "topology.croft.dev/node"
)

// Pool is what the driver needs of a pool; *pool.Pool has it. Its methods are called concurrently.
type Pool interface {
	Info() pool.Info
	Capacity(ctx context.Context) (pool.Capacity, error)

	Create(ctx context.Context, name string, o pool.CreateOptions) (pool.Volume, error)
	Clone(ctx context.Context, name string, o pool.CloneOptions) (pool.Volume, error)
	Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error)
	Delete(ctx context.Context, name string, o pool.DeleteOptions) error
	Volume(ctx context.Context, name string) (pool.Volume, error)
	Volumes(ctx context.Context) ([]pool.Volume, error)

	CreateSnapshot(ctx context.Context, name string, o pool.SnapshotOptions) (pool.Snapshot, error)
	DeleteSnapshot(ctx context.Context, name string) error
	Snapshot(ctx context.Context, name string) (pool.Snapshot, error)
	Snapshots(ctx context.Context) ([]pool.Snapshot, error)

	Publish(ctx context.Context, name string, o pool.PublishOptions) error
	Unpublish(ctx context.Context, name, target string) error
	Publications(ctx context.Context, name string) ([]pool.Publication, error)
}

// NamedPool is a pool, and what StorageClasses call it on this node.
type NamedPool struct {
	Name string
	Pool Pool
}

// Options configure a Driver.
type Options struct {
	// NodeID is the node's name in the cluster: 1 to 63 letters, digits, dots, dashes and underscores, as the value of
	// a topology segment may be (CSI spec, message Topology).
	NodeID string
	// Version is the program's, in GetPluginInfo.
	Version string
	// Pools are the node's, each with a name of its own.
	Pools []NamedPool
	// MaxVolumes is how many volumes the CO may publish on the node; 0 leaves that to the CO.
	MaxVolumes int64
	// TargetRoots are directories of which one must be above a target path. Default: a target may be anywhere.
	TargetRoots []string
	// Alive returns nil when the mounts of all pools answer, and does not hang. Default: they are not asked.
	Alive func(ctx context.Context) error
	// Logger takes each call, at debug level, and those that fail by the driver's fault as errors. Default: none.
	Logger *zap.Logger
}

// EnsureDefaults puts the default where a field is zero.
func (o *Options) EnsureDefaults() {
	if o.Alive == nil {
		o.Alive = func(context.Context) error { return nil }
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
}

var segmentValue = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$`)

// Validate reports every fault of the options, after EnsureDefaults.
func (o *Options) Validate() error {
	var faults []error
	if !segmentValue.MatchString(o.NodeID) {
		faults = append(faults, fmt.Errorf("node id %q: 1 to 63 letters, digits, '.', '-' and '_' are possible, with a letter or a digit at both ends", o.NodeID))
	}
	if o.MaxVolumes < 0 {
		faults = append(faults, fmt.Errorf("%d volumes at most: it is 0 or more", o.MaxVolumes))
	}
	names := make(map[string]bool)
	for _, p := range o.Pools {
		if err := pool.CheckName(p.Name); err != nil {
			faults = append(faults, fmt.Errorf("name of a pool: %w", err))
		}
		if names[p.Name] {
			faults = append(faults, fmt.Errorf("two pools are called %q", p.Name))
		}
		names[p.Name] = true
	}
	return errors.Join(faults...)
}

// Driver is the CSI plugin of a node.
type Driver struct {
	Options
	locks  locks
	copies copies
	stop   context.CancelFunc

	csipb.UnimplementedIdentityServer
	csipb.UnimplementedControllerServer
	csipb.UnimplementedNodeServer
}

// New returns a Driver, which Register has served. Close ends it.
func New(o Options) (*Driver, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	d := &Driver{Options: o}
	d.copies.log = o.Logger
	d.copies.ctx, d.stop = context.WithCancel(context.Background())
	return d, nil
}

// Close ends the copies that are under way, and waits for that. No call is under way any more.
func (d *Driver) Close() {
	d.stop()
	d.copies.running.Wait()
}

// poolOf returns the pool that goes by an id or a name; nil when it is not here.
func (d *Driver) poolOf(word string) Pool {
	for _, p := range d.Pools {
		if p.Pool.Info().ID == word || p.Name == word {
			return p.Pool
		}
	}
	return nil
}

// nameOf returns what a pool is called on this node.
func (d *Driver) nameOf(p Pool) string {
	for _, named := range d.Pools {
		if named.Pool == p {
			return named.Name
		}
	}
	return ""
}

// locate returns the pool and the name of what has an id: missing, wrapped, when it cannot be one, and ErrElsewhere.
func (d *Driver) locate(id string, missing error) (Pool, string, error) {
	if id == "" {
		return nil, "", fmt.Errorf("%w: no id is given", ErrArgument)
	}
	word, name, ok := splitID(id)
	if !ok {
		return nil, "", fmt.Errorf("%q: %w", id, missing)
	}
	p := d.poolOf(word)
	if p == nil {
		return nil, "", fmt.Errorf("%q: %w", id, ErrElsewhere)
	}
	return p, name, nil
}

// volume finds a volume by its id, also an ephemeral one.
func (d *Driver) volume(ctx context.Context, id string) (Pool, pool.Volume, error) {
	if p, v, err := d.ephemeral(ctx, id); err == nil {
		return p, v, nil
	} else if !errors.Is(err, pool.ErrNotFound) {
		return nil, pool.Volume{}, err
	}
	p, name, err := d.locate(id, pool.ErrNotFound)
	if err != nil {
		return nil, pool.Volume{}, err
	}
	v, err := p.Volume(ctx, name)
	return p, v, err
}

// findVolume finds what has that name in any pool.
func (d *Driver) findVolume(ctx context.Context, name string) (Pool, pool.Volume, error) {
	for _, p := range d.Pools {
		v, err := p.Pool.Volume(ctx, name)
		if !errors.Is(err, pool.ErrNotFound) {
			return p.Pool, v, err
		}
	}
	return nil, pool.Volume{}, fmt.Errorf("volume %s: %w", name, pool.ErrNotFound)
}

// ephemeral finds an ephemeral inline volume by the id that kubelet gave it.
func (d *Driver) ephemeral(ctx context.Context, id string) (Pool, pool.Volume, error) {
	p, v, err := d.findVolume(ctx, ephemeralName(id))
	if err == nil && (v.Labels[LabelEphemeral] == "" || v.Labels[LabelName] != id) {
		err = fmt.Errorf("%q: %w", id, pool.ErrNotFound)
	}
	return p, v, err
}

// ephemeralName is what an ephemeral volume is called in its pool. No persistent volume can be.
func ephemeralName(id string) string { return hashOf(hashedInline, id) }

// idOfVolume is the id of a volume as the CO knows it.
func (d *Driver) idOfVolume(p Pool, v pool.Volume) string {
	if v.Labels[LabelEphemeral] != "" {
		return v.Labels[LabelName]
	}
	return idOf(p.Info().ID, v.Name)
}

// lockVolume is for the calls that make, change or delete a volume, by what it is called in its pool.
func (d *Driver) lockVolume(own string) (*hold, error) { return d.locks.take("volume " + own) }

func (d *Driver) topology() []*csipb.Topology {
	return []*csipb.Topology{{Segments: map[string]string{TopologyKey: d.NodeID}}}
}

// here tells whether a topology includes this node: one without our key says nothing against it.
func (d *Driver) here(t *csipb.Topology) bool {
	node, said := t.GetSegments()[TopologyKey]
	return !said || node == d.NodeID
}

// reaches tells whether a requirement can be met by this node.
func (d *Driver) reaches(r *csipb.TopologyRequirement) bool {
	all := r.GetRequisite()
	if len(all) == 0 {
		all = r.GetPreferred()
	}
	return len(all) == 0 || slices.ContainsFunc(all, d.here)
}

// roomiest returns the pool with the most room for new volumes among those that are called so, or all when name is "".
func (d *Driver) roomiest(ctx context.Context, name string) (Pool, uint64, error) {
	var best Pool
	var most uint64
	for _, p := range d.Pools {
		if name != "" && p.Name != name {
			continue
		}
		room, err := roomIn(ctx, p.Pool)
		if err != nil {
			return nil, 0, err
		}
		if best == nil || room > most {
			best, most = p.Pool, room
		}
	}
	if best == nil {
		return nil, 0, fmt.Errorf("%w: %q", ErrNoPool, cmp.Or(name, "any"))
	}
	return best, most, nil
}

// roomIn is how many bytes new volumes of a pool can have.
func roomIn(ctx context.Context, p Pool) (uint64, error) {
	c, err := p.Capacity(ctx)
	if err != nil {
		return 0, err
	}
	return c.Available, nil
}
