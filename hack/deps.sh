#!/usr/bin/env bash
# deps.sh demo|test|bench|pjdfstest|cluster installs the Debian packages that the make target of that
# name needs. It asks the network only when a command is missing.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin

# A line: who needs it, the command that shows it is there, its package.
needs="
demo fio         fio
demo losetup     mount
demo mkfs.ext4   e2fsprogs
test btrfs       btrfs-progs
test fusermount3 fuse3
test gcc         gcc
test getfacl     acl
test getfattr    attr
test git         git
test mkfs.xfs    xfsprogs
test prove       perl
test psql        postgresql
test shellcheck  shellcheck
test sqlite3     sqlite3
test stress-ng   stress-ng
bench bindfs      bindfs
bench fio         fio
bench fusermount3 fuse3
bench git         git
bench losetup     mount
bench mkfs.btrfs  btrfs-progs
bench mkfs.ext4   e2fsprogs
bench mkfs.xfs    xfsprogs
bench psql        postgresql
bench sqlite3     sqlite3
bench tar         tar
pjdfstest autoreconf autoconf
pjdfstest automake automake
pjdfstest make     make
pjdfstest openssl  openssl
cluster gcc        gcc
cluster ip         iproute2
cluster mkfs.xfs   xfsprogs
cluster nsenter    util-linux
cluster openssl    openssl
cluster pkg-config pkg-config
cluster psql       postgresql
"

want=${1:-test}
missing=()
while read -r who command package; do
	# Each needs what those before it need as well.
	case $want/$who in
	*/demo | test/test | bench/bench | pjdfstest/test | pjdfstest/pjdfstest | cluster/cluster) ;;
	*) continue ;;
	esac
	command -v "$command" >/dev/null || missing+=("$package")
done <<<"$needs"
# The race detector links C: the compiler is not enough.
if [[ $want != demo && $want != bench && ! -e /usr/include/stdlib.h ]]; then
	missing+=(libc6-dev)
fi
# runc links it.
if [[ $want == cluster && ! -e /usr/include/seccomp.h ]]; then
	missing+=(libseccomp-dev)
fi
# PostgreSQL's client may be there without its server.
if [[ $want =~ ^(bench|test|cluster)$ && " ${missing[*]} " != *" postgresql "* ]] && ! compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null; then
	missing+=(postgresql)
fi
((${#missing[@]})) || exit 0

echo "installing: ${missing[*]}"
if ! command -v apt-get >/dev/null; then
	echo "deps: not a Debian system; please install these (Debian's names): ${missing[*]}" >&2
	exit 1
fi
if ((EUID != 0)); then
	echo "deps: run as root, or install these: ${missing[*]}" >&2
	exit 1
fi
export DEBIAN_FRONTEND=noninteractive
options=(-qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
apt-get "${options[@]}" update
install=(apt-get "${options[@]}" install -y --no-install-recommends)
if [[ " ${missing[*]} " == *" postgresql "* ]]; then
	# Only its programs are wanted: no server of the system's own.
	"${install[@]}" postgresql-common </dev/null
	cluster=/etc/postgresql-common/createcluster.conf
	cp -p "$cluster" "$cluster.croft"
	trap 'mv "$cluster.croft" "$cluster"' EXIT
	echo 'create_main_cluster = false' >>"$cluster"
fi
"${install[@]}" "${missing[@]}" </dev/null
