package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// TestPublishOnOddNames goes through mountinfo, the records and a restart with names that each of them writes in its own way.
func TestPublishOnOddNames(t *testing.T) {
	s := newSite(t, "v")
	long := s.targets
	for len(long) < maxTarget-256 {
		long += "/" + strings.Repeat("n", 255)
	}
	s.must(os.MkdirAll(long, 0o755))
	long += "/" + strings.Repeat("x", maxTarget-len(long)-1)
	targets := []string{long}
	for _, name := range []string{"a b", "tab\t", "line\nfeed", `back\slash`, `\040`, "#hash", "ünïcode", "quote'\"", "-o", "a,b=c", "gone (deleted)"} {
		targets = append(targets, s.target(name))
	}
	for _, target := range targets {
		s.publish("v", PublishOptions{Target: target})
		s.publish("v", PublishOptions{Target: target})
		s.wantMounted(target)
	}
	s.wantPublished("v", targets...)
	s.restart(func() {})
	s.wantPublished("v", targets...)
	for _, target := range targets {
		if target != long { // a shell cannot name what is on it
			s.wantServed("v", target)
		}
		s.unpublish("v", target)
		s.wantGone(target)
	}
}

// TestPublishOverContents publishes on a directory and a file that are there: what is in them is hidden, and stays.
func TestPublishOverContents(t *testing.T) {
	s := newSite(t, "v")
	empty, full := s.target("empty"), s.target("full")
	s.sh(`mkdir "$1" "$2"; echo precious >"$2/file"`, empty, full)
	for _, target := range []string{empty, full} {
		s.publish("v", PublishOptions{Target: target})
		s.wantServed("v", target)
	}
	s.wantSays("", `ls "$1"`, full)
	s.unpublish("v", empty)
	s.wantGone(empty)
	for range 2 {
		s.wantErr("unpublish", s.Unpublish(t.Context(), "v", full), ErrTarget)
		s.wantPublished("v")
		s.wantSays("precious", `cat "$1/file"`, full)
		if on := s.on(full); len(on) > 0 {
			t.Errorf("still mounted: %+v", on)
		}
	}
	// It can go on either way.
	s.publish("v", PublishOptions{Target: full})
	s.wantServed("v", full)
	s.wantErr("unpublish", s.Unpublish(t.Context(), "v", full), ErrTarget)
	s.must(os.Remove(filepath.Join(full, "file")))
	s.unpublish("v", full)
	s.wantGone(full)
	s.wantPublished("v")
}

// TestDeleteOverContents deletes by force what is published over something: that stays, and the volume goes at once.
func TestDeleteOverContents(t *testing.T) {
	s := newSite(t, "v")
	full := s.target("full")
	s.sh(`mkdir "$1"; echo precious >"$1/file"`, full)
	s.publish("v", PublishOptions{Target: full})
	s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
	s.wantSays("precious", `cat "$1/file"`, full)
	if records, err := s.store.Publications(); err != nil || len(records) > 0 || len(s.on(full)) > 0 {
		t.Errorf("recorded: %+v, %v", records, err)
	}
}

// TestUnpublishBusy takes away what somebody uses, as soon as nobody does.
func TestUnpublishBusy(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.publish("v", PublishOptions{Target: target})
	before := s.wantMounted(target)
	h := s.hold(filepath.Join(target, "held"))
	for range 2 {
		err := s.Unpublish(t.Context(), "v", target)
		s.wantErr("unpublish", err, ErrBusy)
		if err != nil && !strings.Contains(err.Error(), target) {
			t.Errorf("it does not name the target: %v", err)
		}
	}
	s.publish("v", PublishOptions{Target: target})
	if after := s.wantMounted(target); after.ID != before.ID {
		t.Error("it was mounted anew")
	}
	s.wantPublished("v", target)
	s.wantServed("v", target)
	h.release()
	s.unpublish("v", target)
	s.wantGone(target)
}

