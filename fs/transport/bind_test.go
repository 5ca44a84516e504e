package transport

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// bindPlace is a filesystem to mount parts of, and places to mount them on. Nothing may be mounted there at the end.
type bindPlace struct {
	t          *testing.T
	dir        string // has all of it, and is free of links
	source     string // a filesystem, with a directory "tree" in it, and a file "file" in each of the two
	tree, file string // directories and files of the source
}

func newBindPlace(t *testing.T) *bindPlace {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts: run it as root")
	}
	checkLeaks(t)
	dir, err := filepath.EvalSymlinks(t.TempDir())
	p := &bindPlace{t: t, dir: dir, source: filepath.Join(dir, "source")}
	p.tree, p.file = filepath.Join(p.source, "tree"), filepath.Join(p.source, "file")
	p.must(err)
	t.Cleanup(p.sweep)
	p.must(os.Mkdir(p.source, 0o755))
	p.must(unix.Mount("croft-bind-test", p.source, "tmpfs", 0, ""))
	p.must(os.Mkdir(p.tree, 0o755))
	for _, file := range []string{p.file, filepath.Join(p.tree, "file")} {
		p.must(os.WriteFile(file, []byte(filepath.Base(filepath.Dir(file))), 0o644))
	}
	return p
}

// sweep takes away what a test has mounted. More than the source is a test's fault.
func (p *bindPlace) sweep() {
	left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(p.dir))
	if err != nil {
		p.t.Error(err)
	}
	for _, m := range slices.Backward(left) {
		if m.Mountpoint != p.source {
			p.t.Errorf("a mount is left on %s", m.Mountpoint)
		}
		if err := Detach(m.Mountpoint); err != nil {
			p.t.Error(err)
		}
	}
}

func (p *bindPlace) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

// target makes a directory to mount on.
func (p *bindPlace) target(name string) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	p.must(os.Mkdir(path, 0o755))
	return path
}

// targetFile makes a file to mount on.
func (p *bindPlace) targetFile(name string) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	p.must(os.WriteFile(path, nil, 0o644))
	return path
}

func (p *bindPlace) bind(source, target string, flags ...string) {
	p.t.Helper()
	p.must(Bind(source, target, flags))
}

func (p *bindPlace) unmount(target string) {
	p.t.Helper()
	p.must(unix.Unmount(target, unix.UMOUNT_NOFOLLOW))
}

// options are those of the topmost mount on a target, and not of its filesystem.
func (p *bindPlace) options(target string) []string {
	p.t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(target))
	p.must(err)
	if len(infos) == 0 {
		p.t.Fatalf("nothing is mounted on %s", target)
	}
	return strings.Split(infos[len(infos)-1].Options, ",")
}

// wantNone wants nothing to be mounted on a target.
func (p *bindPlace) wantNone(what, target string) {
	p.t.Helper()
	if on, err := MountsOn(target); err != nil || len(on) > 0 {
		p.t.Errorf("%s: on %s is %+v, %v", what, target, on, err)
	}
}

// TestBind mounts a directory, a file and a part of a mount that has others on it.
func TestBind(t *testing.T) {
	p := newBindPlace(t)
	whole, tree, file := p.target("whole"), p.target("on tree\n\\"), p.targetFile("on file")
	below := filepath.Join(p.tree, "below")
	p.must(os.Mkdir(below, 0o755))
	p.must(unix.Mount("croft-bind-test", below, "tmpfs", 0, ""))
	p.bind(p.source, whole)
	p.bind(p.tree, tree)
	p.bind(p.file, file)
	for path, want := range map[string]string{
		filepath.Join(whole, "file"):      "source",
		filepath.Join(whole, "tree/file"): "tree",
		filepath.Join(tree, "file"):       "tree",
		file:                              "source",
	} {
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%s has %q, %v, want %q", path, got, err, want)
		}
	}
	// What is mounted below the source does not come along.
	var outer, inner unix.Stat_t
	p.must(unix.Stat(tree, &outer))
	p.must(unix.Stat(filepath.Join(tree, "below"), &inner))
	if outer.Dev != inner.Dev {
		t.Error("a mount below the source came along")
	}
	for target, root := range map[string]string{whole: "/", tree: "/tree", file: "/file"} {
		on, err := MountsOn(target)
		if err != nil || len(on) != 1 {
			t.Fatalf("on %s: %+v, %v", target, on, err)
		}
		if m := on[0]; m.Mountpoint != target || m.Root != root || m.Source != "croft-bind-test" || m.Type != "tmpfs" || m.Device != outer.Dev {
			t.Errorf("on %s: %+v, want root %s of device %d", target, m, root, outer.Dev)
		}
		p.unmount(target)
		p.wantNone("unmounted", target)
	}
	p.unmount(below)
}

