package pool

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/transport"
)

// siteBytes is the limit of a site's volumes.
const siteBytes = 4 << 20

// site is a mounted pool, with a directory for targets beside it. This process serves the mount and stays off it: who
// uses it is a process of its own.
type site struct {
	*Pool
	t       *testing.T
	base    string // has all that follows
	mnt     string
	targets string
}

// newSite makes a pool with volumes that are trees, and mounts it. At the test's end everything is unpublished, and
// no mount and no loop device may be left.
func newSite(t *testing.T, trees ...string) *site {
	t.Helper()
	base, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { wantNothingLeft(t, base) })
	s := &site{t: t, base: base, mnt: filepath.Join(base, "mnt"), targets: filepath.Join(base, "targets")}
	if _, err := Init(s.pool()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{s.mnt, s.targets} {
		s.must(os.Mkdir(dir, 0o755))
	}
	s.open()
	t.Cleanup(s.end)
	for _, name := range trees {
		_, err := s.Create(t.Context(), name, CreateOptions{Bytes: siteBytes})
		s.must(err)
	}
	s.mount()
	return s
}

func (s *site) pool() string { return filepath.Join(s.base, "pool") }

func (s *site) open() {
	s.t.Helper()
	p, err := Open(Options{Dir: s.pool()})
	s.must(err)
	s.Pool = p
}

func (s *site) mount() {
	s.t.Helper()
	s.must(s.Mount(MountOptions{Mountpoint: s.mnt}))
}

// end unpublishes everything, whatever state the test has left it in. What would hold up the pool's end is taken away first.
func (s *site) end() {
	volumes, _ := s.Volumes(s.t.Context()) // of a pool that is closed, none
	for _, v := range volumes {
		for _, target := range v.Published {
			if err := s.Unpublish(s.t.Context(), v.Name, target); err != nil {
				s.t.Errorf("at the end: %v", err)
			}
		}
	}
	wantNothingLeft(s.t, s.targets)
	if err := s.Close(); err != nil {
		s.t.Error(err)
	}
}

// wantNothingLeft fails the test when there is a mount below dir, or a loop device whose file is there, and takes it away.
func wantNothingLeft(t *testing.T, dir string) {
	t.Helper()
	left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Error(err)
	}
	for _, m := range slices.Backward(left) {
		t.Errorf("a mount is left: %s of %s on %s", m.Root, m.Source, m.Mountpoint)
		if err := transport.Detach(m.Mountpoint); err != nil {
			t.Error(err)
		}
	}
	for device, file := range backingFiles(t, dir) {
		t.Errorf("a loop device is left: %s of %s", device, file)
		if out, err := exec.Command("losetup", "--detach", device).CombinedOutput(); err != nil {
			t.Errorf("detach %s: %v %s", device, err, out)
		}
	}
}

// backingFiles are the files below dir that loop devices have, by device.
func backingFiles(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	names, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Error(err)
	}
	for _, name := range names {
		file, err := os.ReadFile(name)
		if err == nil && strings.HasPrefix(string(file), dir+"/") { // else it has gone meanwhile, or is not ours
			found["/dev/"+strings.Split(name, "/")[3]] = strings.TrimSpace(string(file))
		}
	}
	return found
}

func (s *site) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) wantErr(what string, err, want error) {
	s.t.Helper()
	wantErr(s.t, what, err, []error{want})
}

func (s *site) target(name string) string { return filepath.Join(s.targets, name) }

func (s *site) block(name string) {
	s.t.Helper()
	_, err := s.Create(s.t.Context(), name, CreateOptions{Bytes: siteBytes, Kind: KindBlock})
	s.must(err)
}

func (s *site) publish(volume string, o PublishOptions) {
	s.t.Helper()
	s.must(s.Publish(s.t.Context(), volume, o))
}

func (s *site) unpublish(volume, target string) {
	s.t.Helper()
	s.must(s.Unpublish(s.t.Context(), volume, target))
}

