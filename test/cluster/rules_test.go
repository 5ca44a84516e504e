package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// backing is where the data of the default pool is, seen in the cluster's namespaces.
var backing = filepath.Join("/var/lib/croft", defaultPool, "volumes")

const defaultPool = "main"

// A pod's group can read and write 100,000 files that were another's at once, and none of them is changed for it.
func TestFSGroup(t *testing.T) {
	const files = 100_000
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "2Gi"}.String() + pod{name: "root", volumes: []string{"data"}}.String())
	n.ready("root")
	n.sh("root", fmt.Sprintf(`umask 077; cd /data; i=0; while [ $i -lt %d ]; do
		[ $((i %% 1000)) != 0 ] || mkdir $((i / 1000))
		echo $i >$((i / 1000))/$i; i=$((i + 1)); done`, files))
	n.kubectl("delete", "pod/root")

	began := time.Now()
	n.apply(pod{name: "grouped", volumes: []string{"data"}, more: []string{"securityContext: {runAsUser: 1234, runAsGroup: 1234, fsGroup: 4321}"}}.String())
	n.ready("grouped")
	t.Logf("a pod with %d files is ready after %v", files, time.Since(began).Round(time.Millisecond))
	if got := n.sh("grouped", "find /data -type f -group 4321 -perm -060 | wc -l; cat /data/99/99999; echo more >>/data/0/0 && cat /data/0/0; id -u"); got != fmt.Sprintf("%d\n99999\n0\nmore\n1234", files) {
		t.Errorf("what the group sees: %q", got)
	}
	pv := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	out, err := inside("find", filepath.Join(backing, pv), "-type", "f", "-group", "0", "-perm", "600", "-printf", ".").Output()
	if err != nil || len(out) != files {
		t.Errorf("%d files are as they were made, want %d (%v)", len(out), files, err)
	}
}

// A pod with a user namespace sees its volume's files as its own root's.
func TestUserNamespace(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi"}.String() + pod{name: "host", volumes: []string{"data"}}.String())
	n.ready("host")
	n.sh("host", "echo of-the-host >/data/before; chown 7:7 /data/before")
	n.kubectl("delete", "pod/host")

	n.apply(pod{name: "user", volumes: []string{"data"}, more: []string{"hostUsers: false"}}.String())
	n.ready("user")
	if uids := strings.Fields(n.sh("user", "cat /proc/self/uid_map")); len(uids) < 2 || uids[0] != "0" || uids[1] == "0" {
		t.Errorf("the pod has no user namespace: %v", uids)
	}
	if got := n.sh("user", "stat -c %u:%g /data/before; echo mine >/data/mine; chown 5:6 /data/mine; stat -c %u:%g /data/mine"); got != "7:7\n5:6" {
		t.Errorf("owners in the pod: %q", got)
	}
	pv := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	if out, err := inside("stat", "-c", "%u:%g", filepath.Join(backing, pv, "mine")).Output(); err != nil || string(out) != "5:6\n" {
		t.Errorf("the owner on the disk: %q, %v", out, err)
	}
	said := n.sh("user", "dd if=/dev/zero of=/data/full bs=1M count=1000 2>&1 || true; df -mP /data | awk 'NR == 2 { print $2, $4 }'")
	if !strings.Contains(said, "No space left on device") || !strings.HasSuffix(said, "\n64 0") {
		t.Errorf("the limit in a user namespace: %s", said)
	}
}

// A volume goes with its claim, with all that it has; one of a class that retains does not.
func TestDeletion(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi"}.String() + claim{name: "kept", size: "64Mi", class: class + "-retain"}.String() +
		pod{name: "user", volumes: []string{"data", "kept"}}.String())
	n.ready("user")
	n.sh("user", "echo keep me >/kept/file; mkdir -p /data/a/b/c; echo x >/data/a/b/c/file")
	pv := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	kept := n.kubectl("get", "pvc/kept", "-o", "jsonpath={.spec.volumeName}")
	// The claims go when the pod has gone, not before.
	n.kubectl("delete", "pvc/data", "pvc/kept", "--wait=false")
	if got := n.sh("user", "cat /data/a/b/c/file"); got != "x" {
		t.Errorf("a volume in use, whose claim is to be deleted: %q", got)
	}
	n.kubectl("delete", "pod/user")
	n.wait("delete", "pv/"+pv)
	n.wait("jsonpath={.status.phase}=Released", "pv/"+kept)
	if _, err := os.Stat(filepath.Join("/proc", pid(t), "root", backing, pv)); !os.IsNotExist(err) {
		t.Errorf("the volume's directory after its deletion: %v", err)
	}
	out, err := inside("cat", filepath.Join(backing, kept, "file")).Output()
	if err != nil || string(out) != "keep me\n" {
		t.Errorf("what is retained: %q, %v", out, err)
	}
	must(t, "delete", "pv/"+kept)
	croft(t, "volume", "delete", kept)
}

// The scheduler knows each class's room on the node, and places no pod where there is not enough.
func TestCapacity(t *testing.T) {
	n := newNamespace(t)
	eventually(t, "capacity of each class", func() error {
		capacities, err := kubectl("get", "csistoragecapacities", "-A", "-o",
			`jsonpath={range .items[*]}{.storageClassName} {.nodeTopology.matchLabels.topology\.croft\.dev/node} {.capacity}{"\n"}{end}`)
		for _, name := range []string{class, class + "-" + defaultPool, class + "-retain"} {
			if err == nil && !strings.Contains("\n"+capacities, "\n"+name+" "+node(t)+" ") {
				err = fmt.Errorf("none of %s: %q", name, capacities)
			}
		}
		return err
	})
	n.apply(claim{name: "huge", size: "1Pi"}.String() + pod{name: "user", volumes: []string{"huge"}}.String())
	n.event("pod/user", "FailedScheduling", "did not have enough free storage")
	if phase := n.kubectl("get", "pvc/huge", "-o", "jsonpath={.status.phase}"); phase != "Pending" {
		t.Errorf("a claim that fits nowhere is %s", phase)
	}
}

func node(t *testing.T) string {
	t.Helper()
	return must(t, "get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
}