// TestBindFlags looks at what each flag sets, that it holds, and that it holds for that mount only.
func TestBindFlags(t *testing.T) {
	p := newBindPlace(t)
	target := p.target("target")
	plain := p.options(p.source)
	for _, c := range []struct {
		flags    []string
		has, not []string
	}{
		{flags: nil, has: []string{"rw", "relatime"}},
		{flags: []string{"rw"}, has: []string{"rw", "relatime"}},
		{flags: []string{"ro"}, has: []string{"ro", "relatime"}},
		{flags: []string{"rw", "ro"}, has: []string{"ro"}},
		{flags: []string{"ro", "rw"}, has: []string{"ro"}},
		{flags: []string{"nosuid"}, has: []string{"rw", "nosuid"}},
		{flags: []string{"nodev"}, has: []string{"rw", "nodev"}},
		{flags: []string{"noexec"}, has: []string{"rw", "noexec"}},
		{flags: []string{"nosymfollow"}, has: []string{"rw", "nosymfollow"}},
		{flags: []string{"nodiratime"}, has: []string{"rw", "nodiratime", "relatime"}},
		{flags: []string{"noatime"}, has: []string{"noatime"}, not: []string{"relatime"}},
		{flags: []string{"relatime"}, has: []string{"relatime"}},
		{flags: []string{"strictatime"}, not: []string{"relatime", "noatime"}},
		{flags: []string{"ro", "nosuid", "nodev", "noexec", "nosymfollow", "nodiratime", "noatime"},
			has: []string{"ro", "nosuid", "nodev", "noexec", "nosymfollow", "nodiratime", "noatime"}},
	} {
		if err := CheckBindFlags(c.flags); err != nil {
			t.Errorf("%q: %v", c.flags, err)
		}
		p.bind(p.tree, target, c.flags...)
		got := p.options(target)
		has := func(flag string) bool { return slices.Contains(got, flag) }
		if slices.ContainsFunc(c.not, has) || slices.ContainsFunc(c.has, func(flag string) bool { return !has(flag) }) {
			t.Errorf("%q: the mount has %q, want %q and not %q", c.flags, got, c.has, c.not)
		}
		err := os.WriteFile(filepath.Join(target, "new"), nil, 0o600)
		if readOnly := has("ro"); errors.Is(err, unix.EROFS) != readOnly || err != nil && !readOnly {
			t.Errorf("%q: a write answers %v", c.flags, err)
		}
		p.unmount(target)
		if now := p.options(p.source); !slices.Equal(now, plain) {
			t.Fatalf("%q: the source has %q, it had %q", c.flags, now, plain)
		}
	}
	for name := range bindFlags {
		p.bind(p.tree, target, name)
		p.unmount(target)
	}
}

// TestBindFlagsRefused asks for flags that are of no bind mount: nothing is mounted then.
func TestBindFlagsRefused(t *testing.T) {
	p := newBindPlace(t)
	target := p.target("target")
	const known = "known are noatime, nodev, nodiratime, noexec, nosuid, nosymfollow, relatime, ro, rw, strictatime"
	for _, flag := range []string{"", "bind", "remount", "rbind", "exec", "suid", "defaults", "size=1m", "RO", " ro", "ro,noexec", "context=x"} {
		flags := []string{"noexec", flag, "ro"}
		for call, err := range map[string]error{"CheckBindFlags": CheckBindFlags(flags), "Bind": Bind(p.tree, target, flags)} {
			if !errors.Is(err, ErrBindFlag) || !strings.Contains(err.Error(), fmt.Sprintf("%q", flag)) || !strings.Contains(err.Error(), known) {
				t.Errorf("%s, flag %q: %v", call, flag, err)
			}
		}
		p.wantNone("flag "+flag, target)
	}
}

