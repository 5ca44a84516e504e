package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	// manifests are what a user applies.
	manifests = "../../deploy/kubernetes/overlays/default"
	// snapshotController is what a cluster with snapshots has to have.
	snapshotController = "../../deploy/kubernetes/snapshot-controller"
	// poolSize is that of the filesystem which the pool has for itself. It is sparse: no test fills it.
	poolSize = 100 << 30
	// nextTag is the image's tag of the version that croft is upgraded to.
	nextTag = "next"
)

// start builds what is not built yet, brings the cluster up, and Croft in it.
func start() error {
	for _, name := range []string{"./debs.sh", "./build.sh"} {
		if err := script(name); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(run, 0o700); err != nil {
		return err
	}
	images, err := pinned()
	if err != nil {
		return err
	}
	for i, image := range images {
		if filepath.Base(repository(image)) != "croft" {
			continue
		}
		this, next := filepath.Join(run, "croft"), filepath.Join(run, "croft-next")
		if err := buildCroft(this, "v0.0.0-this"); err != nil {
			return err
		}
		if err := buildCroft(next, "v0.0.0-next"); err != nil {
			return err
		}
		images[i] = image + "=" + this
		images = append(images, repository(image)+":"+nextTag+"="+next)
		break
	}
	if err := script("./images.sh", images...); err != nil {
		return err
	}
	if err := makePool(filepath.Join(run, "pool.image"), poolSize); err != nil {
		return err
	}
	if err := script("./up.sh"); err != nil {
		return err
	}
	return deploy()
}

// pinned lists the images that the manifests name.
func pinned() ([]string, error) {
	var images []string
	for _, dir := range []string{manifests, snapshotController} {
		cmd := exec.Command(filepath.Join(bin, "kubectl"), "kustomize", dir)
		cmd.Stderr = os.Stderr
		text, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("kubectl kustomize %s: %w", dir, err)
		}
		for _, found := range regexp.MustCompile(`(?m)^[ -]*image: "?([^"\s]+)`).FindAllSubmatch(text, -1) {
			images = append(images, string(found[1]))
		}
	}
	slices.Sort(images)
	return slices.Compact(images), nil
}

// repository is an image's name without its tag.
func repository(image string) string {
	i := strings.LastIndexByte(image, ':')
	return image[:i]
}

func buildCroft(path, version string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version="+version, "-o", path, "./cmd/croft")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build croft: %w\n%s", err, out)
	}
	return nil
}

// makePool makes an image of the filesystem that node.sh mounts for the pool.
func makePool(image string, size int64) error {
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return err
	}
	if out, err := exec.Command("mkfs.xfs", "-q", "-K", image).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.xfs: %w\n%s", err, out)
	}
	return nil
}

// deploy applies what a user would, and waits until it works.
func deploy() error {
	for _, args := range [][]string{
		{"apply", "-f", filepath.Join(bin, "share", "snapshots")},
		{"wait", "--for=condition=Established", "crd", "--all", "--timeout=2m"},
		{"apply", "-k", snapshotController},
		{"-n", "kube-system", "rollout", "status", "deployment", "--timeout=5m"},
		{"apply", "-k", manifests},
		{"-n", system, "wait", "--for=create", "pod", "-l", "app.kubernetes.io/component=keeper", "--timeout=5m"},
		{"-n", system, "wait", "--for=condition=Ready", "pod", "--all", "--timeout=5m"},
		{"wait", "--for=jsonpath={.spec.drivers[0].name}=" + driver, "csinode", "--all", "--timeout=2m"},
	} {
		if out, err := kubectl(args...); err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
	}
	return nil
}
