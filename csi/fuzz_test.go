package csi

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/croftfs/croft/fs/pool"
)

const (
	maxCalls  = 8 // of one input
	maxNested = 5 // messages in each other
	tiny      = 1 << 20
)

// method is one of what a Server serves.
type method struct {
	name string // in full
	grpc.MethodDesc
}

func methods(t testing.TB) []method {
	t.Helper()
	var all []method
	for _, s := range []grpc.ServiceDesc{csipb.Identity_ServiceDesc, csipb.Controller_ServiceDesc, csipb.Node_ServiceDesc} {
		if len(s.Streams) > 0 {
			t.Fatalf("%s has streams, which nothing here calls", s.ServiceName)
		}
		for _, m := range s.Methods {
			all = append(all, method{"/" + s.ServiceName + "/" + m.MethodName, m})
		}
	}
	return all
}

// smallBlocks is a pool that has no room for large block volumes: they take their space at once. Sizes that no disk has
// are the pool's own to refuse.
type smallBlocks struct{ *pool.Pool }

func large(bytes uint64) error {
	if bytes > 4*tiny && bytes < 1<<50 {
		return fmt.Errorf("%w: this is a test", pool.ErrNoRoom)
	}
	return nil
}

func (p smallBlocks) Create(ctx context.Context, name string, o pool.CreateOptions) (pool.Volume, error) {
	if o.Kind == pool.KindBlock && large(o.Bytes) != nil {
		return pool.Volume{}, large(o.Bytes)
	}
	return p.Pool.Create(ctx, name, o)
}

func (p smallBlocks) Clone(ctx context.Context, name string, o pool.CloneOptions) (pool.Volume, error) {
	kind := pool.Kind("")
	if v, err := p.Volume(ctx, o.Volume); err == nil {
		kind = v.Kind
	} else if s, err := p.Snapshot(ctx, o.Snapshot); err == nil {
		kind = s.Kind
	}
	if kind == pool.KindBlock && large(o.Bytes) != nil {
		return pool.Volume{}, large(o.Bytes)
	}
	return p.Pool.Clone(ctx, name, o)
}

func (p smallBlocks) Resize(ctx context.Context, name string, o pool.ResizeOptions) (pool.Volume, error) {
	if v, err := p.Volume(ctx, name); err == nil && v.Kind == pool.KindBlock && large(o.Bytes) != nil {
		return pool.Volume{}, large(o.Bytes)
	}
	return p.Pool.Resize(ctx, name, o)
}

// world is a driver over a pool that is not mounted, and what is around the pool.
type world struct {
	base, dir, allowed, outside string

	pool    *pool.Pool
	methods []method
	driver  *Driver
	server  *Server
	logs    *observer.ObservedLogs

	paths, ids, names, keys, values, flags, all []string

	around string // what the listing of outside is
	kept   map[string]pool.Volume
	snap   pool.Snapshot
}

func newWorld(f *testing.F) *world {
	f.Helper()
	if os.Geteuid() != 0 {
		f.Fatal("this test makes pools: run it as root")
	}
	base, err := filepath.EvalSymlinks(f.TempDir())
	ok(f, err)
	w := &world{base: base, dir: base + "/pool", allowed: base + "/allowed", outside: base + "/outside",
		methods: methods(f), kept: make(map[string]pool.Volume)}
	ok(f, os.MkdirAll(w.outside+"/empty", 0o755))
	ok(f, os.MkdirAll(w.outside+"/full/below", 0o755))
	ok(f, os.WriteFile(w.outside+"/file", nil, 0o600))
	ok(f, os.WriteFile(w.outside+"/full/file", []byte("content"), 0o600))
	w.around = w.list(f)

	id, err := pool.Init(w.dir)
	ok(f, err)
	w.pool, err = pool.Open(pool.Options{Dir: w.dir})
	ok(f, err)
	f.Cleanup(func() {
		if err := w.pool.Close(); err != nil {
			f.Errorf("close: %v", err)
		}
	})
	w.driver, err = New(Options{NodeID: "node-a", Version: "1", TargetRoots: []string{w.allowed},
		Pools: []NamedPool{{Name: "fast", Pool: smallBlocks{w.pool}}}})
	ok(f, err)
	f.Cleanup(w.driver.Close)
	core, logs := observer.New(zap.ErrorLevel)
	w.logs = logs
	w.server = &Server{log: zap.New(core), calls: newCalls()}
	w.learn(id)
	w.restore(f)
	return w
}

