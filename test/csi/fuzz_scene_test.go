package csi_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/sys/mountinfo"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"

	"github.com/croftfs/croft/csi"
	"github.com/croftfs/croft/fs/pool"
	"github.com/croftfs/croft/test/kit"
)

// scene is a driver over two mounted pools on its socket, a directory for targets, and what is beside all that and
// must stay as it is. Every input begins with the same volumes, so that one that fails does so when it is run alone.
type scene struct {
	base, targets, outside string
	pools                  []*pool.Pool
	conn                   *grpc.ClientConn
	log                    logged
	expand                 func(string) string
	props                  []*prop
	untouched              []string // a listing of the two directories
}

// prop is a volume or a snapshot that is there when an input begins.
type prop struct {
	pool   *pool.Pool
	name   string
	make   func(context.Context) error
	volume pool.Volume // when it was made
	snap   pool.Snapshot
	target string // that it is published on
}

// logged is what the driver has logged.
type logged struct {
	mu sync.Mutex // guards what follows
	bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.Buffer.Write(b)
}

func (l *logged) Sync() error { return nil }

func (l *logged) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.Reset()
	return l.String()
}

func newScene(t testing.TB) *scene {
	t.Helper()
	kit.Need(t)
	base, err := filepath.EvalSymlinks(kit.TempDir(t))
	kit.OK(t, err)
	s := &scene{base: base, targets: filepath.Join(base, "targets"), outside: filepath.Join(base, "outside")}
	s.furnish(t)
	o := csi.Options{NodeID: "node-a", Version: "1", TargetRoots: []string{s.targets}}
	o.Logger = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), &s.log, zap.DebugLevel))
	for _, name := range []string{"fast", "slow"} {
		o.Pools = append(o.Pools, csi.NamedPool{Name: name, Pool: s.openPool(t, name)})
	}
	s.expand = strings.NewReplacer("{fast}", s.pools[0].Info().ID, "{slow}", s.pools[1].Info().ID, "{base}", base,
		"{targets}", s.targets, "{outside}", s.outside, "{fastdir}", filepath.Join(base, "fast"), "{fastmnt}", filepath.Join(base, "mnt", "fast")).Replace
	driver, err := csi.New(o)
	kit.OK(t, err)
	t.Cleanup(driver.Close)
	socket := filepath.Join(base, "run", "csi.sock")
	server, err := csi.Listen(driver, socket, o.Logger)
	kit.OK(t, err)
	t.Cleanup(func() { server.Shutdown(context.Background()) })
	s.conn = dial(t, socket)
	s.cast()
	kit.OK(t, s.reset(context.Background()))
	s.untouched, err = s.listing(s.outside, s.targets)
	kit.OK(t, err)
	return s
}

// furnish makes what must stay as it is, and traps that lead to it.
func (s *scene) furnish(t testing.TB) {
	for _, dir := range []string{"outside/dir", "outside/empty", "targets/keep", "mnt/fast", "mnt/slow"} {
		kit.OK(t, os.MkdirAll(filepath.Join(s.base, dir), 0o755))
	}
	for path, body := range map[string]string{"outside/letter": "dear", "outside/blank": "", "outside/dir/letter": "sir", "targets/letter": "or",
		"targets/keep/letter": "madam"} {
		kit.OK(t, os.WriteFile(filepath.Join(s.base, path), []byte(body), 0o644))
	}
	for path, to := range map[string]string{"targets/escape": s.outside, "targets/loop": "loop", "outside/link": "letter"} {
		kit.OK(t, os.Symlink(to, filepath.Join(s.base, path)))
	}
}

func (s *scene) openPool(t testing.TB, name string) *pool.Pool {
	dir := filepath.Join(s.base, name)
	_, err := pool.Init(dir)
	kit.OK(t, err)
	p, err := pool.Open(pool.Options{Dir: dir})
	kit.OK(t, err)
	t.Cleanup(func() {
		if err := errors.Join(s.clear(context.Background(), p), p.Close()); err != nil {
			t.Errorf("pool %s: %v", name, err)
		}
	})
	kit.OK(t, p.Mount(pool.MountOptions{Mountpoint: filepath.Join(s.base, "mnt", name), Tier: "daemon"}))
	s.pools = append(s.pools, p)
	return p
}

