// Package keeper keeps descriptors for daemons that come and go: a FUSE connection lives as long as
// somebody has its descriptor, and so does the memory in which a daemon has
// written what the next one must know (fs/state). A keeper knows nothing of either: it
// holds what it is given, by the pool's id and a name, and gives it back. It opens nothing.
//
// # Protocol
//
// A client connects to a unix socket (SOCK_SEQPACKET, mode 0600); who is not the
// keeper's own user is refused by his credentials (SO_PEERCRED). It sends requests
// and waits for the answer to each:
//
//	version op pool name    one byte, one byte, 64 bytes, 32 bytes, the rest zero
//
//	hold    with one descriptor: keeps it under the name, in the place of what was there
//	list    answers with the names, each ended by a zero
//	get     answers with the descriptor of a name
//	drop    lets go of all of the pool's
//
// An answer is a byte, 0 when all is well, and then a message for people, or what was asked for. A request that
// is malformed ends the connection, and so does a client that takes no answer for ten seconds. What came with
// it is closed. The end of a connection lets go of nothing.
package keeper
