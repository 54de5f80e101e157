#!/bin/sh
# Creates or refreshes the developer environment `.venv` from locks/dev.txt and installs this checkout into it.
#
# uv links files from its own cache, so a second checkout costs a second, and no disk. The stamp holds the
# hash of what was installed: nothing is done while lock and project file are unchanged.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=$(cat locks/uv.txt locks/dev.txt pyproject.toml | sha256sum | cut -c1-16)
[ "$(cat .venv/.stamp 2>/dev/null || true)" = "$stamp" ] && exit 0
echo "installing the developer environment into .venv" >&2
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --require-hashes -r locks/uv.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --require-hashes -r locks/dev.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
echo "$stamp" > .venv/.stamp
