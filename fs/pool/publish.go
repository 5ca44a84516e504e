package pool

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/croftfs/croft/fs/transport"
	"github.com/croftfs/croft/meta"
)

var (
	// ErrPublished is returned when a volume is published on that target in another way, or another volume is.
	ErrPublished = errors.New("published otherwise")
	// ErrExclusive is returned when a volume cannot be published on a second target, since one of the two
	// publications is to be the only one, or its group another.
	ErrExclusive = errors.New("volume cannot be published twice")
	// ErrTarget is returned for a target where nothing can be published.
	ErrTarget = errors.New("not a target to publish on")
	// ErrNotMounted is returned when a volume is to be published while its pool is not mounted.
	ErrNotMounted = errors.New("pool is not mounted")
)

// CheckMountFlags returns an error, with those that are known, for flags that a publication cannot have.
func CheckMountFlags(flags []string) error { return transport.CheckBindFlags(flags) }

// PublishOptions say how to publish a volume.
type PublishOptions struct {
	// Target is an absolute path in UTF-8, neither in the pool or a mount of Croft nor above one, whose parent exists. What
	// is not there is made: a directory, or for a block volume a file; a file that is there is empty.
	Target   string `json:"target"`
	ReadOnly bool   `json:"read_only,omitempty"`
	// Flags are those of mount(8) that CheckMountFlags knows. A block volume has none.
	Flags []string `json:"flags,omitempty"`
	// Exclusive refuses a second publication of the volume, and this one beside another.
	Exclusive bool `json:"exclusive,omitempty"`
	// Group has the volume shown as that group's as long as it is published so: fs.FS.SetGroup. Default: none.
	Group *uint32 `json:"group,omitempty"`
}

// Publication is a place that a volume is mounted on.
type Publication struct {
	Volume string `json:"volume"`
	PublishOptions
	Created time.Time `json:"created"`
}

// publications are those of an open pool, by volume and target.
type publications map[string]map[string]meta.Publication

func (all publications) put(r meta.Publication) {
	if all[r.Volume] == nil {
		all[r.Volume] = make(map[string]meta.Publication)
	}
	all[r.Volume][r.Target] = r
}

func (all publications) remove(volume, target string) {
	delete(all[volume], target)
	if len(all[volume]) == 0 {
		delete(all, volume)
	}
}

// of returns those of a volume, by target.
func (all publications) of(volume string) []meta.Publication {
	list := make([]meta.Publication, 0, len(all[volume]))
	for _, r := range all[volume] {
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b meta.Publication) int { return strings.Compare(a.Target, b.Target) })
	return list
}

// group is the group that a volume is shown as belonging to.
func (all publications) group(volume string) *uint32 {
	for _, r := range all[volume] {
		if r.Group != nil {
			return r.Group
		}
	}
	return nil
}

func (p *Pool) publicationsOf(volume string) []meta.Publication {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.published.of(volume)
}

// Publications lists where a volume is published, by target. ErrNotFound.
func (p *Pool) Publications(_ context.Context, name string) ([]Publication, error) {
	if _, err := p.find(name); err != nil {
		return nil, err
	}
	records := p.publicationsOf(name)
	list := make([]Publication, 0, len(records))
	for _, r := range records {
		list = append(list, Publication{Volume: name, Created: r.Created, PublishOptions: PublishOptions{
			Target: r.Target, ReadOnly: r.ReadOnly, Flags: r.Flags, Exclusive: r.Exclusive, Group: r.Group}})
	}
	return list, nil
}

// Publish mounts a volume's root directory, or the device of a block volume, on a target. It may be repeated: what
// is published in the same way stays as it is, and a dead mount there is replaced. ErrNotFound, ErrMissing, ErrNotMounted, ErrTarget,
// ErrPublished, ErrExclusive, ErrInvalid, and ErrBusy for a block volume that is attached read-only and is not asked
// to be, or the reverse.
func (p *Pool) Publish(ctx context.Context, name string, o PublishOptions) error {
	if err := CheckName(name); err != nil {
		return err
	}
	defer p.names.take(name)()
	v, err := p.find(name)
	if err != nil {
		return err
	}
	if err := p.publish(ctx, v, o); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return nil
}

