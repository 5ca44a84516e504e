package app

import (
	"context"
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestRequests(t *testing.T) {
	dir := poolDir(t, idA)
	h, f := newHost(t), newFakePool(dir, "a")
	h.want(ExitFailure, "pool "+dir+": the pool is not mounted (`croft mount` does that)", "requests", "--pool", dir)
	h.want(ExitUsage, "which pool? None is mounted", "requests")
	h.want(ExitUsage, "--watch=5s", "requests", "--watch", "5s")
	h.want(ExitUsage, "more than 0", "requests", "--watch=0s")
	h.serves(f)
	h.want(ExitFailure, "the pool is not mounted", "requests", "--pool", dir)

	f.setRequests(map[string]uint64{"INIT": 1, "LOOKUP": 300, "GETATTR": 300, "OPEN": 399})
	h.want(ExitOK, "OPERATION   COUNT   SHARE\nOPEN        399     39.9%\nGETATTR     300     30.0%\nLOOKUP      300     30.0%\nINIT        1       0.1%\ntotal       1000    100.0%\n", "requests")
	h.want(ExitOK, "{\n  \"total\": 1000,\n  \"requests\": {\n    \"GETATTR\": 300,", "requests", "-o", "json", "--pool", dir)
	h.want(ExitOK, dir+"\n:0", "__complete", "requests", "--pool", "")
	h.want(ExitOK, "1s\n5s\n", "__complete", "requests", "--watch=")
}

func TestWatchRequests(t *testing.T) {
	h, f := newHost(t), newFakePool(poolDir(t, idA))
	h.serves(f)
	f.setRequests(map[string]uint64{"INIT": 1, "LOOKUP": 5})
	out := new(syncBuffer)
	o := h.opts
	o.Stdout, o.Stderr = out, out
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	code := make(chan int, 1)
	go func() { code <- New(o).Run(ctx, []string{"requests", "--watch=5ms", "-o", "json"}) }()

	// next waits for a line with something in it.
	next := func() (c requestCounts) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			lines := strings.SplitAfter(out.String(), "\n")
			for _, line := range lines[:len(lines)-1] {
				if err := json.Unmarshal([]byte(line), &c); err != nil {
					t.Fatalf("%v in %q", err, line)
				}
				if c.Total > 0 {
					return c
				}
			}
		}
		t.Fatalf("no line:\n%s", out)
		return c
	}
	for line := ""; line == ""; time.Sleep(time.Millisecond) {
		line = out.String() // the first one: what was before is known
	}
	f.setRequests(map[string]uint64{"INIT": 1, "LOOKUP": 8, "OPEN": 1})
	c := next()
	if want := map[string]uint64{"LOOKUP": 3, "OPEN": 1}; c.Total != 4 || c.Time == nil || !reflect.DeepEqual(c.Requests, want) {
		t.Errorf("%+v, want %v", c, want)
	}
	interrupt()
	if got := <-code; got != ExitOK {
		t.Errorf("exit code %d\n%s", got, out)
	}
}

func TestWriteInterval(t *testing.T) {
	out := new(syncBuffer)
	a := New(Options{Stdout: out})
	if err := a.writeInterval(formatTable, time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), map[string]uint64{"LOOKUP": 3, "OPEN": 10}); err != nil {
		t.Fatal(err)
	}
	if want := "03:04:05       13  OPEN 10  LOOKUP 3\n"; out.String() != want {
		t.Errorf("%q, want %q", out, want)
	}
}

func TestRequestsSince(t *testing.T) {
	last := map[string]uint64{"INIT": 1, "LOOKUP": 5, "OPEN": 2}
	if got := since(last, map[string]uint64{"INIT": 1, "LOOKUP": 6, "OPEN": 2, "READ": 1}); !reflect.DeepEqual(got, map[string]uint64{"LOOKUP": 1, "READ": 1}) {
		t.Error(got)
	}
	restarted := map[string]uint64{"INIT": 1, "LOOKUP": 4, "OPEN": 3}
	if got := since(last, restarted); !reflect.DeepEqual(got, restarted) {
		t.Error(got)
	}
}
