package csi

import (
	"fmt"
	"math"
	"reflect"
	"slices"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/fs/pool"
)

const (
	anyWriters = csipb.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER
	readers    = csipb.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY
)

func asTree(mode csipb.VolumeCapability_AccessMode_Mode, flags ...string) *csipb.VolumeCapability {
	return &csipb.VolumeCapability{AccessMode: &csipb.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{MountFlags: flags}}}
}

func forGroup(group string) *csipb.VolumeCapability {
	c := asTree(anyWriters)
	c.GetMount().VolumeMountGroup = group
	return c
}

func asDevice(mode csipb.VolumeCapability_AccessMode_Mode) *csipb.VolumeCapability {
	return &csipb.VolumeCapability{AccessMode: &csipb.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csipb.VolumeCapability_Block{Block: &csipb.VolumeCapability_BlockVolume{}}}
}

func TestParseAccess(t *testing.T) {
	ten := uint32(10)
	croft := asTree(anyWriters)
	croft.GetMount().FsType = "croft"
	for name, c := range map[string]struct {
		capability *csipb.VolumeCapability
		want       access
	}{
		"tree":       {asTree(anyWriters, "noatime", "ro"), access{kind: pool.KindFilesystem, flags: []string{"noatime", "ro"}, mode: anyWriters}},
		"named type": {croft, access{kind: pool.KindFilesystem, mode: anyWriters}},
		"group":      {forGroup("10"), access{kind: pool.KindFilesystem, group: &ten, mode: anyWriters}},
		"device":     {asDevice(readers), access{kind: pool.KindBlock, mode: readers}},
	} {
		if a, err := parseAccess(c.capability); err != nil || !reflect.DeepEqual(a, c.want) {
			t.Errorf("%s: %+v, %v, want %+v", name, a, err, c.want)
		}
	}
}

func TestBadAccess(t *testing.T) {
	ext4 := asTree(anyWriters)
	ext4.GetMount().FsType = "ext4"
	for _, c := range []struct {
		capability *csipb.VolumeCapability
		word       string
	}{
		{nil, "no volume capability"},
		{&csipb.VolumeCapability{}, "access mode 0"},
		{asTree(csipb.VolumeCapability_AccessMode_UNKNOWN), "access mode 0"},
		{asTree(99), "access mode 99"},
		{asDevice(-1), "access mode -1"},
		{&csipb.VolumeCapability{AccessMode: &csipb.VolumeCapability_AccessMode{Mode: anyWriters}}, "neither mount nor block"},
		{ext4, `fs_type "ext4"`},
		{asTree(anyWriters, "ro", "suid"), `"suid": known are`},
		{asTree(anyWriters, ""), "mount flags"},
		{forGroup("wheel"), `volume_mount_group: "wheel"`},
		{forGroup("4294967295"), "0 to 4294967294"},
	} {
		_, err := parseAccess(c.capability)
		wantMessage(t, err, ErrArgument, c.word)
	}
}

// TestModes goes through the modes of the interface: all are possible, since a volume is on one node.
func TestModes(t *testing.T) {
	exclusive := []csipb.VolumeCapability_AccessMode_Mode{csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER,
		csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY, csipb.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER}
	readOnly := []csipb.VolumeCapability_AccessMode_Mode{csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY,
		csipb.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY}
	for n, name := range csipb.VolumeCapability_AccessMode_Mode_name {
		mode := csipb.VolumeCapability_AccessMode_Mode(n)
		if mode == csipb.VolumeCapability_AccessMode_UNKNOWN {
			continue
		}
		a, err := parseAccess(asTree(mode))
		if err != nil || a.exclusive() != slices.Contains(exclusive, mode) || a.readOnly() != slices.Contains(readOnly, mode) {
			t.Errorf("%s: exclusive %v, read-only %v, %v", name, a.exclusive(), a.readOnly(), err)
		}
	}
}

func TestParseAccesses(t *testing.T) {
	tree, device := asTree(anyWriters), asDevice(readers)
	for _, c := range []struct {
		all  []*csipb.VolumeCapability
		kind pool.Kind
		word string
	}{
		{[]*csipb.VolumeCapability{tree}, pool.KindFilesystem, ""},
		{[]*csipb.VolumeCapability{tree, asTree(readers)}, pool.KindFilesystem, ""},
		{[]*csipb.VolumeCapability{device, device}, pool.KindBlock, ""},
		{nil, "", "no volume capabilities"},
		{[]*csipb.VolumeCapability{tree, nil}, "", "no volume capability"},
		{[]*csipb.VolumeCapability{tree, device}, "", "both a filesystem and a block device"},
		{[]*csipb.VolumeCapability{device, tree}, "", "both a filesystem and a block device"},
	} {
		kind, err := parseAccesses(c.all)
		if kind != c.kind {
			t.Errorf("%v: kind %q, want %q", c.all, kind, c.kind)
		}
		if c.word == "" {
			ok(t, err)
		} else {
			wantMessage(t, err, ErrArgument, c.word)
		}
	}
}

