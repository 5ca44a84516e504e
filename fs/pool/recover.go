package pool

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"slices"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// records are those that a pool is opened with.
type records struct {
	volumes      []meta.Volume
	checkpoints  map[string]meta.Checkpoint
	publications []meta.Publication
	snapshots    []meta.Snapshot
}

// openStore opens the records and reads them.
func (p *Pool) openStore() (all records, err error) {
	if p.store, err = meta.Open(meta.Options{Dir: filepath.Join(p.dir, metaName), Logger: p.log}); err != nil {
		return all, err
	}
	if all.volumes, err = p.store.Volumes(); err == nil {
		all.checkpoints, err = p.store.Checkpoints()
	}
	if err == nil {
		all.publications, err = p.store.Publications()
	}
	if err == nil {
		all.snapshots, err = p.store.Snapshots()
	}
	return all, err
}

// recover finishes what a crash has cut in two, and has the volumes served. Those that must be recounted are left
// waiting: see startCounts.
func (p *Pool) recover(all records) error {
	for _, r := range all.publications {
		p.published.put(r)
	}
	var ready []meta.Volume
	for _, r := range all.volumes {
		var err error
		switch r.State {
		case meta.StateReady:
			ready = append(ready, r)
		case meta.StateCreating, meta.StateDeleting:
			p.log.Info("finishing what was cut short", zap.String("volume", r.Name), zap.String("state", string(r.State)))
			err = p.remove(r)
		default:
			err = fmt.Errorf("%w: state %q", meta.ErrCorrupt, r.State)
		}
		if err != nil {
			return fmt.Errorf("volume %s: %w", r.Name, err)
		}
	}
	var loading errgroup.Group
	for share := range slices.Chunk(ready, len(ready)/runtime.GOMAXPROCS(0)+1) {
		loading.Go(func() error {
			for _, r := range share {
				if err := p.load(r, all.checkpoints); err != nil {
					return fmt.Errorf("volume %s: %w", r.Name, err)
				}
			}
			return nil
		})
	}
	if err := loading.Wait(); err != nil {
		return err
	}
	return p.recoverSnapshots(all.snapshots)
}

// load serves a volume that is recorded as ready. One whose directory has gone
// is kept, to be seen and deleted.
func (p *Pool) load(r meta.Volume, checkpoints map[string]meta.Checkpoint) error {
	if err := CheckName(r.Name); err != nil {
		return fmt.Errorf("%w: %w", meta.ErrCorrupt, err)
	}
	if r.Block {
		return p.loadBlock(r)
	}
	checkpoint, ok := checkpoints[r.Name]
	if !ok {
		checkpoint.Dirty = true
	}
	used, kept := p.fs.Kept(r.Name)
	if !kept {
		used = checkpoint.Used
	}
	v := &volume{name: r.Name, record: r, ledger: quota.NewLedger(r.Limit, used), count: counted()}
	if checkpoint.Dirty {
		v.idle.dirty.Store(true)
	}
	if checkpoint.Dirty && !kept {
		v.count = p.newCount()
		v.used = checkpoint.BootID == p.bootID
	}
	err := p.serve(v)
	if errors.Is(err, unix.ENOENT) {
		err = p.loadMissing(v)
	}
	if err != nil {
		return err
	}
	p.loaded(v)
	return nil
}

// loaded adds a volume to those that there are.
func (p *Pool) loaded(v *volume) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.volumes[v.name] = v
}

// loadMissing deals with a volume of which a directory has gone. That of the
// orphans is nothing to anybody and is made again; that of the tree is not.
func (p *Pool) loadMissing(v *volume) error {
	tree, err := openDirAt(p.volumesDir, v.name)
	if err == nil {
		tree.Close()
		if err := p.makeDir(p.orphansDir, v.name, dirOptions{mode: 0o700, wipe: v.record.Wipe}); err != nil {
			return err
		}
		return p.serve(v)
	}
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	p.log.Error("the directory of a volume is missing", zap.String("volume", v.name))
	v.missing, v.count = true, counted()
	return nil
}
