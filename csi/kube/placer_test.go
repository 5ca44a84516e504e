package kube

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
)

func object(apiVersion, kind, namespace, name string, more map[string]any) *unstructured.Unstructured {
	o := &unstructured.Unstructured{Object: map[string]any{"apiVersion": apiVersion, "kind": kind}}
	for field, value := range more {
		o.Object[field] = value
	}
	o.SetNamespace(namespace)
	o.SetName(name)
	return o
}

func classOf(name, provisioner string) *unstructured.Unstructured {
	return object("storage.k8s.io/v1", "StorageClass", "", name, map[string]any{"provisioner": provisioner})
}

// copyClaim is a claim for a copy of what group/kind/name is in its namespace.
func copyClaim(group, kind, name string, change func(o *unstructured.Unstructured, spec map[string]any)) *unstructured.Unstructured {
	source := map[string]any{"kind": kind, "name": name}
	if group != "" {
		source["apiGroup"] = group
	}
	spec := map[string]any{"storageClassName": "ours", "dataSource": source, "dataSourceRef": source}
	o := object("v1", "PersistentVolumeClaim", "ns", "copy", map[string]any{"spec": spec})
	o.SetUID("copy-uid")
	if change != nil {
		change(o, spec)
	}
	return o
}

// placed is an API server with sources on node "machine", which the topology calls "gone".
func placed(t *testing.T, objects ...runtime.Object) (*cluster, *Placer) {
	snapshotOf := func(name, content string) *unstructured.Unstructured {
		status := map[string]any{}
		if content != "" {
			status["boundVolumeSnapshotContentName"] = content
		}
		return object(snapshotGroup+"/v1", "VolumeSnapshot", "ns", name, map[string]any{"status": status})
	}
	contentOf := func(name, driver string) *unstructured.Unstructured {
		o := object(snapshotGroup+"/v1", "VolumeSnapshotContent", "", name, map[string]any{"spec": map[string]any{"driver": driver}})
		o.SetLabels(map[string]string{managedBy: "machine"})
		return o
	}
	unbound := pvc("u", "")
	unbound.SetName("unbound")
	lost := pvc("l", "no-pv")
	lost.SetName("lost")
	c := newCluster(t, PolicyOff, append(objects, classOf("ours", driver), classOf("theirs", "other"),
		pv("Delete", nil), pvc("claim-uid", "pv"), unbound, lost,
		snapshotOf("monday", "content"), snapshotOf("early", ""), snapshotOf("foreign", "foreign"), contentOf("content", driver), contentOf("foreign", "other"))...)
	c.setNodes(node("machine", "gone"), node("gone", "other"))
	return c, &Placer{Objects: c.objects, Metadata: c.nodes, Driver: driver, TopologyKey: key, Logger: zap.NewNop()}
}

func TestPlace(t *testing.T) {
	for name, claim := range map[string]*unstructured.Unstructured{
		"a clone":          copyClaim("", "PersistentVolumeClaim", "claim", nil),
		"a restore":        copyClaim(snapshotGroup, "VolumeSnapshot", "monday", nil),
		"of its own space": copyClaim(snapshotGroup, "VolumeSnapshot", "monday", from("ns")),
		"sent elsewhere": copyClaim("", "PersistentVolumeClaim", "claim", func(o *unstructured.Unstructured, _ map[string]any) {
			o.SetAnnotations(map[string]string{selectedNode: "elsewhere"})
		}),
	} {
		t.Run(name, func(t *testing.T) {
			c, p := placed(t, claim)
			got, err := p.place(t.Context(), claim)
			want := `patch persistentvolumeclaims copy {"metadata":{"annotations":{"volume.kubernetes.io/selected-node":"machine"},"resourceVersion":"","uid":"copy-uid"}}`
			if err != nil || got != "machine" || len(c.changes) != 1 || c.changes[0] != want {
				t.Errorf("%q, %v; changes %q", got, err, c.changes)
			}
		})
	}
}

// from has a claim name its source's namespace.
func from(namespace string) func(*unstructured.Unstructured, map[string]any) {
	return func(_ *unstructured.Unstructured, spec map[string]any) {
		ref := maps.Clone(spec["dataSourceRef"].(map[string]any))
		ref["namespace"] = namespace
		spec["dataSourceRef"] = ref
	}
}

