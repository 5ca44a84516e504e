package snapshot_test

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/croftfs/croft/test/kit"
)

// record is how much pairs writes at a time, in bytes: enough for a copy to come in between.
const record = 512 * kit.Ki

// pairs overwrites one file with one write(2) of equal bytes, then another one with the same, and again with others,
// until its standard input ends.
func pairs(args []string) int {
	var files [2]*os.File
	for i, name := range []string{"first", "second"} {
		f, err := os.OpenFile(filepath.Join(args[0], name), os.O_CREATE|os.O_RDWR, 0o644)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		files[i] = f
	}
	over := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(over)
	}()
	data := make([]byte, record)
	for n := 0; ; n++ {
		for i := range data {
			data[i] = byte(n)
		}
		for _, f := range files {
			if _, err := unix.Pwrite(int(f.Fd()), data, 0); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		if n == 0 {
			fmt.Println("writing")
		}
		select {
		case <-over:
			return 0
		default:
		}
	}
}

// TestMoment makes snapshots under writers that overwrite one file after the other: no write is half in a snapshot, and
// none is without the one before it.
func TestMoment(t *testing.T) {
	const writers, rounds = 3, 8
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		p.Create("v", 512*kit.Mi)
		var running []*kit.Running
		for i := range writers {
			dir := p.Path("v", fmt.Sprint(i))
			kit.OK(t, os.Mkdir(dir, 0o755))
			r := kit.Process{Helper: "pairs", Args: []string{dir}}.Start(t)
			r.Line()
			running = append(running, r)
		}
		seen := map[byte]bool{}
		for round := range rounds {
			name := fmt.Sprint("s", round)
			snapshot(t, p, "create", "v", name)
			for i := range writers {
				tree := filepath.Join(p.Dir, "snapshots", name, fmt.Sprint(i))
				first, second := whole(t, tree+"/first"), whole(t, tree+"/second")
				if first != second && first != second+1 {
					t.Errorf("round %d: the first file shows write %d, the second %d", round, first, second)
				}
				seen[first] = true
			}
			if s := snapshots(t, p)[name]; s.Held <= 0 {
				t.Errorf("held for %v", s.Held)
			}
		}
		if len(seen) < 3 {
			t.Errorf("only the writes %v were seen: that was no load", seen)
		}
		for _, r := range running {
			if code := r.Wait(); code != 0 {
				t.Errorf("a writer ended with %d", code)
			}
		}
	})
}

// whole returns the byte that all of the file is.
func whole(t *testing.T, path string) byte {
	t.Helper()
	data, err := os.ReadFile(path)
	kit.OK(t, err)
	if len(data) != record {
		t.Fatalf("%s has %d bytes", path, len(data))
	}
	for i, b := range data {
		if b != data[0] {
			t.Fatalf("%s: byte %d is of write %d, the first of %d", path, i, b, data[0])
		}
	}
	return data[0]
}

// TestDatabase makes snapshots of a volume with a SQLite database under load. What is restored has all that was
// committed before, and is whole.
func TestDatabase(t *testing.T) {
	kit.Need(t, "sqlite3")
	kit.EachPool(t, func(t *testing.T, p *kit.Pool) {
		for _, journal := range []string{"delete", "wal"} {
			dir := p.Create(journal, 256*kit.Mi)
			db := startDatabase(t, filepath.Join(dir, "db"), journal)
			for round := range 3 {
				kit.Poll(t, "commits", func() bool { return db.committed.Load() > int64(20*(round+1)) })
				name := fmt.Sprint(journal, round)
				before := db.committed.Load()
				snapshot(t, p, "create", journal, name)
				snapshot(t, p, "restore", name, name)
				restored := p.Path(name, "db")
				if out := kit.Must(t, "sqlite3", restored, "pragma integrity_check"); strings.TrimSpace(out) != "ok" {
					t.Errorf("%s: %s", name, out)
				}
				count, err := strconv.ParseInt(strings.TrimSpace(kit.Must(t, "sqlite3", restored, "select count(*) from t")), 10, 64)
				kit.OK(t, err)
				if count < before {
					t.Errorf("%s: %d transactions are in it, %d had been committed", name, count, before)
				}
			}
			db.stop(t)
		}
	})
}

// database is a sqlite3 process that commits a row at a time.
type database struct {
	cmd       *exec.Cmd
	over      chan struct{}
	ended     chan error
	committed atomic.Int64
}

func startDatabase(t *testing.T, path, journal string) *database {
	t.Helper()
	db := &database{cmd: exec.CommandContext(kit.Context(t), "sqlite3", path), over: make(chan struct{}), ended: make(chan error, 1)}
	in, err := db.cmd.StdinPipe()
	kit.OK(t, err)
	out, err := db.cmd.StdoutPipe()
	kit.OK(t, err)
	kit.OK(t, db.cmd.Start())
	go func() {
		defer in.Close()
		fmt.Fprintf(in, "pragma journal_mode=%s; create table t(id integer primary key, x); create index i on t(x);\n", journal)
		for {
			select {
			case <-db.over:
				return
			default:
			}
			_, err := fmt.Fprintln(in, "begin; insert into t(x) values(randomblob(3000)); update t set x=randomblob(3000) where id=abs(random())%50; commit; select max(id) from t;")
			if err != nil {
				return
			}
		}
	}()
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			if n, err := strconv.ParseInt(s.Text(), 10, 64); err == nil {
				db.committed.Store(n)
			}
		}
		db.ended <- db.cmd.Wait()
	}()
	return db
}

func (db *database) stop(t *testing.T) {
	t.Helper()
	close(db.over)
	if err := <-db.ended; err != nil {
		t.Errorf("sqlite3: %v", err)
	}
}
