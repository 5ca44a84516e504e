package fs

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Directories have no handles: OPENDIR is answered with ENOSYS, once, and from then on
// the kernel asks for it and for RELEASEDIR no more (FUSE_NO_OPENDIR_SUPPORT,
// fuse_file_open in fs/fuse/file.c). Who lists a directory waits for one request less, and an
// open directory is nothing that the next daemon would have to know. The kernel keeps all
// listings then, the one of the volumes too: see changedVolumes.

// dirStream reads a directory, for all that list it. Cookies are the backing filesystem's own
// (d_off), so a stream stays right while entries come and go, and after a
// seekdir, a restart, or the end of what it was read by.
type dirStream struct {
	mu  sync.Mutex
	buf []byte // what getdents64 gave and the kernel has not had yet
	pos uint64 // the cookie at which buf begins
	// begun tells that the descriptor has been read from the start first. Else ext4, when it is
	// read from the end first, finds nothing after a rewind: it takes the place for the one that it is at
	// (info->last_pos in ext4_dx_readdir, fs/ext4/dir.c), by a hash that is the end's.
	begun bool
}

// maxPage is the most that is read of a directory at once, in bytes; minPage is
// enough for the longest entry.
const (
	minPage = 512
	maxPage = 32 << 10
)

// pages are for getdents64: a directory that nobody reads has none.
var pages = sync.Pool{New: func() any { return new([maxPage]byte) }}

// dirent is one entry of struct linux_dirent64.
type dirent struct {
	ino  uint64
	next uint64 // cookie of the entry after this one
	mode uint32 // S_IFMT bits
	name string // in the buffer, with a zero behind it
	size int    // bytes in the buffer
}

func parseDirent(b []byte) dirent {
	size := int(binary.NativeEndian.Uint16(b[16:]))
	name := b[19:size]
	return dirent{
		ino:  binary.NativeEndian.Uint64(b),
		next: binary.NativeEndian.Uint64(b[8:]),
		mode: uint32(b[18]) << 12,
		name: unsafe.String(&name[0], bytes.IndexByte(name, 0)),
		size: size,
	}
}

// OpenDir says that there are no handles.
func (f *FS) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }

// ReadDir serves getdents(2).
func (f *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	// An entry takes up to a third more in the answer than in getdents64's.
	return f.readDir(in, in.Size/4*3, func(_ *dirFD, e fuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus is ReadDir with a lookup of each name, so that ls -l asks no more.
func (f *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	// Here mostly four to five times as much.
	q := f.request(&in.InHeader)
	return f.readDir(in, in.Size/5, func(d *dirFD, e fuse.DirEntry) bool {
		if !q.Room() {
			return false
		}
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." {
			return true // the kernel wants no node for these
		}
		if d == nil {
			if f.lookupVolume(q, e.Name, entry) != fuse.OK {
				*entry = fuse.EntryOut{}
			}
			return true
		}
		// A name that has gone since stays without a node: the kernel lists it
		// and looks it up when asked.
		key, st, err := describePath(d.fd, unsafe.StringData(e.Name)) // see dirent
		if err != nil {
			return true
		}
		fillEntry(entry, f.nodes.lookup(q, d.node.vol, key, st.Mode, nil), &st)
		return true
	})
}

// readDir lists up to size bytes of getdents64's entries. It should be what the
// answer has room for: what is too much is kept until the next request. The directory of
// volumes has no dirFD.
func (f *FS) readDir(in *fuse.ReadIn, size uint32, add func(*dirFD, fuse.DirEntry) bool) fuse.Status {
	if in.NodeId == rootIno {
		f.listVolumes(in.Offset, func(e fuse.DirEntry) bool { return add(nil, e) })
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	d, err := f.dir(n)
	if err != nil {
		return toStatus(err)
	}
	defer f.putDir(d)
	s := &d.stream
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.begun && in.Offset != 0 {
		page := pages.Get().(*[maxPage]byte)
		_, err := unix.Getdents(d.fd, page[:minPage])
		pages.Put(page)
		if err != nil {
			return toStatus(err)
		}
	}
	s.begun = true
	// At the beginning also for btrfs, which lists what there was at the last rewind.
	if s.pos != in.Offset || in.Offset == 0 {
		if _, err := unix.Seek(d.fd, int64(in.Offset), unix.SEEK_SET); err != nil {
			return toStatus(err)
		}
		s.buf, s.pos = nil, in.Offset
	}
	var page *[maxPage]byte
	defer func() {
		if page != nil {
			s.buf = bytes.Clone(s.buf)
			pages.Put(page)
		}
	}()
	for added := false; ; {
		if len(s.buf) == 0 {
			if added {
				return fuse.OK // one getdents a request: small directories fit
			}
			page = pages.Get().(*[maxPage]byte)
			got, err := unix.Getdents(d.fd, page[:min(max(size, minPage), maxPage)])
			if err != nil {
				return toStatus(err)
			}
			if got == 0 {
				return fuse.OK
			}
			s.buf = page[:got]
		}
		e := parseDirent(s.buf)
		ino := e.ino
		if e.name == ".." && n == n.vol.root {
			ino = rootIno
		}
		if !add(d, fuse.DirEntry{Name: e.name, Mode: e.mode, Ino: ino, Off: e.next}) {
			return fuse.OK
		}
		added = true
		s.buf, s.pos = s.buf[e.size:], e.next
	}
}

// listVolumes lists the volumes from a cookie on: 1 and 2 come after "." and "..", and
// after a volume comes the number of its root, so that a listing stays right while volumes
// come and go. Filesystems number inodes from more than that.
func (f *FS) listVolumes(after uint64, add func(fuse.DirEntry) bool) {
	for at, name := range []string{".", ".."} {
		if off := uint64(at + 1); off > after && !add(fuse.DirEntry{Name: name, Mode: unix.S_IFDIR, Ino: rootIno, Off: off}) {
			return
		}
	}
	f.mu.RLock()
	volumes := slices.Collect(maps.Values(f.volumes))
	f.mu.RUnlock()
	slices.SortFunc(volumes, func(a, b *volume) int { return cmp.Compare(a.ino, b.ino) })
	for _, v := range volumes {
		if v.ino > after && !add(fuse.DirEntry{Name: v.id, Mode: unix.S_IFDIR, Ino: v.ino, Off: v.ino}) {
			return
		}
	}
}

// changedVolumes has the kernel list the volumes anew: it keeps a listing while the time of
// the directory's last change stays (fuse_readdir_cached in fs/fuse/readdir.c), and asks for that now.
// Whatever was listed before that time was read is dropped then, too. It must not be called with f.mu held, nor by a handler.
func (f *FS) changedVolumes() {
	for {
		old := f.changed.Load()
		if f.changed.CompareAndSwap(old, max(old+1, time.Now().UnixNano())) {
			break
		}
	}
	if k := f.kernel.Load(); k != nil {
		if _, err := k.NotifyInvalInode(rootIno, -1, 0); err != nil {
			f.log.Sugar().Warnw("invalidate the list of volumes", "error", err)
		}
	}
}
