package meta

import "errors"

// Errors of the record store, wrapped with the name of what they are about.
var (
	// ErrNotFound is returned when there is no record of that name.
	ErrNotFound = errors.New("no such record")
	// ErrExists is returned when a volume of that name is recorded already.
	ErrExists = errors.New("record exists")
	// ErrInUse is returned by Open when the store is open already, in this
	// process or another.
	ErrInUse = errors.New("record store is in use")
	// ErrNewerFormat is returned when the store or a record was written by a
	// newer version of Croft.
	ErrNewerFormat = errors.New("written by a newer version")
	// ErrNoRoom is returned when the disk is so full that Badger could die of
	// what was asked. Nothing was changed.
	ErrNoRoom = errors.New("the disk has no room for it")
	// ErrCorrupt is returned when a record cannot be decoded.
	ErrCorrupt = errors.New("record is corrupt")
)
