package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// provisionerFinalizer keeps a PV until its volume has been deleted, which nobody can do any more
// (sig-storage-lib-external-provisioner, finalizerPV). Provisioners on other nodes put it back on a PV that is not being deleted.
const provisionerFinalizer = "external-provisioner.volume.kubernetes.io/finalizer"

// The values of a PV's fields (Kubernetes API, PersistentVolumeSpec and PersistentVolumeStatus).
const (
	reclaimDelete = "Delete"
	reclaimRetain = "Retain"
	phaseBound    = "Bound"
	phasePending  = "Pending"
)

// volume is what matters of a PV.
type volume struct {
	name, uid, resourceVersion string
	handle                     string   // the volume's id
	nodes                      []string // where it may be
	unsure                     bool     // it may be elsewhere too
	reclaim, phase             string
	claim                      *claim
	finalizers                 []string
	deleted                    bool // its deletion has begun
}

// claim is the PVC that a PV is for.
type claim struct{ namespace, name, uid string }

// manifest is the part of a PV that is read.
type manifest struct {
	Spec struct {
		CSI *struct {
			Driver string `json:"driver"`
			Handle string `json:"volumeHandle"`
		} `json:"csi"`
		Reclaim  string `json:"persistentVolumeReclaimPolicy"`
		ClaimRef *struct {
			Namespace string `json:"namespace"`
			Name      string `json:"name"`
			UID       string `json:"uid"`
		} `json:"claimRef"`
		NodeAffinity struct {
			Required struct {
				Terms []struct {
					Expressions []struct {
						Key      string   `json:"key"`
						Operator string   `json:"operator"`
						Values   []string `json:"values"`
					} `json:"matchExpressions"`
				} `json:"nodeSelectorTerms"`
			} `json:"required"`
		} `json:"nodeAffinity"`
	} `json:"spec"`
	Status struct {
		Phase string `json:"phase"`
	} `json:"status"`
}

// parse reads a PV; ours tells whether it is the driver's.
func parse(o *unstructured.Unstructured, driver, topologyKey string) (v volume, ours bool, err error) {
	var m manifest
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &m); err != nil {
		return v, false, err
	}
	if m.Spec.CSI == nil || m.Spec.CSI.Driver != driver {
		return v, false, nil
	}
	v = volume{
		name: o.GetName(), handle: m.Spec.CSI.Handle, uid: string(o.GetUID()), resourceVersion: o.GetResourceVersion(),
		reclaim: m.Spec.Reclaim, phase: m.Status.Phase, finalizers: o.GetFinalizers(), deleted: o.GetDeletionTimestamp() != nil,
	}
	if c := m.Spec.ClaimRef; c != nil {
		v.claim = &claim{c.Namespace, c.Name, c.UID}
	}
	// Terms are alternatives; the expressions of one must all hold.
	for _, term := range m.Spec.NodeAffinity.Required.Terms {
		named := false
		for _, e := range term.Expressions {
			if e.Key == topologyKey && e.Operator == "In" && len(e.Values) > 0 {
				v.nodes, named = append(v.nodes, e.Values...), true
			}
		}
		v.unsure = v.unsure || !named
	}
	return v, true, nil
}

// lost tells whether it is for sure that none of its nodes is there.
func (v volume) lost(there map[string]bool) bool {
	return !v.unsure && len(v.nodes) > 0 && !slices.ContainsFunc(v.nodes, func(node string) bool { return there[node] })
}

// release does the next step for a PV whose nodes have been gone for long enough; a later sweep does the one after that.
func (r *Releaser) release(ctx context.Context, v volume) error {
	keep := r.Policy == PolicyRetain || v.reclaim != reclaimDelete
	bound := v.phase == phaseBound || v.phase == phasePending
	if keep && v.reclaim != reclaimDelete && !bound {
		return nil // as it is to be
	}
	if gone, err := r.stillGone(ctx, v); err != nil || !gone {
		return err
	}
	log := r.Logger.With(zap.String("pv", v.name), zap.Strings("nodes", v.nodes), zap.String("policy", string(r.Policy)))
	if keep && v.reclaim == reclaimDelete {
		version, err := r.patch(ctx, v, map[string]any{"spec": map[string]any{"persistentVolumeReclaimPolicy": reclaimRetain}})
		if err != nil {
			return fmt.Errorf("make it %s: %w", reclaimRetain, err)
		}
		log.Info("a PV of a node that is gone is retained")
		v.reclaim, v.resourceVersion = reclaimRetain, version
	}
	if bound && v.claim != nil {
		return r.releaseClaim(ctx, v, log)
	}
	if keep || bound {
		return nil
	}
	return r.remove(ctx, v, log)
}

