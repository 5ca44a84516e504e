package csi_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"

	"github.com/croftfs/croft/test/kit"
)

// notAdvertised are the capabilities that the driver does not have, by what csi-sanity says when it skips what
// is about them.
var notAdvertised = map[string]string{
	"ControllerPublishVolume not supported":   "PUBLISH_UNPUBLISH_VOLUME: a volume is on one node",
	"ControllerUnpublishVolume not supported": "PUBLISH_UNPUBLISH_VOLUME",
	"ControllerExpandVolume not supported":    "EXPAND_VOLUME of the controller: NodeExpandVolume does it",
	"NodeStageVolume not supported":           "STAGE_UNSTAGE_VOLUME: there is nothing to stage",
	"NodeUnstageVolume not supported":         "STAGE_UNSTAGE_VOLUME",
	"GroupControllerService not supported":    "GROUP_CONTROLLER_SERVICE",

	"Controller Publish, UnpublishVolume not supported": "PUBLISH_UNPUBLISH_VOLUME",
	// It compares messages with what they have in caches, and so fails for whoever returns a topology (v5.6.0).
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported": "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
}

// spec is one test of csi-sanity, as the helper reports it.
type spec struct {
	Name, State, Message string
}

// TestSanity runs csi-sanity in each tier that a volume may be served in, and for block volumes.
func TestSanity(t *testing.T) {
	for _, c := range []struct{ fstype, tier, access string }{
		{"ext4", "gate", "mount"}, {"ext4", "daemon", "mount"}, {"xfs", "gate", "mount"}, {"btrfs", "gate", "mount"}, {"ext4", "gate", "block"},
	} {
		t.Run(c.fstype+"/"+c.tier+"/"+c.access, func(t *testing.T) {
			n := start(t, c.fstype, "none", "--tier", c.tier)
			report := filepath.Join(n.RunDir, "sanity.json")
			r := kit.Process{Helper: "sanity", Args: []string{n.CSISocket(), filepath.Join(n.targets, "sanity"), c.access, report}}.Run(t)
			body, err := os.ReadFile(report)
			if err != nil {
				t.Fatalf("%v: %s", err, r)
			}
			var specs []spec
			kit.OK(t, json.Unmarshal(body, &specs))
			ran := judge(t, specs)
			if ran < 50 {
				t.Errorf("only %d specs have run of %d", ran, len(specs))
			}
			if t.Failed() {
				t.Log(r)
			}
			if left := n.List(); len(left) > 0 {
				t.Errorf("volumes are left: %v", slices.Collect(maps.Keys(left)))
			}
		})
	}
}

// judge makes each spec a test of its own, but those that are about what is not advertised, and counts them.
func judge(t *testing.T, specs []spec) (ran int) {
	for _, s := range specs {
		if s.State == types.SpecStatePending.String() {
			continue // csi-sanity's own: it is not finished
		}
		if _, expected := notAdvertised[s.Message]; s.State == types.SpecStateSkipped.String() && expected {
			continue
		}
		ran++
		t.Run(s.Name, func(t *testing.T) {
			if s.State != types.SpecStatePassed.String() {
				t.Errorf("%s: %s", s.State, s.Message)
			}
		})
	}
	return ran
}

// runSanity is csi-sanity in a process of its own: Ginkgo runs once in a process.
func runSanity(args []string) int {
	socket, dir, access, report := args[0], args[1], args[2], args[3]
	config := sanity.NewTestConfig()
	config.Address = socket
	config.TargetPath, config.StagingPath = filepath.Join(dir, "target"), filepath.Join(dir, "staging")
	config.TestVolumeSize, config.TestVolumeExpandSize = 16<<20, 32<<20
	config.TestVolumeAccessType = access
	config.TestVolumeParameters = map[string]string{"pool": "mnt"}
	config.TestVolumeMutableParameters = map[string]string{"inodes": "4096"}
	if access == "block" {
		config.TestVolumeMutableParameters = map[string]string{}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var specs []spec
	ginkgo.ReportAfterEach(func(r ginkgo.SpecReport) {
		s := spec{Name: strings.Join(append(r.ContainerHierarchyTexts, r.LeafNodeText), " "), State: r.State.String(), Message: r.Failure.Message}
		specs = append(specs, s)
	})
	sanity.GinkgoTest(&config)
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.NoColor = true
	passed := ginkgo.RunSpecs(stillGoing{}, "CSI sanity", suite, reporter)
	body, err := json.Marshal(specs)
	if err == nil {
		err = os.WriteFile(report, body, 0o600)
	}
	if err != nil || !passed {
		return 1
	}
	return 0
}

// stillGoing is what RunSpecs tells of a failure, which is in its result as well.
type stillGoing struct{}

func (stillGoing) Fail() {}
