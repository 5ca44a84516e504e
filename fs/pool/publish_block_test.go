package pool

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// device returns the device of a volume, "" when it has none.
func (s *site) device(volume string) string {
	s.t.Helper()
	v, err := s.Volume(s.t.Context(), volume)
	s.must(err)
	return v.Device
}

// wantDevice wants the device of a volume, of that many bytes, to be on its targets.
func (s *site) wantDevice(volume string, bytes uint64, targets ...string) {
	s.t.Helper()
	device := s.device(volume)
	if device == "" {
		s.t.Fatalf("volume %s has no device", volume)
	}
	numbers := s.sh(`stat --format '%F %t:%T' "$1"`, device)
	for _, target := range targets {
		s.wantMounted(target)
		s.wantSays(strings.TrimSpace(numbers), `stat --format '%F %t:%T' "$1"`, target)
		s.wantSays(fmt.Sprint(bytes), `blockdev --getsize64 "$1"`, target)
	}
}

// TestPublishDevice uses a device on its targets, and grows it there.
func TestPublishDevice(t *testing.T) {
	s := newSite(t)
	s.block("b")
	first, second := s.target("first"), s.target("second")
	s.publish("b", PublishOptions{Target: first})
	device := s.device("b")
	s.publish("b", PublishOptions{Target: first})
	s.publish("b", PublishOptions{Target: second})
	s.wantPublished("b", first, second)
	s.wantDevice("b", siteBytes, first, second)
	s.wantSays("text", `echo text | dd of="$1" bs=4096 conv=sync oflag=direct status=none; head -c 4 "$2"`, first, second)
	s.sh(`! dd if=/dev/zero of="$1" bs=64k oflag=direct seek=$(($2/65536)) count=1 status=none`, first, fmt.Sprint(siteBytes))

	_, err := s.Resize(t.Context(), "b", ResizeOptions{Bytes: 2 * siteBytes})
	s.must(err)
	s.wantDevice("b", 2*siteBytes, first, second)
	s.sh(`echo more | dd of="$1" bs=64k conv=sync oflag=direct seek=$(($2/65536)) status=none`, first, fmt.Sprint(siteBytes))

	s.unpublish("b", first)
	s.wantGone(first)
	s.wantDevice("b", 2*siteBytes, second)
	if now := s.device("b"); now != device {
		t.Errorf("the device %s became %s", device, now)
	}
	// The device is its own as long as it is seen somewhere.
	err = s.Detach(t.Context(), "b")
	s.wantErr("detach", err, ErrBusy)
	if err != nil && !strings.Contains(err.Error(), second) {
		t.Errorf("it does not name the target: %v", err)
	}
	s.wantDevice("b", 2*siteBytes, second)
	s.unpublish("b", second)
	s.wantGone(second)
	if now := s.device("b"); now != "" {
		t.Errorf("%s is left", now)
	}
	s.publish("b", PublishOptions{Target: first})
	s.wantSays("textmore", `head -c 4 "$1"; tail -c +$(($2+1)) "$1" | head -c 4`, first, fmt.Sprint(siteBytes))
}

// TestPublishDeviceReadOnly: a device is read-only for all, or for none.
func TestPublishDeviceReadOnly(t *testing.T) {
	s := newSite(t)
	s.block("b")
	first, second := s.target("first"), s.target("second")
	for _, readOnly := range []bool{false, true} {
		o := PublishOptions{Target: first, ReadOnly: readOnly}
		s.publish("b", o)
		s.publish("b", o)
		s.wantSays(map[bool]string{false: "0", true: "1"}[readOnly], `blockdev --getro "$1"`, first)
		write := `dd if=/dev/zero of="$1" bs=4096 count=1 oflag=direct status=none`
		if readOnly {
			write = "! " + write
		}
		s.sh(write, first)
		s.wantErr("the reverse", s.Publish(t.Context(), "b", PublishOptions{Target: second, ReadOnly: !readOnly}), ErrBusy)
		s.wantErr("the reverse, there", s.Publish(t.Context(), "b", PublishOptions{Target: first, ReadOnly: !readOnly}), ErrPublished)
		s.wantGone(second)
		s.wantPublished("b", first)
		s.wantDevice("b", siteBytes, first)
		s.publish("b", PublishOptions{Target: second, ReadOnly: readOnly})
		s.unpublish("b", first)
		s.unpublish("b", second)
		// Of the device that was attached by hand, too.
		_, err := s.Attach(t.Context(), "b", AttachOptions{ReadOnly: !readOnly})
		s.must(err)
		s.wantErr("by hand the reverse", s.Publish(t.Context(), "b", o), ErrBusy)
		s.wantPublished("b")
		s.wantDevice("b", siteBytes)
		s.must(s.Detach(t.Context(), "b"))
	}
}

