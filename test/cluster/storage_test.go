package cluster

import (
	"encoding/xml"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var (
	storageFocus = flag.String("focus", `External.Storage`, "which of Kubernetes' storage tests run")
	storageProcs = flag.Int("procs", 6, "how many of them run at a time")
)

// serially are those of Kubernetes' tests that must have the node for themselves.
const serially = `\[Serial\]|\[Disruptive\]`

// impossible are those that cannot pass here; docs/conformance.md#in-kubernetes says why of each.
const impossible = `Pre-provisioned Snapshot|any volume data source|block volmode.* volume-modify|` +
	`modify volumes with a different`

// Kubernetes' own tests of external CSI drivers, with all that storage.yaml says of Croft. Each is a test here.
func TestExternalStorage(t *testing.T) {
	if err := script("./build.sh", "e2e"); err != nil {
		t.Fatal(err)
	}
	must(t, "apply", "-f", "attributes.yaml")
	ran := external(t, "together", *storageFocus, impossible+"|"+serially, *storageProcs)
	ran += external(t, "alone", "("+*storageFocus+").*("+serially+")", impossible, 1)
	if ran == 0 {
		t.Errorf("no test ran: is there one that -focus matches?")
	}
}

// external runs those of the tests that focus matches, and skip does not, reports each, and returns how many.
func external(t *testing.T, name, focus, skip string, procs int) (ran int) {
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	report := t.TempDir()
	cmd := inside(filepath.Join(bin, "ginkgo"), "--procs="+strconv.Itoa(procs), "--timeout=24h", "--no-color", "--silence-skips",
		"--focus="+focus, "--skip="+skip, filepath.Join(bin, "e2e.test"), "--",
		"--kubeconfig="+filepath.Join(run, "kubeconfig"), "--provider=local", "--kubectl-path="+filepath.Join(bin, "kubectl"),
		"--num-nodes=1", "--allowed-not-ready-nodes=0", "--storage.testdriver="+filepath.Join(dir, "storage.yaml"),
		"--report-dir="+report)
	out, failed := cmd.CombinedOutput()
	log := filepath.Join(run, "log", "external-"+name+".log")
	if err := os.WriteFile(log, out, 0o600); err != nil {
		t.Error(err)
	}
	files, _ := filepath.Glob(filepath.Join(report, "junit*.xml"))
	skipped := map[string]int{}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var suites junit
		if err := xml.Unmarshal(data, &suites); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, test := range suites.Cases {
			if test.Skipped != nil && test.Skipped.Message != "skipped" { // that is one which was not asked for
				skipped[test.Skipped.Message]++
			}
			if test.Failure == nil && (test.Status != "passed" || !strings.HasPrefix(test.Name, "[It]")) {
				continue
			}
			ran++
			t.Run(name+"/"+strings.TrimPrefix(test.Name, "[It] "), func(t *testing.T) {
				if test.Failure != nil {
					t.Errorf("%s\n%s", test.Failure.Message, test.Output)
				}
			})
		}
	}
	for _, reason := range slices.Sorted(maps.Keys(skipped)) {
		t.Logf("%s: %d do not apply: %s", name, skipped[reason], reason)
	}
	if failed != nil && !t.Failed() {
		t.Errorf("ginkgo: %v: %s", failed, tail(string(out)))
	}
	return ran
}

// junit is what is read of a report.
type junit struct {
	Cases []struct {
		Name    string `xml:"name,attr"`
		Status  string `xml:"status,attr"`
		Output  string `xml:"system-err"`
		Failure *struct {
			Message string `xml:"message,attr"`
		} `xml:"failure"`
		Skipped *struct {
			Message string `xml:"message,attr"`
		} `xml:"skipped"`
	} `xml:"testsuite>testcase"`
}

func tail(s string) string { return s[max(0, len(s)-4000):] }
