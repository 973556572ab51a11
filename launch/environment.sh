# Sourced by the scripts beside it: the repository's own .venv, with the tested versions in it.
# SCALEFL_PYTHON: the python of another environment, which has the project's dependencies.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "scalefl: no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# install NAME REQUIREMENT: install the project once, and again when what it depends on has changed.
install() {
    local stamp="$venv/installed-$1" state python
    state="$root $(cat "$root/setup.cfg" "$root/pyproject.toml" "$root/constraints.txt" | sha256sum)"
    if [[ -x "$venv/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$state" ]]; then
        return
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if [[ -e "$venv/made-by-scalefl" ]]; then
            rm -rf "$venv"
        elif [[ -n "$(ls -A "$venv" 2>/dev/null)" ]]; then
            echo "scalefl: $venv: is of other making, and has no pip that runs; expected an environment" \
                "with pip; install that there, or move the folder away" >&2
            return 2
        fi
        python="$(find_python)"
        echo "scalefl: making $venv" >&2
        mkdir -p "$venv"
        touch "$venv/made-by-scalefl"
        "$python" -m venv "$venv"
    fi
    echo "scalefl: installing into $venv (some minutes, the first time)" >&2
    # torch first: deepspeed's own setup looks for it.
    (
        cd "$root"
        "$venv/bin/python" -m pip install --quiet -c constraints.txt torch setuptools wheel
        "$venv/bin/python" -m pip install --quiet -c constraints.txt -e "$2"
    )
    echo "$state" >"$stamp"
}

# Behind `install dev`: a layer over the environment, in which `scalefl serve` runs. gradio 6.31 refuses Pillow
# 13, which everything else keeps; the layer may go when gradio takes it. Sets `serve_python`.
install_serve() {
    local layer="$venv/serve" stamp="$venv/installed-serve" wanted
    serve_python="$layer/bin/python"
    wanted="$(cat "$venv/installed-dev")"
    if [[ -x "$serve_python" && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
        return
    fi
    echo "scalefl: installing into $layer" >&2
    rm -rf "$layer"
    "$venv/bin/python" -m venv --without-pip "$layer"
    purelib "$venv/bin/python" >"$(purelib "$serve_python")/below.pth"
    sed 's/^pillow==.*/pillow==12.3.0/' "$root/constraints.txt" >"$layer/constraints.txt"
    "$serve_python" -m pip install --quiet -c "$layer/constraints.txt" -e "$root[serve]"
    echo "$wanted" >"$stamp"
}

purelib() {
    "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
}

# Sets `python` to one that runs this repository's code.
find_project() {
    python="${SCALEFL_PYTHON:-$venv/bin/python}"
    [[ -n "${SCALEFL_PYTHON:-}" ]] || install project .
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
