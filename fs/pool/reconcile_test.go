package pool

import (
	"bufio"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestPublishMissing: a volume whose directory has gone is published no more, and not again.
func TestPublishMissing(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.publish("v", PublishOptions{Target: target, Group: group(1)})
	s.restart(func() { s.must(os.Remove(filepath.Join(s.base, "pool", "volumes", "v"))) })
	s.wantPublished("v")
	s.wantErr("publish", s.Publish(t.Context(), "v", PublishOptions{Target: target}), ErrMissing)
	s.unpublish("v", target)
	s.wantGone(target)
	s.must(s.Delete(t.Context(), "v", DeleteOptions{}))
}

// TestReconcile has the next daemon find what the last one has left of a publication, and what became of it since.
func TestReconcile(t *testing.T) {
	for name, c := range map[string]struct {
		between func(s *site, target string)
		gone    bool // the publication
		after   func(s *site, target string)
	}{
		"dead": {between: func(s *site, target string) {
			s.wantSays("Transport endpoint is not connected", `ls "$1" 2>&1 | sed 's/.*: //'`, target)
		}},
		"dead and stacked": {between: func(s *site, target string) {
			s.must(unix.Mount(target, target, "", unix.MS_BIND, ""))
			if on := s.on(target); len(on) != 2 {
				s.t.Errorf("%d mounts: the test tests nothing", len(on))
			}
		}},
		"unmounted": {gone: true, between: func(s *site, target string) { s.sh(`umount "$1"`, target) }},
		"removed":   {gone: true, between: func(s *site, target string) { s.sh(`umount "$1"; rmdir "$1"`, target) }},
		"foreign": {gone: true, between: func(s *site, target string) { s.sh(`umount "$1"`, target); s.foreign(target) },
			after: func(s *site, target string) { s.takeForeign(target) }},
		"a file in its place": {gone: true, between: func(s *site, target string) { s.sh(`umount "$1"; rmdir "$1"; echo precious >"$1"`, target) },
			after: func(s *site, target string) { s.wantSays("precious", `cat "$1"; rm "$1"`, target) }},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite(t, "v", "other")
			s.makeRoots("v")
			target, beside := s.target("pod"), s.target("beside")
			o := PublishOptions{Target: target, Flags: []string{"noexec"}, Group: group(3), Exclusive: true}
			s.publish("v", o)
			s.publish("other", PublishOptions{Target: beside})
			s.restart(func() { c.between(s, target) })
			s.wantServed("other", beside)
			if c.gone {
				s.wantPublished("v")
				s.wantShown("0 600", s.path("v"))
			} else {
				s.wantPublished("v", target)
				s.wantServed("v", target)
				s.wantShown("3 660", target, s.path("v"))
				if m := s.wantMounted(target); !slices.Contains(strings.Split(m.Options, ","), "noexec") {
					t.Errorf("options %s", m.Options)
				}
				id := s.wantMounted(target).ID
				s.publish("v", o)
				if again := s.wantMounted(target).ID; again != id {
					t.Error("it was mounted once more")
				}
			}
			if c.after != nil {
				c.after(s, target)
			}
			s.publish("v", o)
			s.wantServed("v", target)
			s.unpublish("v", target)
			s.wantGone(target)
		})
	}
}

// TestReconcileInUse replaces a dead mount that somebody uses: who had it has errors, who comes has the volume.
func TestReconcileInUse(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.publish("v", PublishOptions{Target: target})
	// When its input is closed it tries what it has, and then what is there by name.
	held := exec.Command("sh", "-c", `cd "$1" && exec 3>held && echo open && read go; echo text >&3 && exit 1; ls . && exit 1; cat "$1/held"`, "sh", target)
	in, err := held.StdinPipe()
	s.must(err)
	out, err := held.StdoutPipe()
	s.must(err)
	s.must(held.Start())
	defer func() { in.Close(); _ = held.Wait() }()
	said := bufio.NewReader(out)
	if line, err := said.ReadString('\n'); line != "open\n" {
		t.Fatal(line, err)
	}
	s.restart(func() {})
	s.wantServed("v", target)
	s.sh(`echo new >"$1/held"`, target)
	in.Close()
	if rest, err := io.ReadAll(said); string(rest) != "new\n" {
		t.Errorf("who had the dead mount open has read %q, %v", rest, err)
	}
	s.unpublish("v", target)
	s.wantGone(target)
}

// TestPublishOnDead publishes where a dead mount is that no record tells of.
func TestPublishOnDead(t *testing.T) {
	s := newSite(t, "v")
	recorded, target := s.target("recorded"), s.target("pod")
	s.publish("v", PublishOptions{Target: recorded})
	s.must(os.Mkdir(target, 0o755))
	s.restart(func() {
		s.must(errors.Join(unix.Mount(recorded, target, "", unix.MS_BIND, ""), unix.Unmount(recorded, 0)))
	})
	s.wantPublished("v")
	s.publish("v", PublishOptions{Target: target})
	s.wantServed("v", target)
	s.unpublish("v", target)
	s.wantGone(target)
}

// TestPublishAborted: when the connection has ended under the daemon what is published can be taken away, and is
// replaced by the next one.
func TestPublishAborted(t *testing.T) {
	s := newSite(t, "v")
	first, second := s.target("first"), s.target("second")
	s.publish("v", PublishOptions{Target: first})
	s.publish("v", PublishOptions{Target: second, ReadOnly: true})
	s.hold(filepath.Join(first, "held"))
	s.sh(`umount --force --lazy "$1"`, s.mnt)
	<-s.Served()
	s.wantErr("publish", s.Publish(t.Context(), "v", PublishOptions{Target: s.target("third")}), ErrNotMounted)
	s.wantErr("publish again", s.Publish(t.Context(), "v", PublishOptions{Target: first}), ErrNotMounted)
	s.wantPublished("v", first, second)
	s.restart(func() {})
	s.wantPublished("v", first, second)
	s.wantServed("v", first)
	s.sh(`! touch "$1/new" 2>/dev/null`, second)
	s.unpublish("v", first)
	s.wantGone(first)
}

// TestClosePublished: the end of a pool waits for nobody, and takes nothing away that is published.
func TestClosePublished(t *testing.T) {
	s := newSite(t, "v")
	target, byHand := s.target("pod"), s.target("by hand")
	s.publish("v", PublishOptions{Target: target})
	s.sh(`mkdir "$1"; mount --bind "$2" "$1"`, byHand, s.mnt)
	s.hold(filepath.Join(target, "held"))
	s.must(s.Close())
	if left := s.on(s.mnt); len(left) > 0 {
		t.Errorf("the mount is left: %+v", left)
	}
	for _, at := range []string{target, byHand} {
		s.wantMounted(at)
		s.wantSays("Transport endpoint is not connected", `ls "$1" 2>&1 | sed 's/.*: //'`, at)
	}
	s.must(unix.Unmount(byHand, 0))
	s.open()
	s.mount()
	s.wantServed("v", target)
}
