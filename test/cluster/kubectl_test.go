package cluster

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	system = "croft-system" // the namespace of Croft's own pods
	driver = "csi.croft.dev"
	class  = "croft" // the default StorageClass, and the VolumeSnapshotClass
)

// patience ends what hangs: nothing takes nearly as long when all is well. kubectl is given it as --timeout.
const patience = 5 * time.Minute

// inside makes a command in the namespaces of the cluster.
func inside(name string, args ...string) *exec.Cmd {
	pid, err := os.ReadFile(filepath.Join(run, "pid"))
	if err != nil {
		panic(err) // there is no cluster: start has failed to notice
	}
	here, err := os.Getwd()
	if err != nil {
		panic(err)
	}
	return exec.Command("nsenter", append([]string{"--target", strings.TrimSpace(string(pid)), "--mount", "--net", "--pid",
		"--", "env", "-C", here, name}, args...)...)
}

// kubectl runs it, and returns what it prints on stdout. The error has what it says on stderr.
func kubectl(args ...string) (string, error) { return kubectlWith("", args...) }

func kubectlWith(stdin string, args ...string) (string, error) {
	cmd := inside(filepath.Join(bin, "kubectl"), append([]string{"--kubeconfig", filepath.Join(run, "kubeconfig")}, args...)...)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = strings.NewReader(stdin), &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), err
}

// namespace is a test's own namespace.
type namespace struct {
	t    *testing.T
	name string
}

// newNamespace makes one. At the test's end it is deleted, and the test fails when persistent volumes, snapshots or volumes
// in the pool are left.
func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{t: t, name: strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))}
	before := volumes(t)
	must(t, "create", "namespace", n.name)
	t.Cleanup(func() {
		if t.Failed() {
			n.tell()
		}
		must(t, "delete", "namespace", n.name, "--timeout="+patience.String())
		eventually(t, "nothing is left", func() error {
			for _, kind := range []string{"persistentvolumes", "volumesnapshotcontents"} {
				left, err := kubectl("get", kind, "-o", "name")
				if err != nil || left != "" {
					return fmt.Errorf("%s: %q, %v", kind, left, err)
				}
			}
			if after := volumes(t); !slices.Equal(after, before) {
				return fmt.Errorf("volumes in the pool: %q, before: %q", after, before)
			}
			return nil
		})
	})
	return n
}

// tell logs what helps to understand a failure.
func (n *namespace) tell() {
	for _, args := range [][]string{
		{"-n", n.name, "get", "pods,pvc,pv,volumesnapshots", "-o", "wide"},
		{"-n", n.name, "get", "events", "--sort-by=.lastTimestamp"},
		{"-n", system, "get", "pods"},
		{"-n", system, "logs", "daemonset/croft-node", "--all-containers", "--prefix", "--tail=40"},
	} {
		out, err := kubectl(args...)
		n.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// kubectl runs it in the namespace.
func (n *namespace) kubectl(args ...string) string {
	n.t.Helper()
	return must(n.t, append([]string{"-n", n.name}, args...)...)
}

// apply applies manifests.
func (n *namespace) apply(manifests string) {
	n.t.Helper()
	if _, err := kubectlWith(manifests, "-n", n.name, "apply", "-f", "-"); err != nil {
		n.t.Fatal(err)
	}
}

// sh runs a script in a pod.
func (n *namespace) sh(pod, script string) string {
	n.t.Helper()
	return n.kubectl("exec", pod, "--", "sh", "-c", script)
}

// wait waits for a state, as `kubectl wait --for`.
func (n *namespace) wait(state, what string) {
	n.t.Helper()
	n.kubectl("wait", "--for="+state, what, "--timeout="+patience.String())
}

// ready waits for a pod.
func (n *namespace) ready(pod string) {
	n.t.Helper()
	n.wait("condition=Ready", "pod/"+pod)
}

// event waits for an event about an object, whose message has that text.
func (n *namespace) event(object, reason, text string) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s: %s: %s", object, reason, text), func() error {
		messages, err := kubectl("-n", n.name, "events", "--for", object, "-o",
			"jsonpath={range .items[?(@.reason==\""+reason+"\")]}{.message}{\"\\n\"}{end}")
		if err == nil && !strings.Contains(messages, text) {
			err = fmt.Errorf("events: %q", messages)
		}
		return err
	})
}

func must(t *testing.T, args ...string) string {
	t.Helper()
	out, err := kubectl(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// croft runs a command of Croft in the driver's pod.
func croft(t *testing.T, args ...string) string {
	t.Helper()
	return must(t, append([]string{"-n", system, "exec", "daemonset/croft-node", "-c", "croft", "--", "croft"}, args...)...)
}

// volumes lists the pool's volumes and snapshots.
func volumes(t *testing.T) (names []string) {
	t.Helper()
	for _, kind := range []string{"volume", "snapshot"} {
		var list []struct{ Name string }
		if err := json.Unmarshal([]byte(croft(t, kind, "list", "-o", "json")), &list); err != nil {
			t.Fatal(err)
		}
		for _, each := range list {
			names = append(names, each.Name)
		}
	}
	slices.Sort(names)
	return names
}

// eventually repeats f until it returns nil.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(200 * time.Millisecond) {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: not after %v: %v", what, patience, err)
		}
	}
}