// learn fills the dictionaries. Seeds are places in them: what is new comes last.
func (w *world) learn(id string) {
	long := strings.Repeat("x", 300)
	w.names = []string{"kept", "kept-block", "kept-snap", "new", "new-block", "new-snap", "csi-x", "a b", "../..", "a/../../b", ".", "..",
		"-", "nul\x00", long, strings.Repeat("/x", 3000), "ü", "%s%n", "UPPER", strings.Repeat("n", maxOwnName), strings.Repeat("n", maxOwnName+1)}
	for _, n := range w.names {
		w.ids = append(w.ids, id+"/"+n)
	}
	w.ids = append(w.ids, "inline", "fast/kept", "fast/kept-block", "fast/", "/kept", "/", "0000000000000000/kept", "../kept", id, id+"/kept/",
		id+"/../volumes/kept", id+"/"+ownName("a b"), id+"/"+ownName("../.."), id+"/"+ephemeralName("inline"), long, "inline\x00", "../..")
	for _, p := range []string{"/one", "/two", "/full", "/file", "/link", "/link/new", "/link/file", "/link/empty", "/link/full", "/dangling",
		"/round/x", "/pool/volumes/x", "/pool/blocks/kept-block", "", "/", "/.", "/../outside/new", "/one/../two", "//one/", "/none/below/x",
		"/file/x", "/" + long, "/nul\x00", strings.Repeat("/x", 3000), "/../pool", "-sibling", "/full/..", "/link/../new"} {
		w.paths = append(w.paths, w.allowed+p)
	}
	w.paths = append(w.paths, w.dir, w.dir+"/volumes/kept", w.dir+"/volumes/new", w.dir+"/pool.json", w.outside, w.outside+"/new",
		w.outside+"/empty", "/", "//", "relative", "../..", "\x00", ".")
	w.keys = []string{ParameterPool, ParameterInodes, ParameterWipe, ParameterUID, ParameterGID, ParameterMode, ParameterSize,
		kubernetesEphemeral, kubernetesPrefix + "pod.name", TopologyKey, "unknown", "", "Pool", long}
	w.values = []string{"fast", "", "true", "false", "0", "1", "10", "-1", "4294967294", "4294967295", "9223372036854775807",
		"18446744073709551616", "0770", "7777", "2770", "0o770", "2Mi", "1Gi", "1e30", "1n", "-1Gi", "0", "Inf", "8Ei", "16Ei", "node-a",
		"node-b", "slow", "NaN", "1_0", long, "\x00", strings.Repeat("v", 5000)}
	w.flags = []string{"", "croft", "ext4", "ro", "rw", "noexec", "nosuid", "nodev", "bind", "remount", "noatime", "x=y", "-o", "ro,rw"}
	w.all = slices.Concat(w.paths, w.ids, w.names, w.keys, w.values, w.flags)
}

// own is the dictionary of a field.
func (w *world) own(field string) []string {
	switch {
	case strings.Contains(field, "path"):
		return w.paths
	case strings.HasSuffix(field, "_id"), field == "starting_token":
		return w.ids
	case field == "name":
		return w.names
	case field == "key":
		return w.keys
	case field == "value", field == "volume_mount_group":
		return w.values
	case field == "mount_flags", field == "fs_type":
		return w.flags
	}
	return w.all
}

