// Package kit is what the integration suites under test/ stand on: it builds
// the croft binary, makes pools on loop images of real filesystems, runs the
// daemon as a process of its own, and looks after every test that nothing was
// left wrong or behind.
//
// The suites need root, /dev/fuse, loop devices and the tools of the
// filesystems. What is missing fails a test, it does not skip it.
//
// After every test, while the daemon still runs: no descriptor of a tenant's
// file is open in an idle daemon, `croft check` finds nothing. After it: no
// FUSE mount, no loop device and no process of it are left.
//
// Waiting is always for an event: an exit of a process, or a state that is
// polled. Time limits are backstops against a hang (Backstop), never the way
// in which a test decides that something has happened.
package kit
