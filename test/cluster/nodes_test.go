package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const (
	// smallPool is the size of the other nodes' pools: less than what a claim asks for that only the first node has room for.
	smallPool = 10 << 30
	tooLarge  = "20Gi"
)

// joined adds a node to the cluster, whose pool is on an image: nil, or the image of another node's. It ends with the test.
func joined(t *testing.T, name string, number int, from string) {
	t.Helper()
	dir := filepath.Join(run, "nodes", name)
	image := filepath.Join(dir, "pool.image")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	var err error
	if from == "" {
		err = makePool(image, smallPool)
	} else {
		err = os.Rename(filepath.Join(run, "nodes", from, "pool.image"), image)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		left(t, name)
		must(t, "delete", "node", name, "--ignore-not-found")
		eventually(t, "the driver's pods of "+name+" have gone", func() error {
			pods, err := kubectl("-n", system, "get", "pods", "-o", "name", "--field-selector", "spec.nodeName="+name)
			if err == nil && pods != "" {
				err = fmt.Errorf("there are %q", pods)
			}
			return err
		})
		// Whose owner, the DaemonSet, is still there.
		must(t, "-n", system, "delete", "csistoragecapacities", "-l", "csi.storage.k8s.io/managed-by=external-provisioner-"+name)
	})
	if err := script("./join.sh", name, fmt.Sprint(number)); err != nil {
		t.Fatal(err)
	}
	must(t, "wait", "--for=jsonpath={.spec.drivers[0].name}="+driver, "csinode/"+name, "--timeout="+patience.String())
	must(t, "-n", system, "wait", "--for=condition=Ready", "pod", "-l", "app.kubernetes.io/component=node", "--field-selector", "spec.nodeName="+name,
		"--timeout="+patience.String())
}

// left ends a node as a power cut does, unless that was done before.
func left(t *testing.T, name string) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(run, "nodes", name, "pid")); os.IsNotExist(err) {
		return
	}
	if err := script("./join.sh", "--leave", name); err != nil {
		t.Fatal(err)
	}
}

// croftOn runs a command of Croft in the driver's pod of a node.
func croftOn(t *testing.T, node string, args ...string) string {
	t.Helper()
	pod := must(t, "-n", system, "get", "pods", "-l", "app.kubernetes.io/component=node", "--field-selector", "spec.nodeName="+node,
		"-o", "jsonpath={.items[0].metadata.name}")
	return must(t, append([]string{"-n", system, "exec", pod, "-c", "croft", "--", "croft"}, args...)...)
}

func on(node string) []string {
	return []string{"nodeSelector: {kubernetes.io/hostname: " + node + "}"}
}

func (n *namespace) nodeOf(pod string) string {
	n.t.Helper()
	return n.kubectl("get", "pod/"+pod, "-o", "jsonpath={.spec.nodeName}")
}

func (n *namespace) runsOn(pod, node string) {
	n.t.Helper()
	n.ready(pod)
	if got := n.nodeOf(pod); got != node {
		n.t.Errorf("%s runs on %s, want %s", pod, got, node)
	}
}

// There are other nodes: pods go where there is room, and where their volumes, snapshots and clones are; a pool moves to another
// machine, which starts anew; what a machine that never comes back had is let go of.
func TestNodes(t *testing.T) {
	first, second, third := node(t), "node2", "node3"
	n := newNamespace(t)
	joined(t, second, 2, "")

	t.Log("a claim that fits on one node only")
	eventually(t, "the capacity of "+second, func() error {
		capacities, err := kubectl("get", "csistoragecapacities", "-A", "-o",
			`jsonpath={range .items[?(@.storageClassName=="`+class+`")]}{.nodeTopology.matchLabels.topology\.croft\.dev/node}{"\n"}{end}`)
		if err == nil && !strings.Contains(capacities, second) {
			err = fmt.Errorf("there is that of %q", capacities)
		}
		return err
	})
	n.apply(claim{name: "large", size: tooLarge}.String() + pod{name: "large", volumes: []string{"large"}}.String())
	n.runsOn("large", first)
	n.apply(claim{name: "nowhere", size: tooLarge}.String() + pod{name: "nowhere", volumes: []string{"nowhere"}, more: on(second)}.String())
	n.event("pod/nowhere", "FailedScheduling", "did not have enough free storage")
	n.kubectl("delete", "pod/large", "pvc/large", "pod/nowhere", "pvc/nowhere")

	t.Log("a pod stays with its volume")
	n.apply(claim{name: "data", size: "64Mi"}.String() + pod{name: "user", volumes: []string{"data"}, more: on(second)}.String())
	n.runsOn("user", second)
	n.sh("user", "echo first >/data/file; sync")
	n.kubectl("delete", "pod/user")
	must(t, "cordon", second)
	n.apply(pod{name: "user", volumes: []string{"data"}}.String())
	n.event("pod/user", "FailedScheduling", "didn't match PersistentVolume's node affinity")
	must(t, "uncordon", second)
	n.runsOn("user", second)

	t.Log("a snapshot's restore and a clone are made where it is")
	n.apply(snapshot("monday", "data"))
	n.wait("jsonpath={.status.readyToUse}=true", "volumesnapshot/monday")
	n.sh("user", "echo second >/data/file; sync")
	n.apply(claim{name: "restored", size: "64Mi", source: "VolumeSnapshot/monday"}.String() + pod{name: "other", volumes: []string{"restored"}}.String() +
		claim{name: "cloned", size: "64Mi", source: "PersistentVolumeClaim/data"}.String() + pod{name: "twin", volumes: []string{"cloned"}}.String())
	n.runsOn("other", second)
	n.runsOn("twin", second)
	if got := n.sh("other", "cat /restored/file") + " " + n.sh("twin", "cat /cloned/file"); got != "first second" {
		t.Errorf("restored and cloned: %q", got)
	}
	n.kubectl("delete", "pod/other", "pvc/restored", "pod/twin", "pvc/cloned", "volumesnapshot/monday")
	n.volumes(1)

	t.Log("the node's machine ends, another gets its disk")
	n.apply(set)
	n.wait("jsonpath={.status.readyReplicas}=1", "statefulset/web")
	if got := n.nodeOf("web-0"); got != second {
		t.Fatalf("web-0 runs on %s", got)
	}
	n.sh("web-0", "touch /data/old")
	pv := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	handle := must(t, "get", "pv/"+pv, "-o", "jsonpath={.spec.csi.volumeHandle}")
	must(t, "patch", "pv/"+pv, "-p", `{"spec":{"persistentVolumeReclaimPolicy":"Retain"}}`)
	left(t, second)
	n.kubectl("delete", "pod/user", "--force")
	n.kubectl("delete", "pvc/data")
	must(t, "delete", "pv/"+pv)
	lost := n.kubectl("get", "pvc/data-web-0", "-o", "jsonpath={.spec.volumeName}")
	volume := must(t, "get", "pv/"+lost, "-o", "jsonpath={.spec.csi.volumeHandle}")
	must(t, "delete", "node", second)
	letsGo(t) // below: it takes a minute
	joined(t, third, 3, second)
	n.apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s}
