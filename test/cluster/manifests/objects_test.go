package manifests

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	snapshotv1 "github.com/kubernetes-csi/external-snapshotter/client/v8/apis/volumesnapshot/v1"
	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	kubernetes "k8s.io/client-go/kubernetes/scheme"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const (
	deploy = "../../../deploy"
	chart  = deploy + "/helm/croft"
	// snapshotAPI is what the chart looks for.
	snapshotAPI = "--api-versions=snapshot.storage.k8s.io/v1"
)

// object is a manifest, and how it reads as the type that Kubernetes has for it.
type object struct {
	unstructured.Unstructured
	typed runtime.Object
}

func (o object) String() string {
	return fmt.Sprintf("%s %s/%s", o.GetKind(), o.GetNamespace(), o.GetName())
}

// strict refuses fields that a type does not have.
var strict = func() runtime.Decoder {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{kubernetes.AddToScheme, snapshotv1.AddToScheme, monitoringv1.AddToScheme} {
		if err := add(scheme); err != nil {
			panic(err) // two types of one name
		}
	}
	return serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
}()

// decode reads the documents of a stream, each as an object that Kubernetes takes.
func decode(t *testing.T, stream []byte) []object {
	t.Helper()
	var all []object
	documents := utilyaml.NewYAMLReader(newReader(stream))
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return all
		}
		ok(t, err)
		var o object
		ok(t, yaml.UnmarshalStrict(document, &o.Object)) // also no key twice
		if len(o.Object) == 0 {
			continue // comments alone
		}
		o.typed, _, err = strict.Decode(document, nil, nil)
		if err != nil {
			t.Errorf("%s: %v", o, err)
			continue
		}
		all = append(all, o)
	}
}

// kustomize builds a kustomization of deploy/kubernetes.
func kustomize(t *testing.T, dir string) []object {
	t.Helper()
	m, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(deploy, "kubernetes", dir))
	ok(t, err)
	text, err := m.AsYaml()
	ok(t, err)
	return decode(t, text)
}

// helmProgram is $HELM, or what TestMain builds.
var helmProgram = os.Getenv("HELM")

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if helmProgram == "" {
		dir, err := os.MkdirTemp("", "helm")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		helmProgram = filepath.Join(dir, "helm")
		cmd := exec.Command("go", "build", "-o", helmProgram, "helm.sh/helm/v4/cmd/helm")
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			panic(fmt.Errorf("build helm: %w", err))
		}
	}
	return m.Run()
}

// helm runs it, and returns what it prints and says.
func helm(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, said bytes.Buffer
	cmd := exec.CommandContext(t.Context(), helmProgram, args...)
	home := t.TempDir() // not the caller's plugins and repositories
	cmd.Env = append(os.Environ(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home, "KUBECONFIG="+home+"/none")
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	return out.String(), said.String(), err
}

// template renders the chart.
func template(t *testing.T, args ...string) []object {
	t.Helper()
	text, said, err := helm(t, append([]string{"template", "croft", chart, "--namespace=croft-system"}, args...)...)
	if err != nil {
		t.Fatalf("helm template %q: %v\n%s", args, err, said)
	}
	return decode(t, []byte(text))
}

// find returns the object of that kind and name; nil when there is none.
func find(all []object, kind, name string) *object {
	for i := range all {
		if all[i].GetKind() == kind && all[i].GetName() == name {
			return &all[i]
		}
	}
	return nil
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// kustomizations are those of deploy/kubernetes that are complete by themselves.
func kustomizations(t *testing.T) (dirs []string) {
	t.Helper()
	root := filepath.Join(deploy, "kubernetes")
	files, err := filepath.Glob(root + "/*/kustomization.yaml")
	ok(t, err)
	more, err := filepath.Glob(root + "/overlays/*/kustomization.yaml")
	ok(t, err)
	for _, f := range append(files, more...) {
		dir, err := filepath.Rel(root, filepath.Dir(f))
		ok(t, err)
		dirs = append(dirs, dir)
	}
	for _, want := range []string{"base", "overlays/default", "snapshot-controller"} {
		if !strings.Contains(strings.Join(dirs, " "), want) {
			t.Fatalf("no kustomization %s among %q", want, dirs)
		}
	}
	return dirs
}
