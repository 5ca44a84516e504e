package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func jobBatches(b *bench) []batch {
	seconds := func(name, title, note string) metric {
		return metric{name: name, title: title, unit: "s", note: note, lower: true, serial: name != "postgresql"}
	}
	return []batch{{
		group:   "jobs",
		metrics: []metric{seconds("tar", "unpack a tar of 20,000 small files", "no sync")},
		prepare: func(ctx context.Context, _ *system) error {
			return once(b.source("tar"), func(path string) error { return b.makeTar(path, b.opts.scaled(20_000, 200)) })
		},
		run: func(ctx context.Context, s *system, n int) (map[string]float64, error) {
			dir := filepath.Join(s.dir, fmt.Sprint("tar", n))
			if _, err := b.run.output(ctx, "mkdir", dir); err != nil {
				return nil, err
			}
			took, err := b.timed(ctx, "tar", "-x", "-f", b.source("tar"), "-C", dir)
			return map[string]float64{"tar": took}, err
		},
	}, {
		group: "jobs",
		metrics: []metric{
			seconds("git-clone", "git clone of 5,000 files", "the repository is in the native directory"),
			seconds("git-status-cold", "git status, cold", "after the kernel forgot all inodes"),
			seconds("git-status", "git status", "run before"),
		},
		prepare: func(ctx context.Context, _ *system) error {
			return once(b.source("git"), func(path string) error { return b.makeRepository(ctx, path) })
		},
		run: b.git,
	}, {
		group:   "jobs",
		metrics: []metric{seconds("sqlite", "SQLite: 200 transactions, then 100,000 rows", "each transaction is synced")},
		prepare: func(context.Context, *system) error { return nil },
		run: func(ctx context.Context, s *system, n int) (map[string]float64, error) {
			start := time.Now()
			_, err := b.run.outputAs(ctx, nil, "", strings.NewReader(b.sql()), "sqlite3", "-bail", filepath.Join(s.dir, fmt.Sprintf("sqlite%d.db", n)))
			return map[string]float64{"sqlite": time.Since(start).Seconds()}, err
		},
	}, {
		group:   "jobs",
		metrics: []metric{seconds("postgresql", "PostgreSQL: pgbench, 4 clients, 2,000 transactions", "each transaction is synced")},
		prepare: b.preparePostgreSQL,
		run:     b.postgreSQL,
	}}
}

// source is where the data is that jobs start from: beside the systems, the same for all.
func (b *bench) source(name string) string { return filepath.Join(b.image, "source-"+name) }

// once makes path unless it is there.
func once(path string, do func(path string) error) error {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	return do(path)
}

// timed is how many seconds a command took.
func (b *bench) timed(ctx context.Context, argv ...string) (float64, error) {
	start := time.Now()
	_, err := b.run.output(ctx, argv...)
	return time.Since(start).Seconds(), err
}

// smallFiles calls do with the paths and contents of a tree, always the same: text-like,
// 100 bytes to 8 KiB, fifty to a directory.
func smallFiles(n int, do func(path string, content []byte) error) error {
	r := rand.New(rand.NewPCG(1, 2))
	for i := range n {
		content := make([]byte, 100+r.IntN(8<<10))
		for j := range content {
			content[j] = "etaoin shrdlu\n"[r.IntN(14)]
		}
		if err := do(fmt.Sprintf("dir%02d/sub%03d/file%05d.txt", i/1000, i/50, i), content); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) makeTar(path string, files int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	err = smallFiles(files, func(name string, content []byte) error {
		h := tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), ModTime: time.Unix(1_700_000_000, 0)}
		if err := w.WriteHeader(&h); err != nil {
			return err
		}
		_, err := w.Write(content)
		return err
	})
	return errors.Join(err, w.Close())
}

