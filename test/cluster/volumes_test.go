package cluster

import (
	"fmt"
	"strings"
	"testing"
)

// mebibytes is a command that prints the size of a volume. Not df: busybox's takes the first mount of the same device, and
// all volumes of a pool are of one.
func mebibytes(dir string) string { return "echo $(($(stat -f -c '%b*%S/1048576' " + dir + ")))" }

// Three pods have a volume each, find it again when they are made anew, and their volumes are there when they are not.
func TestStatefulSet(t *testing.T) {
	n := newNamespace(t)
	n.apply(`
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: web}
spec:
  serviceName: web
  replicas: 3
  selector: {matchLabels: {app: web}}
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Delete, whenScaled: Retain}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: main
          image: busybox
          imagePullPolicy: Never
          command: [sh, -c, "echo $HOSTNAME >>/data/starts; while :; do sleep 1; done"]
          volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
    - metadata: {name: data}
      spec:
        storageClassName: ` + class + `
        accessModes: [ReadWriteOnce]
        resources: {requests: {storage: 256Mi}}
`)
	ready := func(replicas int) {
		t.Helper()
		n.kubectl("rollout", "status", "statefulset/web", "--timeout="+patience.String())
		n.wait(fmt.Sprintf("jsonpath={.status.readyReplicas}=%d", replicas), "statefulset/web")
	}
	started := func(ordinal, times int) {
		t.Helper()
		name := fmt.Sprintf("web-%d", ordinal)
		want := strings.TrimSpace(strings.Repeat(name+"\n", times))
		if got := n.sh(name, "cat /data/starts"); got != want {
			t.Errorf("%s: starts in its volume: %q, want %q", name, got, want)
		}
	}
	ready(3)
	for i := range 3 {
		started(i, 1)
	}
	n.kubectl("delete", "pod", "-l", "app=web")
	ready(3)
	for i := range 3 {
		started(i, 2)
	}
	n.kubectl("scale", "statefulset/web", "--replicas=1")
	n.wait("delete", "pod/web-2")
	n.wait("delete", "pod/web-1")
	n.kubectl("scale", "statefulset/web", "--replicas=3")
	ready(3)
	started(0, 2)
	started(1, 3)
	started(2, 3)
}

// A volume is made when a pod wants it, on the pod's node, and bound to that.
func TestWaitForFirstConsumer(t *testing.T) {
	n := newNamespace(t)
	before := len(volumes(t))
	n.apply(claim{name: "data", size: "64Mi"}.String())
	n.event("pvc/data", "WaitForFirstConsumer", "waiting for first consumer")
	if phase := n.kubectl("get", "pvc/data", "-o", "jsonpath={.status.phase}"); phase != "Pending" {
		t.Errorf("without a pod the claim is %s", phase)
	}
	if after := len(volumes(t)); after != before {
		t.Errorf("%d volumes were made without a pod", after-before)
	}
	n.apply(pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	pv := n.kubectl("get", "pvc/data", "-o", "jsonpath={.spec.volumeName}")
	node := n.kubectl("get", "pod/user", "-o", "jsonpath={.spec.nodeName}")
	affinity := n.kubectl("get", "pv/"+pv, "-o", "jsonpath={.spec.nodeAffinity.required.nodeSelectorTerms[*].matchExpressions[*]}")
	if !strings.Contains(affinity, "topology."+strings.TrimPrefix(driver, "csi.")+"/node") || !strings.Contains(affinity, `"`+node+`"`) {
		t.Errorf("the volume's affinity is %s, the pod's node %s", affinity, node)
	}
}

// The pod gets as much as it has asked for, sees it, and no more; it can be given more while it runs.
func TestLimitAndExpansion(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "192Mi"}.String() + pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	fill := func(mebibytes int) {
		t.Helper()
		if size := n.sh("user", "df -mP /data | awk 'NR == 2 { print $2 }'"); size != fmt.Sprint(mebibytes) {
			t.Errorf("df shows %s MiB, want %d", size, mebibytes)
		}
		said := n.sh("user", "dd if=/dev/zero of=/data/full bs=1M count=1000 2>&1; du -m /data/full | cut -f 1; df -mP /data | awk 'NR == 2 { print $4 }'")
		lines := strings.Split(said, "\n")
		if !strings.Contains(said, "No space left on device") || lines[len(lines)-2] != fmt.Sprint(mebibytes) || lines[len(lines)-1] != "0" {
			t.Errorf("a full volume of %d MiB: %s", mebibytes, said)
		}
	}
	fill(192)
	inodes := n.sh("user", "rm /data/full; i=0; while echo x >/data/$i; do i=$((i + 1)); done 2>&1; ls /data | wc -l; df -iP /data | awk 'NR == 2 { print $2 }'")
	if !strings.HasSuffix(inodes, "No space left on device\n12288\n12288") { // one for each 16 KiB
		t.Errorf("a volume with inodes for 192 MiB: %s", inodes)
	}
	n.sh("user", "rm -r /data/*")

	started := n.kubectl("get", "pod/user", "-o", "jsonpath={.status.containerStatuses[0].containerID}")
	n.kubectl("patch", "pvc/data", "-p", `{"spec":{"resources":{"requests":{"storage":"320Mi"}}}}`)
	n.wait("jsonpath={.status.capacity.storage}=320Mi", "pvc/data")
	fill(320)
	if now := n.kubectl("get", "pod/user", "-o", "jsonpath={.status.containerStatuses[0].containerID}"); now != started {
		t.Errorf("the container is another one: %s, was %s", now, started)
	}
}