// TestUnpublishDeleted takes away what is still mounted of a volume that has gone.
func TestUnpublishDeleted(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.sh(`mkdir "$1"; mount --bind "$2" "$1"`, target, s.path("v"))
	s.wantErr("delete what is mounted by hand", s.Delete(t.Context(), "v", DeleteOptions{}), ErrBusy)
	s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
	for range 2 {
		s.unpublish("v", target)
		s.wantGone(target)
	}
	// The next volume of that name is another one.
	s.sh(`mkdir "$1"`, target)
	_, err := s.Create(t.Context(), "v", CreateOptions{Bytes: siteBytes})
	s.must(err)
	s.sh(`mount --bind "$2" "$1"`, target, s.path("v"))
	s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
	_, err = s.Create(t.Context(), "v", CreateOptions{Bytes: siteBytes})
	s.must(err)
	s.publish("v", PublishOptions{Target: target})
	s.wantServed("v", target)
}

// TestPublishTakenAway: what somebody has unmounted by hand, as kubelet does by force, is no publication any more.
func TestPublishTakenAway(t *testing.T) {
	s := newSite(t, "v")
	s.makeRoots("v")
	first, second := s.target("first"), s.target("second")
	for what, goOn := range map[string]func(){
		"publish elsewhere": func() {
			s.publish("v", PublishOptions{Target: second, Exclusive: true})
			s.wantPublished("v", second)
			s.wantShown("0 600", second)
			s.unpublish("v", second)
		},
		"publish there otherwise": func() {
			s.publish("v", PublishOptions{Target: first, ReadOnly: true, Group: group(2)})
			s.wantPublished("v", first)
			s.wantShown("2 660", first)
		},
		"publish there again": func() {
			s.publish("v", PublishOptions{Target: first, Exclusive: true, Group: group(1)})
			s.wantShown("1 660", first)
		},
		"unpublish": func() {
			s.unpublish("v", first)
			s.wantShown("0 600", s.path("v"))
		},
		"delete": func() {
			s.must(s.Delete(t.Context(), "v", DeleteOptions{}))
			_, err := s.Create(t.Context(), "v", CreateOptions{Bytes: siteBytes})
			s.must(err)
			s.makeRoots("v")
		},
		"delete by force": func() {
			s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
			s.wantGone(first)
			_, err := s.Create(t.Context(), "v", CreateOptions{Bytes: siteBytes})
			s.must(err)
			s.makeRoots("v")
		},
	} {
		for _, removed := range []bool{false, true} {
			t.Run(fmt.Sprint(what, ", removed: ", removed), func(t *testing.T) {
				defer func(outer *testing.T) { s.t = outer }(s.t)
				s.t = t
				s.publish("v", PublishOptions{Target: first, Exclusive: true, Group: group(1)})
				s.sh(`umount "$1"`, first)
				if removed {
					s.must(os.Remove(first))
				}
				goOn()
				s.unpublish("v", first)
				s.wantGone(first)
				s.wantPublished("v")
			})
		}
	}
}

// TestPublishStacked: of what was mounted over a target by hand, all that is the volume's goes.
func TestPublishStacked(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.sh(`mkdir -p "$1/sub/path"; echo below >"$1/sub/path/file"`, s.path("v"))
	stack := func() {
		t.Helper()
		s.publish("v", PublishOptions{Target: target, Flags: []string{"noexec"}})
		s.sh(`mount --bind "$1" "$1"; mount --bind "$2/sub/path" "$1"; mount --bind "$2" "$1"`, target, s.path("v"))
		if on := s.on(target); len(on) != 4 {
			t.Fatalf("%d mounts", len(on))
		}
	}
	stack()
	s.publish("v", PublishOptions{Target: target, Flags: []string{"noexec"}})
	s.wantServed("v", target)
	if m := s.wantMounted(target); !slices.Contains(strings.Split(m.Options, ","), "noexec") {
		t.Errorf("a mount by hand is left: %s", m.Options)
	}
	stack()
	s.unpublish("v", target)
	s.wantGone(target)

	stack()
	s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
	s.wantGone(target)
}