// TestPlaceNot changes nothing where a claim is none of its business, or it cannot be told where it belongs.
func TestPlaceNot(t *testing.T) {
	clone := func(change func(o *unstructured.Unstructured, spec map[string]any)) *unstructured.Unstructured {
		return copyClaim("", "PersistentVolumeClaim", "claim", change)
	}
	for name, test := range map[string]struct {
		claim *unstructured.Unstructured
		fails func(error) bool // nil: it does not
	}{
		"no source": {clone(func(_ *unstructured.Unstructured, spec map[string]any) {
			delete(spec, "dataSource")
			delete(spec, "dataSourceRef")
		}), nil},
		"no class":          {clone(func(_ *unstructured.Unstructured, spec map[string]any) { delete(spec, "storageClassName") }), nil},
		"bound":             {clone(func(_ *unstructured.Unstructured, spec map[string]any) { spec["volumeName"] = "v" }), nil},
		"another driver's":  {clone(func(_ *unstructured.Unstructured, spec map[string]any) { spec["storageClassName"] = "theirs" }), nil},
		"a class of nobody": {clone(func(_ *unstructured.Unstructured, spec map[string]any) { spec["storageClassName"] = "none" }), apierrors.IsNotFound},
		"being deleted": {clone(func(o *unstructured.Unstructured, _ map[string]any) {
			now := metav1.Now()
			o.SetDeletionTimestamp(&now)
		}), nil},
		"there already": {clone(func(o *unstructured.Unstructured, _ map[string]any) {
			o.SetAnnotations(map[string]string{selectedNode: "machine"})
		}), nil},
		"a populator's":        {copyClaim("example.test", "Backup", "monday", nil), nil},
		"a namesake":           {copyClaim("example.test", "VolumeSnapshot", "monday", nil), nil},
		"no such claim":        {copyClaim("", "PersistentVolumeClaim", "none", nil), apierrors.IsNotFound},
		"an unbound claim":     {copyClaim("", "PersistentVolumeClaim", "unbound", nil), notYet},
		"a claim without PV":   {copyClaim("", "PersistentVolumeClaim", "lost", nil), apierrors.IsNotFound},
		"no such snapshot":     {copyClaim(snapshotGroup, "VolumeSnapshot", "none", nil), apierrors.IsNotFound},
		"an early snapshot":    {copyClaim(snapshotGroup, "VolumeSnapshot", "early", nil), notYet},
		"a foreign snapshot":   {copyClaim(snapshotGroup, "VolumeSnapshot", "foreign", nil), nil},
		"in another's space":   {copyClaim(snapshotGroup, "VolumeSnapshot", "monday", from("other")), nil},
		"not in its own space": {copyClaim(snapshotGroup, "VolumeSnapshot", "monday", func(o *unstructured.Unstructured, _ map[string]any) { o.SetNamespace("other") }), apierrors.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			c, p := placed(t, test.claim)
			got, err := p.place(t.Context(), test.claim)
			if got != "" || len(c.changes) > 0 || (err == nil) != (test.fails == nil) || err != nil && !test.fails(err) {
				t.Errorf("%q, %v; changes %q", got, err, c.changes)
			}
		})
	}
}

func notYet(err error) bool { return errors.Is(err, errNotYet) }

// TestPlaceLost leaves a claim alone whose source is on no node that is there, or on one that is not known for sure.
func TestPlaceLost(t *testing.T) {
	claim := copyClaim("", "PersistentVolumeClaim", "claim", nil)
	c, p := placed(t, claim)
	c.setNodes(node("gone", "other")) // it has the name that the topology calls another
	if got, err := p.place(t.Context(), claim); got != "" || err == nil || !strings.Contains(err.Error(), "0 nodes have that label") {
		t.Errorf("%q, %v", got, err)
	}
	o, err := c.objects.Tracker().Get(pvs, "", "pv")
	if err != nil {
		t.Fatal(err)
	}
	u := o.(*unstructured.Unstructured)
	unstructured.RemoveNestedField(u.Object, "spec", "nodeAffinity")
	if err := c.objects.Tracker().Update(pvs, u, ""); err != nil {
		t.Fatal(err)
	}
	if got, err := p.place(t.Context(), claim); got != "" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if len(c.changes) > 0 {
		t.Errorf("changes: %q", c.changes)
	}
}

// TestPlacer places what is there, what comes later, and again what somebody has sent elsewhere.
func TestPlacer(t *testing.T) {
	first := copyClaim("", "PersistentVolumeClaim", "claim", nil)
	c, p := placed(t, first)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); p.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-ended })
	claims := c.objects.Resource(pvcs).Namespace("ns")
	goes := func(name string) {
		t.Helper()
		var last error
		for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			o, err := claims.Get(t.Context(), name, metav1.GetOptions{})
			if err == nil && o.GetAnnotations()[selectedNode] == "machine" {
				return
			}
			last = errors.Join(err, fmt.Errorf("%v", o))
		}
		t.Fatalf("%s: %v", name, last)
	}
	goes("copy")
	later := copyClaim(snapshotGroup, "VolumeSnapshot", "monday", func(o *unstructured.Unstructured, _ map[string]any) { o.SetName("later") })
	// The fake client's watch begins after its list, at no version: what is made in between is not told.
	for watching := false; !watching; time.Sleep(time.Millisecond) {
		for _, a := range c.objects.Actions() {
			watching = watching || a.GetVerb() == "watch"
		}
	}
	if err := c.objects.Tracker().Create(pvcs, later, "ns"); err != nil {
		t.Fatal(err)
	}
	goes("later")
	later.SetAnnotations(map[string]string{selectedNode: "elsewhere"})
	if _, err := claims.Update(t.Context(), later, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	goes("later")
}