// TestBindPaths asks for sources and targets that there are not, that are links, and that are not of one sort.
func TestBindPaths(t *testing.T) {
	p := newBindPlace(t)
	dir, file := p.target("dir"), p.targetFile("plain")
	parent, target := p.target("parent"), filepath.Join(p.dir, "parent", "target")
	p.must(os.Mkdir(target, 0o755))
	for name, to := range map[string]string{"to-parent": parent, "to-dir": dir, "to-tree": p.tree, "to-source": p.source, "to-plain": file} {
		p.must(os.Symlink(to, filepath.Join(p.dir, name)))
	}
	at := func(elem ...string) string { return filepath.Join(append([]string{p.dir}, elem...)...) }
	for name, c := range map[string]struct {
		source, target string
		want           error
	}{
		"no source":                    {at("absent"), dir, unix.ENOENT},
		"no target":                    {p.tree, at("absent"), unix.ENOENT},
		"no source's parent":           {at("absent", "x"), dir, unix.ENOENT},
		"empty source":                 {"", dir, unix.ENOENT},
		"a directory on a file":        {p.tree, file, unix.EINVAL},
		"a file on a directory":        {p.file, dir, unix.EINVAL},
		"a directory on a link to one": {p.tree, at("to-dir"), unix.EINVAL},
		"a link to a directory":        {at("to-tree"), dir, unix.EINVAL},
		"below a file":                 {p.tree, filepath.Join(file, "x"), unix.ENOTDIR},
		"a name too long":              {p.tree, at(strings.Repeat("n", 256)), unix.ENAMETOOLONG},
	} {
		if err := Bind(c.source, c.target, []string{"ro"}); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	for _, target := range []string{dir, file, target, at("to-dir"), at("absent")} {
		p.wantNone("refused", target)
	}

	// A link above is followed. mountinfo shows what it leads to.
	p.bind(at("to-source", "tree"), at("to-parent", "target"), "ro")
	if options := p.options(target); !slices.Contains(options, "ro") {
		t.Errorf("options %q", options)
	}
	p.wantNone("by the link's name", at("to-parent", "target"))
	p.unmount(target)
	// A file is put on a link itself, and not on what it leads to.
	p.bind(p.file, at("to-plain"))
	p.wantNone("behind the link", file)
	p.unmount(at("to-plain"))
}

// TestBindLivesOn: a bind mount needs neither the name of its source nor the mount that it was made from.
func TestBindLivesOn(t *testing.T) {
	p := newBindPlace(t)
	target := p.target("target")
	p.bind(p.tree, target)
	p.must(os.RemoveAll(p.tree))
	on, err := MountsOn(target)
	if err != nil || len(on) != 1 || !strings.HasPrefix(on[0].Root, "/tree") {
		t.Errorf("its source was removed: %+v, %v", on, err)
	}
	p.unmount(target)
	p.bind(p.source, target)
	p.unmount(p.source)
	if got, err := os.ReadFile(filepath.Join(target, "file")); err != nil || string(got) != "source" {
		t.Errorf("its mount was taken away: %q, %v", got, err)
	}
	p.unmount(target)
}

// TestMountsOn lists stacked mounts in the order in which they can be taken away, and nothing beside or below them.
func TestMountsOn(t *testing.T) {
	p := newBindPlace(t)
	target, beside := p.target("target"), p.target("target-2")
	p.wantNone("at first", target)
	p.wantNone("absent", filepath.Join(p.dir, "absent"))
	p.wantNone("relative", "target")
	p.wantNone("empty", "")
	p.bind(p.source, target)
	p.bind(p.tree, target)
	p.bind(p.tree, beside)
	below := filepath.Join(target, "below")
	p.must(os.Mkdir(below, 0o755))
	p.bind(p.source, below)
	p.unmount(below)
	p.must(os.Remove(below))
	p.must(unix.Mount("croft-bind-test-2", target, "tmpfs", unix.MS_RDONLY, ""))
	for i, want := range []struct{ source, root string }{
		{"croft-bind-test-2", "/"}, {"croft-bind-test", "/tree"}, {"croft-bind-test", "/"},
	} {
		on, err := MountsOn(target)
		p.must(err)
		if len(on) != 3-i {
			t.Fatalf("%d mounts, want %d: %+v", len(on), 3-i, on)
		}
		if on[0].Source != want.source || on[0].Root != want.root {
			t.Errorf("the topmost is %+v, want %+v", on[0], want)
		}
		for j := range on[1:] {
			if on[j].Parent != on[j+1].ID {
				t.Errorf("%+v is not on %+v", on[j], on[j+1])
			}
		}
		p.unmount(target)
	}
	p.wantNone("taken away", target)
	if croft, err := Mounts(MountFilter{Mountpoint: beside}); err != nil || len(croft) > 0 {
		t.Errorf("a mount of Croft: %+v, %v", croft, err)
	}
	p.unmount(beside)
}

// TestBindOfMount binds a mount of Croft, whose daemon then goes: the bind mount is found by what mountinfo says of it, and taken
// away, without a word from the daemon.
func TestBindOfMount(t *testing.T) {
	p := newBindPlace(t)
	m := mountTest(t, newTestFS(), Options{FsName: "croft:test"}).serve()
	dir, file := p.target("dir"), p.targetFile("on file")
	within(t, "a bind mount of a served mount", func() error {
		return errors.Join(Bind(m.dir, dir, []string{"ro"}), Bind(m.path(fileName), file, nil))
	})
	device := m.device(t)
	p.must(m.Unmount(false)) // they do not make it busy
	p.must(abortConnection(device))
	m.waitServed(t)
	within(t, "looking for dead bind mounts", func() error {
		entries, err := Mounts(MountFilter{Source: "croft:test"})
		entries = slices.DeleteFunc(entries, func(e MountEntry) bool { return !strings.HasPrefix(e.Mountpoint, p.dir+"/") })
		if err != nil || len(entries) != 2 {
			return fmt.Errorf("found %+v, %v", entries, err)
		}
		for i, want := range []struct{ on, root string }{{file, "/" + fileName}, {dir, "/"}} {
			if e := entries[i]; e.Mountpoint != want.on || e.Root != want.root || e.Type != "fuse.croft" || e.Device != device {
				return fmt.Errorf("found %+v, want %+v of device %d", e, want, device)
			}
			on, err := MountsOn(want.on)
			if err != nil || len(on) != 1 || on[0] != entries[i] {
				return fmt.Errorf("on %s: %+v, %v", want.on, on, err)
			}
		}
		return errors.Join(Detach(dir), Detach(file))
	})
}
