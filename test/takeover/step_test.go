package takeover_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// operations are those that cannot be done twice. Each is done once, in a directory that
// has the file "file", the open file "open" and the directory "dir", and wants what it names.
var operations = map[string]struct {
	opcode string
	makes  bool // an inode
	do     func(dir string) error
}{
	"create":       {"CREATE", true, func(dir string) error { return create(filepath.Join(dir, "new")) }},
	"mkdir":        {"MKDIR", true, func(dir string) error { return os.Mkdir(filepath.Join(dir, "new"), 0o700) }},
	"mknod":        {"MKNOD", true, func(dir string) error { return unix.Mknod(filepath.Join(dir, "new"), unix.S_IFIFO|0o600, 0) }},
	"symlink":      {"SYMLINK", true, func(dir string) error { return os.Symlink("target", filepath.Join(dir, "new")) }},
	"link":         {"LINK", false, func(dir string) error { return os.Link(filepath.Join(dir, "file"), filepath.Join(dir, "new")) }},
	"unlink":       {"UNLINK", false, func(dir string) error { return unix.Unlink(filepath.Join(dir, "file")) }},
	"unlink-open":  {"UNLINK", false, func(dir string) error { return unix.Unlink(filepath.Join(dir, "open")) }},
	"rmdir":        {"RMDIR", false, func(dir string) error { return unix.Rmdir(filepath.Join(dir, "dir")) }},
	"rename":       {"RENAME2", false, func(dir string) error { return rename(dir, "file", "new", unix.RENAME_NOREPLACE) }},
	"replace":      {"RENAME", false, func(dir string) error { return rename(dir, "file", "other", 0) }},
	"replace-open": {"RENAME", false, func(dir string) error { return rename(dir, "file", "open", 0) }},
	"exchange":     {"RENAME2", false, func(dir string) error { return rename(dir, "file", "dir", unix.RENAME_EXCHANGE) }},
	"whiteout":     {"RENAME2", true, func(dir string) error { return rename(dir, "file", "new", unix.RENAME_WHITEOUT) }},
	"tmpfile":      {"TMPFILE", true, func(dir string) error { return tmpfile(dir, filepath.Join(dir, "new")) }},
	"setxattr": {"SETXATTR", false, func(dir string) error {
		return unix.Setxattr(filepath.Join(dir, "file"), "user.new", []byte("1"), unix.XATTR_CREATE)
	}},
	"removexattr": {"REMOVEXATTR", false, func(dir string) error { return unix.Removexattr(filepath.Join(dir, "file"), "user.old") }},
}

// healthy is how long a daemon must have served to be replaced at once.
const healthy = 100 * time.Millisecond

var steps = []string{"begun", "trying", "made", "settled", "replied"}

func create(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString("new")
	return errors.Join(err, f.Close())
}

func rename(dir, from, to string, flags uint) error {
	return unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, from), unix.AT_FDCWD, filepath.Join(dir, to), flags)
}

// step does one of the operations.
func step(args []string) int {
	if err := operations[args[0]].do(args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// prepare makes what the operations are done to.
func prepare(t *testing.T, dir string) *os.File {
	t.Helper()
	kit.OK(t, os.Mkdir(dir, 0o755))
	kit.OK(t, os.Mkdir(filepath.Join(dir, "dir"), 0o755))
	for _, name := range []string{"file", "open", "other"} {
		kit.OK(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600))
	}
	kit.OK(t, unix.Setxattr(filepath.Join(dir, "file"), "user.old", []byte("1"), 0))
	open, err := os.OpenFile(filepath.Join(dir, "open"), os.O_RDWR, 0)
	kit.OK(t, err)
	return open
}

// tree describes what is in a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	kit.OK(t, err)
	var all string
	for _, e := range entries {
		var st unix.Stat_t
		path := filepath.Join(dir, e.Name())
		kit.OK(t, unix.Lstat(path, &st))
		content := ""
		if st.Mode&unix.S_IFMT == unix.S_IFREG {
			body, err := os.ReadFile(path)
			kit.OK(t, err)
			content = string(body)
		}
		attrs := make([]byte, 256)
		n, err := unix.Llistxattr(path, attrs)
		kit.OK(t, err)
		all += fmt.Sprintf("%s %o %d %q %q\n", e.Name(), st.Mode, st.Nlink, content, attrs[:n])
	}
	return all
}

// TestSteps has the daemon die at each step of each operation: who asked sees one outcome,
// that of an operation that was done once.
func TestSteps(t *testing.T) {
	for _, fstype := range kit.Filesystems {
		t.Run(fstype, func(t *testing.T) {
			shot := filepath.Join(kit.TempDir(t), "shot")
			p := kit.NewPool(t, fstype)
			p.Keeper = "auto"
			p.Mount("CROFT_TEST_KILL=" + shot)
			p.Create("v", 256*kit.Mi)
			want := map[string]string{}
			for name := range operations {
				want[name] = doStep(t, p, name, p.Path("v", name), func() {})
			}
			for name, op := range operations {
				for _, at := range steps {
					if at == "settled" && !op.makes {
						continue
					}
					t.Run(name+"/"+at, func(t *testing.T) {
						pid := p.Serving()
						dir := p.Path("v", name+"-"+at)
						time.Sleep(2 * healthy) // else the supervisor takes it for a daemon that cannot live
						got := doStep(t, p, name, dir, func() {
							kit.OK(t, os.WriteFile(shot, []byte(op.opcode+"/"+at), 0o600))
						})
						if err := os.Remove(shot); err == nil {
							t.Fatal("the daemon has not come to that step")
						}
						p.AwaitNext(pid)
						if got != want[name] {
							t.Errorf("there is\n%s, and not\n%s", got, want[name])
						}
					})
				}
			}
			p.Check()
			p.Idle()
		})
	}
}

// doStep does an operation and returns what is there afterwards.
func doStep(t *testing.T, p *kit.Pool, name, dir string, before func()) string {
	t.Helper()
	open := prepare(t, dir)
	defer open.Close()
	before()
	if r := (kit.Process{Helper: "step", Args: []string{name, dir}}).Run(t); r.Code != 0 {
		t.Fatalf("%s: %s", name, r)
	}
	body := make([]byte, 16)
	if n, err := open.ReadAt(body, 0); string(body[:n]) != "open" {
		t.Errorf("the open file holds %q: %v", body[:n], err)
	}
	return tree(t, dir)
}
