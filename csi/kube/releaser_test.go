package kube

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/metadata"
	metadatafake "k8s.io/client-go/metadata/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
)

const (
	driver = "csi.example.test"
	key    = "topology.example.test/node"
)

// cluster is an API server with some objects. What a real one does by itself (finalizers, a PV that is released when
// its claim is deleted) is done by react and by the tests.
type cluster struct {
	*Releaser
	t       *testing.T
	objects *dynamicfake.FakeDynamicClient
	nodes   *metadatafake.FakeMetadataClient
	clock   time.Time
	changes []string // what was changed, in order
	events  int
}

func newCluster(t *testing.T, policy Policy, objects ...runtime.Object) *cluster {
	t.Helper()
	c := &cluster{t: t, clock: time.Date(2026, 11, 30, 0, 0, 0, 0, time.UTC)}
	c.objects = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		pvs: "PersistentVolumeList", pvcs: "PersistentVolumeClaimList", events: "EventList",
	}, objects...)
	c.objects.PrependReactor("*", "*", c.react)
	scheme := metadatafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	c.nodes = metadatafake.NewSimpleMetadataClient(scheme)
	var err error
	c.Releaser, err = New(Options{Objects: c.objects, Metadata: c.nodes, Driver: driver, TopologyKey: key, Policy: policy, now: func() time.Time { return c.clock }})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// react notes changes, and has a PV with finalizers wait for their removal.
func (c *cluster) react(a clienttesting.Action) (bool, runtime.Object, error) {
	what := a.GetResource().Resource
	switch a := a.(type) {
	case clienttesting.CreateActionImpl:
		o := a.GetObject().(*unstructured.Unstructured)
		reason, _, _ := unstructured.NestedString(o.Object, "reason")
		c.changes = append(c.changes, "event "+reason)
		c.events++
		o.SetName(fmt.Sprint("event", c.events)) // generateName is the server's
	case clienttesting.PatchActionImpl:
		c.changes = append(c.changes, fmt.Sprintf("patch %s %s %s", what, a.GetName(), a.GetPatch()))
		return c.patch(a)
	case clienttesting.DeleteActionImpl:
		c.changes = append(c.changes, fmt.Sprintf("delete %s %s", what, a.GetName()))
		o, err := c.objects.Tracker().Get(a.GetResource(), a.GetNamespace(), a.GetName())
		if err != nil {
			return false, nil, nil
		}
		u := o.(*unstructured.Unstructured)
		if p := a.GetDeleteOptions().Preconditions; p == nil || p.UID == nil || *p.UID != u.GetUID() {
			return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), a.GetName(), fmt.Errorf("precondition"))
		}
		if len(u.GetFinalizers()) > 0 {
			now := metav1.NewTime(c.clock)
			u.SetDeletionTimestamp(&now)
			return true, nil, c.objects.Tracker().Update(a.GetResource(), u, a.GetNamespace())
		}
	}
	return false, nil, nil
}

// patch refuses one of another resource version, and removes what has lost its last finalizer.
func (c *cluster) patch(a clienttesting.PatchActionImpl) (bool, runtime.Object, error) {
	var said struct {
		Metadata struct{ UID, ResourceVersion string }
	}
	if err := json.Unmarshal(a.GetPatch(), &said); err != nil {
		c.t.Fatal(err)
	}
	o, err := c.objects.Tracker().Get(a.GetResource(), a.GetNamespace(), a.GetName())
	if err != nil {
		return false, nil, nil
	}
	u := o.(*unstructured.Unstructured)
	if said.Metadata.UID != string(u.GetUID()) || said.Metadata.ResourceVersion != u.GetResourceVersion() {
		return true, nil, apierrors.NewConflict(a.GetResource().GroupResource(), a.GetName(), fmt.Errorf("%s", a.GetPatch()))
	}
	return false, nil, nil
}

func (c *cluster) setNodes(nodes ...*metav1.PartialObjectMetadata) {
	c.nodes.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, listOf(nodes...), nil
	})
}

// listOf is what the fake client wants a reactor to answer.
func listOf(nodes ...*metav1.PartialObjectMetadata) runtime.Object {
	list := &metav1.List{}
	for _, n := range nodes {
		list.Items = append(list.Items, runtime.RawExtension{Object: n})
	}
	return list
}

func node(name string, labels ...string) *metav1.PartialObjectMetadata {
	n := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, value := range labels {
		n.Labels = map[string]string{key: value}
	}
	return n
}