// releaseClaim deletes the claim of a PV.
func (r *Releaser) releaseClaim(ctx context.Context, v volume, log *zap.Logger) error {
	c := v.claim
	claims := r.Objects.Resource(pvcs).Namespace(c.namespace)
	o, err := claims.Get(ctx, c.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil // the PV will be released
	} else if err != nil {
		return fmt.Errorf("its claim: %w", err)
	}
	to, _, err := unstructured.NestedString(o.Object, "spec", "volumeName")
	switch {
	case err != nil:
		return fmt.Errorf("its claim: %w", err)
	case to != v.name || c.uid != "" && string(o.GetUID()) != c.uid:
		return nil // another claim of that name
	case o.GetDeletionTimestamp() != nil:
		return nil // a pod has it still
	}
	uid := o.GetUID()
	err = claims.Delete(ctx, c.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete its claim %s/%s: %w", c.namespace, c.name, err)
	}
	log.Info("the claim of a volume of a node that is gone is deleted", zap.String("namespace", c.namespace), zap.String("claim", c.name))
	return r.event(ctx, v, "VolumeReleased", fmt.Sprintf("%s: the claim is deleted", r.describe(v)))
}

// remove deletes a PV that is bound to no claim. Its deletion begins before the finalizer is taken away: the provisioners of
// other nodes would put it back.
func (r *Releaser) remove(ctx context.Context, v volume, log *zap.Logger) error {
	if !v.deleted {
		uid := types.UID(v.uid)
		err := r.Objects.Resource(pvs).Delete(ctx, v.name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &v.resourceVersion}})
		if apierrors.IsNotFound(err) {
			return nil
		} else if err != nil {
			return fmt.Errorf("delete it: %w", err)
		}
		log.Info("a PV of a node that is gone is deleted")
	}
	o, err := r.Objects.Resource(pvs).Get(ctx, v.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	} else if err != nil {
		return err
	}
	v.finalizers, v.resourceVersion = o.GetFinalizers(), o.GetResourceVersion()
	if string(o.GetUID()) != v.uid || !slices.Contains(v.finalizers, provisionerFinalizer) {
		return nil
	}
	left := slices.DeleteFunc(slices.Clone(v.finalizers), func(f string) bool { return f == provisionerFinalizer })
	if _, err := r.patch(ctx, v, map[string]any{"metadata": map[string]any{"finalizers": left}}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("take its finalizer away: %w", err)
	}
	return nil
}

// patch changes a PV if it is what was read, and returns its new resource version.
func (r *Releaser) patch(ctx context.Context, v volume, change map[string]any) (version string, err error) {
	meta, _ := change["metadata"].(map[string]any)
	if meta == nil {
		meta = make(map[string]any)
	}
	meta["uid"], meta["resourceVersion"] = v.uid, v.resourceVersion
	change["metadata"] = meta
	body, err := json.Marshal(change)
	if err != nil {
		return "", err
	}
	o, err := r.Objects.Resource(pvs).Patch(ctx, v.name, types.MergePatchType, body, metav1.PatchOptions{})
	if err != nil {
		return "", err
	}
	return o.GetResourceVersion(), nil
}

// announce tells who owns a claim what is to come.
func (r *Releaser) announce(ctx context.Context, v volume) error {
	return r.event(ctx, v, "NodeGone", fmt.Sprintf("%s: the claim will be deleted when it has been gone for %s", r.describe(v), r.Grace))
}

func (r *Releaser) describe(v volume) string {
	where := fmt.Sprintf("node %q", v.nodes[0])
	if len(v.nodes) > 1 {
		where = fmt.Sprintf("each of nodes %q", v.nodes)
	}
	return fmt.Sprintf("%s, where volume %s is, is no longer in the cluster", where, v.name)
}

// event is about the claim of a PV; about a PV without one there is nobody to tell.
func (r *Releaser) event(ctx context.Context, v volume, reason, note string) error {
	if v.claim == nil {
		return nil
	}
	about := map[string]any{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": v.claim.namespace, "name": v.claim.name, "uid": v.claim.uid}
	now := metav1.NewMicroTime(r.now()).UTC().Format(metav1.RFC3339Micro)
	_, err := r.Objects.Resource(events).Namespace(v.claim.namespace).Create(ctx, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "events.k8s.io/v1", "kind": "Event",
		"metadata":            map[string]any{"generateName": v.claim.name + "-", "namespace": v.claim.namespace},
		"eventTime":           now,
		"reportingController": r.Driver, "reportingInstance": r.Name,
		"action": "Release", "reason": reason, "type": "Warning", "note": note,
		"regarding": about,
	}}, metav1.CreateOptions{})
	// The claim's namespace may be on its way out, and what was done is logged.
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
		return fmt.Errorf("event for claim %s/%s: %w", v.claim.namespace, v.claim.name, err)
	}
	return nil
}
