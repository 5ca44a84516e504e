package meta

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dgraph-io/badger/v4"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func openStore(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(Options{Dir: dir, InMemory: dir == ""})
	must(t, err)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// onStores runs a test on a store of each kind.
func onStores(t *testing.T, test func(t *testing.T, s *Store)) {
	t.Run("disk", func(t *testing.T) { test(t, openStore(t, t.TempDir())) })
	t.Run("memory", func(t *testing.T) { test(t, openStore(t, "")) })
}

func putOf(v Volume) func(*badger.Txn) error {
	return func(txn *badger.Txn) error { return put(txn, volumePrefix+v.Name, v) }
}

// raw stores bytes as the record of a key.
func raw(t *testing.T, s *Store, key string, value []byte) {
	t.Helper()
	must(t, s.update(func(txn *badger.Txn) error { return txn.Set([]byte(key), value) }))
}

func TestVolumes(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		if all, err := s.Volumes(); err != nil || len(all) != 0 {
			t.Errorf("a new store: %v, %v", all, err)
		}
		names := []string{"b", "a", "a-b", "z", "a0", strings.Repeat("n", 128), "B"}
		for _, name := range names {
			must(t, s.CreateVolume(volume(name)))
		}
		must(t, s.PutCheckpoint("a", clean, false))
		if err := s.CreateVolume(volume("a")); !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), "volume a") {
			t.Errorf("created twice: %v", err)
		}
		if got, err := s.Volume("b"); err != nil || !reflect.DeepEqual(got, volume("b")) {
			t.Errorf("%+v, %v, want %+v", got, err, volume("b"))
		}
		if _, err := s.Volume("none"); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "volume none") {
			t.Errorf("absent: %v", err)
		}
		slices.Sort(names)
		all, err := s.Volumes()
		must(t, err)
		var got []string
		for _, v := range all {
			got = append(got, v.Name)
		}
		if !slices.Equal(got, names) {
			t.Errorf("listed %q, want %q", got, names)
		}

		changed := volume("a")
		changed.Labels, changed.Limit.Bytes = nil, 7
		must(t, s.PutVolume(changed))
		if got, err := s.Volume("a"); err != nil || !reflect.DeepEqual(got, changed) {
			t.Errorf("%+v, %v, want %+v", got, err, changed)
		}
		for range 2 {
			must(t, s.DeleteVolume("a"))
			must(t, wantNone("a")(s))
		}
		must(t, s.CreateVolume(volume("a")))
		if _, err := checkpoint(s, "a"); !errors.Is(err, ErrNotFound) {
			t.Errorf("a volume made again has the old one's checkpoint: %v", err)
		}
	})
}

func TestUpdateVolume(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		if _, err := s.UpdateVolume("a", func(*Volume) error { t.Error("called"); return nil }); !errors.Is(err, ErrNotFound) {
			t.Errorf("absent: %v", err)
		}
		must(t, s.CreateVolume(volume("a")))
		wrong := errors.New("wrong")
		if _, err := s.UpdateVolume("a", func(v *Volume) error { v.State = StateDeleting; return wrong }); !errors.Is(err, wrong) {
			t.Errorf("refused: %v", err)
		}
		must(t, wantState("a", StateReady)(s))
		v, err := s.UpdateVolume("a", func(v *Volume) error { v.Limit.Inodes = 9; return nil })
		want := volume("a")
		want.Limit.Inodes = 9
		if got, gerr := s.Volume("a"); err != nil || gerr != nil || !reflect.DeepEqual(v, want) || !reflect.DeepEqual(got, want) {
			t.Errorf("returned %+v, %v; stored %+v, %v; want %+v", v, err, got, gerr, want)
		}
	})
}

