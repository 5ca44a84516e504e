package csi_test

import (
	"cmp"
	"math"
	"slices"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/proto"

	"github.com/croftfs/croft/csi"
)

func anew(name string, c *csipb.VolumeCapability, least, most int64, params ...string) *csipb.CreateVolumeRequest {
	return &csipb.CreateVolumeRequest{Name: name, VolumeCapabilities: []*csipb.VolumeCapability{c},
		CapacityRange: &csipb.CapacityRange{RequiredBytes: least, LimitBytes: most}, Parameters: pairs(params...)}
}

// copied is anew from a source, which is a snapshot or a volume.
func copied(name, snapshot, volume string) *csipb.CreateVolumeRequest {
	r := anew(name, capability(rwo), 0, 0)
	r.VolumeContentSource = &csipb.VolumeContentSource{}
	if snapshot != "" {
		r.VolumeContentSource.Type = &csipb.VolumeContentSource_Snapshot{Snapshot: &csipb.VolumeContentSource_SnapshotSource{SnapshotId: snapshot}}
	} else {
		r.VolumeContentSource.Type = &csipb.VolumeContentSource_Volume{Volume: &csipb.VolumeContentSource_VolumeSource{VolumeId: volume}}
	}
	return r
}

func deviceFrom(name, volume string) *csipb.CreateVolumeRequest {
	r := copied(name, "", volume)
	r.VolumeCapabilities = []*csipb.VolumeCapability{blockCapability(rwo)}
	return r
}

func pairs(words ...string) map[string]string {
	if len(words) == 0 {
		return nil
	}
	m := make(map[string]string)
	for i := 0; i < len(words); i += 2 {
		m[words[i]] = words[i+1]
	}
	return m
}

func publish(id, target string, c *csipb.VolumeCapability, context ...string) *csipb.NodePublishVolumeRequest {
	return &csipb.NodePublishVolumeRequest{VolumeId: id, TargetPath: target, VolumeCapability: c, VolumeContext: pairs(context...)}
}

func unpublish(id, target string) *csipb.NodeUnpublishVolumeRequest {
	return &csipb.NodeUnpublishVolumeRequest{VolumeId: id, TargetPath: target}
}

func onNode(node string) *csipb.TopologyRequirement {
	return &csipb.TopologyRequirement{Requisite: []*csipb.Topology{{Segments: pairs(csi.TopologyKey, node)}}}
}

func expand(id, path string, least, most int64) *csipb.NodeExpandVolumeRequest {
	return &csipb.NodeExpandVolumeRequest{VolumeId: id, VolumePath: path, CapacityRange: &csipb.CapacityRange{RequiredBytes: least, LimitBytes: most}}
}

const (
	ephemeralContext = "csi.storage.k8s.io/ephemeral"

	web  = "{fast}/web"
	disk = "{fast}/disk"
)

// longest is the longest word.
var longest = slices.MaxFunc(words, func(a, b string) int { return cmp.Compare(len(a), len(b)) })