// A snapshot has what was there, restores and clones start from it and go their own ways.
func TestSnapshotRestoreClone(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "256Mi"}.String() + pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	n.sh("user", "echo first >/data/file; mkdir /data/dir; head -c 20M /dev/urandom >/data/dir/random; sync")
	n.apply(snapshot("monday", "data"))
	n.wait("jsonpath={.status.readyToUse}=true", "volumesnapshot/monday")
	n.sh("user", "echo second >/data/file; echo new >/data/new")
	sum := n.sh("user", "md5sum </data/dir/random")

	n.apply(claim{name: "restored", size: "512Mi", source: "VolumeSnapshot/monday"}.String() +
		claim{name: "cloned", size: "256Mi", source: "PersistentVolumeClaim/data"}.String() +
		pod{name: "other", volumes: []string{"restored", "cloned"}}.String())
	n.ready("other")
	for dir, want := range map[string]string{"restored": "first", "cloned": "second"} {
		if got := n.sh("other", "cat /"+dir+"/file"); got != want {
			t.Errorf("%s: %q, want %q", dir, got, want)
		}
		if got := n.sh("other", "md5sum </"+dir+"/dir/random"); got != sum {
			t.Errorf("%s: dir/random has another sum", dir)
		}
		n.sh("other", "echo third >/"+dir+"/file")
	}
	if got := n.sh("other", "ls /restored; "+mebibytes("/restored")); got != "dir\nfile\n512" {
		t.Errorf("restored: %q", got)
	}
	if got := n.sh("user", "cat /data/file"); got != "second" {
		t.Errorf("the source is changed: %q", got)
	}

	// A snapshot does not need its source.
	n.kubectl("delete", "pod/user", "pod/other", "pvc/data", "pvc/restored")
	n.apply(claim{name: "again", size: "256Mi", source: "VolumeSnapshot/monday"}.String() + pod{name: "user", volumes: []string{"again"}}.String())
	n.ready("user")
	if got := n.sh("user", "cat /again/file"); got != "first" {
		t.Errorf("restored when the source was gone: %q", got)
	}
}

// Volumes of a pod, generic and inline, are there with it and go with it.
func TestEphemeral(t *testing.T) {
	n := newNamespace(t)
	before := len(volumes(t))
	n.apply(pod{name: "user", inline: map[string]string{
		"generic": "ephemeral: {volumeClaimTemplate: {spec: {storageClassName: " + class +
			", accessModes: [ReadWriteOnce], resources: {requests: {storage: 160Mi}}}}}",
		"inline": `csi: {driver: ` + driver + `, volumeAttributes: {size: 144Mi}}`,
	}}.String())
	n.ready("user")
	for dir, size := range map[string]string{"generic": "160", "inline": "144"} {
		if got := n.sh("user", "echo scratch >/"+dir+"/file; "+mebibytes("/"+dir)); got != size {
			t.Errorf("%s has %s MiB, want %s", dir, got, size)
		}
	}
	if now := len(volumes(t)); now != before+2 {
		t.Errorf("%d volumes are there for two", now-before)
	}
	n.kubectl("delete", "pod/user")
	eventually(t, "the volumes have gone", func() error {
		if now := len(volumes(t)); now != before {
			return fmt.Errorf("%d are left", now-before)
		}
		return nil
	})
}

