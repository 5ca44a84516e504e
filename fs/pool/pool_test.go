package pool_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/quota"
)

// newPool makes a pool in a temporary directory.
func newPool(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes pools: run it as root")
	}
	dir := filepath.Join(t.TempDir(), "pool")
	if _, err := pool.Init(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// open opens a pool; it is closed at the end of the test, if it was not before.
func open(t *testing.T, dir string) *pool.Pool {
	t.Helper()
	p, err := pool.Open(pool.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { shut(t, p) })
	return p
}

func shut(t *testing.T, p *pool.Pool) {
	t.Helper()
	if err := p.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func create(t *testing.T, p *pool.Pool, name string, bytes uint64) pool.Volume {
	t.Helper()
	v, err := p.Create(context.Background(), name, pool.CreateOptions{Bytes: bytes})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func wantErr(t *testing.T, err, want error, words ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
		return
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
}

func TestInit(t *testing.T) {
	dir := newPool(t)
	id, err := pool.ReadID(dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = pool.Init(dir)
	wantErr(t, err, pool.ErrIsPool, dir, id)

	used := t.TempDir()
	if err := os.WriteFile(filepath.Join(used, "letter"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = pool.Init(used)
	wantErr(t, err, pool.ErrNotEmpty, "letter")
	if _, err := os.Stat(filepath.Join(used, "volumes")); err == nil {
		t.Error("a refused directory was changed")
	}

	// What an Init that was cut short has left does not stop the next one.
	half := t.TempDir()
	for _, name := range []string{"meta", "volumes", "lost+found"} {
		if err := os.Mkdir(filepath.Join(half, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pool.Init(half); err != nil {
		t.Error(err)
	}
	_, err = pool.Init("/proc/self/fdinfo")
	wantErr(t, err, pool.ErrNotEmpty)
}

func TestInitOnUnsuitableFilesystem(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	_, err := pool.Init(dir)
	wantErr(t, err, pool.ErrUnsuitable, "ext4, xfs or btrfs")
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Errorf("the refused directory holds %v", entries)
	}
}

// TestProbeHoldsWrites wants the doctor to say what Mount chooses.
func TestProbeHoldsWrites(t *testing.T) {
	dir := newPool(t)
	_, features, err := pool.Probe(dir)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(features, func(f pool.Feature) bool { return f.Name == pool.HoldingWrites })
	if i < 0 {
		t.Fatalf("%+v", features)
	}
	p := open(t, dir)
	if err := p.Mount(pool.MountOptions{Mountpoint: t.TempDir()}); err != nil {
		t.Fatal(err)
	}
	info := p.Info()
	if f := features[i]; info.Tier == "" || info.Tier != "daemon" && f.OK != (info.Tier == "gate") || f.OK != (f.Detail == "") {
		t.Errorf("%+v, and tier %s: %s", f, info.Tier, info.WhyNotBetter)
	}
}

func TestReadID(t *testing.T) {
	for content, want := range map[string]error{
		`{"type":"croft-pool","format":2,"id":"0011223344556677"}`: pool.ErrNewerFormat,
		`{"type":"other","format":1,"id":"0011223344556677"}`:      pool.ErrNotPool,
		`{"type":"croft-pool","format":1,"id":"../../etc"}`:        pool.ErrNotPool,
		`{"type":"croft-pool","format":1`:                          pool.ErrNotPool,
		``:                                                         pool.ErrNotPool,
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "pool.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := pool.ReadID(dir)
		wantErr(t, err, want, dir)
		_, err = pool.Open(pool.Options{Dir: dir})
		wantErr(t, err, want, dir)
	}
	_, err := pool.ReadID(t.TempDir())
	wantErr(t, err, pool.ErrNotPool, "croft pool init")
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "web-0", "pvc-7d1f.x_Y", "0", strings.Repeat("n", pool.MaxName)} {
		if err := pool.CheckName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", ".", "..", ".a", "-a", "_a", "a/b", "../a", "a\x00", "a b", "ä", strings.Repeat("n", pool.MaxName+1)} {
		if err := pool.CheckName(name); !errors.Is(err, pool.ErrInvalid) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestVolumesLive(t *testing.T) {
	ctx := context.Background()
	dir := newPool(t)
	p := open(t, dir)
	v := create(t, p, "web-0", 10<<20+1)
	want := quota.Usage{Bytes: 10<<20 + 4096, Inodes: 640}
	if v.Limit != want || v.State != pool.StateReady || v.Used != (quota.Usage{}) {
		t.Errorf("created %+v", v)
	}
	_, err := p.Create(ctx, "web-0", pool.CreateOptions{Bytes: 1 << 20})
	wantErr(t, err, pool.ErrExists, "web-0")
	_, err = p.Create(ctx, "tiny", pool.CreateOptions{Bytes: 10})
	wantErr(t, err, pool.ErrInvalid, "tiny", "1048576")
	_, err = p.Create(ctx, "../x", pool.CreateOptions{Bytes: 1 << 20})
	wantErr(t, err, pool.ErrInvalid)
	_, err = p.Volume(ctx, "nobody")
	wantErr(t, err, pool.ErrNotFound, "nobody")
	wantErr(t, p.Delete(ctx, "nobody", pool.DeleteOptions{}), pool.ErrNotFound, "nobody")
	_, err = pool.Open(pool.Options{Dir: dir})
	wantErr(t, err, pool.ErrInUse, "by process")

	owned, err := p.Create(ctx, "owned", pool.CreateOptions{Bytes: 1 << 20, Inodes: 7, Mode: 0o770 | os.ModeSetgid, UID: 1000, GID: 2000})
	if err != nil || owned.Limit.Inodes != 7 {
		t.Fatal(owned, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, "volumes", "owned"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Uid != 1000 || st.Gid != 2000 || st.Mode != unix.S_IFDIR|unix.S_ISGID|0o770 {
		t.Errorf("owner %d:%d, mode %o", st.Uid, st.Gid, st.Mode)
	}

	if v, err = p.Resize(ctx, "web-0", pool.ResizeOptions{Bytes: 20 << 20}); err != nil || v.Limit != (quota.Usage{Bytes: 20 << 20, Inodes: 1280}) {
		t.Errorf("resized %+v, %v", v, err)
	}
	if v, err = p.Resize(ctx, "owned", pool.ResizeOptions{Bytes: 2 << 20}); err != nil || v.Limit.Inodes != 7 {
		t.Errorf("an inode limit that was named has followed the size: %+v, %v", v, err)
	}
	shut(t, p)

	p = open(t, dir)
	list, err := p.Volumes(ctx)
	if err != nil || len(list) != 2 || list[0].Name != "owned" || list[1].Limit.Bytes != 20<<20 {
		t.Fatalf("%+v, %v", list, err)
	}
	if err := p.Delete(ctx, "web-0", pool.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	create(t, p, "web-0", 1<<20) // the name is free at once
	if err := p.WaitTrash(ctx); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "trash")); len(left) > 0 {
		t.Errorf("left in the trash: %v", left)
	}
}

// TestStrays checks that what lies in a pool without a record is neither served nor removed.
func TestStrays(t *testing.T) {
	ctx := context.Background()
	dir := newPool(t)
	stray := filepath.Join(dir, "volumes", "stray", "file")
	if err := os.MkdirAll(filepath.Dir(stray), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stray, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := open(t, dir)
	_, err := p.Create(ctx, "stray", pool.CreateOptions{Bytes: 1 << 20})
	wantErr(t, err, pool.ErrExists, "without a record")
	found, err := p.Check(ctx, pool.CheckOptions{Repair: true})
	if err != nil || len(found.Findings) != 1 || !strings.Contains(found.Findings[0], "volumes/stray") {
		t.Errorf("%+v, %v", found, err)
	}
	if _, err := os.Stat(stray); err != nil {
		t.Error(err)
	}
}

// TestMissing checks that a volume whose directory has gone is shown, and can be deleted.
func TestMissing(t *testing.T) {
	ctx := context.Background()
	dir := newPool(t)
	p := open(t, dir)
	create(t, p, "a", 1<<20)
	create(t, p, "b", 1<<20)
	shut(t, p)
	if err := os.Remove(filepath.Join(dir, "volumes", "a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "orphans", "b")); err != nil {
		t.Fatal(err)
	}
	p = open(t, dir)
	if v, err := p.Volume(ctx, "a"); err != nil || v.State != pool.StateMissing {
		t.Errorf("%+v, %v", v, err)
	}
	if v, err := p.Volume(ctx, "b"); err != nil || v.State != pool.StateReady {
		t.Errorf("%+v, %v", v, err)
	}
	found, err := p.Check(ctx, pool.CheckOptions{})
	if err != nil || found.Clean() {
		t.Errorf("%+v, %v", found, err)
	}
	if err := p.Delete(ctx, "a", pool.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	if found, err = p.Check(ctx, pool.CheckOptions{}); err != nil || !found.Clean() {
		t.Errorf("%+v, %v", found, err)
	}
}

// TestDeepTrash deletes a tree that is deeper than PATH_MAX and than there are descriptors.
func TestDeepTrash(t *testing.T) {
	const depth = 5000
	dir := newPool(t)
	p := open(t, dir)
	create(t, p, "deep", 1<<30)
	at, err := os.Open(filepath.Join(dir, "volumes", "deep"))
	if err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(t.TempDir(), "outside")
	if err := os.WriteFile(outside, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range depth {
		name := strings.Repeat("d", 100)
		fd := int(at.Fd())
		if err := errors.Join(unix.Mkdirat(fd, name, 0o700), unix.Symlinkat(filepath.Dir(outside), fd, "link"), unix.Mkfifoat(fd, "fifo", 0o600)); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		at.Close()
		at = os.NewFile(uintptr(next), name)
	}
	at.Close()
	if err := p.Delete(context.Background(), "deep", pool.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := p.WaitTrash(context.Background()); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(filepath.Join(dir, "trash")); len(left) > 0 {
		t.Errorf("left in the trash: %v", left)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Error(err)
	}
}

// TestCheckRepairs changes a volume behind Croft's back.
func TestCheckRepairs(t *testing.T) {
	ctx := context.Background()
	dir := newPool(t)
	p := open(t, dir)
	create(t, p, "v", 1<<20)
	file := filepath.Join(dir, "volumes", "v", "file")
	if err := os.WriteFile(file, make([]byte, 8192), 0o600); err != nil {
		t.Fatal(err)
	}
	disk := quota.Usage{Bytes: 8192, Inodes: 1}
	found, err := p.Check(ctx, pool.CheckOptions{})
	if err != nil || found.Clean() || found.Volumes[0].Disk != disk || found.Volumes[0].Repaired {
		t.Fatalf("%+v, %v", found, err)
	}
	found, err = p.Check(ctx, pool.CheckOptions{Repair: true, Volumes: []string{"v"}})
	if err != nil || !found.Volumes[0].Repaired {
		t.Fatalf("%+v, %v", found, err)
	}
	if found, err = p.Check(ctx, pool.CheckOptions{}); err != nil || !found.Clean() {
		t.Errorf("%+v, %v", found, err)
	}
	_, err = p.Resize(ctx, "v", pool.ResizeOptions{Bytes: 1 << 20, Inodes: 1})
	if err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(file+"2", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err = p.Check(ctx, pool.CheckOptions{Repair: true}); err != nil || found.Clean() {
		t.Fatalf("%+v, %v", found, err)
	}
	if v, err := p.Volume(ctx, "v"); err != nil || v.State != pool.StateOverLimit {
		t.Errorf("%+v, %v", v, err)
	}
	_, err = p.Check(ctx, pool.CheckOptions{Volumes: []string{"other"}})
	wantErr(t, err, pool.ErrNotFound, "other")
}

// run runs a program on the mount; this process serves it and stays off it.
func run(t *testing.T, script string) string {
	t.Helper()
	out, err := exec.Command("sh", "-ec", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return string(out)
}

func TestMountedLife(t *testing.T) {
	ctx := context.Background()
	dir, mnt := newPool(t), t.TempDir()
	p := open(t, dir)
	create(t, p, "v", 16<<20)
	wantErr(t, p.Mount(pool.MountOptions{Mountpoint: filepath.Join(dir, "volumes")}), pool.ErrInvalid, "inside the pool")
	wantErr(t, p.Mount(pool.MountOptions{Mountpoint: filepath.Join(mnt, "none")}), os.ErrNotExist, "mkdir")
	if err := p.Mount(pool.MountOptions{Mountpoint: mnt}); err != nil {
		t.Fatal(err)
	}
	wantErr(t, p.Mount(pool.MountOptions{Mountpoint: mnt}), pool.ErrMounted, mnt)
	create(t, p, "later", 16<<20)
	run(t, "cd "+mnt+"; test -d later; dd if=/dev/zero of=v/f bs=1M count=8 status=none; ! dd if=/dev/zero of=later/f bs=1M status=none 2>/dev/null")
	if v, err := p.Volume(ctx, "later"); err != nil || v.Used.Bytes != 16<<20 {
		t.Errorf("%+v, %v", v, err)
	}
	_, err := p.Resize(ctx, "v", pool.ResizeOptions{Bytes: 8<<20 - 4096})
	wantErr(t, err, pool.ErrBelowUse, "8388608 in use")
	if _, err := p.Resize(ctx, "v", pool.ResizeOptions{Bytes: 8 << 20}); err != nil {
		t.Error(err)
	}
	bind := t.TempDir()
	run(t, "mount --bind "+mnt+"/v "+bind)
	wantErr(t, p.Delete(ctx, "v", pool.DeleteOptions{}), pool.ErrBusy, bind)
	run(t, "umount "+bind)

	holder := exec.Command("sh", "-c", "exec 3>"+mnt+"/v/held; echo; read x; ! echo more >&3")
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	wantErr(t, p.Delete(ctx, "v", pool.DeleteOptions{}), pool.ErrBusy, "--force")
	if err := p.Delete(ctx, "v", pool.DeleteOptions{Force: true}); err != nil {
		t.Error(err)
	}
	run(t, "test ! -e "+mnt+"/v")
	if _, err := in.Write([]byte("\n")); err != nil {
		t.Fatal(err)
	}
	if err := holder.Wait(); err != nil {
		t.Errorf("a write into a deleted volume succeeded: %v", err)
	}
	if found, err := p.Check(ctx, pool.CheckOptions{}); err != nil || !found.Clean() {
		t.Errorf("%+v, %v", found, err)
	}
	run(t, "umount "+mnt)
	<-p.Served()
	if err := p.ServeErr(); err != nil {
		t.Error(err)
	}
	shut(t, p)
	p = open(t, dir)
	if v, err := p.Volume(ctx, "later"); err != nil || v.State != pool.StateReady || v.Used != (quota.Usage{Bytes: 16 << 20, Inodes: 1}) {
		t.Errorf("after a clean end: %+v, %v", v, err)
	}
}
