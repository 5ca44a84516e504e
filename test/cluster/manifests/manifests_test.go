package manifests

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

func newReader(stream []byte) *bufio.Reader { return bufio.NewReader(bytes.NewReader(stream)) }

// TestKustomize builds all that can be built, and reads each object as Kubernetes does.
func TestKustomize(t *testing.T) {
	for _, dir := range kustomizations(t) {
		t.Run(dir, func(t *testing.T) {
			all := kustomize(t, dir)
			if len(all) == 0 {
				t.Error("nothing is in it")
			}
			checkPods(t, all)
		})
	}
}

func TestExamples(t *testing.T) {
	files, err := filepath.Glob(deploy + "/examples/*.yaml")
	ok(t, err)
	if len(files) < 9 {
		t.Fatalf("only %q", files)
	}
	classes := kustomize(t, "overlays/default")
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			text, err := os.ReadFile(f)
			ok(t, err)
			all := decode(t, text)
			for _, o := range all {
				if c, isClaim := o.typed.(*corev1.PersistentVolumeClaim); isClaim && c.Spec.VolumeName == "" &&
					find(classes, "StorageClass", *c.Spec.StorageClassName) == nil {
					t.Errorf("%s: there is no class %s", o, *c.Spec.StorageClassName)
				}
			}
			images(t, all)
		})
	}
}

// podSpecs are those of an object's pods.
func podSpecs(o object) (specs []corev1.PodSpec) {
	switch o := o.typed.(type) {
	case *corev1.Pod:
		specs = append(specs, o.Spec)
	case *appsv1.DaemonSet:
		specs = append(specs, o.Spec.Template.Spec)
	case *appsv1.Deployment:
		specs = append(specs, o.Spec.Template.Spec)
	case *appsv1.StatefulSet:
		specs = append(specs, o.Spec.Template.Spec)
	}
	return specs
}

func containers(p corev1.PodSpec) []corev1.Container {
	return slices.Concat(p.InitContainers, p.Containers)
}

var pinned = regexp.MustCompile(`^[a-z0-9./-]+:v?[0-9]+(\.[0-9]+)+$`)

// images wants each image to have a version.
func images(t *testing.T, all []object) {
	t.Helper()
	for _, o := range all {
		for _, p := range podSpecs(o) {
			for _, c := range containers(p) {
				if !pinned.MatchString(c.Image) {
					t.Errorf("%s, %s: image %s has no version", o, c.Name, c.Image)
				}
			}
		}
	}
}

// checkPods wants that only the daemon is privileged, and that nobody else has more than is said here.
func checkPods(t *testing.T, all []object) {
	t.Helper()
	images(t, all)
	for _, o := range all {
		for _, p := range podSpecs(o) {
			if p.HostNetwork || p.HostIPC || p.HostPID != (o.GetName() == "croft-node") {
				t.Errorf("%s: host's network %v, IPC %v, processes %v", o, p.HostNetwork, p.HostIPC, p.HostPID)
			}
			if !strings.HasPrefix(p.PriorityClassName, "system-") {
				t.Errorf("%s: priority class %q", o, p.PriorityClassName)
			}
			names := make(map[string]bool)
			for _, v := range p.Volumes {
				names[v.Name] = true
			}
			for _, c := range containers(p) {
				checkContainer(t, o, c)
				for _, m := range c.VolumeMounts {
					if !names[m.Name] {
						t.Errorf("%s, %s: there is no volume %s", o, c.Name, m.Name)
					}
				}
			}
		}
	}
}

func checkContainer(t *testing.T, o object, c corev1.Container) {
	t.Helper()
	s := c.SecurityContext
	if s == nil || s.ReadOnlyRootFilesystem == nil || !*s.ReadOnlyRootFilesystem {
		t.Errorf("%s, %s: its root filesystem can be written", o, c.Name)
		return
	}
	if c.Resources.Requests.Cpu().IsZero() || c.Resources.Requests.Memory().IsZero() {
		t.Errorf("%s, %s: no requests", o, c.Name)
	}
	if o.GetName() == "croft-node" && c.Name == "croft" {
		return
	}
	var may []corev1.Capability
	if strings.HasPrefix(c.Name, "pool-") {
		may = []corev1.Capability{"SYS_ADMIN", "DAC_READ_SEARCH", "DAC_OVERRIDE"}
	}
	switch {
	case s.Privileged != nil && *s.Privileged:
		t.Errorf("%s, %s is privileged", o, c.Name)
	case s.AllowPrivilegeEscalation == nil || *s.AllowPrivilegeEscalation:
		t.Errorf("%s, %s may gain privileges", o, c.Name)
	case s.Capabilities == nil || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) || !slices.Equal(s.Capabilities.Add, may):
		t.Errorf("%s, %s: capabilities %v, want %v alone", o, c.Name, s.Capabilities, may)
	}
	for _, m := range c.VolumeMounts {
		if m.MountPropagation != nil && *m.MountPropagation == corev1.MountPropagationBidirectional {
			t.Errorf("%s, %s: what it mounts on %s is the node's", o, c.Name, m.MountPath)
		}
	}
}

// TestFlags asks the program itself whether it knows the flags that it is started with.
func TestFlags(t *testing.T) {
	croft := filepath.Join(t.TempDir(), "croft")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-o", croft, "./cmd/croft")
	cmd.Dir = filepath.Join(deploy, "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build croft: %v\n%s", err, out)
	}
	asked := make(map[string]bool)
	ask := func(all []object) {
		for _, o := range all {
			for _, p := range podSpecs(o) {
				for _, c := range containers(p) {
					if !strings.HasPrefix(c.Image, "ghcr.io/croftfs/croft:") {
						continue
					}
					asked[c.Args[0]] = true
					// --help is read last, after what comes before it was understood.
					if out, err := exec.CommandContext(t.Context(), croft, append(slices.Clone(c.Args), "--help")...).CombinedOutput(); err != nil {
						t.Errorf("%s, %s: croft %q: %v\n%s", o, c.Name, c.Args, err, out)
					}
				}
			}
		}
	}
	ask(kustomize(t, "overlays/two-pools"))
	ask(kustomize(t, "overlays/all"))
	ask(template(t, "--set=node.overcommit=2,node.tier=read,node.maxVolumes=100,node.logLevel=debug", "--set-json=node.spare=1.5",
		"--set=controller.deadNodes.policy=delete,controller.deadNodes.after=90m,controller.logLevel=error"))
	for _, command := range []string{"node", "keeper", "controller", "pool"} {
		if !asked[command] {
			t.Errorf("nothing starts croft %s", command)
		}
	}
}
