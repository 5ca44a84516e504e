package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
)

// Policy says what becomes of the volumes of a node that is gone. doc.go has the table.
type Policy string

const (
	// PolicyOff leaves them alone.
	PolicyOff Policy = "off"
	// PolicyRetain lets go of their claims, and keeps the PVs.
	PolicyRetain Policy = "retain"
	// PolicyDelete lets go of their claims, and of the PVs whose reclaim policy is Delete.
	PolicyDelete Policy = "delete"
)

const (
	// DefaultGrace is longer than a machine takes to be set up anew.
	DefaultGrace = time.Hour
	// MinGrace is more than kubelet takes to register a node again whose object was deleted by mistake.
	MinGrace = time.Minute
	// sweepsInGrace is how often a node is looked for, at least, before it counts as gone for good.
	sweepsInGrace = 10
	// longestPause bounds the time between sweeps. Each lists all nodes and PVs.
	longestPause = 5 * time.Minute
	// pageSize is how many objects are asked for at once.
	pageSize = 500
)

var (
	nodes  = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	pvs    = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumes"}
	pvcs   = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	events = schema.GroupVersionResource{Group: "events.k8s.io", Version: "v1", Resource: "events"}
)

// errNoNodes is returned when the API server shows no node: the cluster that this process runs in has one.
var errNoNodes = errors.New("the API server shows no nodes at all: nothing is concluded from that")

// Options configure a Releaser.
type Options struct {
	// Objects and Metadata reach the API server.
	Objects  dynamic.Interface
	Metadata metadata.Interface
	// Driver is the CSI driver's name, TopologyKey the key of the topology segment that names a volume's node.
	Driver, TopologyKey string
	// Policy says what is done. Default PolicyOff.
	Policy Policy
	// Grace is how long a node must have been gone. Default DefaultGrace.
	Grace time.Duration
	// Name is who does it, in events: the pod's name. Default "croft-controller".
	Name string
	// Logger takes what is done and what fails. Default: none.
	Logger *zap.Logger

	now func() time.Time // default time.Now
}

// EnsureDefaults puts the default where a field is zero.
func (o *Options) EnsureDefaults() {
	if o.Policy == "" {
		o.Policy = PolicyOff
	}
	if o.Grace == 0 {
		o.Grace = DefaultGrace
	}
	if o.Name == "" {
		o.Name = "croft-controller"
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	if o.now == nil {
		o.now = time.Now
	}
}

// Validate reports every fault of the options, after EnsureDefaults.
func (o *Options) Validate() error {
	var faults []error
	switch o.Policy {
	case PolicyOff, PolicyRetain, PolicyDelete:
	default:
		faults = append(faults, fmt.Errorf("policy %q: it is %s, %s or %s", o.Policy, PolicyOff, PolicyRetain, PolicyDelete))
	}
	if o.Grace < MinGrace {
		faults = append(faults, fmt.Errorf("a grace of %s: it is %s at least, so that a node may come back", o.Grace, MinGrace))
	}
	if o.Driver == "" || o.TopologyKey == "" {
		faults = append(faults, errors.New("no name of the driver, or no topology key"))
	}
	return errors.Join(faults...)
}

// Releaser lets go of the volumes of nodes that are gone.
type Releaser struct {
	Options
	// gone is since when a node has been seen to be gone; told are the claims that were told so. Of Sweep's caller.
	gone map[string]time.Time
	told map[string]bool
}

// New returns a Releaser.
func New(o Options) (*Releaser, error) {
	o.EnsureDefaults()
	if err := o.Validate(); err != nil {
		return nil, err
	}
	return &Releaser{Options: o, gone: make(map[string]time.Time), told: make(map[string]bool)}, nil
}

// Run sweeps until ctx ends. What fails is logged, and tried again by the next sweep.
func (r *Releaser) Run(ctx context.Context) {
	if r.Policy == PolicyOff {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(min(r.Grace/sweepsInGrace, longestPause))
	defer tick.Stop()
	for {
		if err := r.Sweep(ctx); err != nil && ctx.Err() == nil {
			r.Logger.Error("volumes of nodes that are gone", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Sweep looks for nodes that are gone, and lets go of what was on those that have been so for long enough. It is not
// called concurrently.
func (r *Releaser) Sweep(ctx context.Context) error {
	there, err := r.nodes(ctx)
	if err != nil {
		return err
	}
	lost, err := r.lost(ctx, there)
	if err != nil {
		return err
	}
	now := r.now()
	gone := make(map[string]time.Time)
	for _, v := range lost {
		for _, node := range v.nodes {
			since, known := r.gone[node]
			if !known {
				since = now
				r.Logger.Warn("a node with volumes is gone", zap.String("node", node), zap.Duration("grace", r.Grace), zap.String("policy", string(r.Policy)))
			}
			gone[node] = since
		}
	}
	for node := range r.gone {
		if _, still := gone[node]; !still && there[node] {
			r.Logger.Info("the node is back", zap.String("node", node))
		}
	}
	r.gone = gone
	var errs []error
	told := make(map[string]bool)
	for _, v := range lost {
		since := now
		for i, node := range v.nodes {
			if at := gone[node]; i == 0 || at.After(since) {
				since = at
			}
		}
		if now.Sub(since) < r.Grace {
			if told[v.uid] = true; !r.told[v.uid] {
				err := r.announce(ctx, v)
				told[v.uid] = err == nil
				errs = append(errs, err)
			}
			continue
		}
		if err := r.release(ctx, v); apierrors.IsConflict(err) { // also when another process was quicker
			r.Logger.Info("a PV or its claim has changed meanwhile: the next sweep looks again", zap.String("pv", v.name), zap.Error(err))
		} else if err != nil {
			errs = append(errs, fmt.Errorf("PV %s: %w", v.name, err))
		}
	}
	r.told = told
	return errors.Join(errs...)
}

// nodes are the names of all nodes, and what they are called by the topology key.
func (r *Releaser) nodes(ctx context.Context) (map[string]bool, error) {
	there := make(map[string]bool)
	for o := (metav1.ListOptions{Limit: pageSize}); ; {
		page, err := r.Metadata.Resource(nodes).List(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("list nodes: %w", err)
		}
		for _, n := range page.Items {
			there[n.Name] = true
			if value, labelled := n.Labels[r.TopologyKey]; labelled {
				there[value] = true
			}
		}
		if o.Continue = page.Continue; o.Continue == "" {
			break
		}
	}
	if len(there) == 0 {
		return nil, errNoNodes
	}
	return there, nil
}

// lost are the driver's PVs none of whose nodes is there.
func (r *Releaser) lost(ctx context.Context, there map[string]bool) ([]volume, error) {
	var lost []volume
	for o := (metav1.ListOptions{Limit: pageSize}); ; {
		page, err := r.Objects.Resource(pvs).List(ctx, o)
		if err != nil {
			return nil, fmt.Errorf("list PVs: %w", err)
		}
		for i := range page.Items {
			v, ours, err := parse(&page.Items[i], r.Driver, r.TopologyKey)
			if err != nil {
				r.Logger.Error("a PV cannot be read, and is left alone", zap.String("pv", page.Items[i].GetName()), zap.Error(err))
			} else if ours && v.lost(there) {
				lost = append(lost, v)
			}
		}
		if o.Continue = page.GetContinue(); o.Continue == "" {
			return lost, nil
		}
	}
}

// stillGone asks the API server once more, for each of a volume's nodes.
func (r *Releaser) stillGone(ctx context.Context, v volume) (bool, error) {
	there, err := r.nodes(ctx)
	return err == nil && v.lost(there), err
}
