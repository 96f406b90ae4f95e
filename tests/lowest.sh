#!/usr/bin/env bash
# Run the suite on Python 3.10 with the lowest direct dependencies that pyproject.toml allows.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(python3 tools/_environment.py list | sed -n 's/^3\.10 //p')
if [ "$python" = missing ]; then
    echo "make test-lowest: Python 3.10 with venv is needed, and none is on PATH or in pyenv's folder" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
# uv raises s3fs along with fsspec, which is no direct dependency; its own bound holds it down.
s3fs=$(sed -n 's/^ *"s3fs>=\([0-9.]*\)",$/\1/p' pyproject.toml)
.venv/bin/uv pip install --quiet --python "$work/venv/bin/python" --resolution lowest-direct \
    --editable '.[parquet,test]' "s3fs==$s3fs.*"
.venv/bin/uv pip list --python "$work/venv/bin/python" | grep -E '^(torch|numpy|scipy|deepspeed|s3fs) '
OMP_NUM_THREADS=1 "$work/venv/bin/python" -m pytest -m "not long and not gpu and not s3 and not slurm" \
    -n 2 --dist loadfile --no-loadscope-reorder
