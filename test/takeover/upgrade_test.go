package takeover_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

const layout = "-X github.com/croftfs/croft/fs/state.layout="

// TestUpgradeBuilds has one build take over from another, forth and back, under load.
func TestUpgradeBuilds(t *testing.T) {
	p, install := installed(t, map[string]string{"v1": "-X main.version=v1", "v2": "-X main.version=v2"})
	install("v1")
	p.Mount()
	l := startLoad(t, p)
	for _, build := range []string{"v2", "v1", "v2"} {
		install(build)
		pid := p.Serving()
		kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
		p.AwaitNext(pid)
		kit.Poll(t, "its build", func() bool {
			return strings.Count(p.Log(), `"version": "`+build+`"`) > strings.Count(`v1 v1 v2`, build)-1
		})
	}
	l.end()
	p.Check()
	p.Idle()
}

// TestOlderRefuses has a build of an older layout refuse, and the one of the newer go on.
func TestOlderRefuses(t *testing.T) {
	p, install := installed(t, map[string]string{"new": layout + "2", "old": layout + "1"})
	install("new")
	p.Mount()
	dir := p.Create("v", kit.Gi)
	f, err := os.Create(filepath.Join(dir, "f"))
	kit.OK(t, err)
	defer f.Close()
	install("old")
	pid := p.Serving()
	kit.OK(t, p.Daemon().Signal(unix.SIGHUP))
	kit.Poll(t, "the refusal", func() bool { return strings.Contains(p.Log(), "the state region is of a newer croft") })
	p.AwaitNext(pid)
	_, err = f.WriteString("x")
	kit.OK(t, err)
	kit.OK(t, os.Mkdir(filepath.Join(dir, "d"), 0o700))
	kit.OK(t, f.Close())
	p.Check()
}

// installed is a pool that is mounted by a program of its own; install puts a build there.
func installed(t *testing.T, builds map[string]string) (p *kit.Pool, install func(name string)) {
	t.Helper()
	kit.Need(t, "fio", "git", "sqlite3", "psql", "setpriv")
	dir := kit.TempDir(t)
	for name, ldflags := range builds {
		kit.Build(t, filepath.Join(dir, name), ldflags)
	}
	p = kit.NewPoolIn(t, kit.Backing(t, "ext4", 8*kit.Gi))
	p.Keeper = "auto"
	p.Program = filepath.Join(dir, "croft")
	return p, func(name string) {
		t.Helper()
		link := filepath.Join(dir, "next")
		kit.OK(t, os.Link(filepath.Join(dir, name), link))
		kit.OK(t, os.Rename(link, p.Program)) // the running one's inode stays
	}
}
