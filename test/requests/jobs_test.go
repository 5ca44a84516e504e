package requests_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// job is something that users do, in a directory of its own, which is the
// working directory and known to the kernel. Its system calls are made as they
// are written here: os.File would ask for more.
type job struct {
	name    string
	user    uint32       // who does it; 0: the owner
	prepare func() error // under an earlier daemon: the kernel does not know what it makes
	before  func() error // right before the job and uncounted: the kernel knows what it touches
	run     func() error
}

const (
	block = 4 << 10
	large = 1 << 20
)

var jobs = []job{
	{name: "read a file, first", prepare: writeF, run: readF},
	{name: "read a file, again", prepare: writeF, before: readF, run: readF},
	{name: "fstat and read, again", prepare: writeF, before: func() error { return errors.Join(fstatReadF(), fstatReadF()) }, run: fstatReadF},
	{name: "read 1 MiB, first", prepare: writeLarge, run: readF},
	{name: "read 1 MiB, again", prepare: writeLarge, before: readF, run: readF},
	{name: "read by another user, first", user: other, prepare: writeF, run: readF},
	{name: "read by another user, again", user: other, prepare: writeF, before: readF, run: readF},
	{name: "run a program, first", prepare: copyProgram, run: runProgram},
	{name: "run a program, again", prepare: copyProgram, before: runProgram, run: runProgram},

	{name: "stat, first", prepare: writeF, run: statF},
	{name: "stat, again", prepare: writeF, before: statF, run: statF},
	{name: "stat after a read", prepare: writeF, before: readF, run: statF},
	{name: "stat after a write", prepare: writeF, before: overwriteF, run: statF},
	{name: "stat by an absolute path", prepare: writeF, before: statAbsolute, run: statAbsolute},
	{name: "stat a missing name, first", run: missing},
	{name: "stat a missing name, again", before: missing, run: missing},

	{name: "create and write, first in a directory", run: func() error { return writeNew("f", block) }},
	{name: "create and write, next in a directory", before: func() error { return writeNew("f", block) }, run: func() error { return writeNew("g", block) }},
	{name: "overwrite", prepare: writeF, before: statF, run: overwriteF},
	{name: "append", prepare: writeF, before: statF, run: func() error { return writeTo("f", unix.O_WRONLY|unix.O_APPEND, block) }},
	{name: "truncate and write", prepare: writeF, before: statF, run: func() error { return writeTo("f", unix.O_WRONLY|unix.O_TRUNC, block) }},
	{name: "write 1 MiB", prepare: writeF, before: statF, run: func() error { return writeTo("f", unix.O_WRONLY, large) }},
	{name: "save safely", prepare: writeF, before: statF, run: saveF},

	{name: "mkdir", run: func() error { return unix.Mkdir("d", 0o755) }},
	{name: "rmdir", prepare: func() error { return unix.Mkdir("f", 0o755) }, before: statF, run: func() error { return unix.Rmdir("f") }},
	{name: "symlink and readlink", run: func() error {
		if err := unix.Symlink("target", "l"); err != nil {
			return err
		}
		return readlink()
	}},
	{name: "readlink, again", prepare: func() error { return unix.Symlink("target", "l") }, before: readlink, run: readlink},
	{name: "link", prepare: writeF, before: statF, run: func() error { return unix.Link("f", "g") }},
	{name: "chmod", prepare: writeF, before: statF, run: func() error { return unix.Chmod("f", 0o600) }},
	{name: "rename", prepare: writeF, before: statF, run: func() error { return unix.Rename("f", "g") }},
	{name: "unlink", prepare: writeF, before: statF, run: func() error { return unix.Unlink("f") }},
	{name: "getxattr", prepare: writeF, before: statF, run: func() error {
		if _, err := unix.Getxattr("f", "user.none", make([]byte, 64)); err != unix.ENODATA {
			return fmt.Errorf("getxattr: %v", err)
		}
		return nil
	}},

	{name: "ls -l of 100 files, first", prepare: hundred, run: list},
	{name: "ls -l of 100 files, again", prepare: hundred, before: func() error { return errors.Join(list(), list()) }, run: list},
	{name: "tar x", run: untar},
	{name: "cp -r", prepare: func() error { return tree("src") }, run: func() error { return tool("cp", "-r", "src", "dst") }},
	{name: "rm -r", prepare: func() error { return tree("src") }, run: func() error { return tool("rm", "-r", "src") }},
	{name: "git status, first", prepare: repository, run: gitStatus},
	{name: "git status, again", prepare: repository, before: gitStatus, run: gitStatus},
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o644)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, fmt.Errorf("open %s: %w", path, err)
		}
		return fd, nil
	}
}

