package main

import (
	"os"
	"testing"
	"time"
)

func TestLoop(t *testing.T) {
	l := loop{path: t.TempDir(), files: 100, dirs: 10, size: 4096, clients: 1}
	t.Chdir(l.path) // each operation goes there; the test comes back
	for _, step := range []struct {
		op      string
		clients int
		atLeast time.Duration
		least   int
	}{
		{"mkdirs", 1, 0, 0},
		{"create", 3, 0, 100},
		{"stat", 1, 0, 100},
		{"read", 3, time.Millisecond, 200},
		{"readdir", 1, 0, 120}, // with . and ..
		{"rename", 1, time.Millisecond, 200},
		{"unlink", 1, 0, 100}, // renames left the names as they were
		{"readdir", 1, 0, 20},
	} {
		l.op, l.clients, l.atLeast = step.op, step.clients, step.atLeast
		r, err := l.do()
		if err != nil {
			t.Fatal(err)
		}
		if r.Operations < step.least || step.atLeast == 0 && r.Operations != step.least {
			t.Errorf("%s: %d operations, want %d", step.op, r.Operations, step.least)
		}
	}
}

func TestLoopsOfTheGate(t *testing.T) {
	l := loop{op: "gated", path: t.TempDir(), size: openedSize + 1<<20, atLeast: time.Millisecond}
	r, err := l.do()
	if err != nil || r.Values["gated-overwrite"] <= 0 || r.Values["gated-read"] <= 0 {
		t.Errorf("%+v, %v", r, err)
	}
	l.op, l.size, l.files, l.pid = "hold", 1<<20, 10, os.Getpid()
	if r, err = l.do(); err != nil || r.Operations != 10 || r.Values["cpu"] < 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if left, err := os.ReadDir(l.path); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	l.op, l.path, l.size = "append", l.path+"/new", 1<<20
	if r, err = l.do(); err != nil || r.Operations != 256 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestOptions(t *testing.T) {
	good := options{fs: "ext4", rounds: 3, scale: 1}
	if err := good.validate(); err != nil || !good.complete() {
		t.Error(err)
	}
	bad := options{fs: "zfs", rounds: 0, scale: 2, systems: []string{"none"}, only: "("}
	if err := bad.validate(); err == nil {
		t.Error("no fault found")
	}
}

func TestMemoryFiles(t *testing.T) {
	if got := kilobytes("VmPeak: 1 kB\nRss:     2048 kB\n", "Rss:"); got != 2<<20 {
		t.Error(got)
	}
	if got := activeObjects("slabinfo - version: 2.1\nfuse_inode  1234 1300 832\n", "fuse_inode"); got != 1234 {
		t.Error(got)
	}
}