func (p *Pool) publish(ctx context.Context, v *volume, o PublishOptions) error {
	if v.missing {
		return ErrMissing
	}
	if err := p.prune(v); err != nil {
		return err
	}
	record, err := p.publicationOf(v, o)
	if err != nil {
		return err
	}
	defer p.names.take(record.Target)() // no volume's name begins with a slash
	mine, err := p.admit(record)
	if err != nil {
		return err
	}
	there, err := p.mountedOn(v.name, record.Target)
	switch {
	case err != nil:
		return err
	case there.foreign != "":
		return fmt.Errorf("%w: %s has %s mounted on it", ErrTarget, record.Target, there.foreign)
	case mine && there.live():
		return nil
	}
	if err := p.checkHides(record.Target); err != nil {
		return err
	}
	if err := there.unmount(); err != nil {
		return err
	}
	// From the record on a crash leaves what the next start and Unpublish take away.
	if err := p.recordPublication(record); err != nil {
		return err
	}
	p.step("publish: recorded")
	if err := p.mountTarget(ctx, v, record); err != nil {
		return errors.Join(err, p.withdraw(v, record.Target))
	}
	p.step("publish: mounted")
	p.log.Info("volume published", zap.String("volume", v.name), zap.String("target", record.Target), zap.Bool("read_only", o.ReadOnly))
	return nil
}