// TestConcurrentUpdates has 16 updaters of one record, and 16 creators of one volume.
func TestConcurrentUpdates(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		const updaters, each = 16, 20
		v := volume("a")
		v.Limit.Bytes = 0
		must(t, s.CreateVolume(v))
		var wg sync.WaitGroup
		var mu sync.Mutex
		runs, created := 0, 0
		for range updaters {
			wg.Go(func() {
				switch err := s.CreateVolume(volume("b")); {
				case err == nil:
					mu.Lock()
					created++
					mu.Unlock()
				case !errors.Is(err, ErrExists):
					t.Error(err)
				}
				for range each {
					if _, err := s.UpdateVolume("a", func(v *Volume) error {
						mu.Lock()
						runs++
						mu.Unlock()
						v.Limit.Bytes++
						return nil
					}); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		v, err := s.Volume("a")
		if err != nil || v.Limit.Bytes != updaters*each {
			t.Errorf("%d updates are left of %d, %v", v.Limit.Bytes, updaters*each, err)
		}
		if created != 1 {
			t.Errorf("created by %d", created)
		}
		t.Logf("%d conflicts", runs-updaters*each)
	})
}

// TestUpdateRetriesConflict makes a conflict for certain.
func TestUpdateRetriesConflict(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		must(t, s.CreateVolume(volume("a")))
		runs := 0
		v, err := s.UpdateVolume("a", func(v *Volume) error {
			if runs++; runs == 1 {
				other := *v
				other.Limit.Bytes = 5
				return s.PutVolume(other)
			}
			v.Limit.Bytes++
			return nil
		})
		if err != nil || runs != 2 || v.Limit.Bytes != 6 {
			t.Errorf("%d runs, %+v, %v", runs, v, err)
		}
	})
}

func TestCheckpoints(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		if _, err := checkpoint(s, "a"); !errors.Is(err, ErrNotFound) {
			t.Errorf("absent: %v", err)
		}
		must(t, s.SetDirty("a", "first"))
		must(t, wantCheckpoint("a", Checkpoint{Dirty: true, BootID: "first"})(s))
		for _, durable := range []bool{false, true} {
			must(t, s.PutCheckpoint("a", clean, durable))
			must(t, wantCheckpoint("a", clean)(s))
			must(t, s.SetDirty("a", "second"))
			dirty := clean
			dirty.Dirty, dirty.BootID = true, "second"
			must(t, wantCheckpoint("a", dirty)(s))
		}
		if all, err := s.Volumes(); err != nil || len(all) != 0 {
			t.Errorf("a checkpoint is listed: %v, %v", all, err)
		}
	})
}

func publication(volume, target string) Publication {
	group := uint32(0) // is one, and not none
	return Publication{Volume: volume, Target: target, ReadOnly: true, Flags: []string{"noexec", "nosuid"}, Exclusive: true,
		Group: &group, Attached: true, Created: time.Unix(3000, 0).UTC()}
}

func wantPublications(t *testing.T, s *Store, want ...Publication) {
	t.Helper()
	if got, err := s.Publications(); err != nil || len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
}

func TestPublications(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		wantPublications(t, s)
		// A volume whose name begins with another's, a target that begins with another, and the longest one.
		a, below, long := publication("a", "/t"), publication("a", "/t/t"), publication("a", "/"+strings.Repeat("x", 4094))
		ab, least := publication("ab", "/t"), Publication{Volume: "b", Target: "/t", Created: time.Unix(3000, 0).UTC()}
		for _, r := range []Publication{least, long, ab, below, a} {
			must(t, s.PutPublication(r))
		}
		wantPublications(t, s, a, below, long, ab, least)
		if all, err := s.Volumes(); err != nil || len(all) > 0 {
			t.Errorf("a publication is listed: %v, %v", all, err)
		}

		a.ReadOnly, a.Flags, a.Group = false, nil, nil
		must(t, s.PutPublication(a))
		for range 2 {
			must(t, s.DeletePublication("a", "/t/t"))
			must(t, s.DeletePublication("none", "/t"))
			wantPublications(t, s, a, long, ab, least)
		}
		// It is not the volume's record.
		must(t, s.CreateVolume(volume("a")))
		must(t, s.DeleteVolume("a"))
		wantPublications(t, s, a, long, ab, least)
		for _, r := range []Publication{a, long, ab, least} {
			must(t, s.DeletePublication(r.Volume, r.Target))
		}
		wantPublications(t, s)
	})
}

