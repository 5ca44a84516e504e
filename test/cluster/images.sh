#!/usr/bin/env bash
# images.sh [IMAGE[=FILE]]... makes the images of the cluster by hand, as tars in $CLUSTER_RUN/images: those of the tests,
# and one for each IMAGE, a static program that is its entry point: FILE, else what build.sh has built under the last part
# of the image's name (registry.k8s.io/sig-storage/csi-resizer:v2.2.0 is of csi-resizer).
set -euo pipefail
# shellcheck source=test/cluster/env.sh
. "$(dirname "$0")/env.sh"

mkdir -p "$CLUSTER_RUN/images"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
entries=()

# image CONFIG ROOT TAG... adds the image of a root directory; CONFIG is a part of its configuration, in JSON.
image() {
	local config=$1 root=$2 n=${#entries[@]} layer tags
	shift 2
	mkdir -p "$work/out"
	tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$root" -cf "$work/out/layer$n.tar" .
	layer=$(sha256sum "$work/out/layer$n.tar" | cut -d ' ' -f 1)
	cat >"$work/out/config$n.json" <<END
{"architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
	"config": {"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], $config},
	"rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]}, "history": [{"created": "1970-01-01T00:00:00Z"}]}
END
	tags=$(printf ', "%s"' "$@")
	entries+=("{\"Config\": \"config$n.json\", \"RepoTags\": [${tags:2}], \"Layers\": [\"layer$n.tar\"]}")
}
# archive NAME writes what was added to a tar.
archive() {
	(IFS=,; echo "[${entries[*]}]") >"$work/out/manifest.json"
	tar -C "$work/out" -cf "$CLUSTER_RUN/images/$1.tar" .
	rm -rf "$work/out"
	entries=()
}

# base DIR makes a root directory with busybox and the files that programs expect.
base() {
	local applet
	mkdir -p "$1"/{bin,etc,tmp,root,usr,var,home,proc,sys,dev,mnt,run}
	chmod 1777 "$1/tmp"
	cp "$(command -v busybox)" "$1/bin/busybox"
	for applet in $("$1/bin/busybox" --list); do
		[[ $applet == busybox ]] || ln -s busybox "$1/bin/$applet"
	done
	# shellcheck disable=SC2016 # it is another script
	printf '#!/bin/sh\nexec /bin/sh "$@"\n' >"$1/bin/bash"
	chmod 755 "$1/bin/bash"
	ln -s ../bin "$1/usr/bin"
	ln -s bin "$1/sbin"
	printf '%s\n' root:x:0:0:root:/root:/bin/sh postgres:x:999:999::/tmp:/bin/sh >"$1/etc/passwd"
	printf '%s\n' root:x:0: postgres:x:999: >"$1/etc/group"
}
# with_libraries ROOT FILE... copies the shared libraries of programs of this machine, under their own names.
with_libraries() {
	local root=$1 library
	shift
	for library in $(ldd "$@" 2>/dev/null | grep -o '/[^ :]* (0x' | cut -d ' ' -f 1 | sort -u); do
		mkdir -p "$root$(dirname "$library")"
		cp -L "$library" "$root$library"
	done
}

base "$work/busybox"
image '"Cmd": ["sh"]' "$work/busybox" docker.io/library/busybox:latest docker.io/library/busybox:1.37 \
	registry.k8s.io/e2e-test-images/busybox:1.37.0-1 registry.k8s.io/e2e-test-images/nginx:1.15-4
image '"Entrypoint": ["/bin/sh", "-c", "trap \"exit 0\" TERM INT; while :; do sleep 86400 & wait; done"]' "$work/busybox" test.local/pause:1
# Kubernetes' tests of many volumes write with GNU's dd (oflag=nocache); busybox's shell would take its own.
base "$work/gnu"
rm "$work/gnu/bin/dd" "$work/gnu/bin/sh"
cp "$(command -v dd)" "$work/gnu/bin/dd"
cp "$(command -v dash)" "$work/gnu/bin/sh"
with_libraries "$work/gnu" "$work/gnu/bin/dd" "$work/gnu/bin/sh"
image '"Cmd": ["sh"]' "$work/gnu" registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0
archive base

base "$work/agnhost"
cp "$CLUSTER_BIN/agnhost" "$work/agnhost/agnhost"
image '"Entrypoint": ["/agnhost"], "Cmd": ["pause"]' "$work/agnhost" registry.k8s.io/e2e-test-images/agnhost:2.63.0
archive agnhost

postgres=$(compgen -G '/usr/lib/postgresql/*/bin/postgres' | sort -V | tail -n 1)
version=$(basename "${postgres%/bin/postgres}")
root=$work/postgres
base "$root"
mkdir -p "$root/usr/lib/postgresql" "$root/usr/share/postgresql" "$root/usr/share/zoneinfo"
cp -r "/usr/lib/postgresql/$version" "$root/usr/lib/postgresql/"
rm -rf "$root/usr/lib/postgresql/$version/lib"/{bitcode,llvmjit*,pgxs} # it compiles no queries, and is large
cp -r "/usr/share/postgresql/$version" "$root/usr/share/postgresql/"
cp -L /usr/share/zoneinfo/UTC "$root/usr/share/zoneinfo/"
with_libraries "$root" "$root/usr/lib/postgresql/$version"/{bin,lib}/*
for program in "$root/usr/lib/postgresql/$version/bin"/*; do
	ln -sf "/usr/lib/postgresql/$version/bin/$(basename "$program")" "$root/bin/"
done
image '"Cmd": ["postgres"], "User": "999:999"' "$root" test.local/postgres:1
archive postgres

for name in "$@"; do
	tag=${name%%=*}
	program=$(basename "${tag%:*}")
	file=$CLUSTER_BIN/$program
	[[ $name != *=* ]] || file=${name#*=}
	root=$work/programs/${#entries[@]}
	mkdir -p "$root/bin"
	cp "$file" "$root/bin/$program"
	image "\"Entrypoint\": [\"/bin/$program\"]" "$root" "$tag"
done
((!$#)) || archive programs
step "images: $(cd "$CLUSTER_RUN/images" && du -hc --apparent-size -- * | tr '\t\n' ' ;')"
