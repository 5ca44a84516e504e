package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// load is a pod's script: four writers that append, sync, rename, read back and delete without end. The first thing that
// goes wrong is left in /data/failed, and ends the pod.
const load = `
cat >/tmp/writer <<'END'
cd /data; mkdir -p $1; i=0
while :; do
	i=$((i + 1))
	echo $i >>$1/log && [ "$(tail -n 1 $1/log)" = $i ] &&
	head -c 65536 /dev/urandom >$1/new && md5sum <$1/new >$1/sum && mv $1/new $1/file && [ "$(md5sum <$1/file)" = "$(cat $1/sum)" ] &&
	dd if=/dev/zero of=$1/synced bs=4k count=16 conv=fsync 2>/dev/null && rm $1/synced || { echo "writer $1, round $i" >>failed; exit 1; }
	echo $i >$1/rounds
done
END
for w in 1 2 3 4; do sh /tmp/writer $w & done
wait`

// loaded starts a pod that writes without end.
func loaded(n *namespace, name string) {
	n.t.Helper()
	n.apply(claim{name: "data", size: "512Mi"}.String() + pod{name: name, volumes: []string{"data"}, script: load}.String())
	n.ready(name)
	progress(n, name)
}

// rounds adds up what the writers have done; it fails when one of them has failed.
func rounds(n *namespace, pod string) int {
	n.t.Helper()
	if failed := n.sh(pod, "cat /data/failed 2>/dev/null || true"); failed != "" {
		n.t.Fatalf("the load has failed: %s", failed)
	}
	sum := 0
	for _, field := range strings.Fields(n.sh(pod, "cat /data/*/rounds")) {
		i, err := strconv.Atoi(field)
		if err != nil {
			n.t.Fatal(err)
		}
		sum += i
	}
	return sum
}

// progress waits until every writer may have gone round.
func progress(n *namespace, pod string) {
	n.t.Helper()
	before := rounds(n, pod)
	eventually(n.t, "the load goes on", func() error {
		if now := rounds(n, pod); now < before+20 {
			return fmt.Errorf("%d rounds, then %d", before, now)
		}
		return nil
	})
}

// settled waits until Croft's pods are ready.
func settled(t *testing.T) {
	t.Helper()
	for _, name := range []string{"daemonset/croft-node", "deployment/croft-controller"} {
		must(t, "-n", system, "rollout", "status", name, "--timeout="+patience.String())
	}
}

// containerOf returns the id of a pod's container and how often it was started anew.
func containerOf(n *namespace, pod string) string {
	n.t.Helper()
	return n.kubectl("get", "pod/"+pod, "-o", "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}")
}

// The driver's pod is deleted, and its daemon killed, while pods write: they do not notice.
func TestDriverKilled(t *testing.T) {
	n := newNamespace(t)
	loaded(n, "writer")
	container := containerOf(n, "writer")
	for range 3 {
		must(t, "-n", system, "delete", "pod", "-l", "app.kubernetes.io/component=node")
		settled(t)
		progress(n, "writer")
		killDaemon(t)
		settled(t)
		progress(n, "writer")
	}
	if now := containerOf(n, "writer"); now != container {
		t.Errorf("the pod's container is another: %s, was %s", now, container)
	}
	// What came while it was away is served as well.
	must(t, "-n", system, "delete", "pod", "-l", "app.kubernetes.io/component=node", "--wait=false")
	n.apply(claim{name: "late", size: "64Mi"}.String() + pod{name: "late", volumes: []string{"late"}}.String())
	n.ready("late")
}

// killDaemon ends `croft node` with SIGKILL, and waits until there is another.
func killDaemon(t *testing.T) {
	t.Helper()
	before := daemon(t)
	if out, err := inside("kill", "-KILL", before).CombinedOutput(); err != nil {
		t.Fatalf("kill %s: %v: %s", before, err, out)
	}
	eventually(t, "another daemon", func() error {
		out, err := inside("pgrep", "-f", "^[^ ]*croft node ").Output()
		if now := strings.TrimSpace(string(out)); err != nil || now == "" || now == before {
			return fmt.Errorf("%q, was %s: %v", now, before, err)
		}
		return nil
	})
}

