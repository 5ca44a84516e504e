// Package tenant_test has a volume's owner try to get at what is not theirs, or
// to make the daemon do it for them.
package tenant_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// tenantID is a user who is nobody on this host.
const tenantID = 64_321

// attempts run as the tenant, in a process of its own, and as root. They return
// what has gone wrong.
var attempts = map[string]func(args []string) error{
	"boundaries": boundaries,
	"names":      names,
	"deep":       deep,
	"specials":   specials,
	"attributes": attributes,
	"setid":      setID,
	"race":       race,
	"openfile":   openFile,
	"connect":    connect,
}

func TestMain(m *testing.M) {
	helpers := map[string]kit.Helper{}
	for name, attempt := range attempts {
		helpers[name] = func(args []string) int {
			if err := attempt(args); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			return 0
		}
	}
	kit.Main(m, helpers)
}

// eachUser runs a test with the processes' owner as the tenant and as root.
func eachUser(t *testing.T, test func(t *testing.T, uid uint32)) {
	t.Helper()
	t.Run("tenant", func(t *testing.T) { test(t, tenantID) })
	t.Run("root", func(t *testing.T) { test(t, 0) })
}

// try runs an attempt as a user.
func try(t *testing.T, uid uint32, name string, args ...string) {
	t.Helper()
	p := kit.Process{Helper: name, Args: args, UID: uid, GID: uid}
	if r := p.Run(t); r.Code != 0 {
		t.Errorf("%s as user %d: %s", name, uid, r)
	}
}

// volume makes a volume of the tenant's.
func volume(t *testing.T, p *kit.Pool, name string) string {
	t.Helper()
	dir := p.Create(name, 64*kit.Mi)
	kit.OK(t, os.Chown(dir, tenantID, tenantID))
	return dir
}

// canary is a tree that nobody is to change, outside every volume.
type canary struct {
	dir    string
	before map[string]string
}

// newCanary makes a canary on the pool's own filesystem: where a path that
// leads out of a volume would be followed without a mount in between.
func newCanary(t *testing.T, p *kit.Pool) *canary {
	t.Helper()
	c := &canary{dir: filepath.Join(p.Backing, "canary")}
	kit.OK(t, os.MkdirAll(filepath.Join(c.dir, "dir", "sub"), 0o777))
	for _, name := range []string{"file", "dir/file", "dir/sub/file"} {
		kit.OK(t, os.WriteFile(filepath.Join(c.dir, name), []byte("canary"), 0o666))
	}
	for _, name := range []string{"", "dir", "dir/sub", "file", "dir/file", "dir/sub/file"} {
		kit.OK(t, os.Chmod(filepath.Join(c.dir, name), 0o777)) // past the umask
	}
	c.before = c.state(t)
	return c
}

// state describes all that is in the canary.
func (c *canary) state(t *testing.T) map[string]string {
	t.Helper()
	state := map[string]string{}
	kit.OK(t, filepath.WalkDir(c.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st := kit.Stat(t, path)
		body := ""
		if d.Type().IsRegular() {
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			body = string(content)
		}
		state[path] = fmt.Sprint(st.Ino, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Mtim, body)
		return nil
	}))
	return state
}

// intact fails the test when the canary has changed.
func (c *canary) intact(t *testing.T) {
	t.Helper()
	after := c.state(t)
	for path, was := range c.before {
		if after[path] != was {
			t.Errorf("%s was %q and is %q", path, was, after[path])
		}
	}
	for path := range after {
		if _, was := c.before[path]; !was {
			t.Errorf("%s is new", path)
		}
	}
}

// wantErr is an error unless err is one of want.
func wantErr(what string, err error, want ...error) error {
	for _, w := range want {
		if errors.Is(err, w) {
			return nil
		}
	}
	return fmt.Errorf("%s: %v, want %v", what, err, want)
}

// closeAfter closes the descriptor of a successful open.
func closeAfter(fd int, err error) error {
	if err == nil {
		unix.Close(fd)
	}
	return err
}
