#!/usr/bin/env bash
# Install the project, import every module and run the short demo with each supported Python on this machine except
# the newest, with which CI runs the whole suite.
#
#   bash tests/interpreters.sh            all of them
#   bash tests/interpreters.sh 3.10       only these
#
# CI_PYTHONS=required: fewer than three interpreters are a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

IMPORT_ALL='
import importlib, pkgutil, vqd_scale
names = [module.name for module in pkgutil.walk_packages(vqd_scale.__path__, "vqd_scale.")]
for name in names:
    importlib.import_module(name)
print(len(names), "modules imported")
'

# Threads that wait must not keep the cores from the tests that run beside this.
export OMP_WAIT_POLICY=PASSIVE

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# try_interpreter VERSION PATH: in a copy of the tree; what it prints is shown only if it fails.
try_interpreter() {
    local version=$1 path=$2 start=$SECONDS tree=$work/$1
    mkdir "$tree"
    tar --create --exclude=./.venv --exclude=./runs --exclude=./.git . | tar --extract --directory="$tree"
    if (cd "$tree" && make setup PYTHON="$path" && .venv/bin/python -c "$IMPORT_ALL" \
        && make demo FAST=1) > "$work/log" 2>&1; then
        echo "$version: ok after $((SECONDS - start)) s ($path; $(grep 'modules imported' "$work/log"))"
        grep -E '^(attribute accuracy|chance level|tokenizer ceiling) ' "$work/log" | sed 's/^/    /'
    else
        tail -n 40 "$work/log"
        echo "$version: FAILED after $((SECONDS - start)) s ($path)"
        failed+=("$version")
    fi
    rm -rf "$tree"
}

listed=$(python3 tools/_environment.py list)
echo "$listed"
mapfile -t there < <(grep -v ' missing$' <<< "$listed" || true)
if [ "${#there[@]}" -lt 3 ] && [ "${CI_PYTHONS:-}" = required ]; then
    echo "CI_PYTHONS=required: ${#there[@]} supported interpreters are on this machine, three are needed" >&2
    exit 1
fi
failed=()
for line in "${there[@]::${#there[@]}-1}"; do
    version=${line%% *}
    if [ $# -eq 0 ] || [[ " $* " == *" $version "* ]]; then
        try_interpreter "$version" "${line#* }"
    fi
done
if [ "${#failed[@]}" -gt 0 ]; then
    exit 1
fi
