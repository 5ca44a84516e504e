package cluster

import (
	"fmt"
	"strings"
)

// claim is a PersistentVolumeClaim; what is left out is the default's.
type claim struct {
	name   string
	size   string
	class  string   // default: class
	mode   string   // of access; default ReadWriteOnce
	block  bool     // a raw block volume
	source string   // of its data, such as "VolumeSnapshot/snap" or "PersistentVolumeClaim/data"
	more   []string // further lines of the spec
}

func (c claim) String() string {
	if c.class == "" {
		c.class = class
	}
	if c.mode == "" {
		c.mode = "ReadWriteOnce"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %s}
spec:
  storageClassName: %s
  accessModes: [%s]
  resources: {requests: {storage: %s}}
`, c.name, c.class, c.mode, c.size)
	if c.block {
		b.WriteString("  volumeMode: Block\n")
	}
	if kind, name, ok := strings.Cut(c.source, "/"); ok {
		group := ""
		if kind == "VolumeSnapshot" {
			group = "apiGroup: snapshot.storage.k8s.io, "
		}
		fmt.Fprintf(&b, "  dataSource: {%skind: %s, name: %s}\n", group, kind, name)
	}
	for _, line := range c.more {
		b.WriteString("  " + line + "\n")
	}
	return b.String()
}

// pod is one of a busybox that sleeps, with volumes.
type pod struct {
	name    string
	volumes []string          // claims, each on /NAME
	devices []string          // claims of raw block volumes, each at /dev/NAME
	inline  map[string]string // volumes of the pod's own, each on /NAME: their source in YAML
	script  string            // default: sleeps
	more    []string          // further lines of the spec
}

func (p pod) String() string {
	if p.script == "" {
		p.script = "while :; do sleep 1; done"
	}
	var b strings.Builder
	fmt.Fprintf(&b, `---
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  terminationGracePeriodSeconds: 0
`, p.name)
	for _, line := range p.more {
		b.WriteString("  " + line + "\n")
	}
	fmt.Fprintf(&b, `  containers:
    - name: main
      image: busybox
      imagePullPolicy: Never
      command: [sh, -c, %q]
      volumeMounts:
`, p.script)
	for _, name := range p.volumes {
		fmt.Fprintf(&b, "        - {name: %s, mountPath: /%s}\n", name, name)
	}
	for name := range p.inline {
		fmt.Fprintf(&b, "        - {name: %s, mountPath: /%s}\n", name, name)
	}
	b.WriteString("      volumeDevices:\n")
	for _, name := range p.devices {
		fmt.Fprintf(&b, "        - {name: %s, devicePath: /dev/%s}\n", name, name)
	}
	b.WriteString("  volumes:\n")
	for _, names := range [][]string{p.volumes, p.devices} {
		for _, name := range names {
			fmt.Fprintf(&b, "    - {name: %s, persistentVolumeClaim: {claimName: %s}}\n", name, name)
		}
	}
	for name, source := range p.inline {
		fmt.Fprintf(&b, "    - {name: %s, %s}\n", name, source)
	}
	return b.String()
}

// snapshot is a VolumeSnapshot of a claim.
func snapshot(name, of string) string {
	return fmt.Sprintf(`---
apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {name: %s}
spec: {volumeSnapshotClassName: %s, source: {persistentVolumeClaimName: %s}}
`, name, class, of)
}