// sh runs a script with arguments, and returns what it prints. It has to succeed.
func (s *site) sh(script string, args ...string) string {
	s.t.Helper()
	cmd := exec.Command("sh", append([]string{"-euc", script, "sh"}, args...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("%s %q: %v\n%s", script, args, err, out)
	}
	return string(out)
}

// wantSays fails the test unless a script prints exactly that.
func (s *site) wantSays(want, script string, args ...string) {
	s.t.Helper()
	if got := strings.TrimSpace(s.sh(script, args...)); got != want {
		s.t.Errorf("%s %q: %q, want %q", script, args, got, want)
	}
}

// on lists what is mounted on a target, the first mounted first.
func (s *site) on(target string) []*mountinfo.Info {
	s.t.Helper()
	// Not mountinfo.SingleEntryFilter, which stops at the first.
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) { return m.Mountpoint != target, false })
	s.must(err)
	return infos
}

// wantMounted wants one mount on a target.
func (s *site) wantMounted(target string) *mountinfo.Info {
	s.t.Helper()
	infos := s.on(target)
	if len(infos) != 1 {
		s.t.Fatalf("%d mounts on %s", len(infos), target)
	}
	return infos[0]
}

// wantServed wants a tree to be mounted on a target, once, and to be the volume that the mount shows.
func (s *site) wantServed(volume, target string) {
	s.t.Helper()
	s.wantMounted(target)
	s.wantSays("here", `echo here >"$1/served"; cat "$2/served"; rm "$1/served"`, s.path(volume), target)
}

func (s *site) path(volume string) string { return filepath.Join(s.mnt, volume) }

// wantGone wants neither a mount nor a target to be left.
func (s *site) wantGone(target string) {
	s.t.Helper()
	if left := s.on(target); len(left) > 0 {
		s.t.Errorf("%d mounts are left on %s", len(left), target)
	} else if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("the target %s is left: %v", target, err)
	}
}

// wantPublished wants a volume to be published on these targets, by what is remembered and by what is recorded.
func (s *site) wantPublished(volume string, targets ...string) {
	s.t.Helper()
	slices.Sort(targets)
	list, err := s.Publications(s.t.Context(), volume)
	s.must(err)
	v, err := s.Volume(s.t.Context(), volume)
	s.must(err)
	records, err := s.store.Publications()
	s.must(err)
	var listed, recorded []string
	for _, l := range list {
		listed = append(listed, l.Target)
	}
	for _, r := range records {
		if r.Volume == volume {
			recorded = append(recorded, r.Target)
		}
	}
	for what, got := range map[string][]string{"Publications": listed, "Volume": v.Published, "the record store": recorded} {
		if !slices.Equal(got, targets) {
			s.t.Errorf("%s: volume %s is on %q, want %q", what, volume, got, targets)
		}
	}
}

// holder is a process that has a file open.
type holder struct {
	cmd *exec.Cmd
	in  io.Closer
}

// hold opens a file, which it makes, until the holder is released.
func (s *site) hold(file string) *holder {
	s.t.Helper()
	h := &holder{cmd: exec.Command("sh", "-c", `exec 3<>"$1" && echo open && read end`, "sh", file)}
	in, err := h.cmd.StdinPipe()
	s.must(err)
	out, err := h.cmd.StdoutPipe()
	s.must(err)
	h.in = in
	s.must(h.cmd.Start())
	s.t.Cleanup(h.release)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "open\n" {
		s.t.Fatalf("%s cannot be held open: %v", file, err)
	}
	return h
}

// release returns when the file is closed. It may be called again.
func (h *holder) release() {
	h.in.Close()
	_ = h.cmd.Wait() // it ends with what read says of a closed input
}

// restart is the end of one daemon and the start of the next, and what happens between.
func (s *site) restart(between func()) {
	s.t.Helper()
	s.must(s.Close())
	between()
	s.open()
	s.mount()
}

// wantShown wants a file of root's to be shown as of a group and with a mode, wherever the volume is seen.
func (s *site) wantShown(want string, places ...string) {
	s.t.Helper()
	for _, place := range places {
		s.wantSays(want, `stat --format '%g %a' "$1/root's"`, place)
	}
}

func (s *site) makeRoots(volume string) {
	s.t.Helper()
	s.sh(`echo text >"$1/root's"; chmod 600 "$1/root's"`, s.path(volume))
}

// foreign mounts something else on a target.
func (s *site) foreign(target string) {
	s.t.Helper()
	s.sh(`mount -t tmpfs -o size=1m foreign "$1"; echo foreign >"$1/file"`, target)
}

// takeForeign takes that away again, which must be there still.
func (s *site) takeForeign(target string) {
	s.t.Helper()
	s.wantSays("foreign", `cat "$1/file"; umount "$1"`, target)
}

