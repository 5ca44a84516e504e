package pool

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	configName   = "pool.json"
	lockName     = "lock"
	metaName     = "meta"
	volumesName  = "volumes"
	orphansName  = "orphans"
	trashName    = "trash"
	snapshotName = "snapshots"
	blocksName   = "blocks"

	poolType   = "croft-pool"
	poolFormat = 1
)

// config is pool.json.
type config struct {
	Type   string `json:"type"`
	Format int    `json:"format"`
	ID     string `json:"id"`
}

// Init makes a pool of dir, which is created if its parent exists, and returns
// the pool's id. A directory that holds anything but lost+found is refused with
// ErrNotEmpty, a pool with ErrIsPool, one on a filesystem that lacks what Croft
// needs with ErrUnsuitable and the reasons. After a crash it can be repeated.
func Init(dir string) (id string, err error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(abs, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	if id, err := ReadID(abs); err == nil {
		return "", fmt.Errorf("%s: %w, its id is %s", abs, ErrIsPool, id)
	} else if !errors.Is(err, ErrNotPool) {
		return "", err
	}
	if err := checkEmpty(abs); err != nil {
		return "", err
	}
	if err := Suitable(abs); err != nil {
		return "", err
	}
	for _, name := range []string{metaName, volumesName, orphansName, trashName, snapshotName, blocksName} {
		if err := os.Mkdir(filepath.Join(abs, name), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return "", err
		}
	}
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return "", err
	}
	id = hex.EncodeToString(random[:])
	return id, publish(abs, config{Type: poolType, Format: poolFormat, ID: id})
}

// checkEmpty refuses a directory with foreign content. The directories that an
// Init before this one has left behind may be there, as long as they are empty.
func checkEmpty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		switch e.Name() {
		case "lost+found", configName + ".new":
			continue
		case metaName, volumesName, orphansName, trashName, snapshotName, blocksName:
			if below, err := os.ReadDir(filepath.Join(dir, e.Name())); err == nil && len(below) == 0 {
				continue
			}
		}
		return fmt.Errorf("%s: %w (it holds %q): name an empty or a new directory", dir, ErrNotEmpty, e.Name())
	}
	return nil
}

// publish writes pool.json: temporary name, sync, rename, sync of the directory.
func publish(dir string, c config) error {
	body, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, configName)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(body, '\n'))
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// ReadID returns the id of the pool in dir without opening it. ErrNotPool when
// dir is none, ErrNewerFormat when a newer version of Croft made it.
func ReadID(dir string) (string, error) {
	path := filepath.Join(dir, configName)
	body, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return "", fmt.Errorf("%s: %w: `croft pool init %s` makes one", dir, ErrNotPool, dir)
	case err != nil:
		return "", err
	}
	var c config
	if err := json.Unmarshal(body, &c); err != nil || c.Type != poolType || c.Format < 1 || !validID(c.ID) {
		return "", fmt.Errorf("%s: %w: %s was not written by Croft, or is damaged", dir, ErrNotPool, path)
	}
	if c.Format > poolFormat {
		return "", fmt.Errorf("%s: %w: format %d, this program knows up to %d", dir, ErrNewerFormat, c.Format, poolFormat)
	}
	return c.ID, nil
}

func validID(id string) bool {
	b, err := hex.DecodeString(id)
	return err == nil && len(b) == 8
}
