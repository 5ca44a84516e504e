package csi_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/test/kit"
)

// wantGone wants neither a mount nor a target to be left, while the pod's directory is.
func wantGone(t testing.TB, target string) {
	t.Helper()
	if left := kit.MountsOn(t, target); len(left) > 0 {
		t.Errorf("%s is still mounted", target)
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the target is left: %v", err)
	}
	kit.Stat(t, filepath.Dir(target))
}

// wantMounted wants one mount on a target.
func wantMounted(t testing.TB, target string) *mountinfo.Info {
	t.Helper()
	infos := kit.MountsOn(t, target)
	if len(infos) != 1 {
		t.Fatalf("%d mounts on %s", len(infos), target)
	}
	return infos[0]
}

// TestPublish mounts a volume ten times each way and takes it away ten times, repeating every call.
func TestPublish(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	for i := range 10 {
		target := n.publish(id, "pod", capability(rwo))
		n.publish(id, "pod", capability(rwo))
		wantMounted(t, target)
		st := kit.Statfs(t, target)
		if size := st.Blocks * uint64(st.Bsize); size != 16*kit.Mi {
			t.Fatalf("df shows %d bytes", size)
		}
		kit.OK(t, os.WriteFile(filepath.Join(target, fmt.Sprint("f", i)), []byte("x"), 0o600))
		n.unpublish(id, target)
		wantGone(t, target)
		n.unpublish(id, target)
	}
	if v := n.List(); len(v) != 1 {
		t.Errorf("%v", v)
	}
	names, err := os.ReadDir(n.Path(volumeName(id)))
	if err != nil || len(names) != 10 {
		t.Errorf("%v, %v", names, err)
	}
	n.delete(id)
	n.delete(id)
}

// volumeName is what the pool calls a volume.
func volumeName(id string) string { return id[strings.LastIndexByte(id, '/')+1:] }

// TestPublishReadOnly publishes in each way that is read-only, beside one that is not.
func TestPublishReadOnly(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	rw := n.publish(id, "writer", capability(rwx))
	kit.OK(t, os.WriteFile(filepath.Join(rw, "f"), []byte("hello"), 0o644))
	readOnly := map[string]*csipb.NodePublishVolumeRequest{
		"readonly": publication(id, n.target("readonly"), capability(rwo)),
		"flag":     publication(id, n.target("flag"), capability(rwo, "ro", "noexec", "nosuid")),
		"rox":      publication(id, n.target("rox"), capability(rox)),
	}
	readOnly["readonly"].Readonly = true
	for name, r := range readOnly {
		_, err := n.NodePublishVolume(t.Context(), r)
		kit.OK(t, err)
		if body, err := os.ReadFile(filepath.Join(r.TargetPath, "f")); err != nil || string(body) != "hello" {
			t.Errorf("%s: %q, %v", name, body, err)
		}
		kit.IsErr(t, name, os.WriteFile(filepath.Join(r.TargetPath, "g"), nil, 0o600), unix.EROFS)
		kit.IsErr(t, name+": chmod", os.Chmod(filepath.Join(r.TargetPath, "f"), 0o600), unix.EROFS)
		if options := wantMounted(t, r.TargetPath).Options; name == "flag" && (!strings.Contains(options, "noexec") || !strings.Contains(options, "nosuid")) {
			t.Errorf("options %s", options)
		}
	}
	kit.OK(t, os.WriteFile(filepath.Join(rw, "g"), nil, 0o600))
	for _, r := range readOnly {
		n.unpublish(id, r.TargetPath)
	}
	n.unpublish(id, rw)
}

