package requests_test

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/croftfs/croft/test/kit"
)

// counts are requests by operation.
type counts map[string]uint64

// countsOf leaves out what no job asks for (INIT), what the test itself asks
// (STATFS) and what a signal causes (INTERRUPT: the Go runtime of the test and of
// the job sends itself some). It puts the two forms of FORGET together: how many a
// BATCH_FORGET holds depends on who is quicker.
func countsOf(all map[string]uint64) counts {
	c := counts{}
	for op, n := range all {
		switch op {
		case "INIT", "STATFS", "INTERRUPT":
		case "BATCH_FORGET":
			c["FORGET"] += n
		default:
			c[op] += n
		}
	}
	return c
}

func (c counts) minus(before counts) counts {
	diff := counts{}
	for op, n := range c {
		if n > before[op] {
			diff[op] = n - before[op]
		}
	}
	return diff
}

func (c counts) String() string {
	var parts []string
	for _, op := range slices.Sorted(maps.Keys(c)) {
		parts = append(parts, fmt.Sprint(op, " ", c[op]))
	}
	if len(parts) == 0 {
		return nothing
	}
	return strings.Join(parts, "  ")
}

const (
	nothing = "nothing"
	pinFile = "testdata/counts"
)

// pin is what a job may ask for: operation, and count or "<=" bound.
type pin map[string]string

func parsePin(s string) (pin, error) {
	p := pin{}
	if s == nothing {
		return p, nil
	}
	fields := strings.Fields(s)
	if len(fields) == 0 || len(fields)%2 != 0 {
		return nil, fmt.Errorf("%q is not OPERATION COUNT...", s)
	}
	for i := 0; i < len(fields); i += 2 {
		if _, err := strconv.ParseUint(strings.TrimPrefix(fields[i+1], "<="), 10, 64); err != nil {
			return nil, err
		}
		p[fields[i]] = fields[i+1]
	}
	return p, nil
}

func (p pin) String() string {
	var parts []string
	for _, op := range slices.Sorted(maps.Keys(p)) {
		parts = append(parts, op+" "+p[op])
	}
	if len(parts) == 0 {
		return nothing
	}
	return strings.Join(parts, "  ")
}

// believed is how long the kernel believes attributes that mappings can change behind it (storeTimeout in fs): in a job
// that takes as long it asks again.
const believed = time.Second

// allows tells whether so many requests of the operation are right in a job that took so long.
func (p pin) allows(op string, got uint64, took time.Duration) bool {
	want, bound := strings.CutPrefix(p[op], "<=")
	n, _ := strconv.ParseUint(want, 10, 64)
	// Among many, one more: "git status, again" had 33 for 32 once, in a job of 150 ms. Why is not known.
	again := op == "GETATTR" && (took >= believed || n >= 32 && got == n+1)
	return got == n || bound && got < n || again && n > 0 && got > n
}

// diff lists the operations that do not fit, and "" when all do, of a job that took that long.
func (p pin) diff(got counts, took time.Duration) string {
	var b strings.Builder
	ops := maps.Clone(got)
	for op := range p {
		ops[op] += 0
	}
	for _, op := range slices.Sorted(maps.Keys(ops)) {
		if p.allows(op, got[op], took) {
			continue
		}
		want := p[op]
		if want == "" {
			want = "0"
		}
		fmt.Fprintf(&b, "  %-16s wanted %6s   got %6d\n", op, want, got[op])
	}
	return b.String()
}

// pins is testdata/counts: lines "JOB | TIER | COUNTS" between comments.
type pins struct{ lines []string }

func readPins(t *testing.T) *pins {
	t.Helper()
	body, err := os.ReadFile(pinFile)
	kit.OK(t, err)
	p := &pins{lines: strings.Split(strings.TrimSuffix(string(body), "\n"), "\n")}
	for _, line := range p.lines {
		if strings.HasPrefix(line, "#") || line == "" {
			continue
		}
		name, _, found := strings.Cut(line, " | ")
		if !found || !slices.ContainsFunc(jobs, func(j job) bool { return j.name == strings.TrimSpace(name) }) {
			t.Fatalf("%s: no such job: %q", pinFile, line)
		}
	}
	return p
}

func (p *pins) find(job, tier string) int {
	return slices.IndexFunc(p.lines, func(line string) bool {
		f := strings.SplitN(line, "|", 3)
		return len(f) == 3 && strings.TrimSpace(f[0]) == job && strings.TrimSpace(f[1]) == tier
	})
}

func (p *pins) get(job, tier string) (pin, bool) {
	i := p.find(job, tier)
	if i < 0 {
		return nil, false
	}
	_, rest, _ := strings.Cut(p.lines[i], "|")
	_, text, _ := strings.Cut(rest, "|")
	c, err := parsePin(strings.TrimSpace(text))
	return c, err == nil
}

// set replaces the counts of a job, or adds them after its other tier's. A bound
// that still holds stays.
func (p *pins) set(job, tier string, got counts) {
	old, _ := p.get(job, tier)
	now := pin{}
	for op, n := range got {
		now[op] = fmt.Sprint(n)
		if op == "FORGET" { // they may come together, and later
			now[op] = "<=" + now[op]
		}
	}
	for op, want := range old {
		if strings.HasPrefix(want, "<=") && old.allows(op, got[op], 0) {
			now[op] = want
		}
	}
	line := fmt.Sprintf("%s | %-6s | %s", job, tier, now)
	if i := p.find(job, tier); i >= 0 {
		p.lines[i] = line
		return
	}
	at := len(p.lines)
	for i, l := range p.lines {
		if strings.HasPrefix(l, job+" |") {
			at = i + 1
		}
	}
	p.lines = slices.Insert(p.lines, at, line)
}

func (p *pins) write(t *testing.T) {
	t.Helper()
	kit.OK(t, os.WriteFile(pinFile, []byte(strings.Join(p.lines, "\n")+"\n"), 0o644))
}