// publicationOf checks the options and makes a record of them.
func (p *Pool) publicationOf(v *volume, o PublishOptions) (meta.Publication, error) {
	r := meta.Publication{Volume: v.name, ReadOnly: o.ReadOnly, Flags: o.Flags, Exclusive: o.Exclusive, Group: o.Group, Created: now()}
	block := p.recordOf(v).Block
	switch {
	case block && len(o.Flags) > 0:
		return r, fmt.Errorf("%w: a block volume has no mount flags", ErrInvalid)
	case block && o.Group != nil:
		return r, fmt.Errorf("%w: a block volume has no group", ErrInvalid)
	case !block && p.mount.point() == "":
		return r, ErrNotMounted
	}
	if o.Group != nil && *o.Group == math.MaxUint32 { // for chown(2) that is none
		return r, fmt.Errorf("%w: there is no group %d", ErrInvalid, *o.Group)
	}
	if err := CheckMountFlags(o.Flags); err != nil {
		return r, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	var err error
	if block {
		var attached bool
		if _, attached, err = p.loopOf(v); err != nil {
			return r, err
		}
		r.Attached = !attached || p.attachedFor(v.name)
	}
	r.Target, err = p.resolveTarget(o.Target)
	return r, err
}

// admit tells whether a volume may be published so, and whether it is recorded as such already.
func (p *Pool) admit(r meta.Publication) (mine bool, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for volume, targets := range p.published {
		if _, taken := targets[r.Target]; taken && volume != r.Volume {
			return false, fmt.Errorf("%w: volume %s is on %s", ErrPublished, volume, r.Target)
		}
	}
	for target, other := range p.published[r.Volume] {
		switch {
		case target == r.Target && sameWay(r, other):
			mine = true
		case target == r.Target:
			return false, fmt.Errorf("%w: it is on %s in another way", ErrPublished, target)
		case r.Exclusive || other.Exclusive:
			return false, fmt.Errorf("%w: it is on %s, and one of the two is to be the only one", ErrExclusive, target)
		case r.Group != nil && other.Group != nil && *r.Group != *other.Group:
			return false, fmt.Errorf("%w: it is on %s for group %d, and cannot be shown as group %d's at the same time",
				ErrExclusive, target, *other.Group, *r.Group)
		}
	}
	return mine, nil
}

func sameWay(a, b meta.Publication) bool {
	sorted := func(flags []string) []string { return slices.Sorted(slices.Values(flags)) }
	sameGroup := a.Group == nil && b.Group == nil || a.Group != nil && b.Group != nil && *a.Group == *b.Group
	return a.ReadOnly == b.ReadOnly && a.Exclusive == b.Exclusive && sameGroup && slices.Equal(sorted(a.Flags), sorted(b.Flags))
}

func (p *Pool) recordPublication(r meta.Publication) error {
	if err := p.store.PutPublication(r); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.published.put(r)
	return nil
}

// mountTarget makes the target and mounts the volume on it.
func (p *Pool) mountTarget(ctx context.Context, v *volume, r meta.Publication) error {
	if v.record.Block {
		return p.mountDevice(v, r)
	}
	if err := p.setGroup(v.name); err != nil {
		return err
	}
	if err := makeTarget(r.Target, os.ModeDir); err != nil {
		return err
	}
	flags := r.Flags
	if r.ReadOnly {
		flags = append(slices.Clone(flags), "ro")
	}
	return p.bind(ctx, filepath.Join(p.mount.point(), v.name), r.Target, flags)
}

func (p *Pool) mountDevice(v *volume, r meta.Publication) error {
	l, attached, err := p.loopOf(v)
	if err == nil && !attached {
		l, err = p.attach(v, r.ReadOnly)
	}
	if err != nil {
		return err
	}
	if l.readOnly != r.ReadOnly {
		return fmt.Errorf("%w: it is attached as %s with read-only %v", ErrBusy, l.device, l.readOnly)
	}
	if err := makeTarget(r.Target, 0); err != nil {
		return err
	}
	return transport.Bind(l.device, r.Target, nil)
}

// Unpublish takes away what is mounted on a target of a volume, the target itself, and the record. It is no error when
// nothing is there, or when the volume is gone. ErrBusy while somebody uses it, ErrTarget when something else is mounted there,
// or is there that was not made to mount on: then that stays, and the volume is not published there any more all the same.
func (p *Pool) Unpublish(_ context.Context, name, target string) error {
	if err := CheckName(name); err != nil {
		return err
	}
	at, err := p.resolveTarget(target)
	if err != nil {
		return err
	}
	defer p.names.take(name)()
	defer p.names.take(at)() // after a volume's name, as in publish
	v, err := p.find(name)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return err
	}
	if err := p.unpublish(v, name, at); err != nil {
		return fmt.Errorf("volume %s: %w", name, err)
	}
	return nil
}

// unpublish is Unpublish for a resolved target; v is nil when the volume is gone.
func (p *Pool) unpublish(v *volume, name, target string) error {
	there, err := p.mountedOn(name, target)
	if err == nil {
		err = there.unmount()
	}
	if err == nil && there.foreign != "" {
		err = fmt.Errorf("%w: %s has %s mounted on it", ErrTarget, target, there.foreign)
	}
	if err != nil {
		return err
	}
	p.step("unpublish: unmounted")
	stays := removeTarget(target)
	if stays != nil && !errors.Is(stays, ErrTarget) {
		return stays
	}
	p.step("unpublish: removed")
	if v == nil {
		return errors.Join(stays, p.forgetPublication(name, target))
	}
	return errors.Join(stays, p.withdraw(v, target))
}

// withdraw ends a publication that is not mounted: its device, its group's view and its record.
func (p *Pool) withdraw(v *volume, target string) error {
	var err error
	left := slices.DeleteFunc(p.publicationsOf(v.name), func(r meta.Publication) bool { return r.Target == target })
	if v.record.Block && !v.missing && len(left) == 0 && p.attachedFor(v.name) {
		err = p.detach(v)
	}
	if err == nil {
		err = p.forgetPublication(v.name, target)
	}
	if err == nil && !v.record.Block && !v.missing {
		err = p.setGroup(v.name)
	}
	return err
}