// clear takes away what a pool holds.
func (s *scene) clear(ctx context.Context, p *pool.Pool) error {
	s.props = slices.DeleteFunc(s.props, func(of *prop) bool { return of.pool == p })
	return s.strike(ctx, p)
}

// cast says what there is when an input begins.
func (s *scene) cast() {
	fast, slow := s.pools[0], s.pools[1]
	volume := func(p *pool.Pool, name, target string, o pool.CreateOptions) {
		made := func(ctx context.Context) error { _, err := p.Create(ctx, name, o); return err }
		s.props = append(s.props, &prop{pool: p, name: name, make: made, target: target})
	}
	called := func(name string) map[string]string { return map[string]string{csi.LabelName: name} }
	volume(fast, "web", s.targets+"/web", pool.CreateOptions{Bytes: 16 << 20, Labels: called("web")})
	volume(fast, "disk", "", pool.CreateOptions{Bytes: 2 << 20, Kind: pool.KindBlock, Labels: called("disk")})
	volume(fast, "handmade", "", pool.CreateOptions{Bytes: 1 << 20})
	volume(slow, "bulky", "", pool.CreateOptions{Bytes: 1 << 30, Wipe: true, Labels: called("bulky")})
	s.props = append(s.props, &prop{pool: fast, name: "snap", make: func(ctx context.Context) error {
		_, err := fast.CreateSnapshot(ctx, "snap", pool.SnapshotOptions{Volume: "web", Labels: called("snap")})
		return err
	}})
}

func (s *scene) prop(p *pool.Pool, name string) *prop {
	i := slices.IndexFunc(s.props, func(of *prop) bool { return of.pool == p && of.name == name })
	if i < 0 {
		return nil
	}
	return s.props[i]
}

// reset has everything as it was at first.
func (s *scene) reset(ctx context.Context) error {
	for _, p := range s.pools {
		if err := s.strike(ctx, p); err != nil {
			return err
		}
	}
	for _, of := range s.props {
		_, err := of.pool.Volume(ctx, of.name)
		_, snapErr := of.pool.Snapshot(ctx, of.name)
		if err == nil || snapErr == nil {
			continue
		}
		if err := of.make(ctx); err != nil {
			return err
		}
		of.volume, _ = of.pool.Volume(ctx, of.name)
		of.snap, _ = of.pool.Snapshot(ctx, of.name)
	}
	for _, of := range s.props {
		if of.target == "" {
			continue
		}
		if err := of.pool.Publish(ctx, of.name, pool.PublishOptions{Target: of.target}); err != nil {
			return err
		}
	}
	return nil
}

// strike takes away what is not of the props of a pool, or is not as it was.
func (s *scene) strike(ctx context.Context, p *pool.Pool) error {
	volumes, err := p.Volumes(ctx)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		of := s.prop(p, v.Name)
		at, err := p.Publications(ctx, v.Name)
		if err != nil {
			return err
		}
		for _, a := range at {
			if of != nil && a.Target == of.target && !a.ReadOnly && !a.Exclusive && a.Group == nil && len(a.Flags) == 0 {
				continue
			}
			if err := unpublishFrom(ctx, p, v.Name, a.Target); err != nil {
				return err
			}
		}
		if of != nil && v.Created.Equal(of.volume.Created) && v.Limit == of.volume.Limit {
			continue
		}
		// Not by force: whatever a call leaves must be possible to delete.
		for _, a := range at {
			if err := unpublishFrom(ctx, p, v.Name, a.Target); err != nil {
				return err
			}
		}
		if err := p.Delete(ctx, v.Name, pool.DeleteOptions{}); err != nil {
			return err
		}
	}
	snaps, err := p.Snapshots(ctx)
	for _, of := range snaps {
		if was := s.prop(p, of.Name); was != nil && of.Created.Equal(was.snap.Created) {
			continue
		}
		err = errors.Join(err, p.DeleteSnapshot(ctx, of.Name))
	}
	return err
}