func group(gid uint32) *uint32 { return &gid }

// TestPublish publishes a volume, repeats it, and takes it away, repeating that.
func TestPublish(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.publish("v", PublishOptions{Target: target})
	first := s.wantMounted(target)
	s.wantSays("text", `echo text >"$1/file"; cat "$2/file"`, target, s.path("v"))
	s.wantSays(fmt.Sprint(siteBytes), `stat --file-system --format '%b %S' "$1" | { read blocks size; echo $((blocks*size)); }`, target)
	s.sh(`! dd if=/dev/zero of="$1/zeros" bs=64k 2>&1 | tee /dev/stderr | grep -v "No space left on device"; rm "$1/zeros"`, target)

	s.publish("v", PublishOptions{Target: target})
	s.publish("v", PublishOptions{Target: target + "/", Flags: []string{}})
	if again := s.wantMounted(target); again.ID != first.ID {
		t.Errorf("mount %d was replaced by %d", first.ID, again.ID)
	}
	other := s.target("another")
	s.publish("v", PublishOptions{Target: other, ReadOnly: true, Flags: []string{"noexec"}, Group: group(7)})
	s.wantPublished("v", target, other)
	list, err := s.Publications(t.Context(), "v")
	s.must(err)
	if p := list[0]; p.Volume != "v" || !p.ReadOnly || p.Exclusive || !slices.Equal(p.Flags, []string{"noexec"}) || *p.Group != 7 || p.Created.IsZero() {
		t.Errorf("listed %+v", p)
	}

	for range 2 {
		s.unpublish("v", target+"/")
		s.wantGone(target)
		s.wantPublished("v", other)
	}
	s.wantSays("text", `cat "$1/file"`, s.path("v"))
	s.publish("v", PublishOptions{Target: target})
	s.wantSays("text", `cat "$1/file"`, target)
}

// TestPublishBeside publishes twice, where the first publication may stand against the second.
func TestPublishBeside(t *testing.T) {
	s := newSite(t, "v", "w")
	for name, c := range map[string]struct {
		first, second PublishOptions // their targets are names
		volume        string         // of the second, if it is not v
		want          error
	}{
		"the same":            {first: PublishOptions{Target: "a", Flags: []string{"nosuid"}}, second: PublishOptions{Target: "a", Flags: []string{"nosuid"}}},
		"read-only":           {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "a", ReadOnly: true}, want: ErrPublished},
		"no longer read-only": {first: PublishOptions{Target: "a", ReadOnly: true}, second: PublishOptions{Target: "a"}, want: ErrPublished},
		"in another order": {first: PublishOptions{Target: "a", Flags: []string{"nosuid", "nodev"}},
			second: PublishOptions{Target: "a", Flags: []string{"nodev", "nosuid"}}},
		"other flags":                  {first: PublishOptions{Target: "a", Flags: []string{"nosuid"}}, second: PublishOptions{Target: "a"}, want: ErrPublished},
		"exclusive on the same":        {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "a", Exclusive: true}, want: ErrPublished},
		"a group on the same":          {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "a", Group: group(0)}, want: ErrPublished},
		"another group on the same":    {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "a", Group: group(2)}, want: ErrPublished},
		"another volume":               {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "a"}, volume: "w", want: ErrPublished},
		"two targets":                  {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "b", ReadOnly: true, Flags: []string{"noexec"}}},
		"exclusive, the same":          {first: PublishOptions{Target: "a", Exclusive: true}, second: PublishOptions{Target: "a", Exclusive: true}},
		"beside an exclusive one":      {first: PublishOptions{Target: "a", Exclusive: true}, second: PublishOptions{Target: "b"}, want: ErrExclusive},
		"an exclusive one beside":      {first: PublishOptions{Target: "a"}, second: PublishOptions{Target: "b", Exclusive: true}, want: ErrExclusive},
		"exclusive of another volume":  {first: PublishOptions{Target: "a", Exclusive: true}, second: PublishOptions{Target: "b", Exclusive: true}, volume: "w"},
		"two groups":                   {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "b", Group: group(2)}, want: ErrExclusive},
		"root's group beside another":  {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "b", Group: group(0)}, want: ErrExclusive},
		"one group twice":              {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "b", Group: group(1)}},
		"a group, and none":            {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "b"}},
		"two volumes and their groups": {first: PublishOptions{Target: "a", Group: group(1)}, second: PublishOptions{Target: "b", Group: group(2)}, volume: "w"},
	} {
		t.Run(name, func(t *testing.T) {
			s := *s
			s.t = t
			volume := c.volume
			if volume == "" {
				volume = "v"
			}
			c.first.Target, c.second.Target = s.target(c.first.Target), s.target(c.second.Target)
			s.publish("v", c.first)
			before := s.wantMounted(c.first.Target)
			s.wantErr("the second", s.Publish(t.Context(), volume, c.second), c.want)
			if after := s.wantMounted(c.first.Target); after.ID != before.ID || after.Options != before.Options {
				t.Errorf("the first mount %+v became %+v", before, after)
			}
			switch {
			case c.want == nil && volume == "v":
				s.wantMounted(c.second.Target)
				s.wantPublished("v", slices.Compact([]string{c.first.Target, c.second.Target})...)
			case c.want == nil:
				s.wantMounted(c.second.Target)
				s.wantPublished("v", c.first.Target)
				s.wantPublished(volume, c.second.Target)
			default:
				s.wantPublished("v", c.first.Target)
				s.wantPublished("w")
				if c.second.Target != c.first.Target {
					s.wantGone(c.second.Target)
				}
			}
			if c.want == nil {
				s.unpublish(volume, c.second.Target)
			}
			s.unpublish("v", c.first.Target)
		})
	}
}