// sweep wants changes, each as a prefix of what was done, and nothing else.
func (c *cluster) sweep(after time.Duration, want ...string) {
	c.t.Helper()
	c.clock = c.clock.Add(after)
	c.changes = nil
	if err := c.Sweep(c.t.Context()); err != nil {
		c.t.Errorf("sweep: %v", err)
	}
	if !slices.EqualFunc(c.changes, want, strings.HasPrefix) {
		c.t.Errorf("after %s: %q, want %q", after, c.changes, want)
	}
}

func (c *cluster) release(pv string) {
	c.t.Helper()
	o, err := c.objects.Tracker().Get(pvs, "", pv)
	if err != nil {
		c.t.Fatal(err)
	}
	u := o.(*unstructured.Unstructured)
	if err := unstructured.SetNestedField(u.Object, "Released", "status", "phase"); err != nil {
		c.t.Fatal(err)
	}
	if err := c.objects.Tracker().Update(pvs, u, ""); err != nil {
		c.t.Fatal(err)
	}
}

func terms(nodes ...[]any) any {
	var all []any
	for _, values := range nodes {
		all = append(all, map[string]any{"matchExpressions": []any{map[string]any{"key": key, "operator": "In", "values": values}}})
	}
	return map[string]any{"required": map[string]any{"nodeSelectorTerms": all}}
}

// pv is one of the driver's that is bound, on node "gone"; change changes its spec.
func pv(reclaim string, change func(spec map[string]any)) *unstructured.Unstructured {
	spec := map[string]any{
		"csi":                           map[string]any{"driver": driver, "volumeHandle": "pool/v"},
		"persistentVolumeReclaimPolicy": reclaim,
		"claimRef":                      map[string]any{"namespace": "ns", "name": "claim", "uid": "claim-uid"},
		"nodeAffinity":                  terms([]any{"gone"}),
	}
	if change != nil {
		change(spec)
	}
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "PersistentVolume",
		"metadata": map[string]any{"name": "pv", "uid": "pv-uid", "resourceVersion": "7", "finalizers": []any{"kubernetes.io/pv-protection", provisionerFinalizer}},
		"spec":     spec, "status": map[string]any{"phase": "Bound"},
	}}
}

func pvc(uid, volume string) *unstructured.Unstructured {
	return &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "PersistentVolumeClaim",
		"metadata": map[string]any{"namespace": "ns", "name": "claim", "uid": uid},
		"spec":     map[string]any{"volumeName": volume},
	}}
}

