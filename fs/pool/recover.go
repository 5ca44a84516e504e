package pool

import (
	"errors"
	"fmt"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/meta"
	"github.com/croftfs/croft/quota"
)

// recover reads the records, finishes what a crash has cut in two, and has the
// volumes served. Those that must be recounted are left waiting: see startCounts.
func (p *Pool) recover() error {
	if err := p.loadPublications(); err != nil {
		return err
	}
	records, err := p.store.Volumes()
	if err != nil {
		return err
	}
	for _, r := range records {
		switch r.State {
		case meta.StateReady:
			err = p.load(r)
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
	return p.recoverSnapshots()
}

// load serves a volume that is recorded as ready. One whose directory has gone
// is kept, to be seen and deleted.
func (p *Pool) load(r meta.Volume) error {
	if err := CheckName(r.Name); err != nil {
		return fmt.Errorf("%w: %w", meta.ErrCorrupt, err)
	}
	if r.Block {
		return p.loadBlock(r)
	}
	checkpoint, err := p.store.Checkpoint(r.Name)
	if errors.Is(err, meta.ErrNotFound) {
		checkpoint, err = meta.Checkpoint{Dirty: true}, nil
	}
	if err != nil {
		return err
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
	err = p.serve(v)
	if errors.Is(err, unix.ENOENT) {
		err = p.loadMissing(v)
	}
	if err != nil {
		return err
	}
	p.volumes[r.Name] = v
	return nil
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
