package pool

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/croftfs/croft/fs"
	"github.com/croftfs/croft/quota"
)

// quiesce calls fn while nothing changes the volume. A volume that has gone
// meanwhile is no error; fn is not called then.
func (p *Pool) quiesce(v *volume, fn func(floating quota.Usage) error) error {
	err := p.fs.Quiesce(v.name, fn)
	if errors.Is(err, fs.ErrNoVolume) {
		return nil
	}
	return err
}

// Check recounts volumes and compares the disk with the ledgers. A volume's
// changes wait while it is counted. With Repair, ledgers that are wrong are set
// to what is on the disk, and volumes that could not be counted are tried again.
// Findings are no error.
func (p *Pool) Check(ctx context.Context, o CheckOptions) (CheckResult, error) {
	names := o.Volumes
	var result CheckResult
	if len(names) == 0 {
		for _, v := range p.all() {
			names = append(names, v.name)
		}
		var err error
		if result.Findings, err = p.checkStrays(); err != nil {
			return result, err
		}
	}
	for _, name := range names {
		c, err := p.checkVolume(ctx, name, o.Repair)
		if errors.Is(err, ErrNotFound) && len(o.Volumes) == 0 {
			continue // deleted meanwhile
		}
		if err != nil {
			return result, err
		}
		result.Volumes = append(result.Volumes, c)
	}
	return result, nil
}

func (p *Pool) checkVolume(ctx context.Context, name string, repair bool) (c VolumeCheck, err error) {
	if err := CheckName(name); err != nil {
		return VolumeCheck{}, err
	}
	defer p.names.take(name)()
	v, err := p.find(name)
	if err != nil {
		return VolumeCheck{}, err
	}
	c = VolumeCheck{Name: name, Limit: v.ledger.Limit()}
	if v.missing {
		c.Findings = append(c.Findings, fmt.Sprintf("%v; `croft volume delete %s` removes its record", ErrMissing, name))
		return c, nil
	}
	if p.recordOf(v).Block {
		err := p.compareBlock(v, &c)
		return c, err
	}
	failure := v.count.wait(ctx)
	if ctx.Err() != nil {
		return c, ctx.Err()
	}
	if failure != nil {
		c.Findings = append(c.Findings, fmt.Sprintf("could not be recounted: %v", failure))
	}
	err = p.quiesce(v, func(floating quota.Usage) error { return p.compare(ctx, v, floating, repair, &c) })
	if err != nil {
		return c, fmt.Errorf("volume %s: %w", name, err)
	}
	return c, nil
}

// compare recounts one volume, while nothing changes it.
func (p *Pool) compare(ctx context.Context, v *volume, floating quota.Usage, repair bool, c *VolumeCheck) error {
	tree, err := p.scan(ctx, p.volumesDir, v.name, quota.ScanOptions{})
	if err != nil {
		return err
	}
	orphans, err := p.scan(ctx, p.orphansDir, v.name, quota.ScanOptions{})
	if err != nil {
		return err
	}
	c.Ledger, c.Disk = v.ledger.Used(), tree.Add(orphans).Add(floating)
	if p.fs.Unsettled(v.name) && c.Disk.Fits(c.Ledger) {
		// A daemon has ended over its changes, and the next charged what they could have cost.
		if err := p.set(v, c.Disk); err != nil {
			return err
		}
		c.Ledger = c.Disk
	}
	wrong := c.Ledger != c.Disk
	if wrong {
		c.Findings = append(c.Findings, fmt.Sprintf("the ledger says %s; the disk holds %s", c.Ledger, c.Disk))
	}
	if n := v.ledger.Overruns(); n > 0 {
		c.Findings = append(c.Findings, fmt.Sprintf("%d changes took more than they had reserved", n))
	}
	if n := v.ledger.Underruns(); n > 0 {
		c.Findings = append(c.Findings, fmt.Sprintf("%d changes would have left less than nothing in use", n))
	}
	if !c.Disk.Fits(c.Limit) {
		c.Findings = append(c.Findings, fmt.Sprintf("it is above its limit of %s; `croft volume resize` raises that", c.Limit))
	}
	if !repair || !wrong && v.count.failure() == nil {
		return nil
	}
	if err := p.set(v, c.Disk); err != nil {
		return err
	}
	v.count.setFailure(nil)
	c.Repaired = true
	return nil
}

// set makes the ledger what the disk was found to hold, while nothing changes the volume.
func (p *Pool) set(v *volume, disk quota.Usage) error {
	// Durably dirty first: a crash after this means a recount.
	if err := p.store.SetDirty(v.name, p.bootID); err != nil {
		return err
	}
	v.idle.dirty.Store(true)
	v.ledger.Reset(disk)
	p.fs.ResetCharges(v.name)
	p.fs.SetSettled(v.name)
	return nil
}

// checkStrays lists what lies in the pool's directories without a record, and snapshots whose tree is gone.
func (p *Pool) checkStrays() (findings []string, err error) {
	known := make(map[string]bool)
	for _, v := range p.all() {
		known[v.name] = true
	}
	for _, parent := range []*os.File{p.volumesDir, p.orphansDir, p.blocksDir} {
		names, err := namesIn(parent)
		if err != nil {
			return nil, err
		}
		slices.Sort(names)
		for _, name := range names {
			if known[name] || p.making(OperationClone, name) {
				continue
			}
			// A volume that is being made or deleted right now has its name locked.
			unlock := p.names.take(name)
			_, err := p.find(name)
			missing := p.strays(name) == nil
			unlock()
			if err != nil && !missing {
				findings = append(findings, stray(parent, name))
			}
		}
	}
	inSnapshots, err := p.checkSnapshots()
	return append(findings, inSnapshots...), err
}

func stray(parent *os.File, name string) string {
	return fmt.Sprintf("%s/%s has no record; move it away or remove it", parent.Name(), name)
}

func (p *Pool) checkSnapshots() (findings []string, err error) {
	names, err := namesIn(p.snapshotsDir)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		// What is copied ahead goes with its operation, or at the next start.
		if strings.HasPrefix(name, stagePrefix) || p.making(OperationSnapshot, name) {
			continue
		}
		unlock := p.names.take(snapName(name))
		_, err := p.findSnap(name)
		missing := p.strayIn(p.snapshotsDir, name) == nil
		unlock()
		if err != nil && !missing {
			findings = append(findings, stray(p.snapshotsDir, name))
		}
	}
	list, err := p.Snapshots(context.Background())
	for _, s := range list {
		if !slices.Contains(names, s.Name) && p.strayIn(p.snapshotsDir, s.Name) == nil {
			findings = append(findings, fmt.Sprintf("the tree of snapshot %s is missing; `croft snapshot delete %s` removes its record", s.Name, s.Name))
		}
	}
	return findings, err
}
