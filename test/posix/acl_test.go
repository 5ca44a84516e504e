package posix_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// somebody and other are users who are nobody on this host.
const somebody, other = 64_401, 64_402

// aclAccess tells what the process may do with the file args[0].
func aclAccess(args []string) int {
	may := ""
	for _, mode := range []struct {
		letter string
		flag   int
	}{{"r", unix.O_RDONLY}, {"w", unix.O_WRONLY}} {
		if fd, err := unix.Open(args[0], mode.flag, 0); err == nil {
			unix.Close(fd)
			may += mode.letter
		}
	}
	fmt.Println(may)
	return 0
}

// makeWithUmask makes a file and a directory in args[0] under the umask args[1].
func makeWithUmask(args []string) int {
	umask, _ := strconv.ParseInt(args[1], 8, 32)
	unix.Umask(int(umask))
	f, err := os.OpenFile(filepath.Join(args[0], "file"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o666)
	if err == nil {
		f.Close()
		err = os.Mkdir(filepath.Join(args[0], "dir"), 0o777)
	}
	if err == nil {
		err = unix.Mkfifo(filepath.Join(args[0], "fifo"), 0o666)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func access(t *testing.T, path string, uid uint32) string {
	t.Helper()
	r := kit.Process{Helper: "acl", Args: []string{path}, UID: uid, GID: uid}.Run(t)
	return strings.TrimSpace(r.Stdout)
}

func TestACL(t *testing.T) {
	kit.Need(t, "setfacl", "getfacl")
	each(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "f")
		write(t, path, "x")
		kit.OK(t, os.Chmod(path, 0o600))
		if may := access(t, path, somebody); may != "" {
			t.Errorf("without an ACL: %q", may)
		}
		kit.Must(t, "setfacl", "-m", fmt.Sprintf("u:%d:rw,g:%d:r", somebody, other), path)
		for uid, want := range map[uint32]string{somebody: "rw", other: "r", 64_403: ""} {
			if may := access(t, path, uid); may != want {
				t.Errorf("user %d may %q, want %q", uid, may, want)
			}
		}
		// The mask bounds it, and chmod sets the mask.
		kit.OK(t, os.Chmod(path, 0o640))
		if may := access(t, path, somebody); may != "r" {
			t.Errorf("under the mask r: %q", may)
		}
		kit.Must(t, "setfacl", "-b", path)
		if may := access(t, path, somebody); may != "" {
			t.Errorf("after the ACL was removed: %q", may)
		}
		got := kit.Must(t, "getfacl", "-cpn", path)
		if strings.Contains(got, fmt.Sprint(somebody)) {
			t.Errorf("getfacl: %s", got)
		}
	})
}

func TestDefaultACL(t *testing.T) {
	kit.Need(t, "setfacl", "getfacl")
	each(t, func(t *testing.T, dir string) {
		sub := filepath.Join(dir, "sub")
		kit.OK(t, os.Mkdir(sub, 0o755))
		kit.Must(t, "setfacl", "-d", "-m", fmt.Sprintf("u::rwx,g::rx,o::-,u:%d:rw,m::rwx", somebody), sub)
		// A default ACL takes the umask's place.
		r := kit.Process{Helper: "umask", Args: []string{sub, "077"}}.Run(t)
		if r.Code != 0 {
			t.Fatal(r)
		}
		for name, want := range map[string]uint32{"file": 0o660, "dir": 0o770, "fifo": 0o660} {
			if mode := kit.Stat(t, filepath.Join(sub, name)).Mode & 0o7777; mode != want {
				t.Errorf("%s: mode %o, want %o", name, mode, want)
			}
		}
		if may := access(t, filepath.Join(sub, "file"), somebody); may != "rw" {
			t.Errorf("the ACL was not inherited: %q", may)
		}
		if got := kit.Must(t, "getfacl", "-cpn", filepath.Join(sub, "dir")); !strings.Contains(got, fmt.Sprintf("default:user:%d:rw-", somebody)) {
			t.Errorf("the default ACL was not inherited:\n%s", got)
		}
		// Without one the umask counts.
		plain := filepath.Join(dir, "plain")
		kit.OK(t, os.Mkdir(plain, 0o755))
		if r := (kit.Process{Helper: "umask", Args: []string{plain, "027"}}).Run(t); r.Code != 0 {
			t.Fatal(r)
		}
		for name, want := range map[string]uint32{"file": 0o640, "dir": 0o750, "fifo": 0o640} {
			if mode := kit.Stat(t, filepath.Join(plain, name)).Mode & 0o7777; mode != want {
				t.Errorf("%s: mode %o, want %o", name, mode, want)
			}
		}
	})
}

func TestOwners(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		sub := filepath.Join(dir, "sub")
		kit.OK(t, os.Mkdir(sub, 0o777))
		kit.OK(t, os.Chown(sub, 0, other))
		kit.OK(t, unix.Chmod(sub, 0o2777))
		if r := (kit.Process{Helper: "umask", Args: []string{sub, "022"}, UID: somebody, GID: somebody}).Run(t); r.Code != 0 {
			t.Fatal(r)
		}
		for _, name := range []string{"file", "dir", "fifo"} {
			st := kit.Stat(t, filepath.Join(sub, name))
			if st.Uid != somebody || st.Gid != other {
				t.Errorf("%s belongs to %d:%d", name, st.Uid, st.Gid)
			}
			if setgid := st.Mode&unix.S_ISGID != 0; setgid != (name == "dir") {
				t.Errorf("%s: mode %o", name, st.Mode)
			}
		}
		// chown by root clears set-id bits of what can be executed.
		path := filepath.Join(dir, "program")
		write(t, path, "#!")
		kit.OK(t, unix.Chmod(path, 0o6755))
		kit.OK(t, os.Chown(path, somebody, somebody))
		if mode := kit.Stat(t, path).Mode & 0o7777; mode != 0o755 {
			t.Errorf("mode %o after chown", mode)
		}
		kit.OK(t, unix.Chmod(path, 0o4755))
		if mode := kit.Stat(t, path).Mode & 0o7777; mode != 0o4755 {
			t.Errorf("mode %o after chmod", mode)
		}
	})
}

