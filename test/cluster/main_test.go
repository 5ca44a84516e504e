package cluster

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var keep = flag.Bool("keep", false, "leave the cluster up at the end, and use the one that is up")

// The scripts of this directory have their own view of these: env.sh.
var (
	run = os.Getenv("CLUSTER_RUN")
	bin = os.Getenv("CLUSTER_BIN")
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := withCluster(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// withCluster brings the cluster up, calls f, and takes the cluster down whatever happens.
func withCluster(f func() int) (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, fmt.Errorf("these tests start a cluster: run them as root")
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return 0, err
	}
	if bin == "" {
		bin = filepath.Join(cache, "croft-cluster", "bin")
	}
	if run == "" {
		run = filepath.Join(os.TempDir(), "croft-cluster")
	}
	os.Setenv("CLUSTER_BIN", bin)
	os.Setenv("CLUSTER_RUN", run)
	if *keep && up() {
		return f(), nil
	}
	if !*keep {
		defer func() {
			if downErr := script("./down.sh"); err == nil {
				err = downErr
			}
		}()
	}
	if err := start(); err != nil {
		return 0, err
	}
	return f(), nil
}

func up() bool {
	pid, err := os.ReadFile(filepath.Join(run, "pid"))
	if err != nil {
		return false
	}
	cmdline, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(pid)), "cmdline"))
	return err == nil && bytes.Contains(cmdline, []byte("node.sh"))
}

// script runs one of this directory's scripts.
func script(name string, args ...string) error {
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
