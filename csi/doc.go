// Package csi serves the Container Storage Interface (CSI) over the pools of one node: Identity, Controller and Node
// on one unix socket (Driver), and the part of it that belongs to no node (ControllerOnly).
//
// # Names and ids
//
// A volume's id is the id of its pool, a slash, and its name in the pool; a snapshot's likewise. It says on which
// node a thing is without asking anybody: one of a pool that is not here is ErrElsewhere, never "not found", and
// is not taken for deleted. The pool may also be given by its name on this node (a static PersistentVolume's handle "fast/web-0").
//
// The name is the one that the CO wants the volume to have, where it can be a name of a pool (pool.CheckName) and is short
// enough for an id of 128 bytes; else it is a hash of that. The label LabelName keeps what the CO said. What was made
// otherwise than by CSI has no such label, and is never taken for what CreateVolume has made.
//
// The id of an ephemeral inline volume is chosen by kubelet and has no slash. Such a volume has the label LabelEphemeral,
// with the target that it was made for.
//
// # Calls that are repeated
//
// Every call may be repeated, at any moment, also while the first one is under way and after the daemon was killed in
// the middle of it. Nothing is kept here: a pool's records, which are durable before a call is answered, say what there
// is, and the kernel says what is mounted. Calls about one volume go one after the other; a call that has waited for
// another until its deadline is Aborted. Copies (snapshots, clones, restores) go on when their caller has gone, so that a CO
// that waits a minute at a time comes to an end: the next call of that name waits for the same copy.
//
// # Errors
//
// The pools' errors become gRPC codes in one table, errors.go.
package csi