func TestRetain(t *testing.T) {
	c := newCluster(t, PolicyRetain, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	c.sweep(time.Minute)
	c.sweep(DefaultGrace-time.Minute,
		`patch persistentvolumes pv {"metadata":{"resourceVersion":"7","uid":"pv-uid"},"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`,
		"delete persistentvolumeclaims claim", "event VolumeReleased")
	c.release("pv")
	c.sweep(time.Minute)
	c.sweep(24 * time.Hour)
}

func TestDelete(t *testing.T) {
	c := newCluster(t, PolicyDelete, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	c.sweep(DefaultGrace, "delete persistentvolumeclaims claim", "event VolumeReleased")
	c.sweep(time.Minute) // bound still: Kubernetes says so until the claim is gone
	c.release("pv")
	c.sweep(time.Minute, "delete persistentvolumes pv",
		`patch persistentvolumes pv {"metadata":{"finalizers":["kubernetes.io/pv-protection"],"resourceVersion":"7","uid":"pv-uid"}}`)
	c.sweep(time.Minute)
	o, err := c.objects.Tracker().Get(pvs, "", "pv")
	if err != nil {
		t.Fatal(err)
	}
	u := o.(*unstructured.Unstructured)
	if u.GetDeletionTimestamp() == nil || !slices.Equal(u.GetFinalizers(), []string{"kubernetes.io/pv-protection"}) {
		t.Errorf("the PV: deleted %v, finalizers %q", u.GetDeletionTimestamp(), u.GetFinalizers())
	}
}

// TestDeleteRetained keeps a PV that is to be retained, and lets go of its claim.
func TestDeleteRetained(t *testing.T) {
	c := newCluster(t, PolicyDelete, pv("Retain", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	c.sweep(DefaultGrace, "delete persistentvolumeclaims claim", "event VolumeReleased")
	c.release("pv")
	c.sweep(24 * time.Hour)
}

// TestBack begins anew with a node that has been back in between.
func TestBack(t *testing.T) {
	c := newCluster(t, PolicyDelete, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	c.setNodes(node("gone"), node("other"))
	c.sweep(DefaultGrace)
	c.setNodes(node("other"))
	c.sweep(time.Minute, "event NodeGone")
	c.sweep(DefaultGrace - time.Second)
	c.sweep(time.Second, "delete persistentvolumeclaims claim", "event VolumeReleased")
}

// TestBackAtLast leaves alone what was on a node that comes back after a sweep has begun.
func TestBackAtLast(t *testing.T) {
	for _, policy := range []Policy{PolicyRetain, PolicyDelete} {
		c := newCluster(t, policy, pv("Delete", nil), pvc("claim-uid", "pv"))
		c.setNodes(node("other"))
		c.sweep(0, "event NodeGone")
		asked := 0
		c.nodes.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
			if asked++; asked > 1 {
				return true, listOf(node("other"), node("gone")), nil
			}
			return true, listOf(node("other")), nil
		})
		c.sweep(DefaultGrace)
		if asked != 2 {
			t.Errorf("%s: the nodes were asked for %d times", policy, asked)
		}
	}
}

// TestLeftAlone has PVs of which nothing is to be changed, whatever the policy.
func TestLeftAlone(t *testing.T) {
	for name, test := range map[string]struct {
		pv    *unstructured.Unstructured
		pvc   *unstructured.Unstructured
		nodes []*metav1.PartialObjectMetadata
	}{
		"its node is there": {nodes: []*metav1.PartialObjectMetadata{node("gone")}},
		"its node has another name, and the label": {
			nodes: []*metav1.PartialObjectMetadata{node("name", "gone")}},
		"another driver's": {pv: pv("Delete", func(spec map[string]any) { spec["csi"] = map[string]any{"driver": "other"} })},
		"no CSI":           {pv: pv("Delete", func(spec map[string]any) { delete(spec, "csi") })},
		"no affinity":      {pv: pv("Delete", func(spec map[string]any) { delete(spec, "nodeAffinity") })},
		"no terms":         {pv: pv("Delete", func(spec map[string]any) { spec["nodeAffinity"] = terms() })},
		"no values":        {pv: pv("Delete", func(spec map[string]any) { spec["nodeAffinity"] = terms([]any{}) })},
		"another key": {pv: pv("Delete", func(spec map[string]any) {
			spec["nodeAffinity"] = map[string]any{"required": map[string]any{"nodeSelectorTerms": []any{map[string]any{
				"matchExpressions": []any{map[string]any{"key": "kubernetes.io/hostname", "operator": "In", "values": []any{"gone"}}}}}}}
		})},
		"another operator": {pv: pv("Delete", func(spec map[string]any) {
			spec["nodeAffinity"] = map[string]any{"required": map[string]any{"nodeSelectorTerms": []any{map[string]any{
				"matchExpressions": []any{map[string]any{"key": key, "operator": "NotIn", "values": []any{"gone"}}}}}}}
		})},
		"a second term without the key": {pv: pv("Delete", func(spec map[string]any) {
			spec["nodeAffinity"] = map[string]any{"required": map[string]any{"nodeSelectorTerms": []any{
				map[string]any{"matchExpressions": []any{map[string]any{"key": key, "operator": "In", "values": []any{"gone"}}}},
				map[string]any{"matchExpressions": []any{map[string]any{"key": "zone", "operator": "In", "values": []any{"a"}}}}}}}
		})},
		"a second node that is there": {pv: pv("Delete", func(spec map[string]any) { spec["nodeAffinity"] = terms([]any{"gone"}, []any{"other"}) })},
	} {
		t.Run(name, func(t *testing.T) {
			for _, policy := range []Policy{PolicyRetain, PolicyDelete} {
				o := test.pv
				if o == nil {
					o = pv("Delete", nil)
				}
				c := newCluster(t, policy, o, pvc("claim-uid", "pv"))
				c.setNodes(append(test.nodes, node("other"))...)
				c.sweep(0)
				c.sweep(DefaultGrace)
				c.sweep(240 * time.Hour)
			}
		})
	}
}

// TestOtherClaim deletes no claim that is not the PV's.
func TestOtherClaim(t *testing.T) {
	for name, other := range map[string]*unstructured.Unstructured{
		"made anew": pvc("other-uid", "pv"), "bound elsewhere": pvc("claim-uid", "pv-2"), "not there": nil,
	} {
		t.Run(name, func(t *testing.T) {
			objects := []runtime.Object{pv("Retain", nil)}
			if other != nil {
				objects = append(objects, other)
			}
			c := newCluster(t, PolicyDelete, objects...)
			c.setNodes(node("other"))
			c.sweep(0, "event NodeGone")
			c.sweep(DefaultGrace)
		})
	}
}

// TestNoNodes concludes nothing from an answer without any node, or none at all.
func TestNoNodes(t *testing.T) {
	c := newCluster(t, PolicyDelete, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	c.clock = c.clock.Add(DefaultGrace)
	c.changes = nil
	c.setNodes()
	if err := c.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), "no nodes at all") {
		t.Errorf("no nodes: %v", err)
	}
	c.nodes.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, apierrors.NewServiceUnavailable("down")
	})
	if err := c.Sweep(t.Context()); err == nil || !strings.Contains(err.Error(), "down") {
		t.Errorf("no answer: %v", err)
	}
	if len(c.changes) > 0 {
		t.Errorf("changed: %q", c.changes)
	}
}