var numbers = []int64{0, 1, tiny, 2 * tiny, 3 * tiny, tiny - 1, tiny + 1, 4096, 100, -1, 1 << 30, 1 << 40, pool.MaxBytes, pool.MaxBytes + 1, pool.MaxBytes - 1,
	math.MaxInt64, math.MaxInt64 - 4094, math.MaxInt64 - 4095, math.MinInt64, math.MinInt32, math.MaxInt32}

// tape is what a message is read from, byte by byte, and, when writing, written to: what writes it makes seeds.
type tape struct {
	*world
	writing bool
	bytes   []byte
}

// choose is one of so many choices. was is what it is in the message that is written.
func (t *tape) choose(of, was int) int {
	if t.writing {
		if was < 0 || was >= min(of, 256) {
			panic(fmt.Sprintf("choice %d of %d cannot be written", was, of))
		}
		t.bytes = append(t.bytes, byte(was))
		return was
	}
	if len(t.bytes) == 0 {
		return 0
	}
	b := t.bytes[0]
	t.bytes = t.bytes[1:]
	return int(b) % of
}

func (t *tape) message(m protoreflect.Message, nested int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		there := 0
		if m.Has(f) {
			there = 1
		}
		if nested == 0 && f.Message() != nil || t.choose(2, there) == 0 {
			continue
		}
		switch {
		case f.IsMap():
			t.entries(f, m.Mutable(f).Map())
		case f.IsList():
			t.list(f, m.Mutable(f).List(), nested)
		case f.Message() != nil:
			t.message(m.Mutable(f).Message(), nested-1)
		default:
			m.Set(f, t.scalar(f, m.Get(f)))
		}
	}
}

func (t *tape) entries(f protoreflect.FieldDescriptor, m protoreflect.Map) {
	var keys []string
	for k := range m.Range {
		keys = append(keys, k.String())
	}
	slices.Sort(keys)
	for i := range t.choose(5, len(keys)) {
		var key, value protoreflect.Value
		if t.writing {
			key = protoreflect.ValueOfString(keys[i])
			value = m.Get(key.MapKey())
		}
		key = t.scalar(f.MapKey(), key)
		m.Set(key.MapKey(), t.scalar(f.MapValue(), value))
	}
}

func (t *tape) list(f protoreflect.FieldDescriptor, l protoreflect.List, nested int) {
	for i := range t.choose(4, l.Len()) {
		switch {
		case f.Message() != nil && t.writing:
			t.message(l.Get(i).Message(), nested-1)
		case f.Message() != nil:
			t.message(l.AppendMutable().Message(), nested-1)
		case t.writing:
			t.scalar(f, l.Get(i))
		default:
			l.Append(t.scalar(f, protoreflect.Value{}))
		}
	}
}

func (t *tape) scalar(f protoreflect.FieldDescriptor, was protoreflect.Value) protoreflect.Value {
	number := func(n func() int64) int64 {
		if t.writing {
			return numbers[t.choose(len(numbers), slices.Index(numbers, n()))]
		}
		return numbers[t.choose(len(numbers), 0)]
	}
	switch f.Kind() {
	case protoreflect.StringKind:
		if t.writing {
			return protoreflect.ValueOfString(t.word(string(f.Name()), was.String()))
		}
		return protoreflect.ValueOfString(t.word(string(f.Name()), ""))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(t.choose(2, 1) == 1) // false is not there
	case protoreflect.EnumKind:
		values := f.Enum().Values()
		// Beside those that are known: one that is not, and a negative one.
		n := values.Len() + 2
		if t.writing {
			return protoreflect.ValueOfEnum(protoreflect.EnumNumber(t.choose(n, int(was.Enum()))))
		}
		switch c := t.choose(n, 0); c {
		case n - 1:
			return protoreflect.ValueOfEnum(-1)
		case n - 2:
			return protoreflect.ValueOfEnum(99)
		default:
			return protoreflect.ValueOfEnum(values.Get(c).Number())
		}
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(number(was.Int))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(number(was.Int)))
	}
	panic(fmt.Sprintf("field %s is of kind %v: say what it can be", f.FullName(), f.Kind()))
}