func TestPublishFlags(t *testing.T) {
	s := newSite(t, "v")
	s.sh(`printf '#!/bin/sh\necho runs\n' >"$1/program"; chmod 755 "$1/program"; ln -s program "$1/link"`, s.path("v"))
	for name, c := range map[string]struct {
		o      PublishOptions
		has    []string // of the mount's options
		script string   // run on the target
		says   string
	}{
		"none":             {has: []string{"rw"}, script: `"$1/program"`, says: "runs"},
		"read-only":        {o: PublishOptions{ReadOnly: true}, has: []string{"ro"}, script: `! touch "$1/new"`, says: "Read-only file system"},
		"ro":               {o: PublishOptions{Flags: []string{"ro"}}, has: []string{"ro"}, script: `! chmod 700 "$1/program"`, says: "Read-only file system"},
		"read-only and rw": {o: PublishOptions{ReadOnly: true, Flags: []string{"rw"}}, has: []string{"ro"}, script: `! touch "$1/new"`, says: "Read-only file system"},
		"noexec":           {o: PublishOptions{Flags: []string{"noexec"}}, has: []string{"noexec", "rw"}, script: `! "$1/program"`, says: "Permission denied"},
		"nosymfollow":      {o: PublishOptions{Flags: []string{"nosymfollow"}}, has: []string{"nosymfollow"}, script: `! cat "$1/link"`, says: "Too many levels of symbolic links"},
		"many":             {o: PublishOptions{Flags: []string{"nosuid", "nodev", "noatime", "nodiratime"}}, has: []string{"nosuid", "nodev", "noatime", "nodiratime"}},
	} {
		target := s.target("pod")
		c.o.Target = target
		s.publish("v", c.o)
		options := strings.Split(s.wantMounted(target).Options, ",")
		for _, want := range c.has {
			if !slices.Contains(options, want) {
				t.Errorf("%s: options %q, want %q", name, options, c.has)
			}
		}
		if c.script != "" {
			if out := s.sh(c.script, target); !strings.Contains(out, c.says) {
				t.Errorf("%s: %q, want %q", name, out, c.says)
			}
		}
		// What the target may do is of this mount only.
		s.wantSays("runs", `touch "$1/new"; rm "$1/new"; "$1/program"`, s.path("v"))
		s.unpublish("v", target)
	}
	for _, flag := range []string{"", "bind", "remount", "size=1m", "NOEXEC", "noexec,nosuid", "exec"} {
		target := s.target("pod")
		err := s.Publish(t.Context(), "v", PublishOptions{Target: target, Flags: []string{"noexec", flag}})
		s.wantErr("flag "+flag, err, ErrInvalid)
		if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("%q: known are noatime, nodev", flag)) {
			t.Errorf("flag %q: %v", flag, err)
		}
		s.wantGone(target)
	}
	s.wantPublished("v")
}

