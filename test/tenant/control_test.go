package tenant_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// hostile are names that no volume may have.
var hostile = []string{
	"", ".", "..", "../x", "a/b", "/", "/etc", "a/../../b", "%2e%2e", "%2e%2e%2fx", "a%2fb", "-x", "--force", ".hidden", "_x",
	"a b", "a\nb", "ä", "a\\b", "a*", "a\xff", strings.Repeat("n", 129), strings.Repeat("n", 300),
}

// TestHostileNames gives the command line, mounted and not, names that would
// lead out of the pool.
func TestHostileNames(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	c := newCanary(t, p)
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprintf("mounted %v", mounted), func(t *testing.T) {
			if mounted {
				p.Mount()
			}
			kept := fmt.Sprint("kept-", mounted)
			p.MustVolume("create", "--size", "1Mi", kept)
			before := backingNames(t, p)
			for _, name := range hostile {
				for _, command := range [][]string{
					{"create", "--size", "1Mi"}, {"show"}, {"resize", "--size", "2Mi"}, {"delete"}, {"delete", "--force"},
				} {
					args := append(command[1:len(command):len(command)], "--", name)
					r := p.Volume(command[0], args...)
					if r.Code == 0 || r.Code == -1 || strings.Contains(r.Stderr, "panic") || strings.Contains(r.Stderr, "goroutine") {
						t.Errorf("volume %s %q: %s", command[0], name, r)
					}
					if strings.TrimSpace(r.Stderr) == "" {
						t.Errorf("volume %s %q is refused without a word", command[0], name)
					}
				}
			}
			if after := backingNames(t, p); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
			if _, ok := p.List()[kept]; !ok {
				t.Errorf("volume %s is gone", kept)
			}
			c.intact(t)
		})
	}
}

// backingNames lists what is in the pool's directories, but for the record store.
func backingNames(t *testing.T, p *kit.Pool) string {
	t.Helper()
	var names []string
	for _, pattern := range []string{"*", "volumes/*", "orphans/*", "trash/*", "snapshots/*"} {
		found, err := filepath.Glob(filepath.Join(p.Dir, pattern))
		kit.OK(t, err)
		names = append(names, found...)
	}
	return strings.Join(names, "\n")
}

// TestInternalNames has volumes named as the pool's own things are.
func TestInternalNames(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	list := []string{"meta", "volumes", "orphans", "trash", "snapshots", "lock", "pool.json", "lost-found", "0", "a..b", "a.", "A", strings.Repeat("n", 128)}
	for _, name := range list {
		dir := p.Create(name, kit.Mi)
		kit.OK(t, os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644))
	}
	if n := len(p.List()); n != len(list) {
		t.Errorf("%d volumes are listed, %d were made", n, len(list))
	}
	p.Check()
	p.Stop()
	p.Mount()
	for _, name := range list {
		if body, err := os.ReadFile(p.Path(name, name)); err != nil || string(body) != name {
			t.Errorf("%s: %q, %v", name, body, err)
		}
		p.MustVolume("delete", name)
	}
	freed(t, p)
	if left := p.List(); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

// TestHostileRequests gives the control socket what the command line would not
// let through.
func TestHostileRequests(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	c := newCanary(t, p)
	p.Mount()
	p.Create("kept", kit.Mi)
	before := backingNames(t, p)
	client := p.Control()
	// A redirection to the clean path is a refusal too: nothing has been done.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	defer client.CloseIdleConnections()
	// request sends a path as it is, without anybody's cleaning it.
	request := func(method, path, body string) int {
		t.Helper()
		r, err := http.NewRequestWithContext(kit.Context(t), method, "http://croft", strings.NewReader(body))
		kit.OK(t, err)
		r.URL.Opaque = path
		answer, err := client.Do(r)
		kit.OK(t, err)
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		kit.OK(t, err)
		var message struct {
			Message string `json:"message"`
		}
		if answer.StatusCode/100 == 4 {
			if err := json.Unmarshal(text, &message); err != nil || message.Message == "" {
				t.Errorf("%s %q: %s: no reason is given: %q", method, path, answer.Status, text)
			}
		}
		return answer.StatusCode
	}
	for _, name := range append([]string{"\x00", "a\x00b", "kept\x00", "..\x00"}, hostile...) {
		var all strings.Builder // every byte escaped
		for i := range len(name) {
			fmt.Fprintf(&all, "%%%02X", name[i])
		}
		for _, path := range []string{url.PathEscape(name), all.String()} {
			for method, body := range map[string]string{
				"GET": "", "POST": `{"bytes":1048576}`, "PATCH": `{"bytes":2097152}`, "DELETE": `{"force":true}`,
			} {
				if name == "" && method == "GET" {
					continue // the list's own path, but for a slash
				}
				if code := request(method, "/v1/volumes/"+path, body); code/100 != 4 && code/100 != 3 {
					t.Errorf("%s %q is answered %d", method, path, code)
				}
			}
		}
	}
	for _, path := range []string{"/v1/volumes/../volumes/x", "/v1/volumes/a/b", "/v1/volumes/kept/../../../x", "//v1//volumes//x", "/v1/volumes/..", "/", "/v2/volumes/kept"} {
		if code := request("DELETE", path, ""); code/100 == 2 || code/100 == 5 {
			t.Errorf("DELETE %q is answered %d", path, code)
		}
	}
	for _, body := range []string{
		"", "null", "[]", "{", `"x"`, `{"bytes":-1}`, `{"bytes":1e400}`, `{"bytes":0}`, `{"bytes":1}`, `{"bytes":18446744073709551615}`,
		`{"bytes":1048576,"unknown":1}`, `{"bytes":1048576}{}`, strings.Repeat("[", 100_000), `{"bytes":1048576,"inodes":18446744073709551616}`,
		`{"bytes":1048576,"uid":-2}`,
	} {
		if code := request("POST", "/v1/volumes/bad", body); code/100 != 4 {
			t.Errorf("POST of %.40q is answered %d", body, code)
		}
	}
	if after := backingNames(t, p); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if v := p.Show("kept"); v.Limit.Bytes != kit.Mi {
		t.Errorf("the limit is %v", v.Limit)
	}
	c.intact(t)
}

