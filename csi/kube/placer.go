package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/metadata"
)

const (
	// selectedNode is the annotation of a claim with the node that its volume is to be made on (k8s.io/component-helpers,
	// AnnSelectedNode). The scheduler takes a pod to no other, and that node's provisioner acts.
	selectedNode = "volume.kubernetes.io/selected-node"
	// managedBy is the label of a VolumeSnapshotContent with the node that it is on (external-snapshotter,
	// VolumeSnapshotContentManagedByLabel).
	managedBy = "snapshot.storage.kubernetes.io/managed-by"

	snapshotGroup = "snapshot.storage.k8s.io"
)

var (
	storageClasses   = schema.GroupVersionResource{Group: "storage.k8s.io", Version: "v1", Resource: "storageclasses"}
	snapshots        = schema.GroupVersionResource{Group: snapshotGroup, Version: "v1", Resource: "volumesnapshots"}
	snapshotContents = schema.GroupVersionResource{Group: snapshotGroup, Version: "v1", Resource: "volumesnapshotcontents"}
)

// errNotYet is returned while it is not known on which node a claim's source is.
var errNotYet = errors.New("its source is not there yet")

// Placer has claims that are made from a snapshot or another claim go to the node where that is: no other can make them.
type Placer struct {
	Objects             dynamic.Interface
	Metadata            metadata.Interface
	Driver, TopologyKey string
	Logger              *zap.Logger
}

// order is the part of a claim that is read: what is to be made.
type order struct {
	Spec struct {
		Class  *string    `json:"storageClassName"`
		Volume string     `json:"volumeName"`
		Source *reference `json:"dataSourceRef"` // the API server sets it where only dataSource was given
	} `json:"spec"`
}

// reference is a TypedObjectReference.
type reference struct {
	Group     string `json:"apiGroup"`
	Kind      string `json:"kind"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
}

// Run places claims until ctx ends. What fails is logged; a claim comes again when it changes, as it does whenever the scheduler or a
// provisioner has tried, and each callTimeout.
func (p *Placer) Run(ctx context.Context) {
	follow(ctx, p.Objects.Resource(pvcs), metav1.ListOptions{}, p.Logger, func(o *unstructured.Unstructured) {
		log := p.Logger.With(zap.String("namespace", o.GetNamespace()), zap.String("claim", o.GetName()))
		node, err := p.place(ctx, o)
		switch {
		case errors.Is(err, errNotYet), apierrors.IsNotFound(err), apierrors.IsConflict(err):
			log.Debug("a claim is not placed yet", zap.Error(err))
		case err != nil && ctx.Err() == nil:
			log.Warn("a claim could not be placed", zap.Error(err))
		case node != "":
			log.Info("a claim goes to its source's node", zap.String("node", node))
		}
	})
}

// place sends a claim to its source's node, and returns that; "" when there is nothing to do.
func (p *Placer) place(ctx context.Context, o *unstructured.Unstructured) (node string, err error) {
	var claim order
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &claim); err != nil {
		return "", err
	}
	if claim.Spec.Source == nil || claim.Spec.Volume != "" || claim.Spec.Class == nil || o.GetDeletionTimestamp() != nil {
		return "", nil
	}
	class, err := p.Objects.Resource(storageClasses).Get(ctx, *claim.Spec.Class, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("its class: %w", err)
	}
	if by, _, _ := unstructured.NestedString(class.Object, "provisioner"); by != p.Driver {
		return "", nil
	}
	source := *claim.Spec.Source
	if source.Namespace != "" && source.Namespace != o.GetNamespace() {
		return "", nil // it needs a ReferenceGrant, which the provisioners of this driver do not look for
	}
	source.Namespace = o.GetNamespace()
	switch source.Group + "/" + source.Kind {
	case "/PersistentVolumeClaim":
		node, err = p.nodeOfClaim(ctx, source)
	case snapshotGroup + "/VolumeSnapshot":
		node, err = p.nodeOfSnapshot(ctx, source)
	}
	if err != nil {
		return "", fmt.Errorf("its source, %s %s/%s: %w", source.Kind, source.Namespace, source.Name, err)
	}
	if node == "" || o.GetAnnotations()[selectedNode] == node {
		return "", nil
	}
	body, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": o.GetUID(), "resourceVersion": o.GetResourceVersion(), "annotations": map[string]any{selectedNode: node},
	}})
	if err != nil {
		return "", err
	}
	_, err = p.Objects.Resource(pvcs).Namespace(o.GetNamespace()).Patch(ctx, o.GetName(), types.MergePatchType, body, metav1.PatchOptions{})
	return node, err
}

// nodeOfClaim is the node where a claim's volume is; "" when that is none of the driver's.
func (p *Placer) nodeOfClaim(ctx context.Context, at reference) (string, error) {
	o, err := p.Objects.Resource(pvcs).Namespace(at.Namespace).Get(ctx, at.Name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	name, _, _ := unstructured.NestedString(o.Object, "spec", "volumeName")
	if name == "" {
		return "", errNotYet
	}
	if o, err = p.Objects.Resource(pvs).Get(ctx, name, metav1.GetOptions{}); err != nil {
		return "", err
	}
	v, ours, err := parse(o, p.Driver, p.TopologyKey)
	if err != nil || !ours || v.unsure || len(v.nodes) != 1 {
		return "", err
	}
	nodes, err := p.Metadata.Resource(nodes).List(ctx, metav1.ListOptions{LabelSelector: labels.Set{p.TopologyKey: v.nodes[0]}.String()})
	if err != nil {
		return "", fmt.Errorf("list nodes: %w", err)
	}
	if len(nodes.Items) != 1 {
		return "", fmt.Errorf("PV %s is on %s=%s, and %d nodes have that label", name, p.TopologyKey, v.nodes[0], len(nodes.Items))
	}
	return nodes.Items[0].Name, nil
}

// nodeOfSnapshot is the node where a snapshot is; "" when that is none of the driver's.
func (p *Placer) nodeOfSnapshot(ctx context.Context, at reference) (string, error) {
	o, err := p.Objects.Resource(snapshots).Namespace(at.Namespace).Get(ctx, at.Name, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	name, _, _ := unstructured.NestedString(o.Object, "status", "boundVolumeSnapshotContentName")
	if name == "" {
		return "", errNotYet
	}
	if o, err = p.Objects.Resource(snapshotContents).Get(ctx, name, metav1.GetOptions{}); err != nil {
		return "", err
	}
	if by, _, _ := unstructured.NestedString(o.Object, "spec", "driver"); by != p.Driver {
		return "", nil
	}
	return o.GetLabels()[managedBy], nil
}