// A raw block volume is a device of its size, keeps its data, and grows.
func TestBlock(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "disk", size: "64Mi", block: true}.String() + pod{name: "user", devices: []string{"disk"}}.String())
	n.ready("user")
	size := "[ -b /dev/disk ] && blockdev --getsize64 /dev/disk"
	if got := n.sh("user", size); got != fmt.Sprint(64<<20) {
		t.Errorf("the device has %s bytes", got)
	}
	n.sh("user", "dd if=/dev/urandom of=/dev/disk bs=1M count=8 conv=fsync 2>&1")
	sum := n.sh("user", "head -c 8M /dev/disk | md5sum")

	n.kubectl("patch", "pvc/disk", "-p", `{"spec":{"resources":{"requests":{"storage":"96Mi"}}}}`)
	n.wait("jsonpath={.status.capacity.storage}=96Mi", "pvc/disk")
	if got := n.sh("user", size); got != fmt.Sprint(96<<20) {
		t.Errorf("the device has %s bytes after it has grown", got)
	}

	n.apply(snapshot("image", "disk"))
	n.wait("jsonpath={.status.readyToUse}=true", "volumesnapshot/image")
	n.kubectl("delete", "pod/user")
	n.apply(claim{name: "copy", size: "96Mi", block: true, source: "VolumeSnapshot/image"}.String() + pod{name: "user", devices: []string{"disk", "copy"}}.String())
	n.ready("user")
	for _, device := range []string{"disk", "copy"} {
		if got := n.sh("user", "head -c 8M /dev/"+device+" | md5sum"); got != sum {
			t.Errorf("%s has other data", device)
		}
	}
}

// Of a ReadWriteOncePod volume one pod is the user, until it has gone.
func TestReadWriteOncePod(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi", mode: "ReadWriteOncePod"}.String() + pod{name: "first", volumes: []string{"data"}}.String())
	n.ready("first")
	n.apply(pod{name: "second", volumes: []string{"data"}}.String())
	n.event("pod/second", "FailedScheduling", "ReadWriteOncePod")
	n.kubectl("delete", "pod/first")
	n.ready("second")
}

// A snapshot that the cluster does not know yet is made known by a VolumeSnapshotContent, which says by a label whose it is.
func TestPreprovisionedSnapshot(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "64Mi"}.String() + pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	n.sh("user", "echo old >/data/file; sync")
	n.apply(snapshot("made", "data"))
	n.wait("jsonpath={.status.readyToUse}=true", "volumesnapshot/made")
	content := n.kubectl("get", "volumesnapshot/made", "-o", "jsonpath={.status.boundVolumeSnapshotContentName}")
	handle := must(t, "get", "volumesnapshotcontent/"+content, "-o", "jsonpath={.status.snapshotHandle}")
	must(t, "patch", "volumesnapshotcontent/"+content, "--type=merge", "-p", `{"spec":{"deletionPolicy":"Retain"}}`)
	n.kubectl("delete", "volumesnapshot/made")
	must(t, "delete", "volumesnapshotcontent/"+content)

	n.apply(fmt.Sprintf(`
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshotContent
metadata: {name: %[1]s-known, labels: {snapshot.storage.kubernetes.io/managed-by: %[2]s}}
spec:
  deletionPolicy: Delete
  driver: %[3]s
  source: {snapshotHandle: %[4]s}
  volumeSnapshotRef: {name: known, namespace: %[1]s}
---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: known}
spec: {source: {volumeSnapshotContentName: %[1]s-known}}
`, n.name, node(t), driver, handle))
	n.wait("jsonpath={.status.readyToUse}=true", "volumesnapshot/known")
	n.apply(claim{name: "restored", size: "64Mi", source: "VolumeSnapshot/known"}.String() + pod{name: "other", volumes: []string{"restored"}}.String())
	n.ready("other")
	if got := n.sh("other", "cat /restored/file"); got != "old" {
		t.Errorf("restored: %q", got)
	}
}

// A VolumeAttributesClass says how many inodes a volume gets, and another one changes that while it is in use.
func TestVolumeAttributesClass(t *testing.T) {
	n := newNamespace(t)
	for name, inodes := range map[string]string{"few-inodes": "1000", "more-inodes": "3000"} {
		n.apply(fmt.Sprintf(`
apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: %s}
driverName: %s
parameters: {inodes: "%s"}
`, name, driver, inodes))
		t.Cleanup(func() { must(t, "delete", "volumeattributesclass/"+name, "--wait=false") })
	}
	n.apply(claim{name: "data", size: "256Mi", more: []string{"volumeAttributesClassName: few-inodes"}}.String() +
		pod{name: "user", volumes: []string{"data"}}.String())
	n.ready("user")
	shows := func(want string) {
		t.Helper()
		if got := n.sh("user", "df -iP /data | awk 'NR == 2 { print $2 }'"); got != want {
			t.Errorf("the volume has %s inodes, want %s", got, want)
		}
	}
	shows("1000")
	n.kubectl("patch", "pvc/data", "-p", `{"spec":{"volumeAttributesClassName":"more-inodes"}}`)
	n.wait("jsonpath={.status.currentVolumeAttributesClassName}=more-inodes", "pvc/data")
	shows("3000")
}