func TestPublicationFormats(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		good, err := encode(publication("a", "/t"))
		must(t, err)
		other, err := encode(publication("a", "/other"))
		must(t, err)
		for what, c := range map[string]struct {
			value []byte
			want  error
		}{
			"newer":     {append([]byte{recordVersion + 1}, good[1:]...), ErrNewerFormat},
			"cut":       {good[:len(good)-1], ErrCorrupt},
			"another's": {other, ErrCorrupt},
		} {
			raw(t, s, publicationPrefix+"a/t", c.value)
			if _, err := s.Publications(); !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), "publication a/t") {
				t.Errorf("%s: %v, want %v", what, err, c.want)
			}
		}
		must(t, s.DeletePublication("a", "/t"))
		wantPublications(t, s)
	})
}

func TestPublicationsReopen(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	a, b := publication("a", "/t"), publication("b", "/t")
	for _, r := range []Publication{a, b} {
		must(t, s.PutPublication(r))
	}
	must(t, s.DeletePublication("b", "/t"))
	must(t, s.Close())
	if err := s.PutPublication(b); err == nil {
		t.Error("a closed store takes publications")
	}
	wantPublications(t, openStore(t, dir), a)
}

func TestReopen(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "by open")
	for i := range 8 { // more than the tables with which Badger begins to compact
		s, err := Open(Options{Dir: dir})
		must(t, err)
		all, err := s.Volumes()
		if err != nil || len(all) != i {
			t.Errorf("%d volumes after %d: %v", len(all), i, err)
		}
		must(t, s.CreateVolume(volume(fmt.Sprint(i))))
		must(t, s.PutCheckpoint("c", clean, false))
		must(t, s.Close())
		must(t, s.Close())
		if err := s.PutVolume(volume("late")); err == nil {
			t.Error("a closed store takes records")
		}
		if _, err := s.Volume("0"); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("a closed store answers %v", err)
		}
	}
	must(t, wantCheckpoint("c", clean)(openStore(t, dir)))
}

// TestUnbornLogs opens a store in which a killed process has made logs and not yet
// given them a size.
func TestUnbornLogs(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(Options{Dir: dir})
	must(t, err)
	must(t, s.CreateVolume(volume("v")))
	must(t, s.Close())
	for _, name := range []string{"000099.vlog", "00099.mem"} {
		must(t, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
	}
	if _, err := openStore(t, dir).Volume("v"); err != nil {
		t.Error(err)
	}
}

// TestLogChanges writes several logs full.
func TestLogChanges(t *testing.T) {
	dir := t.TempDir()
	s := openStore(t, dir)
	big := strings.Repeat("p", 64<<10)
	first := ""
	for i := range 400 {
		v := volume(fmt.Sprint(i))
		v.Labels["big"] = big
		must(t, s.PutVolume(v))
		if first == "" {
			first = s.space.log
		}
	}
	if s.space.log == first {
		t.Errorf("all is in %s: the test tests nothing", first)
	}
	must(t, s.Close())
	all, err := openStore(t, dir).Volumes()
	if err != nil || len(all) != 400 || all[0].Labels["big"] != big {
		t.Errorf("%d volumes, %v", len(all), err)
	}
}

func TestFormats(t *testing.T) {
	onStores(t, func(t *testing.T, s *Store) {
		good, err := encode(volume("bad"))
		must(t, err)
		other, err := encode(volume("other"))
		must(t, err)
		for what, c := range map[string]struct {
			value []byte
			want  error
		}{
			"newer":          {append([]byte{recordVersion + 1}, good[1:]...), ErrNewerFormat},
			"version 0":      {append([]byte{0}, good[1:]...), ErrCorrupt},
			"empty":          {nil, ErrCorrupt},
			"version only":   {good[:1], ErrCorrupt},
			"cut":            {good[:len(good)-1], ErrCorrupt},
			"trailing":       {append(slices.Clone(good), '{'), ErrCorrupt},
			"null":           {[]byte("\x01null"), ErrCorrupt},
			"another's":      {other, ErrCorrupt},
			"wrong type":     {[]byte("\x01" + `{"name":"bad","limit":3}`), ErrCorrupt},
			"negative limit": {[]byte("\x01" + `{"name":"bad","limit":{"bytes":-1}}`), ErrCorrupt},
		} {
			raw(t, s, volumePrefix+"bad", c.value)
			_, err := s.Volume("bad")
			_, listErr := s.Volumes()
			_, updateErr := s.UpdateVolume("bad", func(*Volume) error { t.Errorf("%s: updated", what); return nil })
			for call, err := range map[string]error{"Volume": err, "Volumes": listErr, "UpdateVolume": updateErr} {
				if !errors.Is(err, c.want) || !strings.Contains(fmt.Sprint(err), "volume bad") {
					t.Errorf("%s, %s: %v, want %v", what, call, err, c.want)
				}
			}
			if err := s.CreateVolume(volume("bad")); !errors.Is(err, ErrExists) {
				t.Errorf("%s: created over it: %v", what, err)
			}
		}
		raw(t, s, checkpointPrefix+"bad", []byte{recordVersion + 1})
		if err := s.SetDirty("bad", ""); !errors.Is(err, ErrNewerFormat) {
			t.Errorf("a newer checkpoint is marked dirty: %v", err)
		}
		raw(t, s, checkpointPrefix+"bad", []byte("\x01null"))
		if _, err := checkpoint(s, "bad"); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "volume bad") {
			t.Errorf("a checkpoint of nothing: %v", err)
		}
		must(t, s.DeleteVolume("bad"))
		must(t, wantNone("bad")(s))
	})
}