// TestChanged changes nothing of a PV that is no longer what was read.
func TestChanged(t *testing.T) {
	c := newCluster(t, PolicyRetain, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	conflicts := 0
	c.objects.PrependReactor("patch", "persistentvolumes", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if conflicts++; conflicts > 1 {
			return false, nil, nil
		}
		return true, nil, apierrors.NewConflict(pvs.GroupResource(), "pv", fmt.Errorf("it has changed"))
	})
	c.sweep(DefaultGrace)
	c.sweep(time.Minute, "patch persistentvolumes pv", "delete persistentvolumeclaims claim", "event VolumeReleased")
}

// TestEvent asks for a name that the API server takes: what is generated begins like a name.
func TestEvent(t *testing.T) {
	c := newCluster(t, PolicyDelete, pv("Delete", nil), pvc("claim-uid", "pv"))
	c.setNodes(node("other"))
	c.sweep(0, "event NodeGone")
	list, err := c.objects.Resource(events).Namespace("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	e := list.Items[0]
	note, _, _ := unstructured.NestedString(e.Object, "note")
	kind, _, _ := unstructured.NestedString(e.Object, "regarding", "kind")
	if faults := validation.NameIsDNSSubdomain(e.GetGenerateName(), true); len(faults) > 0 {
		t.Errorf("generateName %q: %q", e.GetGenerateName(), faults)
	}
	if kind != "PersistentVolumeClaim" || !strings.Contains(note, `node "gone"`) || !strings.Contains(note, "1h0m0s") {
		t.Errorf("about a %s: %q", kind, note)
	}
}

// TestPages reads all pages of nodes and PVs, over HTTP: a node on the second one is there.
func TestPages(t *testing.T) {
	var asked []string
	answers := map[string]any{
		"/api/v1/nodes?limit=500": map[string]any{"metadata": map[string]any{"continue": "more"},
			"items": []any{map[string]any{"metadata": map[string]any{"name": "first"}}}},
		"/api/v1/nodes?continue=more&limit=500": map[string]any{"items": []any{map[string]any{"metadata": map[string]any{"name": "second"}}}},
		"/api/v1/persistentvolumes?limit=500": map[string]any{"apiVersion": "v1", "kind": "PersistentVolumeList",
			"metadata": map[string]any{"continue": "more"}, "items": []any{}},
		"/api/v1/persistentvolumes?continue=more&limit=500": map[string]any{"apiVersion": "v1", "kind": "PersistentVolumeList", "metadata": map[string]any{},
			"items": []any{pv("Delete", nil).Object}},
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		answer, known := answers[r.URL.String()]
		if !known {
			http.Error(w, r.URL.String(), http.StatusTeapot)
			return
		}
		if strings.HasPrefix(r.URL.Path, "/api/v1/nodes") {
			if !strings.Contains(r.Header.Get("Accept"), "PartialObjectMetadataList") {
				t.Errorf("whole nodes were asked for: %s", r.Header.Get("Accept"))
			}
			answer.(map[string]any)["apiVersion"], answer.(map[string]any)["kind"] = "meta.k8s.io/v1", "PartialObjectMetadataList"
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(answer); err != nil {
			t.Error(err)
		}
	}))
	defer server.Close()
	config := &rest.Config{Host: server.URL}
	o := Options{Driver: driver, TopologyKey: key, Policy: PolicyRetain}
	var err error
	if o.Objects, err = dynamic.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	if o.Metadata, err = metadata.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	there, err := r.nodes(t.Context())
	if err != nil || !there["first"] || !there["second"] {
		t.Errorf("nodes: %v, %v", there, err)
	}
	lost, err := r.lost(t.Context(), there)
	if err != nil || len(lost) != 1 || lost[0].name != "pv" {
		t.Errorf("PVs: %v, %v", lost, err)
	}
	if len(asked) != len(answers) {
		t.Errorf("asked for %q", asked)
	}
}

func TestOptions(t *testing.T) {
	_, err := New(Options{Policy: "sometimes", Grace: time.Second})
	for _, part := range []string{`policy "sometimes"`, "off, retain or delete", "1s", "1m0s", "topology key"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v: nothing about %s", err, part)
		}
	}
	if _, err := New(Options{Driver: driver, TopologyKey: key}); err != nil {
		t.Error(err)
	}
}
