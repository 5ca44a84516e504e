package cluster

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const examples = "../../deploy/examples"

// Every example of deploy/examples works, as it stands.
func TestExamples(t *testing.T) {
	n := newNamespace(t)
	croft(t, "volume", "create", "--size", "1Gi", "handmade") // as static-pv.yaml says
	files, err := filepath.Glob(filepath.Join(examples, "*.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	// The copies are of its volumes.
	first := filepath.Join(examples, "statefulset.yaml")
	i := slices.Index(files, first)
	if i < 0 {
		t.Fatalf("%s is not there", first)
	}
	files = append([]string{first}, slices.Delete(files, i, i+1)...)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		n.apply(strings.ReplaceAll(string(text), "NODE", node(t)))
		if file == first {
			n.kubectl("rollout", "status", "statefulset", "--timeout="+patience.String())
		}
	}
	n.kubectl("wait", "pod", "--all", "--for=condition=Ready", "--timeout="+patience.String())
	n.kubectl("wait", "pvc", "--all", "--for=jsonpath={.status.phase}=Bound", "--timeout="+patience.String())
	n.kubectl("wait", "volumesnapshot", "--all", "--for=jsonpath={.status.readyToUse}=true", "--timeout="+patience.String())

	n.kubectl("delete", "statefulset", "--all")
	n.kubectl("delete", "pod", "--all")
	n.kubectl("delete", "pvc", "--all")
	must(t, "delete", "pv/handmade")
	must(t, "delete", "volumeattributesclass", "--all")
	croft(t, "volume", "delete", "handmade")
}