// TestPublishSubPath: a part of a published volume, mounted elsewhere by hand as kubelet does for subPath, is not the
// publication's. Who deletes the volume is told of it.
func TestPublishSubPath(t *testing.T) {
	s := newSite(t, "v")
	target, sub := s.target("pod"), s.target("sub")
	s.publish("v", PublishOptions{Target: target})
	s.sh(`mkdir -p "$1/a/b" "$2"; mount --bind "$1/a/b" "$2"`, target, sub)
	s.unpublish("v", target)
	s.wantGone(target)
	s.wantSays("text", `echo text >"$1/file"; cat "$2/a/b/file"`, sub, s.path("v"))
	err := s.Delete(t.Context(), "v", DeleteOptions{})
	s.wantErr("delete", err, ErrBusy)
	if err != nil && !strings.Contains(err.Error(), sub) {
		t.Errorf("it does not name the mount: %v", err)
	}
	// A part of it that is alone on a target is not the volume.
	s.publish("v", PublishOptions{Target: sub})
	s.wantServed("v", sub)
	s.unpublish("v", sub)
	s.wantGone(sub)
}

// TestPublishForeign: what others have mounted on a target stays, below and above.
func TestPublishForeign(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.must(os.Mkdir(target, 0o755))
	s.foreign(target)
	s.wantErr("publish on it", s.Publish(t.Context(), "v", PublishOptions{Target: target}), ErrTarget)
	s.wantErr("unpublish it", s.Unpublish(t.Context(), "v", target), ErrTarget)
	s.wantPublished("v")
	s.takeForeign(target)

	// Above a publication, which is there as long as its mount is, seen or not.
	s.publish("v", PublishOptions{Target: target})
	s.foreign(target)
	s.wantErr("publish below it", s.Publish(t.Context(), "v", PublishOptions{Target: target}), ErrTarget)
	s.wantErr("unpublish below it", s.Unpublish(t.Context(), "v", target), ErrTarget)
	s.wantErr("delete", s.Delete(t.Context(), "v", DeleteOptions{}), ErrBusy)
	s.wantPublished("v", target)
	s.wantErr("an exclusive one", s.Publish(t.Context(), "v", PublishOptions{Target: s.target("other"), Exclusive: true}), ErrExclusive)
	s.takeForeign(target)
	s.wantServed("v", target)

	// The next daemon replaces a dead mount when it is seen again.
	s.restart(func() { s.foreign(target) })
	s.wantPublished("v", target)
	s.takeForeign(target)
	s.publish("v", PublishOptions{Target: target})
	s.wantServed("v", target)

	// What is mounted on a directory that is deleted the kernel takes away, whosever it is.
	s.foreign(target)
	s.must(s.Delete(t.Context(), "v", DeleteOptions{Force: true}))
	if records, err := s.store.Publications(); err != nil || len(records) > 0 {
		t.Errorf("recorded: %+v, %v", records, err)
	}
	s.unpublish("v", target)
	s.wantGone(target)
}

// TestPublishForeignInstead: where others have mounted something after the publication was unmounted, it is none any more.
func TestPublishForeignInstead(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	s.publish("v", PublishOptions{Target: target, Exclusive: true})
	s.sh(`umount "$1"`, target)
	s.foreign(target)
	s.publish("v", PublishOptions{Target: s.target("other"), Exclusive: true})
	s.wantPublished("v", s.target("other"))
	s.takeForeign(target)
}

