package csi

import (
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
)

func TestOptions(t *testing.T) {
	for _, id := range []string{"a", "0", "node-a", "a.b_c-d", "A", strings.Repeat("n", 63)} {
		o := Options{NodeID: id, Pools: []NamedPool{{Name: "fast"}, {Name: "slow"}}}
		o.EnsureDefaults()
		if err := o.Validate(); err != nil {
			t.Errorf("node %q: %v", id, err)
		}
	}
	for _, id := range []string{"", "-a", "a-", ".a", "a.", "a b", "a/b", "é", "a\n", "a\x00", strings.Repeat("n", 64)} {
		o := Options{NodeID: id}
		if err := o.Validate(); err == nil {
			t.Errorf("node %q is possible", id)
		}
	}
	// Every fault is told at once.
	o := Options{NodeID: "", MaxVolumes: -1, Pools: []NamedPool{{Name: "fast"}, {Name: "a/b"}, {Name: "fast"}, {Name: ""}}}
	err := o.Validate()
	if err == nil {
		t.Fatal("nothing is wrong")
	}
	for _, word := range []string{`node id ""`, "-1 volumes", `"a/b"`, `two pools are called "fast"`, "name is empty"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
	if d, err := New(o); err == nil {
		d.Close()
		t.Error("New takes them")
	}
}

func TestTopology(t *testing.T) {
	d := &Driver{Options: Options{NodeID: "node-a"}}
	at := func(pairs ...string) *csipb.Topology {
		segments := make(map[string]string)
		for i := 0; i < len(pairs); i += 2 {
			segments[pairs[i]] = pairs[i+1]
		}
		return &csipb.Topology{Segments: segments}
	}
	a, b, zone := at(TopologyKey, "node-a"), at(TopologyKey, "node-b"), at("zone", "1")
	all := func(t ...*csipb.Topology) []*csipb.Topology { return t }
	for i, c := range []struct {
		r    *csipb.TopologyRequirement
		want bool
	}{
		{nil, true},
		{&csipb.TopologyRequirement{}, true},
		{&csipb.TopologyRequirement{Requisite: all(a)}, true},
		{&csipb.TopologyRequirement{Requisite: all(b)}, false},
		{&csipb.TopologyRequirement{Requisite: all(b, a)}, true},
		{&csipb.TopologyRequirement{Requisite: all(zone)}, true},
		{&csipb.TopologyRequirement{Requisite: all(at(TopologyKey, ""))}, false},
		{&csipb.TopologyRequirement{Requisite: all(a), Preferred: all(b)}, true},
		{&csipb.TopologyRequirement{Requisite: all(b), Preferred: all(a)}, false},
		{&csipb.TopologyRequirement{Preferred: all(a)}, true},
		{&csipb.TopologyRequirement{Preferred: all(b)}, false},
		{&csipb.TopologyRequirement{Requisite: all(nil)}, true},
	} {
		if got := d.reaches(c.r); got != c.want {
			t.Errorf("%d, %v: %v", i, c.r, got)
		}
	}
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