func readF() error {
	fd, err := open("f", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return readAll(fd)
}

// fstatReadF is what cat, cp and every stdio do.
func fstatReadF() error {
	fd, err := open("f", unix.O_RDONLY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, new(unix.Stat_t)); err != nil {
		return err
	}
	return readAll(fd)
}

// readAll reads as programs do: until read(2) returns 0.
func readAll(fd int) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return err
		}
	}
}

func writeTo(path string, flags, size int) error {
	fd, err := open(path, flags)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return write(fd, size)
}

func write(fd, size int) error {
	n, err := unix.Write(fd, bytes.Repeat([]byte("x"), size))
	if err == nil && n != size {
		err = fmt.Errorf("wrote %d of %d bytes", n, size)
	}
	return err
}

func writeNew(path string, size int) error {
	return writeTo(path, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, size)
}

func writeF() error     { return writeNew("f", block) }
func writeLarge() error { return writeNew("f", large) }
func overwriteF() error { return writeTo("f", unix.O_WRONLY, block) }

func statF() error { return unix.Stat("f", new(unix.Stat_t)) }

// statAbsolute walks through the directory of volumes, which is somebody else's.
func statAbsolute() error {
	dir := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(dir)
	if err != nil {
		return err
	}
	return unix.Stat(string(dir[:n-1])+"/f", new(unix.Stat_t))
}

func missing() error {
	if err := unix.Stat("none", new(unix.Stat_t)); err != unix.ENOENT {
		return fmt.Errorf("stat of a missing name: %v", err)
	}
	return nil
}

func readlink() error {
	_, err := unix.Readlink("l", make([]byte, 64))
	return err
}

// saveF is how editors and databases replace a file.
func saveF() error {
	fd, err := open("f.new", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := write(fd, block); err != nil {
		return err
	}
	if err := unix.Fsync(fd); err != nil {
		return err
	}
	return unix.Rename("f.new", "f")
}

func tool(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %q: %w\n%s", name, args, err, out)
	}
	return nil
}

func copyProgram() error {
	return tool("cp", "/bin/true", "prog")
}

func runProgram() error {
	// Not by exec.Command, which looks at the file itself.
	pid, err := syscall.ForkExec("./prog", []string{"prog"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	if err != nil {
		return err
	}
	_, err = syscall.Wait4(pid, nil, 0, nil)
	return err
}

func hundred() error {
	for i := range 100 {
		if err := writeNew(fmt.Sprint("file", i), block); err != nil {
			return err
		}
	}
	return nil
}

func list() error { return tool("ls", "-l") }

// eachOfTree calls fn for 200 paths in 10 directories, the directories before.
func eachOfTree(root string, dir, file func(path string) error) error {
	if err := dir(root); err != nil {
		return err
	}
	for d := range 10 {
		sub := fmt.Sprint(root, "/dir", d)
		if err := dir(sub); err != nil {
			return err
		}
		for f := range 20 {
			if err := file(fmt.Sprint(sub, "/file", f)); err != nil {
				return err
			}
		}
	}
	return nil
}

// tree makes old files: git reads those again that are as new as its index.
func tree(root string) error {
	return eachOfTree(root, func(path string) error {
		return unix.Mkdir(path, 0o755)
	}, func(path string) error {
		old := unix.NsecToTimeval(1_500_000_000_000_000_000)
		if err := writeNew(path, 1000); err != nil {
			return err
		}
		return unix.Utimes(path, []unix.Timeval{old, old})
	})
}

func untar() error {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	body := bytes.Repeat([]byte("x"), 1000)
	err := eachOfTree("src", func(path string) error {
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: path + "/", Mode: 0o755, Uid: owner, Gid: owner})
	}, func(path string) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: path, Mode: 0o644, Uid: owner, Gid: owner, Size: int64(len(body))}); err != nil {
			return err
		}
		_, err := w.Write(body)
		return err
	})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	cmd := exec.Command("tar", "x")
	cmd.Stdin = &archive // by a pipe: the archive is not read from the volume
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("tar x: %w\n%s", err, out)
	}
	return nil
}

func repository() error {
	if err := tree("src"); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"init", "-q", "."},
		{"add", "."},
		{"-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "gc.auto=0", "commit", "-q", "-m", "x"},
	} {
		if err := tool("git", args...); err != nil {
			return err
		}
	}
	return nil
}

func gitStatus() error {
	out, err := exec.Command("git", "status", "--porcelain").Output()
	if err == nil && len(out) > 0 {
		err = fmt.Errorf("git status: %s", out)
	}
	return err
}
