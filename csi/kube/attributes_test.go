package kube

import (
	"context"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
)

// mailbox is an API server with one PV, and those who ask and answer by it. Its PV has no resource version: the fake client
// keeps none.
type mailbox struct {
	t       *testing.T
	objects *dynamicfake.FakeDynamicClient
	asker   *Asker

	mu   sync.Mutex
	done []string
}

func newMailbox(t *testing.T, change func(spec map[string]any)) *mailbox {
	o := pv("Delete", change)
	o.SetResourceVersion("")
	m := &mailbox{t: t}
	m.objects = dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{pvs: "PersistentVolumeList"}, o)
	m.asker = &Asker{Objects: m.objects, Driver: driver, TopologyKey: key}
	return m
}

// serve has a node answer until the test ends.
func (m *mailbox) serve(node string) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	c := &Changer{Objects: m.objects, Driver: driver, TopologyKey: key, Node: node, Logger: zap.NewNop()}
	c.Change = func(_ context.Context, volume string, parameters map[string]string) (uint32, string) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.done = append(m.done, node+" "+volume+" "+parameters["inodes"])
		if parameters["inodes"] == "1" {
			return 11, "it has more"
		}
		return 0, ""
	}
	go func() {
		defer close(ended)
		c.Run(ctx)
	}()
	m.t.Cleanup(func() { cancel(); <-ended })
}

func (m *mailbox) want(done ...string) {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Equal(m.done, done) {
		m.t.Errorf("done: %q, want %q", m.done, done)
	}
}

// clean wants nothing to be left on the PV.
func (m *mailbox) clean() {
	m.t.Helper()
	o, err := m.objects.Resource(pvs).Get(m.t.Context(), "pv", metav1.GetOptions{})
	if err != nil {
		m.t.Fatal(err)
	}
	if len(o.GetAnnotations())+len(o.GetLabels()) > 0 {
		m.t.Errorf("left: %v, %v", o.GetAnnotations(), o.GetLabels())
	}
}

func (m *mailbox) ask(inodes string) (Answer, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	return m.asker.Ask(ctx, "pv", "pool/v", map[string]string{"inodes": inodes})
}

func TestChange(t *testing.T) {
	m := newMailbox(t, nil)
	m.serve("gone")
	m.serve("other")
	for _, inodes := range []string{"5", "6", "5", "5"} {
		if a, err := m.ask(inodes); err != nil || a.Code != 0 {
			t.Errorf("%s: %+v, %v", inodes, a, err)
		}
		m.clean()
	}
	if a, err := m.ask("1"); err != nil || a.Code != 11 || a.Message != "it has more" {
		t.Errorf("below its use: %+v, %v", a, err)
	}
	m.clean()
	m.want("gone pool/v 5", "gone pool/v 6", "gone pool/v 5", "gone pool/v 5", "gone pool/v 1")
}

// TestChangeLater asks while no node answers. Who asks again for the same gets the answer that has come since, and who asks for
// something else does not.
func TestChangeLater(t *testing.T) {
	m := newMailbox(t, nil)
	short := func(inodes string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*askEvery)
		defer cancel()
		_, err := m.asker.Ask(ctx, "pv", "pool/v", map[string]string{"inodes": inodes})
		return err
	}
	for range 2 {
		if err := short("5"); !errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), "node gone") {
			t.Errorf("nobody answers: %v", err)
		}
	}
	first := m.asked()
	if err := short("6"); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody answers: %v", err)
	}
	if second := m.asked(); second.ID == first.ID || second.Parameters["inodes"] != "6" {
		t.Errorf("%+v, then %+v", first, second)
	}
	m.serve("gone")
	if a, err := m.ask("6"); err != nil || a.Code != 0 {
		t.Errorf("%+v, %v", a, err)
	}
	m.want("gone pool/v 6")
	m.clean()
}

