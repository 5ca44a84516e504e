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
	"unicode/utf8"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

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

// maxTarget is the longest path that the kernel takes, in bytes: PATH_MAX without its NUL.
const maxTarget = 4095

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

// ResolveTarget returns the path that mountinfo shows for a target, which need not exist: ErrTarget when there can be
// none. It touches neither what is mounted there nor a mount of Croft.
func ResolveTarget(target string) (string, error) {
	at := filepath.Clean(target)
	switch {
	case !filepath.IsAbs(target):
		return "", fmt.Errorf("%w: %q is not an absolute path", ErrTarget, target)
	case len(target) > maxTarget || strings.ContainsRune(target, 0):
		return "", fmt.Errorf("%w: a path of %d bytes, or with a NUL", ErrTarget, len(target))
	case at == "/":
		return "", fmt.Errorf("%w: the root directory", ErrTarget)
	}
	if err := belowNoMount(at); err != nil {
		return "", err
	}
	for dir, rest := filepath.Split(at); ; {
		dir = filepath.Clean(dir)
		there, err := filepath.EvalSymlinks(dir)
		if errors.Is(err, os.ErrNotExist) && dir != "/" {
			dir, rest = filepath.Dir(dir), filepath.Join(filepath.Base(dir), rest)
			continue
		} else if err != nil {
			return "", fmt.Errorf("%w: %w", ErrTarget, err)
		}
		at = filepath.Join(there, rest)
		if !utf8.ValidString(at) { // its record could not be read again
			return "", fmt.Errorf("%w: %q is not UTF-8", ErrTarget, at)
		}
		return at, belowNoMount(at)
	}
}

// resolveTarget is ResolveTarget for a path outside the pool.
func (p *Pool) resolveTarget(target string) (string, error) {
	if err := p.outside(filepath.Clean(target)); err != nil {
		return "", err
	}
	at, err := ResolveTarget(target)
	if err != nil {
		return "", err
	}
	return at, p.outside(at)
}

// outside refuses a path inside the pool.
func (p *Pool) outside(path string) error {
	if path == p.dir || strings.HasPrefix(path, p.dir+"/") {
		return fmt.Errorf("%w: %s is inside the pool %s", ErrTarget, path, p.dir)
	}
	return nil
}

// belowNoMount refuses a path below a mount of Croft.
func belowNoMount(path string) error {
	mounts, err := transport.Mounts(transport.MountFilter{})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if strings.HasPrefix(path, m.Mountpoint+"/") {
			return fmt.Errorf("%w: %s is below %s, a mount of Croft", ErrTarget, path, m.Mountpoint)
		}
	}
	return nil
}

// checkHides refuses a target above the pool or a mount of Croft: neither could be reached any more.
func (p *Pool) checkHides(target string) error {
	if strings.HasPrefix(p.dir, target+"/") {
		return fmt.Errorf("%w: the pool %s is below %s", ErrTarget, p.dir, target)
	}
	mounts, err := transport.Mounts(transport.MountFilter{})
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, target+"/") {
			return fmt.Errorf("%w: %s, a mount of Croft, is below %s", ErrTarget, m.Mountpoint, target)
		}
	}
	return nil
}

// asTarget makes an ErrTarget of what the caller's path is to blame for.
func asTarget(err error) error {
	for _, e := range []error{unix.ENOENT, unix.ENOTDIR, unix.ENOTEMPTY, unix.ENAMETOOLONG, unix.ELOOP} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrTarget, err)
		}
	}
	return err
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
	sameGroup := a.Group == nil && b.Group == nil || a.Group != nil && b.Group != nil && *a.Group == *b.Group
	return a.ReadOnly == b.ReadOnly && a.Exclusive == b.Exclusive && sameGroup && slices.Equal(a.Flags, b.Flags)
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

// targetMounts is what is mounted on a target.
type targetMounts struct {
	target string
	// device is what the volume's mounts are of: the device number of the pool's mount.
	device uint64
	file   deviceFile
	forced bool                   // what is in use is unmounted too
	ours   []transport.MountEntry // those of the volume, the topmost first
	// foreign describes the topmost mount of something else.
	foreign string
	hidden  bool // the volume is mounted below that
}

func (p *Pool) mountedOn(volume, target string) (targetMounts, error) {
	t := targetMounts{target: target, device: p.mount.deviceNumber()}
	entries, err := transport.MountsOn(target)
	if err != nil || len(entries) == 0 {
		return t, err
	}
	if t.file, err = p.deviceFile(volume); err != nil {
		return t, err
	}
	recorded := p.isPublished(volume, target)
	for _, m := range entries {
		tree := m.Source == p.source() && (m.Root == "/"+volume || strings.HasPrefix(m.Root, "/"+volume+"/"))
		switch ours := tree || t.file.is(m) || recorded && t.file.was(m); {
		case t.foreign != "":
			t.hidden = t.hidden || ours
		case ours:
			t.ours = append(t.ours, m)
		default:
			t.foreign = fmt.Sprintf("%s of %s (%s)", m.Root, m.Source, m.Type)
		}
	}
	return t, nil
}