// word is of the field's dictionary, or of all, or any.
func (t *tape) word(field, was string) string {
	from, how := t.own(field), 0
	if t.writing && !slices.Contains(from, was) {
		how = 5
	}
	switch t.choose(8, how) {
	case 5, 6:
		from = t.all
	case 7:
		n := min(t.choose(64, 0), len(t.bytes))
		raw := strings.ToValidUTF8(string(t.bytes[:n]), "?") // as gRPC lets nothing else through
		t.bytes = t.bytes[n:]
		return raw
	}
	if len(from) > 256 {
		from = from[256*(t.choose(len(from)/256, 0)):]
	}
	return from[t.choose(len(from), slices.Index(from, was))]
}

// call makes a call of the bytes, as the server does, and describes it.
func (t *tape) call() (what string, code codes.Code, err error) {
	m := t.methods[t.choose(len(t.methods), 0)]
	what = m.name
	fill := func(request any) error {
		message := request.(proto.Message)
		t.message(message.ProtoReflect(), maxNested)
		what += " {" + prototext.MarshalOptions{}.Format(message) + "}"
		return nil
	}
	_, err = m.Handler(t.driver, context.Background(), fill, t.server.intercept)
	return what, status.Code(err), err
}

// run makes the calls of an input, and gives back what they were answered with.
func (w *world) run(t testing.TB, input []byte) (answers []codes.Code) {
	t.Helper()
	tape := &tape{world: w, bytes: input}
	var calls []string
	for len(tape.bytes) > 0 && len(calls) < maxCalls {
		what, code, err := tape.call()
		calls = append(calls, fmt.Sprintf("%s: %v", what, err))
		answers = append(answers, code)
		if code == codes.Internal || code == codes.Unknown {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, e := range w.logs.TakeAll() {
		t.Errorf("log: %s %v", e.Message, e.ContextMap())
	}
	w.compare(t)
	w.restore(t)
	if t.Failed() {
		t.Logf("the calls were:\n%s", strings.Join(calls, "\n"))
	}
	return answers
}

// list lists what is outside: also whether something was there for a moment, which the times of directories tell.
func (w *world) list(t testing.TB) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(w.outside, func(at string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := e.Info()
		if err == nil {
			lines = append(lines, fmt.Sprintf("%s %v %d %v", at, fi.Mode(), fi.Size(), fi.ModTime()))
		}
		return err
	})
	ok(t, err)
	return strings.Join(lines, "\n")
}

// compare wants nothing changed outside, and in the pool what the records say.
func (w *world) compare(t testing.TB) {
	t.Helper()
	if now := w.list(t); now != w.around {
		t.Errorf("outside the pool and the targets there was\n%s\nand now there is\n%s", w.around, now)
	}
	if beside := names(t, w.base); !slices.Equal(beside, []string{"allowed", "outside", "pool"}) {
		t.Errorf("beside the pool there are %v", beside)
	}
	var trees, blocks, snaps []string
	volumes, err := w.pool.Volumes(context.Background())
	ok(t, err)
	for _, v := range volumes {
		if v.Kind == pool.KindBlock {
			blocks = append(blocks, v.Name)
		} else {
			trees = append(trees, v.Name)
		}
	}
	snapshots, err := w.pool.Snapshots(context.Background())
	ok(t, err)
	for _, s := range snapshots {
		snaps = append(snaps, s.Name)
	}
	for dir, want := range map[string][]string{"volumes": trees, "orphans": trees, "blocks": blocks, "snapshots": snaps} {
		slices.Sort(want)
		if there := names(t, path.Join(w.dir, dir)); !slices.Equal(there, want) {
			t.Errorf("%s has %q, and the records are of %q", dir, there, want)
		}
	}
}

// restore takes everything away but what inputs begin with.
func (w *world) restore(t testing.TB) {
	t.Helper()
	ctx := context.Background()
	volumes, err := w.pool.Volumes(ctx)
	ok(t, err)
	for _, v := range volumes {
		for _, target := range v.Published {
			ok(t, w.pool.Unpublish(ctx, v.Name, target))
		}
		if now, err := w.pool.Volume(ctx, v.Name); err != nil || now.Device != "" || len(now.Published) > 0 {
			t.Fatalf("what is published nowhere: %+v, %v", now, err)
		}
		if k, kept := w.kept[v.Name]; !kept || k.Limit != v.Limit || !k.Created.Equal(v.Created) || !reflect.DeepEqual(k.Labels, v.Labels) {
			delete(w.kept, v.Name)
			ok(t, w.pool.Delete(ctx, v.Name, pool.DeleteOptions{}))
		}
	}
	snapshots, err := w.pool.Snapshots(ctx)
	ok(t, err)
	for _, s := range snapshots {
		if s.Name != w.snap.Name || !s.Created.Equal(w.snap.Created) {
			ok(t, w.pool.DeleteSnapshot(ctx, s.Name))
		}
	}
	for name, kind := range map[string]pool.Kind{"kept": pool.KindFilesystem, "kept-block": pool.KindBlock} {
		if _, err := w.pool.Volume(ctx, name); err != nil {
			w.kept[name], err = w.pool.Create(ctx, name, pool.CreateOptions{Bytes: tiny, Kind: kind, Labels: map[string]string{LabelName: name}})
			ok(t, err)
		}
	}
	if _, err := w.pool.Snapshot(ctx, "kept-snap"); err != nil {
		w.snap, err = w.pool.CreateSnapshot(ctx, "kept-snap", pool.SnapshotOptions{Volume: "kept", Labels: map[string]string{LabelName: "kept-snap"}})
		ok(t, err)
	}
	// Nothing is mounted there any more, or this fails.
	ok(t, os.RemoveAll(w.allowed))
	ok(t, os.MkdirAll(w.allowed+"/full/below", 0o755))
	ok(t, os.WriteFile(w.allowed+"/file", nil, 0o600))
	for link, to := range map[string]string{"link": w.outside, "dangling": w.outside + "/none", "round": w.allowed + "/round", "pool": w.dir} {
		ok(t, os.Symlink(to, filepath.Join(w.allowed, link)))
	}
}

func names(t testing.TB, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	ok(t, err)
	var all []string
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// seedCall is a call, and what it is answered with.
type seedCall struct {
	method string
	proto.Message
	want codes.Code
}

func (w *world) encode(calls []seedCall) []byte {
	t := &tape{world: w, writing: true}
	for _, c := range calls {
		t.choose(len(w.methods), slices.IndexFunc(w.methods, func(m method) bool { return m.MethodName == c.method }))
		t.message(c.ProtoReflect(), maxNested)
	}
	return t.bytes
}

// seeds call each method that does something.
func (w *world) seeds() [][]seedCall {
	id := func(name string) string { return w.pool.Info().ID + "/" + name }
	const writer = csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER
	mode := &csipb.VolumeCapability_AccessMode{Mode: writer}
	block := &csipb.VolumeCapability{AccessMode: mode, AccessType: &csipb.VolumeCapability_Block{Block: &csipb.VolumeCapability_BlockVolume{}}}
	mount := &csipb.VolumeCapability{AccessMode: mode, AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{
		FsType: "croft", MountFlags: []string{"noexec"}, VolumeMountGroup: "10"}}}
	some := &csipb.CapacityRange{RequiredBytes: 2 * tiny, LimitBytes: 3 * tiny}
	here := &csipb.TopologyRequirement{Requisite: []*csipb.Topology{{Segments: map[string]string{TopologyKey: "node-a"}}}}
	secrets := map[string]string{"unknown": "true"}
	create := func(name string, c *csipb.VolumeCapability, from *csipb.VolumeContentSource) *csipb.CreateVolumeRequest {
		return &csipb.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csipb.VolumeCapability{c}, CapacityRange: some, Secrets: secrets,
			Parameters: map[string]string{ParameterPool: "fast", ParameterWipe: "true"}, AccessibilityRequirements: here, VolumeContentSource: from}
	}
	fromSnap := &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Snapshot{
		Snapshot: &csipb.VolumeContentSource_SnapshotSource{SnapshotId: id("kept-snap")}}}
	fromBlock := &csipb.VolumeContentSource{Type: &csipb.VolumeContentSource_Volume{
		Volume: &csipb.VolumeContentSource_VolumeSource{VolumeId: id("kept-block")}}}
	publish := func(volume, target string, c *csipb.VolumeCapability) *csipb.NodePublishVolumeRequest {
		return &csipb.NodePublishVolumeRequest{VolumeId: volume, TargetPath: w.allowed + target, VolumeCapability: c}
	}
	unpublish := func(volume, target string) *csipb.NodeUnpublishVolumeRequest {
		return &csipb.NodeUnpublishVolumeRequest{VolumeId: volume, TargetPath: w.allowed + target}
	}
	inline := publish("inline", "/one", mount)
	inline.VolumeContext = map[string]string{kubernetesEphemeral: "true", ParameterSize: "2Mi", ParameterMode: "2770"}
	return [][]seedCall{
		{{"CreateVolume", create("new", mount, nil), codes.OK}, {"CreateVolume", create("new", mount, nil), codes.OK},
			{"CreateVolume", create("new", block, nil), codes.AlreadyExists},
			{"ControllerModifyVolume", &csipb.ControllerModifyVolumeRequest{VolumeId: id("new"), MutableParameters: map[string]string{ParameterInodes: "10"}}, codes.OK},
			{"DeleteVolume", &csipb.DeleteVolumeRequest{VolumeId: id("new")}, codes.OK},
			{"DeleteVolume", &csipb.DeleteVolumeRequest{VolumeId: id("new")}, codes.OK}},
		{{"CreateVolume", create("../..", block, nil), codes.OK}, {"CreateVolume", create("a/../../b", mount, fromSnap), codes.OK},
			{"CreateVolume", create("new-block", block, fromBlock), codes.OK}, {"CreateVolume", create("new-snap", block, fromSnap), codes.InvalidArgument}},
		{{"CreateSnapshot", &csipb.CreateSnapshotRequest{Name: "new-snap", SourceVolumeId: id("kept-block")}, codes.OK},
			{"CreateSnapshot", &csipb.CreateSnapshotRequest{Name: "new-snap", SourceVolumeId: id("kept")}, codes.AlreadyExists},
			{"GetSnapshot", &csipb.GetSnapshotRequest{SnapshotId: id("new-snap")}, codes.OK},
			{"ListSnapshots", &csipb.ListSnapshotsRequest{MaxEntries: 1, StartingToken: id("kept")}, codes.OK},
			{"DeleteSnapshot", &csipb.DeleteSnapshotRequest{SnapshotId: id("new-snap")}, codes.OK}},
		{{"ValidateVolumeCapabilities", &csipb.ValidateVolumeCapabilitiesRequest{VolumeId: id("kept"), VolumeCapabilities: []*csipb.VolumeCapability{mount}}, codes.OK},
			{"ListVolumes", &csipb.ListVolumesRequest{MaxEntries: 1}, codes.OK},
			{"ControllerGetVolume", &csipb.ControllerGetVolumeRequest{VolumeId: "fast/kept"}, codes.OK},
			{"GetCapacity", &csipb.GetCapacityRequest{AccessibleTopology: here.Requisite[0], Parameters: map[string]string{ParameterPool: "fast"}}, codes.OK},
			{"ControllerGetVolumeHealth", &csipb.ControllerGetVolumeHealthRequest{VolumeId: id("kept")}, codes.OK},
			{"ControllerListVolumeHealth", &csipb.ControllerListVolumeHealthRequest{MaxEntries: 1}, codes.OK}},
		{{"NodePublishVolume", publish(id("kept-block"), "/one", block), codes.OK},
			{"NodePublishVolume", publish(id("kept-block"), "/two", block), codes.FailedPrecondition},
			{"NodeGetVolumeStats", &csipb.NodeGetVolumeStatsRequest{VolumeId: id("kept-block"), VolumePath: w.allowed + "/one"}, codes.OK},
			{"NodeExpandVolume", &csipb.NodeExpandVolumeRequest{VolumeId: id("kept-block"), VolumePath: w.allowed + "/one", CapacityRange: some}, codes.OK},
			{"NodeGetVolumeHealth", &csipb.NodeGetVolumeHealthRequest{VolumeId: id("kept-block"), VolumePublishPath: w.allowed + "/one"}, codes.OK},
			{"DeleteVolume", &csipb.DeleteVolumeRequest{VolumeId: id("kept-block")}, codes.FailedPrecondition},
			{"NodeUnpublishVolume", unpublish(id("kept-block"), "/one"), codes.OK}},
		{{"NodePublishVolume", publish(id("kept"), "/one", mount), codes.Unavailable}, {"NodePublishVolume", inline, codes.Unavailable},
			{"NodeUnpublishVolume", unpublish("inline", "/one"), codes.OK}},
		{{"NodePublishVolume", publish(id("kept-block"), "/link/new", block), codes.InvalidArgument},
			{"NodeUnpublishVolume", unpublish(id("kept-block"), "/link/file"), codes.InvalidArgument},
			{"NodeUnpublishVolume", unpublish(id("kept-block"), "/full"), codes.InvalidArgument},
			{"NodePublishVolume", publish(id("kept-block"), "/../outside/new", block), codes.InvalidArgument},
			{"NodePublishVolume", publish(id("kept-block"), "/pool/blocks/kept-block", block), codes.InvalidArgument},
			{"NodePublishVolume", publish(id("kept-block"), "/none/below/x", block), codes.InvalidArgument}},
	}
}