func TestCapacityRanges(t *testing.T) {
	const mi, usual, most = 1 << 20, 1 << 30, math.MaxInt64
	for _, c := range []struct {
		least, limit int64
		want         uint64 // what is chosen
		parse, pick  error
	}{
		{0, 0, usual, nil, nil},
		{1, 0, mi, nil, nil},
		{mi, 0, mi, nil, nil},
		{mi + 1, 0, mi + 4096, nil, nil},
		{mi + 4096, mi + 4096, mi + 4096, nil, nil},
		{mi + 1, mi + 4095, 0, nil, ErrRange},
		{0, mi, mi, nil, nil},
		{0, mi + 4095, mi, nil, nil},
		{0, usual - 1, usual - 4096, nil, nil},
		{0, usual + 1, usual, nil, nil},
		{0, most, usual, nil, nil},
		{1, mi, mi, nil, nil},
		{1 << 62, 0, 1 << 62, nil, nil},
		{1<<62 - 1, 0, 1 << 62, nil, nil},
		{1<<62 - 1, 1<<62 - 1, 0, nil, ErrRange},
		{1<<62 - 4096, most, 1<<62 - 4096, nil, nil},

		{1<<62 + 1, 0, 0, ErrRange, nil},
		{most, 0, 0, ErrRange, nil},
		{most, most, 0, ErrRange, nil},
		{most - 4095, most, 0, ErrRange, nil},
		{0, mi - 1, 0, ErrRange, nil},
		{0, 1, 0, ErrRange, nil},
		{1, 1, 0, ErrRange, nil},
		{-1, 0, 0, ErrArgument, nil},
		{0, -1, 0, ErrArgument, nil},
		{math.MinInt64, math.MinInt64, 0, ErrArgument, nil},
		{2, 1, 0, ErrArgument, nil},
		{most, mi, 0, ErrArgument, nil},
	} {
		what := fmt.Sprintf("%d to %d", c.least, c.limit)
		s, err := parseSizes(&csipb.CapacityRange{RequiredBytes: c.least, LimitBytes: c.limit})
		if c.parse != nil || err != nil {
			wantErr(t, what, err, c.parse)
			continue
		}
		got, err := s.choose(usual)
		if c.pick != nil || err != nil {
			wantErr(t, what, err, c.pick)
			continue
		}
		if got != c.want || !s.has(got) || got < pool.MinBytes || got > pool.MaxBytes {
			t.Errorf("%s: %d is chosen, and is in the range: %v; want %d", what, got, s.has(got), c.want)
		}
	}
	if s, err := parseSizes(nil); err != nil || s != (sizes{}) {
		t.Errorf("no range: %v, %v", s, err)
	}
}

func TestHas(t *testing.T) {
	for _, c := range []struct {
		sizes
		bytes uint64
		want  bool
	}{
		{sizes{}, 0, true}, {sizes{}, math.MaxUint64, true},
		{sizes{4096, 8192}, 4095, false}, {sizes{4096, 8192}, 4096, true}, {sizes{4096, 8192}, 8192, true}, {sizes{4096, 8192}, 8193, false},
		{sizes{4096, 0}, math.MaxUint64, true}, {sizes{0, 4096}, 0, true}, {sizes{0, 4096}, 4097, false},
	} {
		if got := c.has(c.bytes); got != c.want {
			t.Errorf("%v has %d: %v", c.sizes, c.bytes, got)
		}
	}
}

// TestPages goes through a list in pages of every size, while entries come and go between them.
func TestPages(t *testing.T) {
	id := func(s string) string { return s }
	var all []string
	for i := range 10 {
		all = append(all, fmt.Sprintf("0123456789abcdef/v%d", i))
	}
	for size := range int32(len(all) + 2) {
		var seen []string
		token := ""
		for {
			part, next, err := page(all, id, token, size)
			ok(t, err)
			seen = append(seen, part...)
			if token = next; token == "" {
				break
			}
			if len(part) != int(size) || token != part[len(part)-1] {
				t.Fatalf("pages of %d: %v, and the token %q", size, part, token)
			}
		}
		if !slices.Equal(seen, all) {
			t.Errorf("pages of %d: %v", size, seen)
		}
	}

	part, token, err := page(all, id, "", 3)
	ok(t, err)
	// What the token names goes, what was seen goes, and something comes on either side of the cut.
	changed := slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == token || s == part[0] })
	changed = append(changed, "0123456789abcdef/v1a", "0123456789abcdef/v2a")
	slices.Sort(changed)
	rest, _, err := page(changed, id, token, 0)
	ok(t, err)
	if want := append([]string{"0123456789abcdef/v2a"}, all[3:]...); !slices.Equal(rest, want) {
		t.Errorf("the rest is %v, want %v", rest, want)
	}
}

func TestPageEdges(t *testing.T) {
	id := func(s string) string { return s }
	all := []string{"p/b", "p/c"}
	for _, c := range []struct {
		token string
		most  int32
		want  []string
		err   error
	}{
		{"p/a", 0, all, nil},
		{"p/c", 0, nil, nil},
		{"q/z", 1, nil, nil},
		{"", math.MaxInt32, all, nil},
		{"", -1, nil, ErrArgument},
		{"p/b", math.MinInt32, nil, ErrArgument},
		{"p", 0, nil, ErrToken},
		{"/b", 0, nil, ErrToken},
		{"p/", 0, nil, ErrToken},
		{"p/../b", 0, nil, ErrToken},
		{"p/b\x00", 0, nil, ErrToken},
	} {
		got, next, err := page(all, id, c.token, c.most)
		wantErr(t, c.token, err, c.err)
		if !slices.Equal(got, c.want) || next != "" {
			t.Errorf("after %q: %v and the token %q, want %v", c.token, got, next, c.want)
		}
	}
	if part, next, err := page(nil, id, "", 1); len(part) != 0 || next != "" || err != nil {
		t.Errorf("an empty list: %v, %q, %v", part, next, err)
	}
}