// TestPublishDeviceHeld: a device that is open stays until it is not, wherever it was opened.
func TestPublishDeviceHeld(t *testing.T) {
	s := newSite(t)
	s.block("b")
	target := s.target("pod")
	s.publish("b", PublishOptions{Target: target})
	there := s.hold(target)
	s.wantErr("open on the target", s.Unpublish(t.Context(), "b", target), ErrBusy)
	s.wantDevice("b", siteBytes, target)
	there.release()

	elsewhere := s.hold(s.device("b"))
	s.wantErr("open elsewhere", s.Unpublish(t.Context(), "b", target), ErrBusy)
	s.wantPublished("b", target)
	s.wantDevice("b", siteBytes)
	elsewhere.release()
	s.unpublish("b", target)
	s.wantGone(target)
	s.wantPublished("b")
	if device := s.device("b"); device != "" {
		t.Errorf("%s is left", device)
	}
}

// TestPublishDeviceLater: a device outlives the daemon, and what somebody else does to it is found out.
func TestPublishDeviceLater(t *testing.T) {
	s := newSite(t)
	s.block("b")
	target := s.target("pod")
	s.publish("b", PublishOptions{Target: target})
	device, mounted := s.device("b"), s.wantMounted(target)
	s.restart(func() {})
	if now := s.wantMounted(target); s.device("b") != device || now.ID != mounted.ID {
		t.Errorf("the next daemon has %s and mount %d, the last had %s and %d", s.device("b"), now.ID, device, mounted.ID)
	}
	s.wantPublished("b", target)

	// Unmounted while nobody serves.
	s.restart(func() { s.sh(`umount "$1"`, target) })
	s.wantPublished("b")
	if now := s.device("b"); now != "" {
		t.Errorf("%s is left", now)
	}

	// Detached by hand: what is on the target is no device of the volume any more, or another one's.
	for what, goOn := range map[string]func(){
		"publish":     func() { s.publish("b", PublishOptions{Target: target}); s.wantDevice("b", siteBytes, target) },
		"restart":     func() { s.restart(func() {}); s.wantDevice("b", siteBytes, target) },
		"unpublish":   func() {},
		"with others": func() { s.publish("b", PublishOptions{Target: s.target("other")}); s.unpublish("b", s.target("other")) },
	} {
		s.publish("b", PublishOptions{Target: target})
		s.sh(`losetup --detach "$1"`, s.device("b"))
		if s.device("b") != "" {
			t.Fatalf("%s: %s is attached: the test tests nothing", what, s.device("b"))
		}
		goOn()
		s.unpublish("b", target)
		s.wantGone(target)
		s.wantPublished("b")
		if now := s.device("b"); now != "" {
			t.Errorf("%s: %s is left", what, now)
		}
	}
	s.publish("b", PublishOptions{Target: target})
	s.sh(`losetup --detach "$1"`, s.device("b"))
	s.must(s.Delete(t.Context(), "b", DeleteOptions{Force: true}))
	s.wantGone(target)
}

// TestPublishDeviceForeign: what others have mounted over a device stays, and the device with it.
func TestPublishDeviceForeign(t *testing.T) {
	s := newSite(t)
	s.block("b")
	target, file := s.target("pod"), s.target("file")
	s.must(os.WriteFile(file, []byte("foreign\n"), 0o600))
	s.publish("b", PublishOptions{Target: target})
	s.sh(`mount --bind "$1" "$2"`, file, target)
	s.wantErr("publish", s.Publish(t.Context(), "b", PublishOptions{Target: target}), ErrTarget)
	s.wantErr("unpublish", s.Unpublish(t.Context(), "b", target), ErrTarget)
	s.wantErr("detach", s.Detach(t.Context(), "b"), ErrBusy)
	s.wantSays("foreign", `cat "$1"; umount "$1"`, target)
	s.wantPublished("b", target)
	s.wantDevice("b", siteBytes, target)
}

// TestPublishDeviceName: a volume may have the name of another's device, which mountinfo shows alike.
func TestPublishDeviceName(t *testing.T) {
	s := newSite(t)
	s.block("b")
	device, tree := s.target("device"), s.target("tree")
	s.publish("b", PublishOptions{Target: device})
	name := filepath.Base(s.device("b"))
	_, err := s.Create(t.Context(), name, CreateOptions{Bytes: siteBytes})
	s.must(err)
	s.publish(name, PublishOptions{Target: tree})
	s.wantErr("unpublish the tree as the device", s.Unpublish(t.Context(), "b", tree), ErrTarget)
	s.wantErr("unpublish the device as the tree", s.Unpublish(t.Context(), name, device), ErrTarget)
	s.wantServed(name, tree)
	s.wantDevice("b", siteBytes, device)
}
