#!/usr/bin/env bash
# Run the short demo on machines that lack something, one after another. Needs `make setup`.
#
#   bash tests/machines.sh [NAME ...]     all machines, or the named ones
#   bash tests/machines.sh --list
#
# Prints a line per machine: ok, FAILED with the end of its log, or "not arranged" with the reason. The exit code is 0
# if none failed. All files are in one temporary folder (10 GB), and all mounts end with their machine's namespace.
set -euo pipefail
cd "$(dirname "$0")/.."

MACHINES=(
    "bare-debian   Debian with python3, python3-venv and make: no git, no compiler"
    "odd-path      a path with spaces and accents, with its own installation"
    "c-locale      LC_ALL=C, and Python without UTF-8"
    "one-core      a single core"
    "bare-path     no compiler, and a PATH of basic tools only"
    "unknown-host  a host name that does not resolve"
    "no-network    no network but loopback"
    "small-shm     /dev/shm of 1 MB"
    "no-home       an unknown user without a home, who can write to the output folder only"
    "umask         umask 077"
)
DEMO_SECONDS=3600
NOT_ARRANGED=77

# What `make` and an activated .venv add to the environment is not part of any machine.
unset MAKEFLAGS MFLAGS MAKELEVEL VIRTUAL_ENV TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
PATH=${PATH//"$PWD/.venv/bin:"/}

# Each machine is a function. It runs in a subshell with a new folder $work, and errexit ends it.

not_arranged() { echo "$1" && exit "$NOT_ARRANGED"; }
needs_root() { [[ $EUID -eq 0 ]] || not_arranged "not root"; }
needs() { type -P "$1" > /dev/null || not_arranged "no $1"; }

# Set `unshare` to the command that enters a new namespace; without root, it is that of a new user namespace.
needs_namespace() {
    needs unshare
    unshare=(unshare "$1")
    [[ $EUID -eq 0 ]] || unshare+=(--map-root-user)
    "${unshare[@]}" true || not_arranged "unshare $1 is not permitted"
}

# Run the command, which writes a demo to the folder, with a home of its own: no kernel built before is found.
run_demo() {
    local out=$1 file
    mkdir -p "$work"/{home,tmp}
    env HOME="$work/home" XDG_CACHE_HOME="$work/home/.cache" TMPDIR="$work/tmp" \
        timeout --foreground --kill-after=30 "$DEMO_SECONDS" "${@:2}"
    for file in "$out"/report.{html,json}; do [[ -s $file ]] || { echo "missing: $file" && return 1; }; done
}

# Run this tree's demo through a prefix such as `taskset -c 0`.
demo() { run_demo "$work/out" "$@" .venv/bin/python tools/demo.py --fast --output "$work/out"; }

# Run this tree's demo in a new namespace, after the command.
demo_in_namespace() {
    needs_namespace "$1"
    demo "${unshare[@]}" bash -euc "$2; exec \"\$@\"" _
}

# Copy the tree without its history and without what .gitignore names.
copy_tree() {
    mkdir -p "$1"
    tar -c --exclude=./.git --exclude-from=<(sed 's,/$,,' .gitignore) . | tar -x --no-same-owner -C "$1"
}

machine_bare_debian() {
    needs_root
    needs debootstrap
    needs apt-cache
    needs_namespace --mount
    local root=$work/root suite mirror file settings=()
    suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
    mirror=$(apt-cache madison base-files | awk -v suite="$suite/main" '$6 == suite { print $5; exit }')
    [[ $mirror ]] || not_arranged "apt lists no mirror of '$suite'; apt-get update may help"
    "${unshare[@]}" debootstrap --variant=minbase --include=python3,python3-venv,make "$suite" "$root" "$mirror" ||
        not_arranged "debootstrap of $suite from $mirror failed"
    # Its environment and configuration: only what is necessary to reach the package index from this network.
    mapfile -d '' settings < <(env -0 | grep -zEi '^(pip_|uv_|[a-z]+_proxy=|ssl_cert_file=|requests_ca_bundle=)')
    for file in /etc/{resolv.conf,pip.conf,xdg/pip,uv} "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}"
    do if [[ -e $file ]]; then cp --recursive --dereference --parents "$file" "$root"; fi; done
    copy_tree "$root/root/vqd_scale"
    mkdir -p "$work"/{upper,overlay} "$root/uv-cache"
    # uv's cache saves several GB of downloads. Where the file system permits an overlay, the cache is not modified
    # and the machine builds source packages itself.
    # shellcheck disable=SC2016
    run_demo "$root/root/vqd_scale/runs/demo-fast" "${unshare[@]}" bash -euc '
        root=$1 cache=$2 work=$3
        for folder in dev proc sys; do mount --rbind "/$folder" "$root/$folder"; done
        layers=lowerdir=$cache,upperdir=$work/upper,workdir=$work/overlay
        if mount -t overlay -o "$layers" overlay "$root/uv-cache"; then rm -rf "$root/uv-cache"/sdists-*
        else mount --bind "$cache" "$root/uv-cache"; fi
        exec env --ignore-environment "${@:4}" HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin \
            UV_CACHE_DIR=/uv-cache UV_LINK_MODE=copy chroot "$root" sh -euxc "
                if command -v git || command -v cc || command -v gcc; then exit 1; fi
                cd /root/vqd_scale && make setup && make demo FAST=1"
    ' _ "$root" "$(.venv/bin/uv cache dir)" "$work" "${settings[@]}"
}

machine_odd_path() {
    local copy="$work/œuvre à moi/vqd scale"
    needs make
    copy_tree "$copy"
    make -C "$copy" setup
    run_demo "$copy/runs/demo-fast" make -C "$copy" demo FAST=1
}

machine_c_locale() { demo env --unset=PYTHONIOENCODING LANG=C LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0; }

machine_one_core() {
    needs taskset
    # In a container, the first permitted core need not be core 0.
    demo taskset -c "$(sed -nE 's/^Cpus_allowed_list:\s*([0-9]+).*/\1/p' /proc/self/status)"
}

machine_bare_path() {
    local tool
    mkdir "$work/bin"
    for tool in sh bash env uname id cat ls cp mv rm ln mkdir chmod date sed grep head tail sort tr
    do ln -s "$(type -P "$tool")" "$work/bin"; done
    demo env --unset=CC --unset=CXX PATH="$work/bin"
}

machine_unknown_host() {
    local name=no-such-host-$$
    needs hostname
    demo_in_namespace --uts "hostname $name
        if getent hosts $name; then echo 'every host name resolves'; exit $NOT_ARRANGED; fi"
}

machine_no_network() {
    needs ip
    demo_in_namespace --net "ip link set lo up"
}

machine_small_shm() { demo_in_namespace --mount "mount -t tmpfs -o size=1m tmpfs /dev/shm"; }

machine_no_home() {
    needs_root
    needs setpriv
    local user=64000 as_user
    while getent passwd "$user"; do user=$((user + 1)); done
    as_user=(setpriv --reuid "$user" --regid "$user" --clear-groups)
    mkdir "$work"/{out,tmp}
    chown "$user:$user" "$work"/{out,tmp}
    # Python may lie in a private home such as /root. The capability permits reading there, and no writing.
    "${as_user[@]}" env .venv/bin/python -c "" ||
        as_user+=(--inh-caps +dac_read_search --ambient-caps +dac_read_search)
    demo "${as_user[@]}" env --unset=USER --unset=LOGNAME --unset=XDG_CACHE_HOME HOME=/nonexistent
}

machine_umask() { umask 077 && demo; }

# A bind mount can be of the same file system, so that --one-file-system alone would not stop at it.
remove() {
    if grep -qF " $1/" /proc/self/mounts; then echo "not removed because of a mount below it: $1" >&2
    else rm -rf --one-file-system "$1"; fi
}

clean() {
    trap '' INT TERM HUP
    if [[ $job ]] && kill -KILL -- "-$job"; then { wait "$job" || sleep 1; } 2> /dev/null; fi
    remove "$scratch"
}

run_machine() {
    local name=$1 start=$SECONDS code=0 result=ok
    work=$scratch/$name
    mkdir "$work"
    printf '%-13s ' "$name"
    "machine_${name//-/_}" > "$scratch/log" 2>&1 < /dev/null &
    job=$!
    wait "$job" || code=$?
    job=
    if [[ $code -eq $NOT_ARRANGED ]]; then result="not arranged ($(tail -n 1 "$scratch/log"))"
    elif [[ $code -ne 0 ]]; then result="FAILED, exit code $code" failed=yes; fi
    echo "$result, $((SECONDS - start)) s"
    [[ $result != FAILED* ]] || tail -n 30 "$scratch/log" | sed 's/^/    /'
    remove "$work"
}

names=("${MACHINES[@]%% *}") job='' failed=''
[[ ${1:-} != --list ]] || { printf '%s\n' "${MACHINES[@]}" && exit; }
for name; do
    [[ " ${names[*]} " == *" $name "* ]] || { echo "no machine '$name'; one of: ${names[*]}" >&2 && exit 2; }
done
[[ -e .venv/done/project ]] || { echo "nothing is installed in .venv: make setup" >&2 && exit 2; }

scratch=$(mktemp -d --tmpdir machines.XXXXXX)
chmod 755 "$scratch" # for the user of no-home
# With job control, a machine is a process group, which can be ended as a whole.
set -o monitor
trap clean EXIT
trap 'exit 130' INT TERM HUP
[[ $# -gt 0 ]] || set -- "${names[@]}"
for name; do run_machine "$name"; done
[[ ! $failed ]]