// TestSocketIsRoots has the tenant connect to the control socket, even one that
// was opened to all by mistake, and look into the pool past the mount.
func TestSocketIsRoots(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	volume(t, p, "v")
	if st := kit.Stat(t, p.Socket()); st.Mode&0o077 != 0 || st.Uid != 0 {
		t.Errorf("the control socket has mode %o and owner %d", st.Mode, st.Uid)
	}
	for _, dir := range []string{"meta", "volumes", "orphans", "trash", "snapshots"} {
		if st := kit.Stat(t, filepath.Join(p.Dir, dir)); st.Mode&0o7777 != 0o700 || st.Uid != 0 {
			t.Errorf("%s has mode %o and owner %d", dir, st.Mode, st.Uid)
		}
	}
	connect := kit.Process{Helper: "connect", Args: []string{p.Socket()}, UID: tenantID, GID: tenantID}
	if r := connect.Run(t); r.Code != 0 || strings.TrimSpace(r.Stdout) != "no connection" {
		t.Errorf("the tenant: %s", r)
	}
	kit.OK(t, os.Chmod(p.RunDir, 0o755))
	kit.OK(t, os.Chmod(p.Socket(), 0o666))
	if r := connect.Run(t); r.Code != 0 || strings.TrimSpace(r.Stdout) != "403 Forbidden" {
		t.Errorf("the tenant at an open socket: %s", r)
	}
	if _, ok := p.List()["v"]; !ok {
		t.Error("the volume is gone")
	}
}

// connect asks for the deletion of the volume v at the control socket args[0].
func connect(args []string) error {
	client := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", args[0])
	}}}
	r, err := http.NewRequest("DELETE", "http://croft/v1/volumes/v", nil)
	if err != nil {
		return err
	}
	answer, err := client.Do(r)
	if errors.Is(err, unix.EACCES) {
		fmt.Println("no connection")
		return nil
	} else if err != nil {
		return err
	}
	fmt.Println(answer.Status)
	return answer.Body.Close()
}

// TestDeleteBusy refuses the deletion of a volume in use; with --force its open
// files answer ESTALE.
func TestDeleteBusy(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Mount()
	dir := volume(t, p, "v")
	user := kit.Process{Helper: "openfile", Args: []string{dir}, UID: tenantID, GID: tenantID}.Start(t)
	if got := user.Line(); got != "open" {
		t.Fatalf("the user says %q", got)
	}
	r := p.Volume("delete", "v")
	if r.Code == 0 || !strings.Contains(r.Stderr, "v") || !strings.Contains(r.Stderr, "in use") {
		t.Errorf("delete of a busy volume: %s", r)
	}
	user.Say("write")
	if got := user.Line(); got != "written" {
		t.Errorf("after the refused delete the user says %q", got)
	}
	p.Check()
	p.MustVolume("delete", "--force", "v")
	user.Say("write")
	if got := user.Line(); got != "stale" {
		t.Errorf("after the forced delete the user says %q", got)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the volume's directory: %v", err)
	}
	// One of the same name is another one.
	dir = volume(t, p, "v")
	kit.OK(t, os.WriteFile(filepath.Join(dir, "new"), []byte("new"), 0o644))
	user.Say("write")
	if got := user.Line(); got != "stale" {
		t.Errorf("after a new volume of that name the user says %q", got)
	}
	if code := user.Wait(); code != 0 {
		t.Errorf("the user ended with %d", code)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("the new volume holds %v, %v", entries, err)
	}
	freed(t, p)
}

// openFile keeps a file open, and writes to it and looks at its directory
// whenever it is told to.
func openFile(args []string) error {
	f, err := os.Create(filepath.Join(args[0], "file"))
	if err != nil {
		return err
	}
	defer f.Close()
	fmt.Println("open")
	var word string
	for {
		if _, err := fmt.Scanln(&word); err != nil {
			return nil
		}
		_, err := f.Write([]byte("more"))
		_, rerr := unix.Pread(int(f.Fd()), make([]byte, 1), 0)
		_ = rerr // may come from the page cache
		switch {
		case err == nil:
			fmt.Println("written")
		case errors.Is(err, unix.ESTALE):
			fmt.Println("stale")
		default:
			fmt.Println(err)
		}
	}
}
