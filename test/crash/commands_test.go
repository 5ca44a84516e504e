package crash_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/croftfs/croft/test/kit"
)

// TestCommandsCut kills commands at random moments, with and without a daemon:
// a volume is there as a whole or not at all, a limit is the old or the new one.
func TestCommandsCut(t *testing.T) {
	rounds := 25
	if testing.Short() {
		rounds = 4
	}
	for _, mounted := range []bool{false, true} {
		t.Run(fmt.Sprintf("mounted %v", mounted), func(t *testing.T) {
			random := seeded(t)
			p := kit.NewPool(t, "ext4")
			if mounted {
				p.Mount()
			}
			// How long a command takes tells where to strike.
			start := time.Now()
			p.Create("first", kit.Mi)
			most := time.Since(start) * 5 / 4
			var made, deleted, resized int
			for i := range rounds {
				name := fmt.Sprint("v", i)
				cut(t, p, random, most, "create", "--size", "1Mi", name)
				if whole(t, p, name) {
					made++
				} else if r := p.Volume("create", "--size", "1Mi", name); r.Code != 0 && !strings.Contains(r.Stderr, "exists") {
					// What was interrupted can be done again, unless the daemon
					// has come to it meanwhile.
					t.Errorf("create again: %s", r)
				}
				if v := p.Show(name); v.Limit.Bytes != kit.Mi || v.Used.Bytes != 0 {
					t.Errorf("made with the limit %v, used %v", v.Limit, v.Used)
				}
				if mounted {
					kit.OK(t, os.WriteFile(p.Path(name, "f"), make([]byte, 100_000), 0o644))
				}
				cut(t, p, random, most, "resize", name, "--size", "3Mi")
				switch limit := p.Show(name).Limit.Bytes; limit {
				case kit.Mi:
				case 3 * kit.Mi:
					resized++
				default:
					t.Errorf("limit %d after a resize from 1 to 3 MiB was interrupted", limit)
				}
				cut(t, p, random, most, "delete", name)
				if !whole(t, p, name) {
					deleted++
				} else if r := p.Volume("delete", name); r.Code != 0 && !strings.Contains(r.Stderr, "no such volume") {
					t.Errorf("delete again: %s", r)
				}
				if whole(t, p, name) {
					t.Errorf("%s is there after it was deleted", name)
				}
				p.Check()
				if t.Failed() {
					t.Fatalf("round %d", i)
				}
			}
			t.Logf("of %d: %d made, %d resized, %d deleted before the kill", rounds, made, resized, deleted)
			if list := p.List(); len(list) != 1 {
				t.Errorf("left: %v", list)
			}
		})
	}
}

// cut starts a command and kills it at a random moment. With a daemon the
// command's death does not end what was asked of the daemon.
func cut(t *testing.T, p *kit.Pool, random *rand.Rand, most time.Duration, verb string, args ...string) {
	t.Helper()
	cmd := p.Command(append([]string{"volume", verb, "--pool", p.Dir}, args...)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	kit.OK(t, cmd.Start())
	moment(random, most)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code > 0 {
		t.Errorf("volume %s %v: exit %d: %s", verb, args, code, out.String())
	}
}

// whole tells whether a volume is there. It waits until it is there as a whole or
// not at all: a daemon may still be about it, and must come to an end.
func whole(t *testing.T, p *kit.Pool, name string) (there bool) {
	t.Helper()
	exists := func(path string) bool {
		_, err := os.Lstat(path)
		return err == nil
	}
	kit.Poll(t, name+" as a whole or not at all", func() bool {
		_, there = p.List()[name]
		for _, dir := range []string{"volumes", "orphans"} {
			if exists(filepath.Join(p.Dir, dir, name)) != there {
				return false
			}
		}
		return p.Daemon() == nil || exists(p.Path(name)) == there
	})
	return there
}

// TestInUse refuses a pool that another process has.
func TestInUse(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	d := p.Mount()
	p.Create("v", kit.Mi)
	elsewhere := kit.TempDir(t)
	refused := func(what string, r kit.Result) {
		t.Helper()
		if r.Code == 0 || r.Code == 3 || !strings.Contains(r.Stderr, "in use") {
			t.Errorf("%s: %s", what, r)
		}
	}
	refused("a second mount", p.Croft("mount", "--pool", p.Dir, elsewhere))
	// A process that does not know of the daemon's socket comes to the lock.
	// It waits for the lock for a while before it gives up: all of them at once.
	var wg sync.WaitGroup
	for _, args := range [][]string{
		{"mount", "--pool", p.Dir, elsewhere},
		{"volume", "create", "--pool", p.Dir, "--size", "1Mi", "x"},
		{"volume", "list", "--pool", p.Dir},
		{"check", "--pool", p.Dir},
	} {
		wg.Go(func() {
			cmd := p.Command(args...)
			cmd.Env = append(cmd.Env, "CROFT_RUN_DIR="+elsewhere)
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), "in use") || !strings.Contains(string(out), fmt.Sprint(d.Pid)) {
				t.Errorf("croft %v without the socket: %v, %s", args, err, out)
			}
		})
	}
	wg.Wait()
	if again := p.Croft("pool", "init", p.Dir); again.Code == 0 {
		t.Errorf("init of a pool in use: %s", again)
	}
	// The daemon has not noticed.
	kit.OK(t, os.WriteFile(p.Path("v", "f"), []byte("x"), 0o644))
	p.Check()
}