// unpublishFrom is Unpublish, also from a target that stays, because it holds something.
func unpublishFrom(ctx context.Context, p *pool.Pool, name, target string) error {
	if err := p.Unpublish(ctx, name, target); !errors.Is(err, pool.ErrTarget) {
		return err
	}
	return nil
}

// listing describes all that is below directories. What is mounted there is named, and not looked into.
func (s *scene) listing(dirs ...string) (lines []string, err error) {
	mounts, err := s.mounts()
	if err != nil {
		return nil, err
	}
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if slices.Contains(mounts, path) {
				lines = append(lines, path+" is a mount")
				if e.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			line := fmt.Sprintf("%s %s", path, e.Type())
			switch {
			case e.Type().IsRegular():
				body, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				line += " " + string(body)
			case e.Type() == fs.ModeSymlink:
				to, err := os.Readlink(path)
				if err != nil {
					return err
				}
				line += " " + to
			}
			lines = append(lines, line)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return lines, nil
}

// mounts are the mount points below the scene's directory.
func (s *scene) mounts() (points []string, err error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(s.base))
	for _, i := range infos {
		points = append(points, i.Mountpoint)
	}
	return points, err
}

// poolEntries are what a pool's directory holds.
var poolEntries = []string{"blocks", "lock", "meta", "orphans", "pool.json", "snapshots", "trash", "volumes"}

// checkDisk compares what the pools hold and where they are mounted with their records.
func (s *scene) checkDisk(ctx context.Context) error {
	var faults []error
	mounts := []string{filepath.Join(s.base, "mnt", "fast"), filepath.Join(s.base, "mnt", "slow")}
	for _, p := range s.pools {
		volumes, err := p.Volumes(ctx)
		snaps, snapErr := p.Snapshots(ctx)
		if err := errors.Join(err, snapErr); err != nil {
			return err
		}
		wanted := map[string][]string{".": poolEntries, "volumes": nil, "blocks": nil, "orphans": nil, "snapshots": nil}
		for _, v := range volumes {
			if v.Kind == pool.KindBlock {
				wanted["blocks"] = append(wanted["blocks"], v.Name)
			} else {
				wanted["volumes"], wanted["orphans"] = append(wanted["volumes"], v.Name), append(wanted["orphans"], v.Name)
			}
			for _, target := range v.Published {
				mounts = append(mounts, target)
				if !strings.HasPrefix(target, s.targets+"/") {
					faults = append(faults, fmt.Errorf("volume %s is published on %s", v.Name, target))
				}
			}
		}
		for _, of := range snaps {
			wanted["snapshots"] = append(wanted["snapshots"], of.Name)
		}
		for _, dir := range slices.Sorted(maps.Keys(wanted)) {
			faults = append(faults, sameNames(filepath.Join(p.Info().Dir, dir), wanted[dir]))
		}
	}
	there, err := s.mounts()
	slices.Sort(there)
	slices.Sort(mounts)
	if !slices.Equal(there, mounts) {
		faults = append(faults, fmt.Errorf("mounted are %q, and published on %q", there, mounts))
	}
	return errors.Join(append(faults, err)...)
}

// sameNames compares what is in a directory with what should be.
func sameNames(dir string, wanted []string) error {
	entries, err := os.ReadDir(dir)
	var there []string
	for _, e := range entries {
		there = append(there, e.Name())
	}
	slices.Sort(wanted)
	if !slices.Equal(there, wanted) {
		err = errors.Join(err, fmt.Errorf("%s holds %q, want %q", dir, there, wanted))
	}
	return err
}

// checkUntouched compares what is beside the pools with what was there.
func (s *scene) checkUntouched() error {
	now, err := s.listing(s.outside, s.targets)
	if err != nil {
		return err
	}
	var faults []error
	for _, line := range now {
		if !slices.Contains(s.untouched, line) {
			faults = append(faults, fmt.Errorf("this was not there: %q", line))
		}
	}
	for _, line := range s.untouched {
		if !slices.Contains(now, line) {
			faults = append(faults, fmt.Errorf("this is there no more: %q", line))
		}
	}
	return errors.Join(faults...)
}
