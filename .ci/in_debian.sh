#!/usr/bin/env bash
# Runs a command in a folder that `.ci/setup_debian.sh` made:  .ci/in_debian.sh FOLDER COMMAND …
# /proc and /dev are mounted for this command alone: they go when it ends, however it ends, so that
# the folder can be removed at any time. Of the environment only what follows is handed on: the
# rest is about folders that are not there.
set -euo pipefail
environment=(
    HOME=/root LANG=C.UTF-8 PATH=/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin
    PIP_CERT=/etc/ssl/certs/ca-certificates.crt
    OMP_NUM_THREADS=1  # the other session wants the cores, too
    USE_LIBUV=0  # Debian builds torch without it, and torch.distributed wants to be told
)
for name in CI ANEMOI_CKPT_TESTS_WITHOUT PIP_INDEX_URL http_proxy https_proxy no_proxy; do
    if [ -n "${!name:-}" ]; then environment+=("$name=${!name}"); fi
done
exec unshare --mount --propagation private bash -euc '
    root=$1; shift
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    exec chroot "$root" "$@"
' in_debian "$1" env -i "${environment[@]}" "${@:2}"
