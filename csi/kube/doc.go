// Package kube is what Croft asks of Kubernetes' API server: to let go of the volumes of nodes that are gone, to send claims where
// they can be met, and to carry what a volume's node is asked by the controller.
//
// A volume is on its node. When that leaves the cluster for good, its PersistentVolume (PV) stays, and so do the claim
// (PVC) that is bound to it and the pods that wait for it: no other node may have them, and the provisioner that would
// delete them is gone as well. A Releaser finds such PVs and lets go of them, by a Policy.
//
// # Which nodes are gone
//
// Those without a Node object. One that is not ready, cordoned or shut down has its object, and is left alone however
// long that lasts. A PV says in its node affinity, by the topology key, on which nodes it may be; it is gone when all
// of those are. A node is there when a Node has that name, or the topology key as a label with that value. What cannot
// be told for sure counts as there: a PV whose affinity has a term without the key, or an API server that shows no nodes
// at all.
//
// A node is gone for good when it has been seen to be gone, in every sweep, for Options.Grace. That is counted from
// when this process saw it first, so that a restart only makes it longer; and the API server is asked once more before
// anything is changed.
//
// # What is done
//
//	             PVC            PV, reclaim policy Delete   PV, reclaim policy Retain
//	PolicyRetain deleted        made Retain, and stays      stays
//	PolicyDelete deleted        deleted                     stays
//
// So a StatefulSet makes a new claim, for another node, in either case. The PV is made Retain before its claim is
// deleted. It is deleted only when it is bound to no claim any more. Data is never touched: nobody could, and when the
// node comes back the volume is in its pool as it was.
//
// Each step may be repeated and is bound to the object that was looked at (by UID and, where something is changed, by
// resource version): several processes may do the same at the same time, and none needs to lead.
//
// # Claims for copies
//
// A snapshot's restore and a volume's clone are made on its node, and no other can make them. A Placer has such a claim selected for
// that node: the scheduler then takes its pods there alone, and that node's provisioner makes the volume. Where a volume is its PV's
// affinity says; where a snapshot is, the label by which the snapshotters of the nodes share the work.
//
// # Volumes that are to change
//
// A VolumeAttributesClass changes a volume in use. external-resizer, of which a cluster has one, asks the driver's
// controller to do that, which reaches no node. So an Asker, there, leaves the question in an annotation of the PV, with a label
// that names the node, and waits. A Changer, in the daemon of that node, watches for its label, does it, and leaves the
// answer; the Asker takes both away. A question has an id of its own, so that an answer is not taken for one to another.
package kube