func (b *bench) makeRepository(ctx context.Context, path string) error {
	err := smallFiles(b.opts.scaled(5_000, 100), func(name string, content []byte) error {
		name = filepath.Join(path, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		return os.WriteFile(name, content, 0o644)
	})
	if err != nil {
		return err
	}
	git := []string{"git", "-C", path, "-c", "user.name=bench", "-c", "user.email=bench@localhost"}
	for _, args := range [][]string{{"init", "-q"}, {"add", "."}, {"commit", "-q", "-m", "files"}, {"gc", "-q"}} {
		if _, err := b.run.output(ctx, append(slices.Clone(git), args...)...); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) git(ctx context.Context, s *system, n int) (map[string]float64, error) {
	dir, values := filepath.Join(s.dir, fmt.Sprint("git", n)), map[string]float64{}
	var err error
	if values["git-clone"], err = b.timed(ctx, "git", "clone", "-q", "--no-hardlinks", b.source("git"), dir); err != nil {
		return nil, err
	}
	// The first one may rewrite the index; it is not measured.
	if _, err := b.run.output(ctx, "git", "-C", dir, "status", "--short"); err != nil {
		return nil, err
	}
	var cold, warm []float64
	for i := range 6 {
		if i < 3 {
			if err := dropInodes(b.image); err != nil {
				return nil, err
			}
		}
		took, err := b.timed(ctx, "git", "-C", dir, "status", "--short")
		if err != nil {
			return nil, err
		}
		if i < 3 {
			cold = append(cold, took)
		} else {
			warm = append(warm, took)
		}
	}
	values["git-status-cold"], values["git-status"] = median(cold), median(warm)
	return values, nil
}

// sql is SQLite's job: single transactions with the default rollback journal, then bulk.
func (b *bench) sql() string {
	var s strings.Builder
	s.WriteString("CREATE TABLE t (id INTEGER PRIMARY KEY, k TEXT, v TEXT);\n")
	for i := range b.opts.scaled(200, 10) {
		fmt.Fprintf(&s, "INSERT INTO t (k, v) VALUES ('key%d', hex(zeroblob(200)));\n", i)
	}
	fmt.Fprintf(&s, "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i < %d)\n"+
		"INSERT INTO t (k, v) SELECT 'bulk' || (i * 7919 %% 100003), hex(zeroblob(50)) FROM n;\n", b.opts.scaled(100_000, 1000))
	s.WriteString("CREATE INDEX t_k ON t (k);\nUPDATE t SET v = 'x' WHERE k LIKE 'bulk1%';\nSELECT count(*), max(k) FROM t;\n")
	return s.String()
}

// postgresBin is the directory of the newest PostgreSQL that Debian has installed.
func postgresBin() (string, error) {
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(dirs) == 0 {
		return "", errors.New("there is no PostgreSQL in /usr/lib/postgresql")
	}
	slices.Sort(dirs)
	return dirs[len(dirs)-1], nil
}

// postgresUser is who the server runs as: it refuses to be root.
func postgresUser() (*as, error) {
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, err
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, err
	}
	return &as{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// pg runs one of PostgreSQL's programs as its user.
func (b *bench) pg(ctx context.Context, program string, args ...string) error {
	bin, err := postgresBin()
	if err != nil {
		return err
	}
	who, err := postgresUser()
	if err != nil {
		return err
	}
	_, err = b.run.outputAs(ctx, who, "/", nil, append([]string{filepath.Join(bin, program)}, args...)...)
	return err
}

// pgSocket is a directory of the server's user for its socket and logs.
func (b *bench) pgSocket() string { return filepath.Join(b.dir, "pg") }

// preparePostgreSQL makes a cluster once, and gives each system a copy.
func (b *bench) preparePostgreSQL(ctx context.Context, s *system) error {
	who, err := postgresUser()
	if err != nil {
		return err
	}
	template := filepath.Join(b.source("postgresql"), "data")
	err = once(b.source("postgresql"), func(dir string) error {
		for _, d := range []string{dir, b.pgSocket()} {
			if err := errors.Join(os.Mkdir(d, 0o755), os.Chown(d, int(who.Uid), int(who.Gid))); err != nil {
				return err
			}
		}
		if err := b.pg(ctx, "initdb", "-D", template, "-A", "trust", "-U", "postgres", "--no-sync", "--locale=C"); err != nil {
			return err
		}
		conf := "listen_addresses = ''\nunix_socket_directories = '" + b.pgSocket() + "'\n" +
			"autovacuum = off\ncheckpoint_timeout = 1h\nmax_wal_size = 4GB\n" // nothing in the background
		f, err := os.OpenFile(filepath.Join(template, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteString(conf); err != nil {
			return err
		}
		return b.withServer(ctx, template, func() error {
			return b.pg(ctx, "pgbench", "-h", b.pgSocket(), "-U", "postgres", "-q", "-i", "-s", "2", "postgres")
		})
	})
	if err != nil {
		return err
	}
	_, err = b.run.output(ctx, "cp", "-a", template, filepath.Join(s.dir, "postgresql"))
	return err
}

// withServer runs do while the cluster is served. The server is a daemon of its own
// session: it is stopped also when ctx is over, and by its pid if its directory is lost.
func (b *bench) withServer(ctx context.Context, data string, do func() error) error {
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), runTimeout)
	defer cancel()
	stop := func() error { return b.pg(end, "pg_ctl", "-D", data, "-m", "fast", "-w", "-s", "-t", "30", "stop") }
	if err := b.pg(ctx, "pg_ctl", "-D", data, "-l", filepath.Join(b.pgSocket(), "log"), "-w", "-s", "start"); err != nil {
		_ = stop() // it may have been about to serve
		return err
	}
	pid := 0
	out, err := b.run.output(end, "head", "-n", "1", filepath.Join(data, "postmaster.pid"))
	if err == nil {
		pid, err = strconv.Atoi(strings.TrimSpace(out))
	}
	if err == nil {
		err = do()
	}
	if stopErr := stop(); stopErr != nil {
		err = errors.Join(err, stopErr)
		if pid > 1 {
			_ = syscall.Kill(pid, syscall.SIGKILL) // its children end when they miss it
		}
	}
	return err
}

func (b *bench) postgreSQL(ctx context.Context, s *system, _ int) (map[string]float64, error) {
	values := map[string]float64{}
	return values, b.withServer(ctx, filepath.Join(s.dir, "postgresql"), func() error {
		start := time.Now()
		err := b.pg(ctx, "pgbench", "-h", b.pgSocket(), "-U", "postgres", "-n", "-c", "4", "-j", "2",
			fmt.Sprint("--transactions=", b.opts.scaled(500, 10)), "postgres")
		values["postgresql"] = time.Since(start).Seconds()
		return err
	})
}
