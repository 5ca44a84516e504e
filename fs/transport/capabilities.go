package transport

import "github.com/hanwen/go-fuse/v2/fuse"

// wantedCapabilities are asked of the kernel in addition to those that go-fuse
// asks for by itself or by an option of its own. Bits and meaning:
// include/uapi/linux/fuse.h, FUSE_INIT flags.
const wantedCapabilities = fuse.CAP_HANDLE_KILLPRIV_V2 | // set-id bits and file capabilities are dropped here: no GETXATTR before each write
	fuse.CAP_DONT_MASK | // the umask is applied here, where default ACLs are known
	fuse.CAP_SETXATTR_EXT | // SETXATTR says when an ACL change must drop set-gid
	fuse.CAP_HAS_RESEND | // unanswered requests survive the daemon
	fuse.CAP_PARALLEL_DIROPS | // lookups and listings of one directory at a time
	fuse.CAP_ASYNC_DIO |
	fuse.CAP_CACHE_SYMLINKS |
	fuse.CAP_DIRECT_IO_ALLOW_MMAP // shared mappings of a file opened with FOPEN_DIRECT_IO

// refusedCapabilities are never negotiated, whatever Options say.
const refusedCapabilities = fuse.CAP_AUTO_INVAL_DATA | // excludes EXPLICIT_INVAL_DATA
	fuse.CAP_POSIX_LOCKS | fuse.CAP_FLOCK_LOCKS | // locks in the kernel survive the daemon
	fuse.CAP_WRITEBACK_CACHE // excludes PASSTHROUGH

// capabilityNames are those whose absence is worth a line in the log.
var capabilityNames = []struct {
	bit  uint64
	name string
}{
	{fuse.CAP_READDIRPLUS, "READDIRPLUS"},
	{fuse.CAP_PARALLEL_DIROPS, "PARALLEL_DIROPS"},
	{fuse.CAP_DONT_MASK, "DONT_MASK"},
	{fuse.CAP_POSIX_ACL, "POSIX_ACL"},
	{fuse.CAP_ASYNC_DIO, "ASYNC_DIO"},
	{fuse.CAP_MAX_PAGES, "MAX_PAGES"},
	{fuse.CAP_CACHE_SYMLINKS, "CACHE_SYMLINKS"},
	{fuse.CAP_EXPLICIT_INVAL_DATA, "EXPLICIT_INVAL_DATA"},
	{fuse.CAP_HANDLE_KILLPRIV_V2, "HANDLE_KILLPRIV_V2"},
	{fuse.CAP_SETXATTR_EXT, "SETXATTR_EXT"},
	{fuse.CAP_DIRECT_IO_ALLOW_MMAP, "DIRECT_IO_ALLOW_MMAP"},
	{fuse.CAP_PASSTHROUGH, "PASSTHROUGH"},
	{fuse.CAP_HAS_RESEND, "HAS_RESEND"},
	{fuse.CAP_ALLOW_IDMAP, "ALLOW_IDMAP"},
}

// missingCapabilities names what was hoped for, was not disabled by the caller, and did not come.
func missingCapabilities(negotiated, disabled uint64) []string {
	var missing []string
	for _, c := range capabilityNames {
		if c.bit&(negotiated|disabled) == 0 {
			missing = append(missing, c.name)
		}
	}
	return missing
}