func TestXattrs(t *testing.T) {
	each(t, func(t *testing.T, dir string) {
		path := filepath.Join(dir, "f")
		write(t, path, "x")
		kit.OK(t, os.Mkdir(filepath.Join(dir, "d"), 0o755))
		for _, path := range []string{path, filepath.Join(dir, "d")} {
			set := func(name, value string, flags int) error { return unix.Lsetxattr(path, name, []byte(value), flags) }
			get := func(name string) string {
				b := make([]byte, 4096)
				n, err := unix.Lgetxattr(path, name, b)
				if err != nil {
					return err.Error()
				}
				return string(b[:n])
			}
			kit.OK(t, set("user.a", "1", 0))
			kit.OK(t, set("user.b", "", unix.XATTR_CREATE))
			kit.OK(t, set("trusted.c", "3", 0))
			kit.OK(t, set("security.d", "4", 0))
			kit.IsErr(t, "CREATE of one that is there", set("user.a", "2", unix.XATTR_CREATE), unix.EEXIST)
			kit.IsErr(t, "REPLACE of one that is not", set("user.z", "2", unix.XATTR_REPLACE), unix.ENODATA)
			kit.OK(t, set("user.a", strings.Repeat("v", 2000), unix.XATTR_REPLACE))
			if get("user.a") != strings.Repeat("v", 2000) || get("user.b") != "" || get("trusted.c") != "3" || get("security.d") != "4" {
				t.Errorf("attributes: %q %q %q %q", get("user.a"), get("user.b"), get("trusted.c"), get("security.d"))
			}
			_, err := unix.Lgetxattr(path, "user.a", make([]byte, 10))
			kit.IsErr(t, "a small buffer", err, unix.ERANGE)
			if n, err := unix.Lgetxattr(path, "user.a", nil); n != 2000 || err != nil {
				t.Errorf("size: %d, %v", n, err)
			}
			b := make([]byte, 4096)
			n, err := unix.Llistxattr(path, b)
			kit.OK(t, err)
			var names []string
			for name := range bytes.SplitSeq(b[:n], []byte{0}) {
				if s := string(name); s != "" && s != "security.selinux" {
					names = append(names, s)
				}
			}
			sort.Strings(names)
			if got := strings.Join(names, " "); got != "security.d trusted.c user.a user.b" {
				t.Errorf("names: %s", got)
			}
			kit.OK(t, unix.Lremovexattr(path, "user.a"))
			_, err = unix.Lgetxattr(path, "user.a", b)
			kit.IsErr(t, "a removed one", err, unix.ENODATA)
			kit.IsErr(t, "removing it again", unix.Lremovexattr(path, "user.a"), unix.ENODATA)
		}
	})
}