func (m *mailbox) asked() (c Change) {
	m.t.Helper()
	o, err := m.objects.Resource(pvs).Get(m.t.Context(), "pv", metav1.GetOptions{})
	if err == nil {
		err = json.Unmarshal([]byte(o.GetAnnotations()[driver+"/change"]), &c)
	}
	if err != nil || o.GetLabels()[driver+"/change-on"] != "gone" {
		m.t.Fatalf("%v, labels %v", err, o.GetLabels())
	}
	return c
}

// TestStaleAnswer takes the answer to one question for no other's.
func TestStaleAnswer(t *testing.T) {
	m := newMailbox(t, nil)
	o, err := m.objects.Tracker().Get(pvs, "", "pv")
	if err != nil {
		t.Fatal(err)
	}
	u := o.(*unstructured.Unstructured)
	u.SetAnnotations(map[string]string{driver + "/change": "no JSON", driver + "/answer": `{"id":"old","code":0}`})
	if err := m.objects.Tracker().Update(pvs, u, ""); err != nil {
		t.Fatal(err)
	}
	m.serve("gone")
	if a, err := m.ask("1"); err != nil || a.Code != 11 {
		t.Errorf("%+v, %v", a, err)
	}
	m.want("gone pool/v 1")
	m.clean()
}

// TestNotAsked asks about no PV that is not the volume's, or is on no one node.
func TestNotAsked(t *testing.T) {
	for name, test := range map[string]struct {
		change func(map[string]any)
		says   string
	}{
		"another volume":     {func(s map[string]any) { s["csi"] = map[string]any{"driver": driver, "volumeHandle": "pool/w"} }, "not that of volume pool/v"},
		"another driver":     {func(s map[string]any) { s["csi"] = map[string]any{"driver": "other", "volumeHandle": "pool/v"} }, "not that of volume pool/v"},
		"no affinity":        {func(s map[string]any) { delete(s, "nodeAffinity") }, "does not name one node"},
		"an affinity to two": {func(s map[string]any) { s["nodeAffinity"] = terms([]any{"gone"}, []any{"other"}) }, "does not name one node"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMailbox(t, test.change)
			m.serve("gone")
			if _, err := m.ask("5"); err == nil || errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("%v, want %q", err, test.says)
			}
			m.want()
			m.clean()
		})
	}
	m := newMailbox(t, nil)
	if _, err := m.asker.Ask(t.Context(), "none", "pool/v", nil); err == nil || !strings.Contains(err.Error(), `"none" not found`) {
		t.Errorf("a PV that is not there: %v", err)
	}
}

// TestForged does nothing for a PV that names this node in its label, and is another's.
func TestForged(t *testing.T) {
	for name, change := range map[string]func(map[string]any){
		"another node":   func(s map[string]any) { s["nodeAffinity"] = terms([]any{"other"}) },
		"another volume": func(s map[string]any) { s["csi"] = map[string]any{"driver": driver, "volumeHandle": "pool/w"} },
	} {
		t.Run(name, func(t *testing.T) {
			o := pv("Delete", change)
			o.SetResourceVersion("")
			o.SetLabels(map[string]string{driver + "/change-on": "gone"})
			o.SetAnnotations(map[string]string{driver + "/change": `{"id":"x","volume":"pool/v","parameters":{"inodes":"5"}}`})
			before := maps.Clone(o.GetAnnotations())
			objects := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{pvs: "PersistentVolumeList"}, o)
			c := &Changer{Objects: objects, Driver: driver, TopologyKey: key, Node: "gone", Logger: zap.NewNop(), Change: func(context.Context, string, map[string]string) (uint32, string) {
				t.Error("changed")
				return 0, ""
			}}
			c.answer(t.Context(), o)
			after, err := objects.Resource(pvs).Get(t.Context(), "pv", metav1.GetOptions{})
			if err != nil || !maps.Equal(after.GetAnnotations(), before) {
				t.Errorf("%v, %v", after.GetAnnotations(), err)
			}
		})
	}
}
