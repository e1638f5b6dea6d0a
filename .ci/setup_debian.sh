#!/usr/bin/env bash
# Makes a Debian of its own in a folder: Python, torch (built for CPUs) and numpy from its packages.
#   .ci/setup_debian.sh trixie FOLDER     Python 3.13, torch 2.6, numpy 2.2
#   .ci/setup_debian.sh sid FOLDER        Python 3.14, torch 2.14 or newer, numpy 2.4 or newer
# 3 GB and some five minutes, as root. What was finished is left as it is. `.ci/in_debian.sh` runs
# commands there. Exit status 77: it cannot be done here, and why.
set -euo pipefail
suite=$1 root=$2

impossible() { echo "NO DEBIAN $suite HERE, so nothing was tested with it: $*" >&2; exit 77; }

if [ -e "$root/finished" ]; then exit 0; fi
[ "$(id -u)" = 0 ] || impossible "it takes root to mount and chroot"
command -v apt-get >/dev/null || impossible "it takes apt"
if [ "${DEBIAN_ALONE:-}" != yes ]; then
    unshare --mount true 2>/dev/null || impossible "mounting is not allowed"
    # What is mounted from here on goes with this process, however it ends.
    DEBIAN_ALONE=yes exec unshare --mount --propagation private "$0" "$@"
fi

export DEBIAN_FRONTEND=noninteractive
if ! command -v debootstrap >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap; } >/dev/null ||
        impossible "debootstrap cannot be installed"
fi
# The machine's own mirror of Debian, where DEBIAN_MIRROR names no other.
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' |
    grep -m1 -E '/debian/?$' || true)}
[ -n "$mirror" ] || impossible "apt's sources name no mirror of Debian; set DEBIAN_MIRROR to one"
release=$(mktemp)
/usr/lib/apt/apt-helper download-file "${mirror%/}/dists/$suite/Release" "$release" >/dev/null 2>&1 ||
    impossible "$mirror has no $suite, or cannot be reached"

rm "$release"
# What was not finished goes. What this script mounts is gone by now, but for all that others did.
if grep -q " $root/" /proc/self/mounts; then echo "something is mounted below $root" >&2; exit 1; fi
rm -rf --one-file-system "$root"
mkdir -p "$root"
debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror" >/dev/null
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
cp /etc/resolv.conf "$root/etc/"
# Nobody needs this folder after a power cut, nor its manuals.
printf 'force-unsafe-io\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\n' \
    >"$root/etc/dpkg/dpkg.cfg.d/quick"
packages=(
    python3-torch python3-numpy python3-venv
    # What the product needs, as old as the suite has it.
    python3-attr python3-boto3 python3-filelock python3-platformdirs python3-requests python3-tqdm
    # What its tests need.
    python3-cryptography python3-fsspec python3-paramiko python3-pytest python3-pytest-mock
    python3-pytest-timeout python3-safetensors python3-yaml
)
in_root() { chroot "$root" "$@"; }
in_root apt-get -o Acquire::Check-Valid-Until=false -qq update  # a mirror may be a snapshot
in_root apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
in_root apt-get clean
touch "$root/finished"