func TestStoreFormats(t *testing.T) {
	for what, c := range map[string]struct {
		value []byte
		want  error
	}{
		"newer": {[]byte{recordVersion + 1}, ErrNewerFormat},
		"long":  {[]byte{1, 1}, ErrCorrupt},
		"empty": {nil, ErrCorrupt},
		"zero":  {[]byte{0}, ErrCorrupt},
	} {
		dir := t.TempDir()
		s, err := Open(Options{Dir: dir})
		must(t, err)
		raw(t, s, formatKey, c.value)
		must(t, s.Close())
		for range 2 { // refused, and not left open
			if _, err := Open(Options{Dir: dir}); !errors.Is(err, c.want) || !strings.Contains(err.Error(), dir) {
				t.Errorf("%s: %v, want %v", what, err, c.want)
			}
		}
	}
}

func TestInUse(t *testing.T) {
	dir := t.TempDir()
	inUse := func() {
		t.Helper()
		if _, err := Open(Options{Dir: dir}); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), dir) {
			t.Errorf("a second open: %v, want %v", err, ErrInUse)
		}
	}
	s := openStore(t, dir)
	inUse()
	must(t, s.CreateVolume(volume("a")))
	must(t, s.Close())

	c := startChild(t, "hold", dir)
	c.expect("open")
	inUse()
	c.kill()
	must(t, wantState("a", StateReady)(openStore(t, dir)))
}

func FuzzDecode(f *testing.F) {
	for _, record := range []any{volume("a"), clean, Checkpoint{}} {
		b, err := encode(record)
		must(f, err)
		f.Add(b)
	}
	f.Add([]byte("\x01null"))
	f.Add([]byte{})
	f.Add([]byte{2, '{', '}'})
	f.Fuzz(func(t *testing.T, b []byte) {
		check(t, b, new(Volume), new(Volume))
		check(t, b, new(Checkpoint), new(Checkpoint))
	})
}

// check decodes, and what it got again when it has been encoded.
func check(t *testing.T, b []byte, first, second any) {
	t.Helper()
	if err := decode(b, first); err != nil {
		newer := len(b) > 0 && b[0] > recordVersion
		if errors.Is(err, ErrNewerFormat) != newer || errors.Is(err, ErrCorrupt) == newer {
			t.Fatalf("%q: %v", b, err)
		}
		return
	}
	again, err := encode(first)
	if err == nil {
		err = decode(again, second)
	}
	// By their text: a time with another location is the same time.
	one, _ := json.Marshal(first)
	two, _ := json.Marshal(second)
	if err != nil || string(one) != string(two) {
		t.Fatalf("%q: %s became %s, %v", b, one, two, err)
	}
}

func BenchmarkCreateVolume(b *testing.B) {
	s := openStore(b, b.TempDir())
	i := 0
	for b.Loop() {
		i++
		must(b, s.CreateVolume(volume(fmt.Sprint(i))))
	}
}