// deviceFile is what mountinfo shows of a mount of a block volume's device.
type deviceFile struct {
	devices uint64 // the filesystem of the devices; 0 when it is no block volume
	root    string // "" when the volume has no device
}

func (d deviceFile) is(m transport.MountEntry) bool {
	return d.root != "" && m.Device == d.devices && m.Root == d.root
}

// was tells whether m is of another such device: that of the volume, before somebody has detached it by hand.
func (d deviceFile) was(m transport.MountEntry) bool {
	return d.devices != 0 && m.Device == d.devices && strings.HasPrefix(m.Root, "/loop")
}

func (p *Pool) deviceFile(volume string) (d deviceFile, err error) {
	v, err := p.find(volume)
	if errors.Is(err, ErrNotFound) {
		return d, nil
	} else if err != nil {
		return d, err
	}
	if !v.record.Block {
		return d, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(loopControl, &st); errors.Is(err, unix.ENOENT) {
		return d, nil
	} else if err != nil {
		return d, &os.PathError{Op: "stat", Path: loopControl, Err: err}
	}
	d.devices = st.Dev
	l, attached, err := p.loopOf(v)
	if err == nil && attached {
		d.root = "/" + filepath.Base(l.device)
	}
	return d, err
}

func (t targetMounts) isTree(e transport.MountEntry) bool { return strings.HasPrefix(e.Type, "fuse.") }

// live tells whether the volume is mounted there, once, and by the daemon that serves it.
func (t targetMounts) live() bool {
	if len(t.ours) != 1 || t.foreign != "" {
		return false
	}
	m := t.ours[0]
	return t.file.is(m) || t.isTree(m) && m.Device == t.device && strings.Count(m.Root, "/") == 1
}

// gone tells whether nothing of the volume is mounted there.
func (t targetMounts) gone() bool { return len(t.ours) == 0 && !t.hidden }

// unmount takes away what is the volume's. A dead mount goes also when somebody uses it.
func (t targetMounts) unmount() error {
	for _, m := range t.ours {
		flags := unix.UMOUNT_NOFOLLOW
		if t.forced || t.isTree(m) && m.Device != t.device {
			flags |= unix.MNT_DETACH
		}
		err := unix.Unmount(t.target, flags)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: files or directories are in use on %s", ErrBusy, t.target)
		} else if err != nil && !errors.Is(err, unix.EINVAL) { // EINVAL: somebody was quicker
			return fmt.Errorf("unmount %s: %w", t.target, err)
		}
	}
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

// makeTarget makes a directory or a file to mount on. One that is there is used; nothing may be mounted there.
func makeTarget(target string, kind os.FileMode) error {
	var err error
	if kind.IsDir() {
		err = os.Mkdir(target, 0o750)
	} else {
		var f *os.File
		if f, err = os.OpenFile(target, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err == nil {
			err = f.Close()
		}
	}
	if !errors.Is(err, os.ErrExist) {
		return asTarget(err)
	}
	fi, err := os.Lstat(target)
	if err == nil && fi.Mode().Type() != kind {
		err = fmt.Errorf("%w: %s is a %s", ErrTarget, target, fi.Mode().Type())
	}
	if err == nil && kind.IsRegular() {
		err = checkTargetFile(target, fi)
	}
	return err
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

// removeTarget removes a directory or a file that something was mounted on: never what is in it. It may be asked for any
// path, so what was not made to mount on stays.
func removeTarget(target string) error {
	fi, err := os.Lstat(target)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return err
	case !fi.IsDir():
		if err := checkTargetFile(target, fi); err != nil {
			return err
		}
	}
	if err := os.Remove(target); !errors.Is(err, os.ErrNotExist) {
		return asTarget(err)
	}
	return nil
}

func checkTargetFile(target string, fi os.FileInfo) error {
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("%w: %s is a %s", ErrTarget, target, fi.Mode().Type())
	case fi.Size() > 0:
		return fmt.Errorf("%w: %s is a file of %d bytes", ErrTarget, target, fi.Size())
	}
	return nil
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

// loadPublications reads the records, before any volume is served.
func (p *Pool) loadPublications() error {
	records, err := p.store.Publications()
	for _, r := range records {
		p.published.put(r)
	}
	return err
}

// reconcile has publications and mounts agree when the pool has just been mounted or taken over. A mount that has died with its
// daemon is replaced: who looks there anew finds the volume, who has it open has errors. A record without a mount is forgotten: the machine was started
// anew, or a crash came before the mount, or somebody took it away; whoever wants it publishes it again.
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
