#!/usr/bin/env bash
# All tests, slow ones too. Arguments go to pytest: `bash launch/test.sh -m "not slow"`.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install dev '.[dev]'

cd "$root"
exec "$venv/bin/python" -m pytest "$@"
