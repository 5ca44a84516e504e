package manifests

import (
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func TestLint(t *testing.T) {
	if out, said, err := helm(t, "lint", "--strict", chart); err != nil {
		t.Errorf("%v\n%s%s", err, out, said)
	}
}

// TestSame compares what the chart makes of its defaults with what kustomize builds: with snapshots, without, and with all
// there is.
func TestSame(t *testing.T) {
	for _, test := range []struct {
		overlay string
		args    []string
	}{
		{"base", nil},
		{"base", []string{snapshotAPI, "--set=snapshots=false"}},
		{"overlays/default", []string{snapshotAPI}},
		{"overlays/default", []string{"--set=snapshots=true"}},
		{"overlays/all", []string{snapshotAPI, "--set=podMonitor.enabled=true,controller.deadNodes.policy=retain"}},
	} {
		want, got := byName(t, kustomize(t, test.overlay)), byName(t, template(t, test.args...))
		delete(want, "Namespace/croft-system") // Helm's --create-namespace
		if w, g := slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got)); !slices.Equal(w, g) {
			t.Errorf("%s has %q\nthe chart with %q %q", test.overlay, w, test.args, g)
		}
		for name := range want {
			if want[name] != got[name] {
				t.Errorf("%s of %s and of the chart with %q:\n%s\n%s", name, test.overlay, test.args, want[name], got[name])
			}
		}
	}
}

// byName has each object as JSON, without what may differ: labels that say who has made it, the default of imagePullPolicy,
// and the order of a pod's containers.
func byName(t *testing.T, all []object) map[string]string {
	t.Helper()
	named := make(map[string]string)
	for _, o := range all {
		labels := o.GetLabels()
		for _, key := range []string{"app.kubernetes.io/managed-by", "app.kubernetes.io/version", "helm.sh/chart"} {
			delete(labels, key)
		}
		o.SetLabels(labels)
		for _, key := range []string{"initContainers", "containers"} {
			list, found, err := unstructured.NestedSlice(o.Object, "spec", "template", "spec", key)
			ok(t, err)
			if !found {
				continue
			}
			for _, c := range list {
				if c := c.(map[string]any); c["imagePullPolicy"] == "IfNotPresent" {
					delete(c, "imagePullPolicy")
				}
			}
			slices.SortFunc(list, func(a, b any) int {
				return strings.Compare(a.(map[string]any)["name"].(string), b.(map[string]any)["name"].(string))
			})
			ok(t, unstructured.SetNestedSlice(o.Object, list, "spec", "template", "spec", key))
		}
		text, err := json.MarshalIndent(o.Object, "", " ")
		ok(t, err)
		name := o.GetKind() + "/" + o.GetName()
		if named[name] != "" {
			t.Errorf("%s is there twice", o)
		}
		named[name] = string(text)
	}
	return named
}

// TestPools has pools in one directory and in another, one of which is there already.
func TestPools(t *testing.T) {
	all := template(t, `--set-json=pools=[{"name":"a","path":"/srv/p/a"},{"name":"b","path":"/srv/p/b","create":false},{"name":"c","path":"/mnt/c/x","hostPathType":"Directory"}]`)
	checkPods(t, all)
	spec := find(all, "DaemonSet", "croft-node").typed.(*appsv1.DaemonSet).Spec.Template.Spec
	var made []string
	for _, c := range spec.InitContainers {
		made = append(made, c.Args[len(c.Args)-1])
	}
	if !slices.Equal(made, []string{"/srv/p/a", "/mnt/c/x"}) {
		t.Errorf("pools that are made: %q", made)
	}
	croft := spec.Containers[0]
	for _, arg := range []string{"--pool=a=/srv/p/a", "--pool=b=/srv/p/b", "--pool=c=/mnt/c/x"} {
		if !slices.Contains(croft.Args, arg) {
			t.Errorf("%s is not among %q", arg, croft.Args)
		}
	}
	types := make(map[string]string)
	for _, v := range spec.Volumes {
		if v.HostPath != nil && strings.HasPrefix(v.Name, "pools") {
			types[v.HostPath.Path] = string(*v.HostPath.Type)
		}
	}
	if !maps.Equal(types, map[string]string{"/srv/p": "DirectoryOrCreate", "/mnt/c": "Directory"}) {
		t.Errorf("the pools' directories: %v", types)
	}
	mounted := make(map[string]int)
	for _, m := range croft.VolumeMounts {
		if mounted[m.MountPath]++; mounted[m.MountPath] > 1 {
			t.Errorf("%s is mounted twice", m.MountPath)
		}
	}
	none := template(t, `--set-json=pools=[{"name":"b","path":"/srv/p/b","create":false}]`)
	if init := find(none, "DaemonSet", "croft-node").typed.(*appsv1.DaemonSet).Spec.Template.Spec.InitContainers; len(init) > 0 {
		t.Errorf("a pool that is not to be made is: %v", init)
	}
}

