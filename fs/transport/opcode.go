package transport

import (
	"encoding/binary"
	"fmt"
)

// Opcodes that this package itself looks at: enum fuse_opcode in include/uapi/linux/fuse.h.
const (
	opForget      = 2
	opFsync       = 20
	opInit        = 26
	opFsyncDir    = 30
	opInterrupt   = 36
	opNotifyReply = 41
	opBatchForget = 42

	opFallocate       = 43
	opCopyFileRange   = 47
	opSyncFS          = 50
	opCopyFileRange64 = 53
)

// slowOpcode tells that such a request waits for the disk, or moves any amount of data.
func slowOpcode(op uint32) bool {
	switch op {
	case opFsync, opFsyncDir, opFallocate, opCopyFileRange, opCopyFileRange64, opSyncFS:
		return true
	}
	return false
}

// opcodeSlots is how many opcodes are counted apart. Slot 0 is for those beyond.
const opcodeSlots = 64

// opcodeNames holds enum fuse_opcode, without its prefix.
var opcodeNames = [opcodeSlots]string{
	0:  "OTHER",
	1:  "LOOKUP",
	2:  "FORGET",
	3:  "GETATTR",
	4:  "SETATTR",
	5:  "READLINK",
	6:  "SYMLINK",
	8:  "MKNOD",
	9:  "MKDIR",
	10: "UNLINK",
	11: "RMDIR",
	12: "RENAME",
	13: "LINK",
	14: "OPEN",
	15: "READ",
	16: "WRITE",
	17: "STATFS",
	18: "RELEASE",
	20: "FSYNC",
	21: "SETXATTR",
	22: "GETXATTR",
	23: "LISTXATTR",
	24: "REMOVEXATTR",
	25: "FLUSH",
	26: "INIT",
	27: "OPENDIR",
	28: "READDIR",
	29: "RELEASEDIR",
	30: "FSYNCDIR",
	31: "GETLK",
	32: "SETLK",
	33: "SETLKW",
	34: "ACCESS",
	35: "CREATE",
	36: "INTERRUPT",
	37: "BMAP",
	38: "DESTROY",
	39: "IOCTL",
	40: "POLL",
	41: "NOTIFY_REPLY",
	42: "BATCH_FORGET",
	43: "FALLOCATE",
	44: "READDIRPLUS",
	45: "RENAME2",
	46: "LSEEK",
	47: "COPY_FILE_RANGE",
	48: "SETUPMAPPING",
	49: "REMOVEMAPPING",
	50: "SYNCFS",
	51: "TMPFILE",
	52: "STATX",
	53: "COPY_FILE_RANGE_64",
}

// OpcodeName returns the kernel's name of an opcode, or its number for one that is not known here.
func OpcodeName(op uint32) string {
	if op > 0 && op < opcodeSlots && opcodeNames[op] != "" {
		return opcodeNames[op]
	}
	return fmt.Sprintf("OPCODE_%d", op)
}

// expectsReply tells whether the kernel waits for an answer.
func expectsReply(op uint32) bool {
	return op != opForget && op != opBatchForget && op != opNotifyReply
}

// Sizes and offsets of struct fuse_in_header and struct fuse_out_header.
const (
	inHeaderSize  = 40
	outHeaderSize = 16
)

func messageLength(msg []byte) int   { return int(binary.NativeEndian.Uint32(msg)) }
func requestNode(msg []byte) uint64  { return binary.NativeEndian.Uint64(msg[16:]) }
func requestOpcode(in []byte) uint32 { return binary.NativeEndian.Uint32(in[4:]) }
func requestUnique(in []byte) uint64 { return binary.NativeEndian.Uint64(in[8:]) }

// putOutHeader writes a reply's or a notification's header: status is a negated errno or a notification's code.
func putOutHeader(out []byte, length int, status int32, unique uint64) {
	binary.NativeEndian.PutUint32(out, uint32(length))
	binary.NativeEndian.PutUint32(out[4:], uint32(status))
	binary.NativeEndian.PutUint64(out[8:], unique)
}