// TestPublishRefused asks for what cannot be.
func TestPublishRefused(t *testing.T) {
	n := start(t, "ext4", "none")
	id, other := n.create("v", 16*kit.Mi), n.create("w", 16*kit.Mi)
	target := n.publish(id, "pod", capability(rwo))
	for name, c := range map[string]struct {
		request *csipb.NodePublishVolumeRequest
		code    codes.Code
		says    string
	}{
		"no capability":     {publication(id, n.target("a"), nil), codes.InvalidArgument, "capability"},
		"no such volume":    {publication(n.ID+"/none", n.target("a"), capability(rwo)), codes.NotFound, "none"},
		"another node's":    {publication("0123/none", n.target("a"), capability(rwo)), codes.NotFound, "node"},
		"no target":         {publication(id, "", capability(rwo)), codes.InvalidArgument, "target_path"},
		"relative target":   {publication(id, "a/b", capability(rwo)), codes.InvalidArgument, "absolute"},
		"target in pool":    {publication(id, filepath.Join(n.Dir, "volumes", "x"), capability(rwo)), codes.InvalidArgument, "inside the pool"},
		"target in volume":  {publication(id, filepath.Join(target, "x"), capability(rwo)), codes.InvalidArgument, "mount of Croft"},
		"unknown flag":      {publication(id, n.target("a"), capability(rwo, "uid=0")), codes.InvalidArgument, "uid=0"},
		"a filesystem type": {publication(id, n.target("a"), fsType("ext4")), codes.InvalidArgument, "ext4"},
		"block":             {publication(id, n.target("a"), blockCapability(rwo)), codes.FailedPrecondition, "filesystem volume"},
		"in another way":    {publication(id, target, capability(rwo, "ro")), codes.AlreadyExists, "another way"},
		"another volume":    {publication(other, target, capability(rwo)), codes.AlreadyExists, target},
		"alone":             {publication(id, n.target("a"), capability(rwop)), codes.FailedPrecondition, "only one"},
		"a group by name":   {publication(id, n.target("a"), forGroup("users")), codes.InvalidArgument, "users"},
	} {
		_, err := n.NodePublishVolume(t.Context(), c.request)
		wantCode(t, name, err, c.code)
		if err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v does not say %q", name, err, c.says)
		}
	}
	wantMounted(t, target)
	// What is published is not deleted.
	_, err := n.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: id})
	wantCode(t, "delete what is published", err, codes.FailedPrecondition)
	n.unpublish(id, target)
	entries, err := os.ReadDir(filepath.Join(n.targets, "a"))
	if err != nil || len(entries) > 0 {
		t.Errorf("what was refused has left %v, %v", entries, err)
	}
}

func fsType(name string) *csipb.VolumeCapability {
	c := capability(rwo)
	c.GetMount().FsType = name
	return c
}

// TestAlone has ReadWriteOncePod hold in both orders, and again after the first pod has gone.
func TestAlone(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	first := n.publish(id, "first", capability(rwop))
	n.publish(id, "first", capability(rwop))
	for name, c := range map[string]*csipb.VolumeCapability{"alone": capability(rwop), "shared": capability(rwo), "reading": capability(rox)} {
		_, err := n.NodePublishVolume(t.Context(), publication(id, n.target("second"), c))
		wantCode(t, name, err, codes.FailedPrecondition)
	}
	n.unpublish(id, first)
	second := n.publish(id, "second", capability(rwo))
	third := n.publish(id, "third", capability(rwo))
	_, err := n.NodePublishVolume(t.Context(), publication(id, n.target("fourth"), capability(rwop)))
	wantCode(t, "alone beside two", err, codes.FailedPrecondition)
	n.unpublish(id, second)
	n.unpublish(id, third)
	n.unpublish(id, n.publish(id, "fourth", capability(rwop)))
}

// TestForced takes publications away behind the driver's back, as kubelet and people do.
func TestForced(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	for name, force := range map[string]func(target string){
		"unmounted":        func(target string) { kit.OK(t, unix.Unmount(target, 0)) },
		"lazily unmounted": func(target string) { kit.OK(t, unix.Unmount(target, unix.MNT_DETACH)) },
		"removed": func(target string) {
			kit.OK(t, unix.Unmount(target, unix.MNT_DETACH))
			kit.OK(t, os.RemoveAll(filepath.Dir(target)))
		},
		"mounted once more": func(target string) { kit.OK(t, unix.Mount(target, target, "", unix.MS_BIND, "")) },
	} {
		t.Run(name, func(t *testing.T) {
			again := []func(target string){
				func(target string) { n.unpublish(id, target) },
				func(target string) { n.unpublish(id, n.publish(id, "pod", capability(rwo))) },
				func(target string) { n.unpublish(id, n.publish(id, "pod", capability(rwo, "ro"))) }, // another way
				func(target string) { // another pod, alone
					if name == "mounted once more" {
						n.unpublish(id, target)
					}
					n.unpublish(id, n.publish(id, "other", capability(rwop)))
				},
			}
			for i, then := range again {
				if name == "mounted once more" && i == 2 {
					continue // it is still published in the first way
				}
				target := n.publish(id, "pod", capability(rwo))
				force(target)
				then(target)
				if left := kit.MountsOn(t, target); len(left) > 0 {
					t.Fatalf("%d: mounts are left: %v", i, left)
				}
				if at := n.Show(volumeName(id)).Published; len(at) > 0 {
					t.Fatalf("%d: records are left: %v", i, at)
				}
			}
		})
	}
	n.delete(id)
}

