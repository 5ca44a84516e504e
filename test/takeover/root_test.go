package takeover_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/croftfs/croft/test/kit"
)

// TestDeletedVolumes kills the daemon while it tells the kernel of deleted volumes: that takes the lock of the directory
// of volumes, which whoever looks for a name there has until the daemon has answered. One that waited for it could not end.
func TestDeletedVolumes(t *testing.T) {
	const kills, lookers, changers = 40, 16, 4
	p := kit.NewPool(t, "ext4")
	p.Keeper = "auto"
	p.Mount()
	var all sync.WaitGroup
	var over atomic.Bool
	for i := range lookers {
		all.Go(func() {
			for j := 0; !over.Load(); j++ {
				if _, err := os.Lstat(filepath.Join(p.Mnt, fmt.Sprint("none-", i, "-", j))); !os.IsNotExist(err) {
					t.Error(err)
					return
				}
			}
		})
	}
	client := p.Control()
	defer client.CloseIdleConnections()
	// A call that a kill meets fails, and its volume may stay.
	call := func(method, name, body string) bool {
		r, err := http.NewRequest(method, "http://croft/v1/volumes/"+name, strings.NewReader(body))
		if err != nil {
			t.Error(err)
			return false
		}
		answer, err := client.Do(r)
		if err != nil {
			return false
		}
		answer.Body.Close()
		return answer.StatusCode == http.StatusOK
	}
	var deleted atomic.Int64
	for i := range changers {
		all.Go(func() {
			for j := 0; !over.Load(); j++ {
				name := fmt.Sprint("v", i, "-", j)
				if !call("POST", name, `{"bytes":1048576}`) {
					continue
				}
				_, _ = os.Lstat(p.Path(name)) // the kernel hears of it
				if call("DELETE", name, "") {
					deleted.Add(1)
				}
			}
		})
	}
	for i := range kills {
		before := deleted.Load()
		kit.Poll(t, "deletions", func() bool { return deleted.Load() > before+int64(i%7) })
		p.KillServing()
	}
	t.Log(deleted.Load(), "volumes were deleted")
	over.Store(true)
	all.Wait()
}
