package csi_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

	"github.com/croftfs/croft/test/kit"
)

// databases is what the scripts have in common: $1 is the volume, $2 a directory for sockets.
const databases = `set -euo pipefail
bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | tail -n 1)
data=$1/postgresql run=$2
as() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
ctl() { as "$bin/pg_ctl" -D "$data" -s -w -l "$run/log" -o "-k $run -c listen_addresses= -c max_wal_size=64MB" "$@"; }
chown postgres "$run"
`

// writeDatabases makes both, and writes to them until it is killed; it says so once something has been written to each.
const writeDatabases = databases + `
mkdir "$data"; chown postgres "$data"
as "$bin/initdb" -k -D "$data" -A trust -U postgres --no-sync --locale=C >/dev/null
ctl start
as "$bin/pgbench" -h "$run" -U postgres -q -i -s 1 postgres 2>/dev/null
sqlite3 "$1/sqlite" "pragma journal_mode=wal; create table t(id integer primary key, x); create index i on t(x)" >/dev/null
while :; do
	echo "begin; insert or replace into t values(abs(random())%2000, randomblob(3000)); update t set x=randomblob(3000) where id=abs(random())%2000; commit;"
done | sqlite3 "$1/sqlite" &
as "$bin/pgbench" -h "$run" -U postgres -n -c 4 -j 2 -T 3600 postgres >/dev/null &
until [ "$(sqlite3 "$1/sqlite" "select count(*) from t")" -gt 0 ] &&
	[ "$(as "$bin/psql" -h "$run" -U postgres -Atc "select count(*) from pgbench_history" postgres)" -gt 0 ]; do
	sleep 0.1
done
echo writing
wait`

// checkDatabases lets both recover, as after a crash, and asks them whether they are whole.
const checkDatabases = databases + `
test "$(sqlite3 "$1/sqlite" 'pragma integrity_check')" = ok
test "$(sqlite3 "$1/sqlite" 'select count(*) from t')" -gt 0
rm "$data/postmaster.pid" # it names the one that goes on in the source
trap 'ctl -m immediate stop 2>/dev/null || true' EXIT
ctl start
as "$bin/pg_amcheck" -h "$run" -U postgres --install-missing --heapallindexed postgres
as "$bin/psql" -h "$run" -U postgres -Atc "select (select sum(abalance) from pgbench_accounts) = sum(delta)
	and (select sum(bbalance) from pgbench_branches) = sum(delta) and (select sum(tbalance) from pgbench_tellers) = sum(delta)
	from pgbench_history" postgres | grep -qx t
ctl -m fast stop
as "$bin/pg_checksums" -D "$data" --check >/dev/null`

// TestDatabases makes 20 snapshots of a volume that SQLite and PostgreSQL are writing to, and asks both, restored, whether
// they are whole.
func TestDatabases(t *testing.T) {
	kit.Need(t, "sqlite3", "psql", "setpriv", "bash")
	for fstype, rounds := range map[string]int{"ext4": 8, "xfs": 8, "btrfs": 4} {
		t.Run(fstype, func(t *testing.T) {
			n := start(t, fstype, "none")
			id := n.create("v", 768*kit.Mi)
			target, run := n.publish(id, "writer", capability(rwo)), kit.TempDir(t)
			cmd := exec.CommandContext(t.Context(), "bash", "-c", writeDatabases, "bash", target, run)
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
			out, err := cmd.StdoutPipe()
			kit.OK(t, err)
			cmd.Stderr = os.Stderr
			kit.OK(t, cmd.Start())
			stop := func() {
				if cmd.ProcessState != nil {
					return
				}
				_ = cmd.Cancel()
				_ = cmd.Wait()
				kit.Must(t, "bash", "-c", databases+`ctl -m immediate stop`, "bash", target, run)
			}
			t.Cleanup(stop)
			var said string
			if _, err := fmt.Fscanln(out, &said); err != nil || said != "writing" {
				t.Fatalf("%q, %v", said, err)
			}
			for i := range rounds {
				name := fmt.Sprint("s", i)
				s, err := n.CreateSnapshot(t.Context(), &csipb.CreateSnapshotRequest{Name: name, SourceVolumeId: id})
				kit.OK(t, err)
				restored := n.createBy(changed("restored-"+name, func(r *csipb.CreateVolumeRequest) {
					r.CapacityRange = nil
					r.VolumeContentSource = fromSnapshot(s.Snapshot.SnapshotId)
				}))
				at := n.publish(restored, "reader", capability(rwop))
				if r := kit.Exec(t, "bash", "-c", checkDatabases, "bash", at, kit.TempDir(t)); r.Code != 0 {
					log, _ := os.ReadFile(filepath.Join(run, "log"))
					t.Fatalf("round %d: %s\n%s", i, r, log)
				}
				n.unpublish(restored, at)
				_, err = n.DeleteSnapshot(t.Context(), &csipb.DeleteSnapshotRequest{SnapshotId: s.Snapshot.SnapshotId})
				kit.OK(t, err)
				kit.Poll(t, "the deletion", func() bool { // the kernel may release files later
					_, err := n.DeleteVolume(t.Context(), &csipb.DeleteVolumeRequest{VolumeId: restored})
					return err == nil
				})
			}
			stop()
			n.unpublish(id, target)
		})
	}
}