spec:
  capacity: {storage: 64Mi}
  accessModes: [ReadWriteOnce]
  persistentVolumeReclaimPolicy: Delete
  storageClassName: %[2]s
  claimRef: {namespace: %[3]s, name: data}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: topology.croft.dev/node, operator: In, values: [%[4]s]}]}]}}
  csi: {driver: %[5]s, volumeHandle: %[6]q}
`, pv, class, n.name, third, driver, handle) + claim{name: "data", size: "64Mi"}.String() + pod{name: "user", volumes: []string{"data"}}.String())
	n.runsOn("user", third)
	if got := n.sh("user", "cat /data/file"); got != "second" {
		t.Errorf("in the volume that has moved: %q", got)
	}

	t.Log("the machine starts anew")
	left(t, third)
	if err := script("./join.sh", third, "3"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod runs again", func() error {
		got, err := kubectl("-n", n.name, "exec", "user", "--", "cat", "/data/file")
		if err == nil && got != "second" {
			err = fmt.Errorf("in its volume: %q", got)
		}
		return err
	})
	n.kubectl("delete", "pod/user", "pvc/data")

	t.Log("the node itself never comes back")
	n.event("pvc/data-web-0", "NodeGone", second)
	must(t, "wait", "--for=delete", "pv/"+lost, "--timeout="+patience.String())
	n.kubectl("delete", "pod/web-0", "--force", "--ignore-not-found") // what a person does, or the garbage collector in a while
	n.ready("web-0")
	if got := n.sh("web-0", "ls /data"); got != "" {
		t.Errorf("in the new volume: %q", got)
	}
	// Its data is where it was.
	name := volume[strings.LastIndexByte(volume, '/')+1:]
	if list := croftOn(t, third, "volume", "list"); !strings.Contains(list, name) {
		t.Errorf("%s is not among the volumes of the pool that has moved:\n%s", volume, list)
	}
	n.kubectl("delete", "statefulset/web", "pvc/data-web-0")
	n.volumes(0)
}

// volumes waits until there are that many persistent volumes: they outlive their claims by a moment.
func (n *namespace) volumes(want int) {
	n.t.Helper()
	eventually(n.t, fmt.Sprint(want, " persistent volumes"), func() error {
		names, err := kubectl("get", "pv", "-o", "name")
		if got := len(strings.Fields(names)); err == nil && got != want {
			err = fmt.Errorf("there are %q", names)
		}
		return err
	})
}

// set is a StatefulSet whose pod would rather be on the second node.
const set = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web}
spec:
  serviceName: web
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      affinity:
        nodeAffinity:
          preferredDuringSchedulingIgnoredDuringExecution:
            - {weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [node2]}]}}
      containers:
        - name: main
          image: busybox
          imagePullPolicy: Never
          command: [sh, -c, "while :; do sleep 1; done"]
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
    - metadata: {name: data}
      spec:
        storageClassName: croft
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 64Mi}}
`

// letsGo has the controller let go of the volumes of nodes that are gone for a minute, until the test's end.
func letsGo(t *testing.T) {
	t.Helper()
	must(t, "apply", "-k", "deadnodes")
	t.Cleanup(func() {
		must(t, "apply", "-k", manifests)
		settled(t)
	})
	must(t, "-n", system, "rollout", "status", "deployment/croft-controller", "--timeout="+patience.String())
}
