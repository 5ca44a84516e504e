package fs

import (
	"bytes"
	"encoding/binary"
	"sync"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// dirStream reads an open directory. Cookies are the backing filesystem's own
// (d_off), so a stream stays right while entries come and go, and after a
// seekdir or a restart.
type dirStream struct {
	mu  sync.Mutex
	buf []byte // what getdents64 gave and the kernel has not had yet
	pos uint64 // the cookie at which buf begins
	// names are the volumes, for the directory that lists them.
	names []string
}

// maxPage is the most that is read of a directory at once, in bytes; minPage is
// enough for the longest entry.
const (
	minPage = 512
	maxPage = 32 << 10
)

// pages are for getdents64: an open directory that nobody reads has none.
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

// OpenDir serves opendir(3).
func (f *FS) OpenDir(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	if in.NodeId == rootIno {
		fd, err := unix.FcntlInt(f.pool.Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return toStatus(err)
		}
		out.Fh = f.handles.add(&file{node: newNode(rootIno, nil, handleKey{}, unix.S_IFDIR), fd: fd}, in.Unique)
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if err := f.handleRoom(n.vol); err != nil {
		return toStatus(err)
	}
	n.lock()
	defer n.unlock()
	if n.lostLocked() {
		return fuse.Status(unix.ESTALE)
	}
	fd, err := f.openNode(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return toStatus(err)
	}
	n.opens++
	out.Fh = f.addHandle(&file{node: n, fd: fd, flags: in.Flags}, in.Unique)
	// Nobody else changes the directory: the kernel may keep what it has read.
	out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// ReadDir serves getdents(2).
func (f *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	// An entry takes up to a third more in the answer than in getdents64's.
	return f.readDir(in, in.Size/4*3, func(_ *file, e fuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus is ReadDir with a lookup of each name, so that ls -l asks no more.
func (f *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	// Here mostly four to five times as much.
	q := f.request(&in.InHeader)
	return f.readDir(in, in.Size/5, func(h *file, e fuse.DirEntry) bool {
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
		if h.node.id == rootIno {
			if f.lookupVolume(q, e.Name, entry) != fuse.OK {
				*entry = fuse.EntryOut{}
			}
			return true
		}
		// A name that has gone since stays without a node: the kernel lists it
		// and looks it up when asked.
		key, st, err := describePath(h.fd, unsafe.StringData(e.Name)) // see dirent
		if err != nil {
			return true
		}
		fillEntry(entry, f.nodes.lookup(q, h.node.vol, key, st.Mode, nil), &st)
		return true
	})
}

// readDir lists up to size bytes of getdents64's entries. It should be what the
// answer has room for: what is too much is kept until the next request.
func (f *FS) readDir(in *fuse.ReadIn, size uint32, add func(*file, fuse.DirEntry) bool) fuse.Status {
	h, err := f.useHandle(in.Fh)
	if err != nil {
		return toStatus(err)
	}
	defer h.done()
	s := &h.dir
	s.mu.Lock()
	defer s.mu.Unlock()
	if h.node.id == rootIno {
		f.listVolumes(h, in.Offset, add)
		return fuse.OK
	}
	if s.pos != in.Offset {
		if _, err := unix.Seek(h.fd, int64(in.Offset), unix.SEEK_SET); err != nil {
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
			n, err := unix.Getdents(h.fd, page[:min(max(size, minPage), maxPage)])
			if err != nil {
				return toStatus(err)
			}
			if n == 0 {
				return fuse.OK
			}
			s.buf = page[:n]
		}
		e := parseDirent(s.buf)
		ino := e.ino
		if e.name == ".." && h.node == h.node.vol.root {
			ino = rootIno
		}
		if !add(h, fuse.DirEntry{Name: e.name, Mode: e.mode, Ino: ino, Off: e.next}) {
			return fuse.OK
		}
		added = true
		s.buf, s.pos = s.buf[e.size:], e.next
	}
}

// listVolumes lists the volumes as they were at opendir, or are at rewinddir.
func (f *FS) listVolumes(h *file, off uint64, add func(*file, fuse.DirEntry) bool) {
	s := &h.dir
	if off == 0 || s.names == nil { // or an earlier daemon has listed them
		s.names = f.volumeIDs()
	}
	for i := off; i < uint64(len(s.names))+2; i++ {
		e := fuse.DirEntry{Mode: unix.S_IFDIR, Ino: rootIno, Off: i + 1}
		switch i {
		case 0:
			e.Name = "."
		case 1:
			e.Name = ".."
		default:
			e.Name = s.names[i-2]
			v, err := f.volume(e.Name)
			if err != nil {
				continue
			}
			e.Ino = v.ino
		}
		if !add(h, e) {
			return
		}
	}
}
