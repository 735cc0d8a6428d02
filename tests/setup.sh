#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing on a Debian 12 machine, or says what is: `tests/setup.sh build vm` before `make test` and `make demo`.
# Does nothing, quickly, when everything is there. Without root it names the packages and ends with status 1.
#
#   build    a C compiler and Python's venv
#   vm       QEMU and a guest kernel (only unpacked into build/vm: the host's own boot is not touched)
#   libvirt  libvirtd and virsh, started by the tests in a directory of their own
#   metrics  promtool
#   disks    file systems that a test can freeze or stop
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

architecture=$(dpkg --print-architecture)
case $architecture in
amd64) qemu=qemu-system-x86 machine=x86_64 ;;
arm64) qemu=qemu-system-arm machine=aarch64 ;;
*) echo "tierd: the test guest is made for amd64 and arm64, this is $architecture" >&2 && exit 1 ;;
esac

kernel=
for part in "$@"; do
	case $part in
	build)
		want python3 python3
		want gcc gcc
		want make make
		want "/usr/lib/$machine-linux-gnu/libc.a" libc6-dev
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
	disks)
		want fuse2fs fuse2fs
		want mkfs.ext4 e2fsprogs
		want losetup mount
		want fsfreeze util-linux
		;;
	*) echo "usage: $0 [build] [vm] [libvirt] [metrics] [disks]" >&2 && exit 2 ;;
	esac
done
for file in build/vm/vmlinuz-* /boot/vmlinuz-*cloud*; do
	[ ! -e "$file" ] || kernel=
done

[ -n "$packages$kernel" ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "tierd: missing here; as root: apt-get install --no-install-recommends$packages${kernel:+ $kernel}" >&2
	exit 1
fi
if ! apt-get -qq -s install $packages $kernel >/dev/null 2>&1; then apt update; fi # no lists yet, or old ones
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
