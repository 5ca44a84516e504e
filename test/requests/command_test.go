package requests_test

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/croftfs/croft/test/kit"
)

// TestCommand runs `croft requests` on a pool that is mounted and then is not.
func TestCommand(t *testing.T) {
	p := kit.NewPool(t, "ext4")
	if r := p.Croft("requests", "--pool", p.Dir); r.Code != 1 || !strings.Contains(r.Stderr, "the pool is not mounted") {
		t.Errorf("not mounted: %s", r)
	}
	p.Mount()
	dir := p.Create("v", 64*kit.Mi)
	var before, after struct {
		Total    uint64            `json:"total"`
		Requests map[string]uint64 `json:"requests"`
	}
	kit.OK(t, json.Unmarshal([]byte(p.MustCroft("requests", "-o", "json")), &before))
	if before.Requests["INIT"] != 1 {
		t.Errorf("%+v", before)
	}

	cmd := p.Command("requests", "--watch=10ms")
	out, err := cmd.StdoutPipe()
	kit.OK(t, err)
	kit.OK(t, cmd.Start())
	lines := bufio.NewScanner(out)
	if !lines.Scan() { // it watches
		t.Fatal("no line")
	}
	kit.OK(t, os.Mkdir(dir+"/d", 0o755))
	for !strings.Contains(lines.Text(), "MKDIR 1") {
		if !lines.Scan() {
			t.Fatal("no line with the MKDIR")
		}
	}
	kit.OK(t, cmd.Process.Signal(os.Interrupt))
	for lines.Scan() {
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("interrupted: %v", err)
	}

	kit.OK(t, json.Unmarshal([]byte(p.MustCroft("requests", "-o", "json", "--pool", p.Dir)), &after))
	if after.Requests["MKDIR"] != 1 || after.Total <= before.Total {
		t.Errorf("%+v, then %+v", before, after)
	}
	table := p.MustCroft("requests")
	if !strings.HasPrefix(table, "OPERATION") || !strings.Contains(table, "\nMKDIR ") || !strings.Contains(table, "\ntotal ") {
		t.Error(table)
	}
}
