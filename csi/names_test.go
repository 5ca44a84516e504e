package csi

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/croftfs/croft/fs/pool"
)

// coNames are names that a CO may give: to 128 bytes of Unicode (CSI spec, CreateVolumeRequest.name and "Size Limits").
func coNames() []string {
	names := []string{"a", "0", "pvc-7f0c", "csi-", "csi-a", ".", "..", "-a", "_a", "a/b", "../../etc", "a b", "A", "a.", "a\x00", "\n", "é", "漢字", "e\u0301",
		"\u202egnp", "ephemeral/a", "csi-00000000000000000000000000000000"}
	for n := 1; n <= maxID; n++ {
		names = append(names, strings.Repeat("x", n), strings.Repeat("x", n-1)+"y", strings.Repeat("x", n-1)+"/")
	}
	for n := 1; n*utf8.RuneLen('漢') <= maxID; n++ {
		names = append(names, strings.Repeat("漢", n))
	}
	return names
}

// TestOwnNames wants every name to become one of its own that a pool takes and that an id has room for.
func TestOwnNames(t *testing.T) {
	poolID := strings.Repeat("f", poolIDLength)
	taken := make(map[string]string)
	add := func(what, own string) {
		if other, is := taken[own]; is && other != what {
			t.Errorf("%q and %q are both called %q", what, other, own)
		}
		taken[own] = what
		if err := pool.CheckName(own); err != nil {
			t.Errorf("%q: %v", what, err)
		}
		id := idOf(poolID, own)
		if p, name, ok := splitID(id); !ok || p != poolID || name != own {
			t.Errorf("the id %q of %q is %q and %q, %v", id, what, p, name, ok)
		}
	}
	for _, name := range coNames() {
		own := ownName(name)
		add("volume "+name, own)
		add("inline volume "+name, ephemeralName(name))
		if again := ownName(name); again != own {
			t.Errorf("%q is called %q and then %q", name, own, again)
		}
		// What was made of a name is never taken for a name itself.
		if strings.HasPrefix(own, hashed) {
			add("volume "+own, ownName(own))
		}
	}
}

func TestOwnNameIsTheNameItself(t *testing.T) {
	for _, name := range []string{"a", "pvc-7f0c2f5e-6a38-4c8d-9a55-1d7c3b1f2e10", strings.Repeat("x", maxOwnName)} {
		if own := ownName(name); own != name {
			t.Errorf("%q is called %q", name, own)
		}
	}
}

func TestSplitID(t *testing.T) {
	for id, want := range map[string][2]string{
		"0123456789abcdef/web": {"0123456789abcdef", "web"},
		"fast/web-0":           {"fast", "web-0"},
		"a b/c":                {"a b", "c"}, // no pool is called so
	} {
		if p, name, ok := splitID(id); !ok || [2]string{p, name} != want {
			t.Errorf("%q: %q, %q, %v", id, p, name, ok)
		}
	}
	for _, id := range []string{"", "/", "web", "/web", "fast/", "fast//web", "fast/web/", "fast/../web", "fast/.", "fast/..", "fast/a b", "fast/é", "fast/w\x00",
		"fast/" + strings.Repeat("x", maxID), strings.Repeat("x", maxID) + "/web"} {
		if p, name, ok := splitID(id); ok {
			t.Errorf("%q: %q, %q", id, p, name)
		}
	}
}