// TestInitIfMissing makes a pool once, and leaves one that is there as it is, also while it is in use. Nothing else is taken for one.
func TestInitIfMissing(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	config := filepath.Join(p.Dir, "pool.json")
	before, err := os.ReadFile(config)
	kit.OK(t, err)
	p.Mount()
	p.Create("v", kit.Mi)
	if id := strings.TrimSpace(p.MustCroft("pool", "init", "--if-missing", p.Dir)); id != p.ID {
		t.Errorf("the pool's id is %s, and init says %q", p.ID, id)
	}
	after, err := os.ReadFile(config)
	kit.OK(t, err)
	if !bytes.Equal(before, after) {
		t.Errorf("init has changed %s: %s", config, after)
	}
	p.Check()
	base := filepath.Dir(p.Dir)
	other := filepath.Join(base, "other")
	first := p.MustCroft("pool", "init", "--if-missing", other)
	if again := p.MustCroft("pool", "init", "--if-missing", other); first == "" || again != first {
		t.Errorf("a new pool's id is %q, and when asked again %q", first, again)
	}
	kit.OK(t, os.Mkdir(filepath.Join(base, "used"), 0o755))
	kit.OK(t, os.WriteFile(filepath.Join(base, "used", "f"), nil, 0o644))
	for dir, says := range map[string]string{"used": "not empty", "no/such/parent": "no such"} {
		if r := p.Croft("pool", "init", "--if-missing", filepath.Join(base, dir)); r.Code != 1 || !strings.Contains(r.Stderr, says) {
			t.Errorf("init of %s: %s", dir, r)
		}
	}
}

// TestNewerFormat refuses what a newer version has written, or somebody else.
func TestNewerFormat(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	p.Create("v", kit.Mi)
	path := filepath.Join(p.Dir, "pool.json")
	original, err := os.ReadFile(path)
	kit.OK(t, err)
	var config map[string]any
	kit.OK(t, json.Unmarshal(original, &config))
	for _, test := range []struct{ key, says string }{{"format", "newer"}, {"type", "not a Croft pool"}} {
		changed := map[string]any{}
		for k, v := range config {
			changed[k] = v
		}
		if test.key == "format" {
			changed["format"] = 99
		} else {
			changed[test.key] = "something else"
		}
		body, err := json.Marshal(changed)
		kit.OK(t, err)
		kit.OK(t, os.WriteFile(path, body, 0o644))
		for _, args := range [][]string{
			{"mount", "--pool", p.Dir, p.Mnt},
			{"volume", "list", "--pool", p.Dir},
			{"volume", "delete", "--pool", p.Dir, "v"},
			{"check", "--pool", p.Dir, "--repair"},
			{"pool", "init", p.Dir},
			{"pool", "init", "--if-missing", p.Dir},
		} {
			r := p.Croft(args...)
			says := test.says
			if args[0] == "pool" && test.key == "type" {
				says = "not empty"
			}
			if r.Code == 0 || r.Code == 3 || !strings.Contains(r.Stderr, says) {
				t.Errorf("%s changed, croft %v: %s", test.key, args, r)
			}
		}
	}
	kit.OK(t, os.WriteFile(path, original, 0o644))
	if _, ok := p.List()["v"]; !ok {
		t.Error("the refused commands have changed the pool")
	}
}