// TestPublishTargets asks for targets that cannot be: nothing is made, mounted or recorded.
func TestPublishTargets(t *testing.T) {
	s := newSite(t, "v", "other")
	s.block("b")
	published := s.target("published")
	s.publish("other", PublishOptions{Target: published})
	s.sh(`mkdir "$1/dir"`, s.path("v"))
	for name, to := range map[string]string{
		"into-pool": s.pool(), "into-volume": s.path("v"), "into-published": published, "to-dir": s.targets, "nowhere": s.target("absent"),
		"to-pool-by-steps": "into-pool/volumes", "loop": "loop",
	} {
		s.must(os.Symlink(to, s.target(name)))
	}
	s.must(os.WriteFile(s.target("file"), nil, 0o600))
	s.must(os.Mkdir(s.target("dir"), 0o700))
	s.must(os.Mkdir(s.target("\xff"), 0o700))
	s.must(os.Symlink("\xff", s.target("to-bytes")))
	s.must(unix.Mkfifo(s.target("fifo"), 0o600))
	before := s.sh(`ls -lR "$1"`, s.targets)

	for name, c := range map[string]struct {
		target string
		volume string // default v
		want   error  // default ErrTarget
	}{
		"none":                        {target: ""},
		"relative":                    {target: "targets/x"},
		"relative, clean":             {target: "./x"},
		"root":                        {target: "/"},
		"root, roundabout":            {target: "//tmp/../"},
		"above root":                  {target: "/.."},
		"too long":                    {target: "/" + strings.Repeat("x/", maxTarget/2+1)},
		"one byte too long":           {target: s.targets + strings.Repeat("/", maxTarget+1-len(s.targets)-1) + "x"},
		"NUL":                         {target: s.target("a\x00b")},
		"NUL after what is there":     {target: s.target("dir\x00")},
		"no text":                     {target: s.target("\xff/x")},
		"no text, by a link":          {target: s.target("to-bytes/x")},
		"the pool":                    {target: s.pool()},
		"in the pool":                 {target: filepath.Join(s.pool(), "x")},
		"in a volume's tree":          {target: filepath.Join(s.pool(), "volumes", "v", "x")},
		"the mount":                   {target: s.mnt},
		"a volume in the mount":       {target: s.path("v")},
		"in the mount":                {target: filepath.Join(s.mnt, "x")},
		"in a mounted volume":         {target: filepath.Join(s.path("v"), "dir")},
		"below a target":              {target: filepath.Join(published, "x")},
		"below a target, roundabout":  {target: s.target("a/../published/x")},
		"a link leads into the pool":  {target: s.target("into-pool/x")},
		"two links lead there":        {target: s.target("to-pool-by-steps/x")},
		"a link leads into a volume":  {target: s.target("into-volume/dir")},
		"a link leads into a target":  {target: s.target("into-published/x")},
		"a link":                      {target: s.target("to-dir")},
		"a link to nothing":           {target: s.target("nowhere")},
		"a link to nothing, a block":  {target: s.target("nowhere"), volume: "b"},
		"a link without end":          {target: s.target("loop/x")},
		"a file for a tree":           {target: s.target("file")},
		"a pipe for a tree":           {target: s.target("fifo")},
		"a directory for a device":    {target: s.target("dir"), volume: "b"},
		"a pipe for a device":         {target: s.target("fifo"), volume: "b"},
		"below a file":                {target: s.target("file/x"), want: unix.ENOTDIR},
		"the pool's directory":        {target: s.base},
		"above that":                  {target: filepath.Dir(s.base)},
		"above a target":              {target: s.targets},
		"no parent":                   {target: s.target("absent/x"), want: os.ErrNotExist},
		"no parent for a device":      {target: s.target("absent/x"), volume: "b", want: os.ErrNotExist},
		"a name too long":             {target: s.target(strings.Repeat("n", 256)), want: unix.ENAMETOOLONG},
		"another's, with another way": {target: s.target("to-dir/published"), want: ErrPublished},
	} {
		if c.volume == "" {
			c.volume = "v"
		}
		if c.want == nil {
			c.want = ErrTarget
		}
		s.wantErr(name, s.Publish(t.Context(), c.volume, PublishOptions{Target: c.target}), c.want)
		s.wantPublished(c.volume)
	}
	if after := s.sh(`ls -lR "$1"`, s.targets); after != before {
		t.Errorf("the targets were\n%s\nand are\n%s", before, after)
	}
	s.wantSays("", `ls -A "$1"; ls -A "$2"`, filepath.Join(s.path("v"), "dir"), s.path("other"))
	if v, err := s.Volume(t.Context(), "b"); err != nil || v.Device != "" {
		t.Errorf("a refused device is left: %+v, %v", v, err)
	}
	// Whoever comes next can read the records.
	s.unpublish("other", published) // Close would wait for it
	s.publish("b", PublishOptions{Target: published})
	s.must(s.Close())
	s.open()
	s.mount()
	s.wantMounted(published)
	s.wantPublished("b", published)
}

