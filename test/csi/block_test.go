package csi_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/croftfs/croft/test/kit"
)

// loops lists the loop devices of a pool's files.
func (n *node) loops() (devices []string) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	kit.OK(n.t, err)
	for _, file := range files {
		if path, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(path), n.Dir+"/") {
			devices = append(devices, strings.Split(file, "/")[3])
		}
	}
	return devices
}

// deviceBytes is the size of a block device.
func deviceBytes(t testing.TB, path string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(strings.TrimSpace(kit.Must(t, "blockdev", "--getsize64", path)), 10, 64)
	kit.OK(t, err)
	return n
}

func blockCreation(name string, bytes int64) *csipb.CreateVolumeRequest {
	r := creation(name, bytes)
	r.VolumeCapabilities = []*csipb.VolumeCapability{blockCapability(rwo)}
	return r
}

// TestBlock publishes a block volume, grows it in use, and has nothing left afterwards.
func TestBlock(t *testing.T) {
	kit.EachFS(t, func(t *testing.T, fstype string) {
		n := start(t, fstype, "none")
		id := n.createBy(blockCreation("v", 32*kit.Mi))
		if st := kit.Stat(t, filepath.Join(n.Dir, "blocks", volumeName(id))); st.Blocks*512 < 32*kit.Mi {
			t.Errorf("only %d blocks are allocated", st.Blocks)
		}
		target := n.publish(id, "pod", blockCapability(rwo))
		n.publish(id, "pod", blockCapability(rwo))
		if st := kit.Stat(t, target); st.Mode&unix.S_IFMT != unix.S_IFBLK {
			t.Fatalf("mode %o", st.Mode)
		}
		second := n.publish(id, "second", blockCapability(rwo))
		n.unpublish(id, second)
		kit.Must(t, "mkfs.ext4", "-q", target)
		at := kit.TempDir(t)
		kit.Must(t, "mount", target, at)
		t.Cleanup(func() { kit.Unmount(t, at) })
		kit.OK(t, os.WriteFile(filepath.Join(at, "f"), []byte("kept"), 0o600))

		_, err := n.NodePublishVolume(t.Context(), readOnly(publication(id, n.target("reader"), blockCapability(rox))))
		wantCode(t, "read-only beside a writer", err, codes.FailedPrecondition)
		r, err := n.NodeExpandVolume(t.Context(), &csipb.NodeExpandVolumeRequest{VolumeId: id, VolumePath: target,
			CapacityRange: &csipb.CapacityRange{RequiredBytes: 64 * kit.Mi}, VolumeCapability: blockCapability(rwo)})
		if err != nil || r.CapacityBytes != 64*kit.Mi || deviceBytes(t, target) != 64*kit.Mi {
			t.Errorf("%v, %v; the device has %d bytes", r, err, deviceBytes(t, target))
		}
		stats, err := n.NodeGetVolumeStats(t.Context(), &csipb.NodeGetVolumeStatsRequest{VolumeId: id, VolumePath: target})
		if err != nil || len(stats.Usage) != 1 || stats.Usage[0].Total != 64*kit.Mi {
			t.Errorf("%v, %v", stats, err)
		}
		kit.Unmount(t, at) // to grow it mounted takes a capability that a container's root may lack
		kit.Must(t, "e2fsck", "-fp", target)
		kit.Must(t, "resize2fs", target)
		kit.Must(t, "mount", target, at)
		if st := kit.Statfs(t, at); st.Blocks*uint64(st.Bsize) < 48*kit.Mi {
			t.Errorf("the filesystem has %d blocks", st.Blocks)
		}
		kit.Unmount(t, at)
		n.unpublish(id, target)
		wantGone(t, target)
		if left := n.loops(); len(left) > 0 {
			t.Errorf("loop devices are left: %v", left)
		}

		target = n.target("reader")
		_, err = n.NodePublishVolume(t.Context(), readOnly(publication(id, target, blockCapability(rox))))
		kit.OK(t, err)
		if f, err := os.OpenFile(target, os.O_WRONLY, 0); err == nil {
			_, err = f.Write([]byte("x"))
			f.Close()
			if err == nil {
				t.Error("a read-only device was written")
			}
		}
		kit.Must(t, "mount", "-o", "ro,noload", target, at)
		if body, err := os.ReadFile(filepath.Join(at, "f")); err != nil || string(body) != "kept" {
			t.Errorf("%q, %v", body, err)
		}
		kit.Unmount(t, at)
		n.unpublish(id, target)

		clone := blockCreation("clone", 64*kit.Mi)
		clone.VolumeContentSource = fromVolume(id)
		cloned := n.createBy(clone)
		target = n.publish(cloned, "pod", blockCapability(rwop))
		kit.Must(t, "e2fsck", "-fn", target)
		n.unpublish(cloned, target)
		n.delete(cloned)
		n.delete(id)
		if left := n.loops(); len(left) > 0 {
			t.Errorf("loop devices are left: %v", left)
		}
	})
}

func readOnly(r *csipb.NodePublishVolumeRequest) *csipb.NodePublishVolumeRequest {
	r.Readonly = true
	return r
}

// TestBlockCrash kills the daemon: whoever has a device keeps it, and what nobody has is detached by the next.
func TestBlockCrash(t *testing.T) {
	n := start(t, "ext4", "none")
	used, lost := n.createBy(blockCreation("used", 4*kit.Mi)), n.createBy(blockCreation("lost", 4*kit.Mi))
	usedAt, lostAt := n.publish(used, "used", blockCapability(rwo)), n.publish(lost, "lost", blockCapability(rwo))
	f, err := os.OpenFile(usedAt, os.O_RDWR, 0)
	kit.OK(t, err)
	defer f.Close()
	n.Daemon().Kill()
	if _, err := f.Write(make([]byte, 4096)); err != nil {
		t.Errorf("write without a daemon: %v", err)
	}
	kit.OK(t, f.Sync())
	// kubelet takes the other one's target away meanwhile.
	kit.OK(t, unix.Unmount(lostAt, 0))
	kit.OK(t, os.RemoveAll(filepath.Dir(lostAt)))
	kit.OK(t, unix.Unmount(n.Mnt, unix.MNT_DETACH))
	n.Mount()
	if left := n.loops(); len(left) != 1 {
		t.Errorf("loop devices: %v", left)
	}
	if _, err := f.Write(make([]byte, 4096)); err != nil {
		t.Error(err)
	}
	kit.OK(t, f.Close())
	n.unpublish(used, usedAt)
	n.unpublish(lost, lostAt)
	if left := n.loops(); len(left) > 0 {
		t.Errorf("loop devices are left: %v", left)
	}
	n.delete(used)
	n.delete(lost)
}