// seeds are what fuzzing begins with, and what it has found.
var seeds = map[string][]proto.Message{
	"identity": {&csipb.GetPluginInfoRequest{}, &csipb.GetPluginCapabilitiesRequest{}, &csipb.ProbeRequest{}},
	"what there is": {&csipb.ControllerGetCapabilitiesRequest{}, &csipb.NodeGetCapabilitiesRequest{}, &csipb.NodeGetInfoRequest{},
		&csipb.NodeGetStorageHealthRequest{}},
	"not served": {&csipb.ControllerPublishVolumeRequest{VolumeId: web, NodeId: "node-a"}, &csipb.ControllerUnpublishVolumeRequest{VolumeId: web},
		&csipb.ControllerExpandVolumeRequest{VolumeId: web}, &csipb.NodeStageVolumeRequest{VolumeId: web, StagingTargetPath: "{targets}/new"},
		&csipb.NodeUnstageVolumeRequest{VolumeId: web, StagingTargetPath: "{targets}/web"}},
	"empty requests": func() (all []proto.Message) {
		for _, m := range methods {
			all = append(all, newMessage(m.Input()))
		}
		return all[3:11]
	}(),
	"more empty requests": func() (all []proto.Message) {
		for _, m := range methods {
			all = append(all, newMessage(m.Input()))
		}
		return all[len(all)-8:]
	}(),

	"create twice, delete twice": {anew("new", capability(rwo), 1<<20, 0), anew("new", capability(rwo), 1<<20, 0), anew("new", capability(rwo), 2<<20, 0),
		&csipb.DeleteVolumeRequest{VolumeId: "{fast}/new"}, &csipb.DeleteVolumeRequest{VolumeId: "{slow}/new"}, &csipb.DeleteVolumeRequest{VolumeId: "{slow}/new"}},
	"create with parameters": {
		anew("new", capability(rwo), 1<<20, 0, "pool", "fast", "inodes", "1", "wipe", "true", "uid", "1", "gid", "4294967294", "mode", "0770", "csi.storage.k8s.io/pvc/name", "web"),
		anew("newer", capability(rwo), 0, 16<<20, "pool", "elsewhere"), anew("newer", capability(rwo), 0, 16<<20, "mode", "7777")},
	"create a device": {anew("new", blockCapability(rwop), 2<<20, 2<<20, "wipe", "true"), &csipb.DeleteVolumeRequest{VolumeId: "{fast}/new"},
		anew("new", blockCapability(rwop), 1<<62, 0), anew("newer", blockCapability(rwop), 0, 4096)},
	"sizes": {anew("new", capability(rox), math.MaxInt64, math.MaxInt64), anew("new", capability(rox), 1<<62, 0), anew("newer", capability(rox), -1, 0),
		anew("a", capability(rox), 1<<20+1, 1<<20+1), anew("b", capability(rox), 0, 1<<20-1), anew("c", capability(rox), math.MaxInt64, 0)},
	"names": {anew("..", capability(rwo), 1<<20, 0), anew("{fastdir}/volumes/web", capability(rwo), 1<<20, 0), anew("é漢\u202e", capability(rwo), 1<<20, 0),
		anew("new\x00", capability(rwo), 1<<20, 0), anew(words[len(words)-2], capability(rwo), 1<<20, 0), anew("csi-inline", capability(rwo), 1<<20, 0),
		anew("handmade", capability(rwo), 1<<20, 0), &csipb.DeleteVolumeRequest{VolumeId: "{fast}/../web"}},
	"create elsewhere": {&csipb.CreateVolumeRequest{Name: "new", VolumeCapabilities: []*csipb.VolumeCapability{capability(rwo)}, AccessibilityRequirements: onNode("node-b")},
		&csipb.CreateVolumeRequest{Name: "new", VolumeCapabilities: []*csipb.VolumeCapability{capability(rwo)}, AccessibilityRequirements: onNode("node-a")}},
	"clone and restore": {copied("new", "{fast}/snap", ""), copied("newer", "", web), copied("a", "0123456789abcdef/web", ""), copied("b", "", "{fast}/b"),
		copied("c", "", disk), &csipb.DeleteSnapshotRequest{SnapshotId: "{fast}/snap"}, &csipb.DeleteVolumeRequest{VolumeId: web}},
	"snapshots": {&csipb.CreateSnapshotRequest{Name: "new", SourceVolumeId: web}, &csipb.CreateSnapshotRequest{Name: "new", SourceVolumeId: disk},
		&csipb.CreateSnapshotRequest{Name: "newer", SourceVolumeId: disk}, &csipb.ListSnapshotsRequest{MaxEntries: 1},
		&csipb.ListSnapshotsRequest{SourceVolumeId: web, StartingToken: "{fast}/new"}, &csipb.GetSnapshotRequest{SnapshotId: "{fast}/newer"},
		&csipb.DeleteSnapshotRequest{SnapshotId: "{fast}/newer"}},
	"copies of a device in use": {publish(disk, "{targets}/disk", blockCapability(rwo)), &csipb.CreateSnapshotRequest{Name: "new", SourceVolumeId: disk}, deviceFrom("newer", disk),
		unpublish(disk, "{targets}/disk"), publish(disk, "{targets}/disk", blockCapability(rox)), &csipb.CreateSnapshotRequest{Name: "new", SourceVolumeId: disk}, deviceFrom("newer", disk)},
	"lists": {&csipb.ListVolumesRequest{MaxEntries: 1}, &csipb.ListVolumesRequest{StartingToken: "{fast}/handmade", MaxEntries: 2}, &csipb.ListVolumesRequest{MaxEntries: -1},
		&csipb.ListVolumesRequest{StartingToken: ".."}, &csipb.ControllerListVolumeHealthRequest{MaxEntries: 1}, &csipb.ListSnapshotsRequest{SnapshotId: "{fast}/snap"}},
	"about a volume": {&csipb.ControllerGetVolumeRequest{VolumeId: web}, &csipb.ControllerGetVolumeHealthRequest{VolumeId: disk},
		&csipb.ValidateVolumeCapabilitiesRequest{VolumeId: web, VolumeCapabilities: []*csipb.VolumeCapability{capability(rwo)}, Parameters: pairs("pool", "fast")},
		&csipb.ValidateVolumeCapabilitiesRequest{VolumeId: web, VolumeCapabilities: []*csipb.VolumeCapability{blockCapability(rwo)}},
		&csipb.NodeGetVolumeStatsRequest{VolumeId: web, VolumePath: "{targets}/web"}, &csipb.NodeGetVolumeStatsRequest{VolumeId: web, VolumePath: "{outside}"},
		&csipb.NodeGetVolumeHealthRequest{VolumeId: web, VolumePublishPath: "{targets}/web"}},
	"change": {&csipb.ControllerModifyVolumeRequest{VolumeId: web, MutableParameters: pairs("inodes", "1")}, &csipb.ControllerModifyVolumeRequest{VolumeId: web,
		MutableParameters: pairs("inodes", "0")}, &csipb.ControllerModifyVolumeRequest{VolumeId: disk, MutableParameters: pairs("inodes", "64")},
		expand(web, "{targets}/web", 1<<30, 0), expand(web, "{targets}/web", 1<<62, 0), expand(web, "{targets}/web", 0, 1<<20), expand(web, "{outside}", 1<<30, 0)},
	"capacity": {&csipb.GetCapacityRequest{}, &csipb.GetCapacityRequest{Parameters: pairs("pool", "slow"), AccessibleTopology: &csipb.Topology{Segments: pairs(csi.TopologyKey, "node-a")}},
		&csipb.GetCapacityRequest{Parameters: pairs("secret", "x")}, &csipb.GetCapacityRequest{AccessibleTopology: &csipb.Topology{Segments: pairs(csi.TopologyKey, "node-b")}}},

	"publish": {publish(web, "{targets}/new", capability(rwo, "noatime", "nosuid")), publish(web, "{targets}/new", capability(rwo)), publish(web, "{targets}/new", capability(rox)),
		publish("{fast}/handmade", "{targets}/new", capability(rwop)), &csipb.DeleteVolumeRequest{VolumeId: web}, unpublish(web, "{targets}/new"), unpublish(web, "{targets}/new")},
	"publish for a group": {publish("fast/web", "{targets}/new", forGroup("1")), publish(web, "{targets}/newer", forGroup("64")), publish("{fast}/handmade", "{targets}/a", forGroup("-1")),
		unpublish(web, "{targets}/web"), publish(web, "{targets}/b", capability(rwop))},
	"publish a device": {publish(disk, "{targets}/disk", blockCapability(rwo)), publish(disk, "{targets}/disk", capability(rwo)), publish(disk, "{targets}/new", blockCapability(rox)),
		expand(disk, "{targets}/disk", 16<<20, 0), &csipb.NodeGetVolumeStatsRequest{VolumeId: disk, VolumePath: "{targets}/disk"}, &csipb.DeleteVolumeRequest{VolumeId: disk},
		unpublish(disk, "{targets}/disk")},
	"inline": {publish("csi-inline", "{targets}/inline", capability(rwo), ephemeralContext, "true", "size", "1Mi", "csi.storage.k8s.io/pvc/name", "web"),
		publish("csi-inline", "{targets}/inline", capability(rwo), ephemeralContext, "true", "size", "1Mi"),
		&csipb.NodeGetVolumeStatsRequest{VolumeId: "csi-inline", VolumePath: "{targets}/inline"}, &csipb.CreateSnapshotRequest{Name: "new", SourceVolumeId: "csi-inline"},
		&csipb.ListVolumesRequest{}, &csipb.DeleteVolumeRequest{VolumeId: "csi-inline"}, unpublish("csi-inline", "{targets}/inline")},
	"inline, not well": {publish("csi-inline", "{targets}/inline", capability(rwo), ephemeralContext, "true"),
		publish("csi-inline", "{targets}/inline", capability(rwo), ephemeralContext, "true", "size", "1m"),
		publish("csi-inline", "{targets}/inline", capability(rwo), ephemeralContext, "true", "size", "1e30"),
		publish("csi-inline", "{targets}/inline", blockCapability(rwo), ephemeralContext, "true", "size", "1Mi"),
		publish(web, "{targets}/inline", capability(rwo), ephemeralContext, "true", "size", "9Ei")},

	"targets outside": {publish(web, "{outside}/empty", capability(rwo)), publish(web, "{targets}/../outside/empty", capability(rwo)),
		publish(web, "{fastdir}/volumes/web", capability(rwo)), publish(web, "{fastmnt}/web", capability(rwo)), publish(web, "{targets}", capability(rwo)),
		unpublish(web, "{outside}/empty"), unpublish(web, "{outside}/blank"), publish(web, "new", capability(rwo))},
	"targets by links": {publish(web, "{targets}/escape/new", capability(rwo)), publish(web, "{targets}/escape", capability(rwo)),
		publish(disk, "{targets}/escape/new", blockCapability(rwo)), unpublish(web, "{targets}/escape/empty"), unpublish(web, "{targets}/escape/blank"),
		unpublish(web, "{targets}/escape"), publish(web, "{targets}/loop/new", capability(rwo)), unpublish(web, "{targets}/loop/new")},
	"targets that are there": {publish(web, "{targets}/letter", capability(rwo)), publish(disk, "{targets}/keep", blockCapability(rwo)), publish(web, "{targets}/letter/new", capability(rwo)),
		unpublish(web, "{targets}/letter"), unpublish("{fast}/nobody", "{targets}/letter"), unpublish(web, "{targets}/keep"), unpublish(web, "{targets}/web/new")},
	"targets that hold something": {publish(web, "{targets}/keep", capability(rwo)), unpublish(web, "{targets}/keep"), publish(disk, "{targets}/letter", blockCapability(rwo)),
		unpublish(disk, "{targets}/letter")},
	"long words": {&csipb.GetSnapshotRequest{SnapshotId: longest + longest}, &csipb.DeleteVolumeRequest{VolumeId: "0123456789abcdef/" + longest},
		anew("new", capability(rwo, longest), 0, 0), anew("new", capability(rwo), 0, 0, longest, "1"), publish(web, "{targets}/letter/"+longest, capability(rwo))},
	"targets that cannot be": {publish(web, "{targets}/deep/er", capability(rwo)), publish(web, "{targets}/"+words[len(words)-2], capability(rwo)),
		publish(web, "{targets}/"+words[len(words)-3], capability(rwo)), publish(web, "{targets}/new\x00", capability(rwo)), unpublish(web, "{targets}/new\x00"),
		unpublish(web, "{targets}/"+words[len(words)-1]), publish(web, "{targets}/web/new", capability(rwo)), publish(web, "{targets}/new/..", capability(rwo))},
}