// attachedFor tells whether a volume is attached because it was published.
func (p *Pool) attachedFor(volume string) bool {
	return slices.ContainsFunc(p.publicationsOf(volume), func(r meta.Publication) bool { return r.Attached })
}

func (p *Pool) isPublished(volume, target string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, is := p.published[volume][target]
	return is
}

func (p *Pool) forgetPublication(volume, target string) error {
	if !p.isPublished(volume, target) {
		return nil
	}
	if err := p.store.DeletePublication(volume, target); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.published.remove(volume, target)
	return nil
}

// checkUnpublished refuses to delete a volume that is published, unless forced: then it is published no more.
func (p *Pool) checkUnpublished(v *volume, force bool) error {
	if force {
		return p.unpublishAll(v)
	}
	if err := p.prune(v); err != nil {
		return err
	}
	if at := p.publicationsOf(v.name); len(at) > 0 {
		return fmt.Errorf("%w: it is published on %s; unpublish it, or use --force", ErrBusy, at[0].Target)
	}
	return nil
}

// unpublishAll takes away every publication of a volume, also those that are in use.
func (p *Pool) unpublishAll(v *volume) error {
	for _, r := range p.publicationsOf(v.name) {
		there, err := p.mountedOn(v.name, r.Target)
		if err != nil {
			return err
		}
		there.forced = true
		if err := there.unmount(); err != nil {
			return err
		}
		// What has something in it, or mounted on it, is nothing that the volume waits for.
		if err := removeTarget(r.Target); err != nil {
			p.log.Warn("a target is left", zap.String("volume", v.name), zap.String("target", r.Target), zap.Error(err))
		}
		if err := p.forgetPublication(v.name, r.Target); err != nil {
			return err
		}
	}
	return nil
}

// prune forgets the publications of a volume that somebody else has taken away, as kubelet does by force.
func (p *Pool) prune(v *volume) error {
	for _, r := range p.publicationsOf(v.name) {
		there, err := p.mountedOn(v.name, r.Target)
		if err == nil && there.gone() {
			err = p.withdraw(v, r.Target)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// reconcile has publications and mounts agree when the pool has just been mounted or taken over. A mount that has died
// with its daemon is replaced: who looks there anew finds the volume, who has it open has errors. A record without a
// mount is forgotten: the machine was started anew, or a crash came before the mount, or somebody took it away; whoever
// wants it publishes it again.
func (p *Pool) reconcile() {
	for _, v := range p.all() {
		for _, r := range p.publicationsOf(v.name) {
			if err := p.reconcileOne(v, r); err != nil {
				p.log.Error("publication", zap.String("volume", v.name), zap.String("target", r.Target), zap.Error(err))
			}
		}
	}
}

func (p *Pool) reconcileOne(v *volume, r meta.Publication) error {
	defer p.names.take(v.name)()
	there, err := p.mountedOn(v.name, r.Target)
	if err != nil || there.live() {
		return err
	}
	log := p.log.With(zap.String("volume", v.name), zap.String("target", r.Target))
	if there.gone() || v.missing {
		log.Info("a publication that is not mounted is forgotten")
		return p.withdraw(v, r.Target)
	}
	if len(there.ours) == 0 { // it is hidden
		return fmt.Errorf("%w: %s is mounted over it", ErrTarget, there.foreign)
	}
	log.Warn("a dead mount is replaced")
	if err := there.unmount(); err != nil {
		return err
	}
	return p.mountTarget(p.ctx, v, r)
}

// groupOf is the group that a volume is published for.
func (p *Pool) groupOf(volume string) *uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.published.group(volume)
}

// setGroup has a volume shown as the group's that it is published for.
func (p *Pool) setGroup(volume string) error { return p.fs.SetGroup(volume, p.groupOf(volume)) }