// TestValues has a value of each kind that is not the default.
func TestValues(t *testing.T) {
	all := template(t, snapshotAPI, "--set=kubeletDir=/var/lib/k0s/kubelet,image.repository=example.org/croft,image.tag=v9.9.9,image.pullPolicy=Always",
		`--set-json=storageClasses=[{"name":"fast","default":true,"parameters":{"pool":"main","inodes":"100","wipe":"true"},"reclaimPolicy":"Retain","volumeBindingMode":"Immediate","allowVolumeExpansion":false,"mountOptions":["noatime"],"annotations":{"a":"b"}}]`,
		`--set-json=volumeAttributesClasses=[{"name":"many","parameters":{"inodes":"4194304"}}]`,
		`--set-json=imagePullSecrets=[{"name":"secret"}]`,
		`--set-json=node.affinity={"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[{"matchExpressions":[{"key":"disk","operator":"Exists"}]}]}}}`,
		"--set=podMonitor.enabled=true,podMonitor.labels.release=prometheus")
	checkPods(t, all)
	class := find(all, "StorageClass", "fast").typed.(*storagev1.StorageClass)
	if class.Annotations["storageclass.kubernetes.io/is-default-class"] != "true" || class.Annotations["a"] != "b" || *class.AllowVolumeExpansion ||
		*class.ReclaimPolicy != corev1.PersistentVolumeReclaimRetain || *class.VolumeBindingMode != storagev1.VolumeBindingImmediate ||
		!slices.Equal(class.MountOptions, []string{"noatime"}) || class.Parameters["wipe"] != "true" {
		t.Errorf("%+v", class)
	}
	if find(all, "VolumeAttributesClass", "many") == nil || find(all, "PodMonitor", "croft-node").GetLabels()["release"] != "prometheus" {
		t.Error("no VolumeAttributesClass, or no label")
	}
	for _, name := range []string{"croft-node", "croft-keeper"} {
		spec := find(all, "DaemonSet", name).typed.(*appsv1.DaemonSet).Spec.Template.Spec
		if spec.Affinity == nil || len(spec.ImagePullSecrets) != 1 || spec.Containers[0].Image != "example.org/croft:v9.9.9" || spec.Containers[0].ImagePullPolicy != corev1.PullAlways {
			t.Errorf("%s: %+v", name, spec)
		}
		for _, v := range spec.Volumes {
			if v.HostPath != nil && strings.HasPrefix(v.HostPath.Path, "/var/lib/kubelet") {
				t.Errorf("%s: %s is not below kubeletDir", name, v.HostPath.Path)
			}
		}
	}
	if find(all, "ClusterRole", "croft-dead-nodes") != nil {
		t.Error("rights for what is off")
	}
}

// TestRefused has values that are wrong, and what helm has to name.
func TestRefused(t *testing.T) {
	for value, says := range map[string]string{
		"--set=pool=x":                                      "pool",
		"--set=node.tire=gate":                              "tire",
		"--set=node.tier=fast":                              "tier",
		"--set=node.overcommit=0.5":                         "overcommit",
		"--set=node.spare=100":                              "spare",
		"--set=controller.deadNodes.policy=":                "policy",
		"--set-json=controller.deadNodes.policy=false":      "policy",
		"--set=controller.deadNodes.after=soon":             "after",
		"--set=kubeletDir=var/lib":                          "kubeletDir",
		"--set-json=pools=[]":                               "pools",
		`--set-json=pools=[{"name":"a"}]`:                   "path",
		`--set-json=pools=[{"name":"A","path":"/srv/a/b"}]`: "name",
		`--set-json=pools=[{"name":"a","path":"/srv"}]`:     "path",
		`--set-json=pools=[{"name":"a","path":"/srv/a/b"},{"name":"a","path":"/srv/a/c"}]`: `two are called "a"`,
		`--set-json=pools=[{"name":"a","path":"/srv/a/b"},{"name":"b","path":"/srv/a/b"}]`: "two have the path /srv/a/b",
		`--set-json=storageClasses=[{"name":"x","parameters":{"fstype":"ext4"}}]`:          "fstype",
		`--set-json=storageClasses=[{"name":"x","parameters":{"wipe":true}}]`:              "wipe",
		`--set-json=storageClasses=[{"name":"x","reclaimPolicy":"Recycle"}]`:               "reclaimPolicy",
		"--set=snapshots=maybe": "snapshots",
	} {
		if out, said, err := helm(t, "template", "croft", chart, value); err == nil || !strings.Contains(said, says) {
			t.Errorf("%s: %v, nothing about %q: %s%.300s", value, err, says, said, out)
		}
	}
}
