package fs

import (
	"encoding/binary"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// dirStream reads an open directory. Cookies are the backing filesystem's own
// (d_off), so a stream stays right while entries come and go, and after a
// seekdir or a restart.
type dirStream struct {
	mu   sync.Mutex
	buf  []byte // what getdents64 gave and the kernel has not had yet
	pos  uint64 // the cookie at which buf begins
	page []byte
	// names are the volumes, for the directory that lists them.
	names []string
}

// dirent is one entry of struct linux_dirent64.
type dirent struct {
	ino  uint64
	next uint64 // cookie of the entry after this one
	mode uint32 // S_IFMT bits
	name string
	size int // bytes in the buffer
}

func parseDirent(b []byte) dirent {
	size := int(binary.NativeEndian.Uint16(b[16:]))
	name := b[19:size]
	for i, c := range name {
		if c == 0 {
			name = name[:i]
			break
		}
	}
	return dirent{
		ino:  binary.NativeEndian.Uint64(b),
		next: binary.NativeEndian.Uint64(b[8:]),
		mode: uint32(b[18]) << 12,
		name: string(name),
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
		out.Fh = f.handles.add(&file{node: newNode(rootIno, nil, handleKey{}, unix.S_IFDIR), fd: fd})
		return fuse.OK
	}
	n := f.nodes.get(in.NodeId)
	if n == nil {
		return fuse.Status(unix.ESTALE)
	}
	if err := f.handleRoom(n.vol); err != nil {
		return toStatus(err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.lostLocked() {
		return fuse.Status(unix.ESTALE)
	}
	fd, err := f.openNode(n, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return toStatus(err)
	}
	n.opens++
	out.Fh = f.addHandle(&file{node: n, fd: fd, flags: in.Flags})
	// Nobody else changes the directory: the kernel may keep what it has read.
	out.OpenFlags = fuse.FOPEN_CACHE_DIR | fuse.FOPEN_KEEP_CACHE
	return fuse.OK
}

// ReadDir serves getdents(2).
func (f *FS) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, func(_ *file, e fuse.DirEntry) bool { return out.AddDirEntry(e) })
}

// ReadDirPlus is ReadDir with a lookup of each name, so that ls -l asks no more.
func (f *FS) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	return f.readDir(in, func(h *file, e fuse.DirEntry) bool {
		entry := out.AddDirLookupEntry(e)
		if entry == nil {
			return false
		}
		if e.Name == "." || e.Name == ".." {
			return true // the kernel wants no node for these
		}
		if h.node.id == rootIno {
			if f.lookupVolume(e.Name, entry) != fuse.OK {
				*entry = fuse.EntryOut{}
			}
			return true
		}
		// A name that has gone since stays without a node: the kernel lists it
		// and looks it up when asked.
		d := &dirFD{node: h.node, fd: h.fd}
		if err := f.lookupChild(d, e.Name, entry); err != nil {
			*entry = fuse.EntryOut{}
		}
		return true
	})
}

func (f *FS) readDir(in *fuse.ReadIn, add func(*file, fuse.DirEntry) bool) fuse.Status {
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
	for added := false; ; {
		if len(s.buf) == 0 {
			if added {
				return fuse.OK // one getdents a request: small directories fit
			}
			if s.page == nil {
				s.page = make([]byte, 32<<10)
			}
			n, err := unix.Getdents(h.fd, s.page)
			if err != nil {
				return toStatus(err)
			}
			if n == 0 {
				return fuse.OK
			}
			s.buf = s.page[:n]
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
	if off == 0 {
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
