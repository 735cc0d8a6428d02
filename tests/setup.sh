#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing on a Debian 12 machine, or says what is: `tests/setup.sh build vm` before `make test` and `make demo`.
# Does nothing, quickly, when everything is there. Without root it names the packages and ends with status 1.
#
#   build    a C compiler, Python's venv, the libraries that compress and encrypt
#   vm       QEMU and a guest kernel (only unpacked into build/vm: the host's own boot is not touched)
#   libvirt  libvirtd and virsh, started by the tests in a directory of their own
#   metrics  promtool
#   stores   Redis, started by the tests in directories of their own
#   disks    file systems that a test can freeze or stop
#   boot     systemd-nspawn, and in build/boot a small Debian 12 with systemd and what tierd imports (after `make build`)
set -eu
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin # libvirtd is there, and an ordinary user may not look there
packages=

# want COMMAND-OR-FILE PACKAGE...: remembers the packages unless the command or file exists
want() {
	if command -v "$1" >/dev/null 2>&1 || [ -e "$1" ]; then return; fi
	shift
	packages="$packages $*"
}

apt() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=120 "$@"
}

# What build/boot is made from: it is made again when this changes. The project itself is not in it, tests mount it there.
boot_recipe() {
	sed -n '/^make_boot() {/,/^}/p' tests/setup.sh
	imports
}

imports() {
	python3 -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")'
}

architecture=$(dpkg --print-architecture)
case $architecture in
amd64) qemu=qemu-system-x86 machine=x86_64 ;;
arm64) qemu=qemu-system-arm machine=aarch64 ;;
*) echo "tierd: the test guest is made for amd64 and arm64, this is $architecture" >&2 && exit 1 ;;
esac

kernel= boot=
for part in "$@"; do
	case $part in
	build)
		want python3 python3
		want gcc gcc
		want make make
		want "/usr/lib/$machine-linux-gnu/libc.a" libc6-dev
		want "/usr/lib/$machine-linux-gnu/liblz4.so.1" liblz4-1
		want "/usr/lib/$machine-linux-gnu/libzstd.so.1" libzstd1
		want "/usr/lib/$machine-linux-gnu/libcrypto.so.3" libssl3
		python3 -c 'import ensurepip, venv' 2>/dev/null || packages="$packages python3-venv"
		python3 -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
			2>/dev/null || packages="$packages python3-dev"
		;;
	vm)
		want "qemu-system-$machine" $qemu
		want gcc gcc
		want "/usr/lib/$machine-linux-gnu/libc.a" libc6-dev
		want setpriv util-linux
		kernel=linux-image-cloud-$architecture
		;;
	libvirt)
		want libvirtd libvirt-daemon
		want virsh libvirt-clients
		want "/usr/lib/$machine-linux-gnu/libvirt/connection-driver/libvirt_driver_qemu.so" libvirt-daemon-driver-qemu
		;;
	metrics) want promtool prometheus ;;
	stores)
		want redis-check-rdb redis-tools # the server's binary; the package redis-server would start one on this host
		want setpriv util-linux
		;;
	disks)
		want fuse2fs fuse2fs
		want mkfs.ext4 e2fsprogs
		want losetup mount
		want fsfreeze util-linux
		;;
	boot)
		want systemd-nspawn systemd-container
		want mmdebstrap mmdebstrap
		want setpriv util-linux
		want gcc gcc
		want "/usr/lib/$machine-linux-gnu/libc.a" libc6-dev
		boot=$(boot_recipe | sha256sum | cut -d ' ' -f 1)
		[ "$(cat build/boot/made-from 2>/dev/null)" != "$boot" ] || boot=
		;;
	*) echo "usage: $0 [build] [vm] [libvirt] [metrics] [stores] [disks] [boot]" >&2 && exit 2 ;;
	esac
done
for file in build/vm/vmlinuz-* /boot/vmlinuz-*cloud*; do
	[ ! -e "$file" ] || kernel=
done

[ -n "$packages$kernel$boot" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	[ -z "$packages$kernel" ] ||
		echo "tierd: missing here; as root: apt-get install --no-install-recommends$packages${kernel:+ $kernel}" >&2
	[ -z "$boot" ] || echo "tierd: build/boot is missing or old; as root: tests/setup.sh boot" >&2
	exit 1
fi
if [ -n "$packages$kernel" ] && ! apt-get -qq -s install $packages $kernel >/dev/null 2>&1; then apt update; fi # no lists yet, or old ones
# shellcheck disable=SC2086 # a list
[ -z "$packages" ] || apt install --no-install-recommends $packages || { apt update && apt install --no-install-recommends $packages; }

fetch_kernel() {
	image=$(apt-cache depends "$kernel" | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
	mkdir -p build/vm
	scratch=$(mktemp -d build/vm/fetch-XXXXXX)
	trap 'rm -rf "$scratch"' EXIT
	(cd "$scratch" && apt download -o APT::Sandbox::User=root "$image") || return 1
	dpkg-deb --fsys-tarfile "$scratch"/*.deb | tar -x -C "$scratch" --wildcards './boot/vmlinuz-*'
	mv "$scratch"/boot/vmlinuz-* build/vm/
}
[ -z "$kernel" ] || fetch_kernel || { apt update && fetch_kernel; }

# Debian 12 whatever runs here: the unit is written for its systemd.
make_boot() {
	mkdir -p build/boot
	rm -rf build/boot/new-*
	scratch=$(mktemp -d build/boot/new-XXXXXX)
	trap 'rm -rf "$scratch"' EXIT
	mmdebstrap --quiet --variant=essential --include=systemd,systemd-sysv,dbus,procps,python3 \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' bookworm "$scratch/root"
	chroot "$scratch/root" python3 -m venv --without-pip /opt/tierd
	imports >"$scratch/imports"
	build/venv/bin/pip install --quiet --python-version 3.11 --only-binary=:all: \
		--target "$scratch/root/opt/tierd/lib/python3.11/site-packages" --requirement "$scratch/imports"
	printf '#!/opt/tierd/bin/python3\nfrom tierd.cli import main\n\nmain()\n' >"$scratch/root/opt/tierd/bin/tierd"
	chmod 0755 "$scratch/root/opt/tierd/bin/tierd" "$scratch/root"
	rm -rf build/boot/root build/boot/made-from
	mv "$scratch/root" build/boot/
}
if [ -n "$boot" ]; then
	(make_boot) # a trap of its own
	echo "$boot" >build/boot/made-from
fi