// TestPublishBlock publishes on a pool that is not mounted: a block volume needs no mount, a tree does.
func TestPublishBlock(t *testing.T) {
	dir := poolToPublish(t, true, false, "v", "w")
	p, base := reopenToPublish(t, dir), filepath.Dir(dir)
	if _, err := p.Create(t.Context(), "tree", CreateOptions{Bytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	a, b := filepath.Join(base, "a"), filepath.Join(base, "b")
	refused := func(what, volume string, o PublishOptions, want error) {
		t.Helper()
		wantErr(t, what, p.Publish(t.Context(), volume, o), []error{want})
	}
	refused("a tree", "tree", PublishOptions{Target: a}, ErrNotMounted)
	refused("flags", "v", PublishOptions{Target: a, Flags: []string{"noexec"}}, ErrInvalid)
	refused("a group", "v", PublishOptions{Target: a, Group: group(0)}, ErrInvalid)
	refused("no volume", "none", PublishOptions{Target: a}, ErrNotFound)
	wantUnpublished(t, p, "v", a)

	if err := os.WriteFile(a, nil, 0o600); err != nil { // it may be there
		t.Fatal(err)
	}
	mustPublish(t, p, "v", PublishOptions{Target: a, Exclusive: true})
	refused("another volume", "w", PublishOptions{Target: a}, ErrPublished)
	refused("another way", "v", PublishOptions{Target: a}, ErrPublished)
	refused("beside an exclusive one", "v", PublishOptions{Target: b}, ErrExclusive)
	wantPublished(t, p, "v", a)
	wantUnpublished(t, p, "w", b)
	wantErr(t, "delete", p.Delete(t.Context(), "v", DeleteOptions{}), []error{ErrBusy})
	wantErr(t, "unpublish another's", p.Unpublish(t.Context(), "w", a), []error{ErrTarget})
	wantPublished(t, p, "v", a)
	mustUnpublish(t, p, "v", a)
	wantUnpublished(t, p, "v", a)

	mustPublish(t, p, "v", PublishOptions{Target: a})
	refused("an exclusive one beside", "v", PublishOptions{Target: b, Exclusive: true}, ErrExclusive)
	refused("read-only beside", "v", PublishOptions{Target: b, ReadOnly: true}, ErrBusy)
	mustPublish(t, p, "v", PublishOptions{Target: b})
	mustUnpublish(t, p, "v", a)
	wantPublished(t, p, "v", b) // with its device
	mustUnpublish(t, p, "v", b)
	wantUnpublished(t, p, "v", b)

	// Who attached it detaches it.
	if _, err := p.Attach(t.Context(), "v", AttachOptions{}); err != nil {
		t.Fatal(err)
	}
	mustPublish(t, p, "v", PublishOptions{Target: a})
	mustUnpublish(t, p, "v", a)
	if !attached(t, p, "v") {
		t.Error("a device that was there before has gone")
	}
	if err := p.Detach(t.Context(), "v"); err != nil {
		t.Error(err)
	}
	wantUnpublished(t, p, "v", a)
}

// TestUnpublishNothing takes away what was never published: what is there stays, but for what could have been made to publish on.
func TestUnpublishNothing(t *testing.T) {
	s := newSite(t, "v")
	s.block("b")
	real, file, full, link := s.target("published"), s.target("file"), s.target("full"), s.target("link")
	s.publish("v", PublishOptions{Target: real})
	s.must(os.WriteFile(file, []byte("precious"), 0o600))
	s.must(os.MkdirAll(filepath.Join(full, "precious"), 0o700))
	s.must(os.Symlink(real, link))
	s.must(unix.Mkfifo(s.target("fifo"), 0o600))
	before := s.sh(`ls -R "$1"`, s.targets)
	for _, volume := range []string{"v", "b", "none"} {
		s.unpublish(volume, s.target("absent"))
		s.unpublish(volume, s.target("absent/x"))
		for _, target := range []string{file, link, s.target("fifo")} {
			s.wantErr(volume+" on "+target, s.Unpublish(t.Context(), volume, target), ErrTarget)
		}
		s.wantErr(volume+" on a full directory", s.Unpublish(t.Context(), volume, full), unix.ENOTEMPTY)
		s.wantErr(volume+" on a relative path", s.Unpublish(t.Context(), volume, "x"), ErrTarget)
	}
	for _, volume := range []string{"b", "none"} {
		s.wantErr("another's", s.Unpublish(t.Context(), volume, real), ErrTarget)
	}
	if after := s.sh(`ls -R "$1"`, s.targets); after != before {
		t.Errorf("the targets were\n%s\nand are\n%s", before, after)
	}
	s.wantSays("precious", `cat "$1"`, file)
	s.wantServed("v", real)
	s.wantErr("a device on a file with text", s.Publish(t.Context(), "b", PublishOptions{Target: file}), ErrTarget)
	s.wantSays("precious", `cat "$1"`, file)
	s.wantPublished("b")
}

// TestTargetThatStays publishes on a directory that holds something: it stays, and stands in the way of nothing.
func TestTargetThatStays(t *testing.T) {
	s := newSite(t, "v", "w")
	full := s.target("full")
	s.must(os.MkdirAll(filepath.Join(full, "precious"), 0o700))
	for volume, take := range map[string]func() error{
		"v": func() error {
			err := s.Unpublish(t.Context(), "v", full)
			s.wantErr("unpublish", err, ErrTarget)
			s.wantPublished("v")
			return s.Delete(t.Context(), "v", DeleteOptions{})
		},
		"w": func() error { return s.Delete(t.Context(), "w", DeleteOptions{Force: true}) },
	} {
		s.publish(volume, PublishOptions{Target: full})
		s.wantServed(volume, full)
		if err := take(); err != nil {
			t.Errorf("delete %s: %v", volume, err)
		}
		s.wantSays("precious", `ls "$1"`, full)
	}
	if records, err := s.store.Publications(); err != nil || len(records) > 0 {
		t.Errorf("recorded: %+v, %v", records, err)
	}
}

// TestDeletePublished deletes by force volumes that are published, and open there.
func TestDeletePublished(t *testing.T) {
	s := newSite(t, "v")
	s.block("b")
	for volume, file := range map[string]string{"v": "/file", "b": ""} {
		first, second := s.target(volume+"1"), s.target(volume+"2")
		s.publish(volume, PublishOptions{Target: first})
		s.publish(volume, PublishOptions{Target: second})
		h := s.hold(first + file)
		s.wantErr("unpublish what is open", s.Unpublish(t.Context(), volume, first), ErrBusy)
		s.wantErr("delete", s.Delete(t.Context(), volume, DeleteOptions{}), ErrBusy)
		s.wantPublished(volume, first, second)
		if err := s.Delete(t.Context(), volume, DeleteOptions{Force: true}); err != nil {
			t.Errorf("delete %s by force: %v", volume, err)
		}
		h.release()
		for _, target := range []string{first, second} {
			s.unpublish(volume, target)
			s.wantGone(target)
		}
		if records, err := s.store.Publications(); err != nil || len(records) > 0 {
			t.Errorf("recorded: %+v, %v", records, err)
		}
	}
}

// TestPublishTogether has several volumes go for one target at a time: one of them gets it.
func TestPublishTogether(t *testing.T) {
	volumes := []string{"a", "b", "c", "d"}
	s := newSite(t, volumes...)
	target := s.target("pod")
	for range 20 {
		errs := make([]error, len(volumes))
		var together sync.WaitGroup
		for i, volume := range volumes {
			together.Go(func() { errs[i] = s.Publish(t.Context(), volume, PublishOptions{Target: target}) })
		}
		together.Wait()
		if on := s.on(target); len(on) != 1 {
			t.Errorf("%d mounts on one target", len(on))
		}
		won := 0
		for i, err := range errs {
			if err == nil {
				won++
				s.wantPublished(volumes[i], target)
				s.unpublish(volumes[i], target)
				continue
			}
			s.wantErr(volumes[i], err, ErrPublished)
			s.wantPublished(volumes[i])
		}
		if won != 1 {
			t.Fatalf("%d volumes have one target: %v", won, errs)
		}
		s.wantGone(target)
	}
}