// daemon is the process of `croft node`, in the cluster's namespace.
func daemon(t *testing.T) string {
	t.Helper()
	out, err := inside("pgrep", "-o", "-f", "^[^ ]*croft node ").Output()
	if err != nil {
		t.Fatalf("no `croft node` runs: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// A drained node's pods end, and find their data when the node is back.
func TestDrain(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi"}.String() + `---
apiVersion: apps/v1
kind: Deployment
metadata: {name: user}
spec:
  selector: {matchLabels: {app: user}}
  template:
    metadata: {labels: {app: user}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: busybox
          imagePullPolicy: Never
          command: [sh, -c, "echo start >>/data/starts; while :; do sleep 1; done"]
          volumeMounts: [{name: data, mountPath: /data}]
      volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`)
	n.kubectl("rollout", "status", "deployment/user", "--timeout="+patience.String())
	name := node(t)
	uncordon := func() { must(t, "uncordon", name) }
	t.Cleanup(uncordon)
	must(t, "drain", name, "--ignore-daemonsets", "--delete-emptydir-data", "--disable-eviction", "--timeout="+patience.String())
	n.wait("jsonpath={.status.unavailableReplicas}=1", "deployment/user")
	uncordon()
	n.kubectl("rollout", "status", "deployment/user", "--timeout="+patience.String())
	settled(t)
	if got := n.sh("deployment/user", "cat /data/starts"); got != "start\nstart" {
		t.Errorf("in the volume after the drain: %q", got)
	}
}

// Croft is uninstalled as docs/kubernetes.md has it: the data stays on the node, and is there again once Croft is.
func TestUninstall(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi"}.String() + pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	n.sh("user", "echo kept >/data/file")
	volume := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	n.kubectl("delete", "pod/user")
	mounted := func(where string) string {
		out, _ := inside("grep", where+".* fuse.croft ", "/proc/mounts").CombinedOutput() // status 1: there is none
		return string(out)
	}
	eventually(t, "the pod's volume is unmounted", func() error { // it has no grace, and is gone before
		if out := mounted("/pods/"); out != "" {
			return fmt.Errorf("there is %s", out)
		}
		return nil
	})

	installed := false
	t.Cleanup(func() {
		if !installed {
			_, _ = kubectl("wait", "--for=delete", "namespace/"+system, "--timeout="+patience.String())
			if err := deploy(); err != nil {
				t.Error(err)
			}
		}
	})
	timeout := "--timeout=" + patience.String()
	must(t, "-n", system, "delete", "daemonset/croft-keeper", "--wait", timeout)
	eventually(t, "the keeper's pods have ended", func() error {
		pods, err := kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/component=keeper", "-o", "name")
		if err == nil && pods != "" {
			err = fmt.Errorf("there are %q", pods)
		}
		return err
	})
	must(t, "delete", "-k", manifests, "--ignore-not-found", "--wait", timeout)
	out, err := inside("cat", "/var/lib/croft/main/volumes/"+volume+"/file").CombinedOutput()
	if err != nil || string(out) != "kept\n" {
		t.Errorf("on the node: %q, %v", out, err)
	}
	if out := mounted(""); out != "" {
		t.Errorf("still mounted: %s", out)
	}

	if err := deploy(); err != nil {
		t.Fatal(err)
	}
	installed = true
	n.apply(pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	if got := n.sh("user", "cat /data/file"); got != "kept" {
		t.Errorf("in the volume: %q", got)
	}
}

// kubelet and containerd are started anew under load: the pods run on, and both serve as before.
func TestNodeRestarted(t *testing.T) {
	n := newNamespace(t)
	loaded(n, "writer")
	container := containerOf(n, "writer")
	for _, service := range []string{"kubelet", "containerd", "kubelet"} {
		restart(n, service, "writer")
		progress(n, "writer")
	}
	settled(t)
	if now := containerOf(n, "writer"); now != container {
		t.Errorf("the pod's container is another: %s, was %s", now, container)
	}
	n.apply(claim{name: "late", size: "64Mi"}.String() + pod{name: "late", volumes: []string{"late"}}.String())
	n.ready("late")
	n.kubectl("patch", "pvc/data", "-p", `{"spec":{"resources":{"requests":{"storage":"768Mi"}}}}`)
	n.wait("jsonpath={.status.capacity.storage}=768Mi", "pvc/data")
}

// restart ends a program of the node, which node.sh starts again, and waits until it serves, and knows pods of the namespace.
func restart(n *namespace, service string, pods ...string) {
	t := n.t
	t.Helper()
	file := filepath.Join(run, "pids", service)
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if out, err := inside("kill", strings.TrimSpace(string(before))).CombinedOutput(); err != nil {
		t.Fatalf("kill %s: %v: %s", service, err, out)
	}
	eventually(t, service+" is started anew", func() error {
		now, err := os.ReadFile(file)
		if err == nil && string(now) == string(before) {
			err = fmt.Errorf("process %s is there", before)
		}
		if err == nil {
			err = inside(filepath.Join(bin, "ctr"), "--address", "/run/containerd/containerd.sock", "version").Run()
		}
		if err == nil {
			_, err = kubectl("get", "--raw", "/api/v1/nodes/"+node(t)+"/proxy/healthz")
		}
		for _, pod := range pods {
			if err == nil {
				_, err = kubectl("-n", n.name, "exec", pod, "--", "true")
			}
		}
		return err
	})
	must(t, "wait", "--for=condition=Ready", "node", "--all", "--timeout="+patience.String())
}

// pid is the cluster's process 1.
func pid(t *testing.T) string {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(run, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(pid))
}