// FuzzRequests makes calls of every method. Whatever is in them, an answer is no fault of the driver, nothing outside the
// pool and the directory of targets changes, and the pool has what its records say.
func FuzzRequests(f *testing.F) {
	w := newWorld(f)
	reached := make(map[string]bool)
	for i, m := range w.methods {
		handler := m.Handler
		w.methods[i].Handler = func(srv any, ctx context.Context, fill func(any) error, via grpc.UnaryServerInterceptor) (any, error) {
			return handler(srv, ctx, fill, func(ctx context.Context, r any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
				reached[info.FullMethod] = true
				return via(ctx, r, info, next)
			})
		}
	}
	for i := range w.methods {
		f.Add([]byte{byte(i)})
		w.run(f, []byte{byte(i)})
	}
	for _, m := range methods(f) {
		if !reached[m.name] {
			f.Errorf("no input calls %s; called were %v", m.name, slices.Sorted(maps.Keys(reached)))
		}
	}
	for _, calls := range w.seeds() {
		var want []codes.Code
		for _, c := range calls {
			want = append(want, c.want)
		}
		input := w.encode(calls)
		if got := w.run(f, input); !slices.Equal(got, want) {
			f.Errorf("seed of %s and more is answered with %v, and not %v", calls[0].method, got, want)
		}
		f.Add(input)
	}
	f.Fuzz(func(t *testing.T, input []byte) { w.run(t, input) })
}
