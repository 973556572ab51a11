#!/usr/bin/env bash
# All tests, slow ones too, a file on each core at a time. Arguments go to pytest:
# `bash launch/test.sh -m "not slow"`; `-n 0` runs them one after another.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install dev '.[dev]'
install_serve

cd "$root"
export SCALEFL_SERVE_PYTHON="$serve_python"
exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
