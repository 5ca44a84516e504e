package cluster

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
)

// PostgreSQL writes to a volume while the driver's pod is killed ten times, the driver upgraded, and kubelet and containerd
// started anew: no client gets an error, and no row that was committed is missing, nor when the database is killed itself.
func TestDatabase(t *testing.T) {
	n := newNamespace(t)
	n.apply(claim{name: "data", size: "2Gi"}.String())
	d := &database{namespace: n}
	d.start()
	n.apply(postgres("client", "", "sleep 1000000"))
	n.ready("client")
	d.client("pgbench --initialize --quiet --scale=5 2>&1 && psql --quiet --command='CREATE EXTENSION amcheck'")
	server := containerOf(n, "postgres")

	d.load()
	for range 10 {
		must(t, "-n", system, "delete", "pod", "-l", "app.kubernetes.io/component=node", "--grace-period=0", "--force")
		settled(t)
		d.progress()
	}
	upgrade(t)
	d.progress()
	d.verify()

	d.load()
	for _, service := range []string{"kubelet", "containerd"} {
		restart(n, service, "postgres", "client")
		d.progress()
	}
	settled(t)
	d.verify()
	if now := containerOf(n, "postgres"); now != server {
		t.Errorf("the database's container is another: %s, was %s", now, server)
	}

	// Without a shutdown: the next one recovers from its log.
	n.kubectl("delete", "pod/postgres", "--grace-period=0", "--force")
	d.start()
	d.verify()
	d.load()
	d.progress()
	d.verify()
}

// database is a PostgreSQL in a pod, and a client in another.
type database struct {
	*namespace
	address   string
	committed int // transactions that clients were told of
}

// postgres is a pod of PostgreSQL's programs.
func postgres(name, volume, script string) string {
	p := pod{name: name, script: script, more: []string{"securityContext: {fsGroup: 999}"}}
	if volume != "" {
		p.volumes = []string{volume}
	}
	return strings.Replace(p.String(), "image: busybox", "image: test.local/postgres:1", 1)
}

func (d *database) start() {
	d.t.Helper()
	d.apply(postgres("postgres", "data", `set -e
export PGDATA=/data/pg
if [ ! -e $PGDATA/PG_VERSION ]; then
	initdb --data-checksums --auth=trust --username=postgres
	echo "host all all all trust" >>$PGDATA/pg_hba.conf
fi
exec postgres -c listen_addresses='*' -c unix_socket_directories=/tmp -c max_wal_size=256MB -c checkpoint_timeout=30s`))
	d.ready("postgres")
	d.address = d.kubectl("get", "pod/postgres", "-o", "jsonpath={.status.podIP}")
	eventually(d.t, "the database answers", func() error {
		_, err := kubectl("-n", d.name, "exec", "postgres", "--", "psql", "--host=/tmp", "--username=postgres", "--command=SELECT 1")
		return err
	})
}

// client runs a script with the clients' programs.
func (d *database) client(script string) string {
	d.t.Helper()
	return d.sh("client", "export PGHOST="+d.address+" PGUSER=postgres PGDATABASE=postgres; "+script)
}

// load starts clients in the background. They write rounds of transactions until verify ends them; one error ends them too.
func (d *database) load() {
	d.t.Helper()
	d.client(`rm -f /tmp/stop /tmp/ended; : >/tmp/rounds; (
while [ ! -e /tmp/stop ]; do
	pgbench --no-vacuum --client=4 --jobs=2 --transactions=50 >/tmp/round 2>&1 || { echo "FAILED: $(cat /tmp/round)" >>/tmp/rounds; break; }
	grep "transactions actually processed" /tmp/round >>/tmp/rounds
done
touch /tmp/ended) >/dev/null 2>&1 &`)
	d.progress()
}

// rounds counts those that have ended without an error.
func (d *database) rounds() int {
	d.t.Helper()
	rounds := d.sh("client", "cat /tmp/rounds")
	if strings.Contains(rounds, "FAILED") {
		d.t.Fatalf("a client got an error:\n%s", rounds)
	}
	return strings.Count(rounds, "processed: 200/200")
}

// progress waits until the clients have written a whole round.
func (d *database) progress() {
	d.t.Helper()
	before := d.rounds()
	eventually(d.t, "clients go on", func() error {
		if now := d.rounds(); now < before+2 {
			return fmt.Errorf("%d rounds", now-before)
		}
		return nil
	})
}

// verify ends the clients, and compares what they were told with what is there.
func (d *database) verify() {
	d.t.Helper()
	d.sh("client", "touch /tmp/stop; if [ -e /tmp/rounds ]; then while [ ! -e /tmp/ended ]; do sleep 0.1; done; fi")
	d.committed += 200 * d.rounds()
	d.sh("client", "rm /tmp/rounds; : >/tmp/rounds")
	query := func(sql string) string { return d.client(`psql --no-align --tuples-only --command="` + sql + `"`) }
	if rows, err := strconv.Atoi(query("SELECT count(*) FROM pgbench_history")); err != nil || rows != d.committed {
		d.t.Errorf("%d rows are there, %d were committed (%v)", rows, d.committed, err)
	}
	sums := query("SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), " +
		"(SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)")
	if fields := strings.Split(sums, "|"); len(fields) != 4 || fields[0] != fields[1] || fields[0] != fields[2] || fields[0] != fields[3] {
		d.t.Errorf("the sums differ: %s", sums)
	}
	d.client("pg_amcheck --heapallindexed --jobs=2 postgres")
}

// upgrade gives the driver's pod another program, and checks that it runs.
func upgrade(t *testing.T) {
	t.Helper()
	image := must(t, "-n", system, "get", "daemonset/croft-node", "-o", `jsonpath={.spec.template.spec.containers[?(@.name=="croft")].image}`)
	set := func(image string) {
		must(t, "-n", system, "set", "image", "daemonset/croft-node", "croft="+image)
		settled(t)
	}
	t.Cleanup(func() { set(image) })
	before := croft(t, "version")
	set(repository(image) + ":" + nextTag)
	if now := croft(t, "version"); now == before || !strings.Contains(now, "v0.0.0-next") {
		t.Errorf("the version after the upgrade is %q, was %q", now, before)
	}
}