// TestPublishGroup: a volume is seen as a group's as long as it is published for it.
func TestPublishGroup(t *testing.T) {
	s := newSite(t, "v", "other")
	s.makeRoots("v")
	s.makeRoots("other")
	plain, first, second := s.target("plain"), s.target("first"), s.target("second")
	s.publish("v", PublishOptions{Target: plain})
	s.wantShown("0 600", plain, s.path("v"))
	s.publish("v", PublishOptions{Target: first, Group: group(4242)})
	s.publish("v", PublishOptions{Target: second, Group: group(4242)})
	s.wantShown("4242 660", first, second, plain, s.path("v"))
	s.wantShown("0 600", s.path("other"))
	s.unpublish("v", first)
	s.wantShown("4242 660", second, plain, s.path("v"))

	// The next daemon shows it so, too, as long as it is mounted.
	s.restart(func() {})
	s.wantShown("4242 660", second, plain, s.path("v"))
	s.restart(func() { s.sh(`umount "$1"`, second) })
	s.wantPublished("v", plain)
	s.wantShown("0 600", plain, s.path("v"))
	s.publish("v", PublishOptions{Target: second, Group: group(0)})
	s.wantShown("0 600", second)
	s.unpublish("v", second)
	s.publish("v", PublishOptions{Target: second, Group: group(7)})
	s.wantShown("7 660", second)
	s.unpublish("v", second)
	s.wantShown("0 600", plain, s.path("v"))

	// What chown(2) takes for none is none: it could not be served.
	s.wantErr("group -1", s.Publish(t.Context(), "v", PublishOptions{Target: second, Group: group(1<<32 - 1)}), ErrInvalid)
	s.wantPublished("v", plain)
	s.wantGone(second)
}

// TestPublishFails: what cannot be mounted is taken back.
func TestPublishFails(t *testing.T) {
	s := newSite(t, "v")
	s.makeRoots("v")
	broken := errors.New("broken")
	bind := s.bind
	s.bind = func(context.Context, string, string, []string) error { return broken }
	target := s.target("pod")
	s.wantErr("publish", s.Publish(t.Context(), "v", PublishOptions{Target: target, Group: group(1)}), broken)
	s.wantPublished("v")
	s.wantShown("0 600", s.path("v"))
	s.bind = bind
	s.publish("v", PublishOptions{Target: target, ReadOnly: true})
	s.wantShown("0 600", target)
}

func TestPublishNames(t *testing.T) {
	s := newSite(t, "v")
	target := s.target("pod")
	_, err := s.Publications(t.Context(), "none")
	s.wantErr("publications of no volume", err, ErrNotFound)
	_, err = s.Publications(t.Context(), "../v")
	s.wantErr("publications of no name", err, ErrInvalid)
	s.wantErr("publish no volume", s.Publish(t.Context(), "none", PublishOptions{Target: target}), ErrNotFound)
	s.wantErr("publish no name", s.Publish(t.Context(), "v/sub", PublishOptions{Target: target}), ErrInvalid)
	s.wantErr("unpublish no name", s.Unpublish(t.Context(), "..", target), ErrInvalid)
	s.wantGone(target)
	s.must(s.Close())
	for what, err := range map[string]error{
		"publish":   s.Publish(t.Context(), "v", PublishOptions{Target: target}),
		"unpublish": s.Unpublish(t.Context(), "v", target),
	} {
		s.wantErr(what+" of a closed pool", err, ErrClosed)
	}
}

// TestPublishAgainst has volumes go for the same targets, and leave them, at a time.
func TestPublishAgainst(t *testing.T) {
	s := newSite(t, "a", "b")
	targets := []string{s.target("1"), s.target("2")}
	var together sync.WaitGroup
	for worker := range 4 {
		together.Go(func() {
			random := rand.New(rand.NewPCG(1, uint64(worker)))
			for range 50 {
				volume, target := []string{"a", "b"}[random.IntN(2)], targets[random.IntN(len(targets))]
				call, allowed := "publish", ErrPublished
				do := func() error { return s.Publish(t.Context(), volume, PublishOptions{Target: target}) }
				if random.IntN(2) == 0 {
					call, allowed = "unpublish", ErrTarget // it is the other's
					do = func() error { return s.Unpublish(t.Context(), volume, target) }
				}
				if err := do(); err != nil && !errors.Is(err, allowed) {
					t.Errorf("%s %s on %s: %v", call, volume, target, err)
				}
			}
		})
	}
	together.Wait()
	for _, target := range targets {
		var of []string
		for _, volume := range []string{"a", "b"} {
			v, err := s.Volume(t.Context(), volume)
			s.must(err)
			if slices.Contains(v.Published, target) {
				of = append(of, volume)
			}
		}
		if len(of) == 0 {
			s.wantGone(target)
			continue
		}
		if len(of) > 1 {
			t.Errorf("%s is of %q", target, of)
		}
		s.wantServed(of[0], target)
	}
}