// TestForeign leaves alone what is not the driver's.
func TestForeign(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	t.Run("a mount", func(t *testing.T) {
		target := n.target("pod")
		kit.OK(t, os.Mkdir(target, 0o755))
		kit.OK(t, unix.Mount("tmpfs", target, "tmpfs", 0, ""))
		defer kit.Unmount(t, target)
		_, err := n.NodePublishVolume(t.Context(), publication(id, target, capability(rwo)))
		wantCode(t, "publish over a mount", err, codes.InvalidArgument)
		_, err = n.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		wantCode(t, "unpublish another mount", err, codes.InvalidArgument)
		if fs := wantMounted(t, target).FSType; fs != "tmpfs" {
			t.Errorf("%s is mounted", fs)
		}
	})
	t.Run("files in the target", func(t *testing.T) {
		target := n.target("full")
		kit.OK(t, os.Mkdir(target, 0o755))
		kit.OK(t, os.WriteFile(filepath.Join(target, "mine"), nil, 0o600))
		n.publish(id, "full", capability(rwo))
		_, err := n.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		if err == nil {
			t.Error("a directory that holds something is gone")
		}
		kit.Stat(t, filepath.Join(target, "mine"))
		if left := kit.MountsOn(t, target); len(left) > 0 {
			t.Error("it is still mounted")
		}
		kit.OK(t, os.RemoveAll(target))
		n.unpublish(id, target)
	})
	t.Run("a pod that still runs", func(t *testing.T) {
		target := n.publish(id, "busy", capability(rwo))
		f, err := os.Create(filepath.Join(target, "open"))
		kit.OK(t, err)
		_, err = n.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target})
		wantCode(t, "unpublish what is in use", err, codes.FailedPrecondition)
		wantMounted(t, target)
		kit.OK(t, f.Close())
		n.unpublish(id, target)
		wantGone(t, target)
	})
	n.delete(id)
}

// TestStats tells use and limit, only where the volume is published.
func TestStats(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	target := n.publish(id, "pod", capability(rwo))
	kit.OK(t, os.WriteFile(filepath.Join(target, "f"), make([]byte, kit.Mi), 0o600))
	r, err := n.NodeGetVolumeStats(t.Context(), &csipb.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: target})
	kit.OK(t, err)
	if len(r.Usage) != 2 || r.Usage[0].Total != 16*kit.Mi || r.Usage[0].Used != kit.Mi || r.Usage[0].Available != 15*kit.Mi ||
		r.Usage[1].Total != 1024 || r.Usage[1].Used != 2 && r.Usage[1].Used != 1 || r.Usage[1].Unit != csipb.VolumeUsage_INODES {
		t.Errorf("%v", r.Usage)
	}
	_, err = n.NodeGetVolumeStats(t.Context(), &csipb.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: n.target("other")})
	wantCode(t, "stats elsewhere", err, codes.NotFound)
	health, err := n.NodeGetVolumeHealth(t.Context(), &csipb.NodeGetVolumeHealthRequest{VolumeId: id, VolumePublishPath: target})
	if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) > 0 {
		t.Errorf("%v, %v", health, err)
	}
	kit.OK(t, unix.Unmount(target, 0))
	health, err = n.NodeGetVolumeHealth(t.Context(), &csipb.NodeGetVolumeHealthRequest{VolumeId: id, VolumePublishPath: n.target("other")})
	if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) != 1 {
		t.Errorf("not mounted there: %v, %v", health, err)
	}
	n.unpublish(id, target)
}

// TestExpand raises a limit while a writer is at it, and shrinks never.
func TestExpand(t *testing.T) {
	n := start(t, "ext4", "none")
	id := n.create("v", 16*kit.Mi)
	target := n.publish(id, "pod", capability(rwo))
	f, err := os.Create(filepath.Join(target, "f"))
	kit.OK(t, err)
	defer f.Close()
	_, err = f.Write(make([]byte, 17*kit.Mi))
	kit.IsErr(t, "beyond the limit", err, unix.ENOSPC)
	expand := func(least, most int64) (*csipb.NodeExpandVolumeResponse, error) {
		return n.NodeExpandVolume(t.Context(), &csipb.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
			CapacityRange: &csipb.CapacityRange{RequiredBytes: least, LimitBytes: most}})
	}
	for range 2 {
		r, err := expand(32*kit.Mi, 0)
		if err != nil || r.CapacityBytes != 32*kit.Mi {
			t.Fatalf("%v, %v", r, err)
		}
	}
	if _, err := f.WriteAt(make([]byte, 17*kit.Mi), 0); err != nil {
		t.Error(err)
	}
	if r, err := expand(8*kit.Mi, 0); err != nil || r.CapacityBytes != 32*kit.Mi {
		t.Errorf("less than it has: %v, %v", r, err)
	}
	_, err = expand(8*kit.Mi, 24*kit.Mi)
	wantCode(t, "shrink", err, codes.OutOfRange)
	_, err = expand(1<<62, 0)
	wantCode(t, "more than there is", err, codes.ResourceExhausted)
	if st := kit.Statfs(t, target); st.Blocks*uint64(st.Bsize) != 32*kit.Mi {
		t.Errorf("df shows %d blocks", st.Blocks)
	}
	kit.OK(t, f.Close())
	n.unpublish(id, target)
}
