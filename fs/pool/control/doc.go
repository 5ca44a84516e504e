// Package control lets other processes manage a pool that a daemon has open.
//
// The daemon runs a Server on a unix socket, <run directory>/<pool id>.sock;
// a Client has the same methods as the pool. What crosses is HTTP with JSON:
//
//	GET    /v1/info            pool.Info
//	GET    /v1/requests        pool.Pool.Requests
//	GET    /v1/volumes         []pool.Volume
//	GET    /v1/volumes/{name}  pool.Volume
//	POST   /v1/volumes/{name}  pool.CreateOptions → pool.Volume
//	PATCH  /v1/volumes/{name}  pool.ResizeOptions → pool.Volume
//	DELETE /v1/volumes/{name}  pool.DeleteOptions
//	POST   /v1/check           pool.CheckOptions → pool.CheckResult
//	GET    /metrics            in the text form of Prometheus
//
// Errors cross as {"code", "message"}. The client's error has the message as its
// text and is, for errors.Is, the sentinel that the pool's error was: see codes.
// A field that this version does not know is refused and not ignored: a newer
// client must hear that what it asked for was not done.
//
// # Who may call
//
// Root only. The run directory is 0700, the socket 0600, and the server asks
// the kernel for the caller's user id (SO_PEERCRED) besides.
//
// # Stale sockets
//
// A daemon that was killed leaves its socket behind. Whoever starts a Server
// holds the pool's lock, so a socket on which nobody listens is removed; one on
// which somebody does is left alone, and Listen fails.
package control
