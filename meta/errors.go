package meta

import "errors"

// Errors of the record store, wrapped with the name of what they are about.
var (
	// ErrNotFound is returned when there is no record of that name.
	ErrNotFound = errors.New("no such record")
	// ErrExists is returned when a volume of that name is recorded already.
	ErrExists = errors.New("record exists")
	// ErrInUse is returned by Open when another process has the store open.
	ErrInUse = errors.New("record store is in use")
	// ErrNewerFormat is returned when the store or a record was written by a
	// newer version of Croft.
	ErrNewerFormat = errors.New("written by a newer version")
	// ErrCorrupt is returned when a record cannot be decoded.
	ErrCorrupt = errors.New("record is corrupt")
)
