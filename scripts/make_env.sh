#!/usr/bin/env bash
# scripts/make_env.sh                    build .venv from requirements-dev.txt (make env)
# scripts/make_env.sh lock [--upgrade]   write requirements*.txt from pyproject.toml (make lock)
#
# PYTHON=/path/to/python3.11 chooses the interpreter. Exit status 2: something must be installed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# 0.9 is the first series in which Horovod's build settings in pyproject.toml are no preview feature.
readonly uv_least=0.9
readonly stamp=.venv/.installed

# From inside an activated .venv, its own python and uv would be found, and deleted while in use.
PATH=${PATH//"$PWD/.venv/bin:"/}
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Horovod's inner make would inherit ours (serial, as soon as `make train ARGS=...` sets a variable), or else run 8
# compilers on any machine.
unset MAKEOVERRIDES MFLAGS
MAKEFLAGS=-j$(nproc)
export MAKEFLAGS
# Horovod compiles against this TensorFlow with these two files (scripts/horovod/toolchain.cmake says why).
export CMAKE_TOOLCHAIN_FILE=$PWD/scripts/horovod/toolchain.cmake
# What is built here is built with the Python that the checks below have seen.
export UV_PYTHON_DOWNLOADS=never

say() { echo "make_env: $*" >&2; }

find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3.10 python3)
    [ -z "${PYTHON-}" ] || candidates=("$PYTHON")
    # Run, not merely looked up: a pyenv shim is on PATH for versions it then refuses to start.
    for candidate in "${candidates[@]}"; do
        # The base executable, because a venv made from another venv breaks when that one goes.
        "$candidate" -c '
import sys
if not (3, 10) <= sys.version_info < (3, 14):
    sys.exit(1)
print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null && return
    done
    return 1
}

find_compiler() {
    local compiler
    # CMake's own order; TensorFlow's headers are C++17.
    for compiler in ${CXX:-c++ g++ clang++}; do
        echo 'int main() {}' | "$compiler" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null && return
    done
    return 1
}

find_uv() {
    local candidate version
    for candidate in uv "$PWD/.tools/bin/uv"; do
        version=$("$candidate" --version 2>/dev/null) || continue
        if printf '%s\n' "$uv_least" "${version#uv }" | sort --version-sort --check=silent; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

fetch_uv() {
    say "fetching uv into .tools"
    "$python" -m venv --clear .tools
    sed -n '/^uv==/,/[^\\]$/p' requirements-dev.txt >.tools/uv.txt
    .tools/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: \
        --requirement .tools/uv.txt
}

lock() {
    local compile=("$uv" pip compile pyproject.toml --universal --python-version 3.10 --generate-hashes
        --no-header --no-annotate --quiet)
    # The versions already in an output file are kept while pyproject.toml allows them. Starting the run-time
    # file from the other one gives both the same versions.
    "${compile[@]}" --group dev "$@" --output-file requirements-dev.txt >/dev/null
    cp requirements-dev.txt requirements.txt
    "${compile[@]}" --output-file requirements.txt >/dev/null
    # With the upper bound in every line, pip on Python 3.13 would skip every package and call it success.
    sed -i "s/python_full_version < '3.14' and //" requirements.txt requirements-dev.txt
}

install() {
    say "building .venv with $("$python" --version); the first time Horovod is compiled, about 3 minutes on 2 cores"
    # Anew each time: an interrupted set-up leaves nothing behind, and Horovod is never older than its TensorFlow.
    "$uv" venv --quiet --clear --python "$python" .venv
    # Compiled ahead, because every rank imports TensorFlow, and with PYTHONDONTWRITEBYTECODE set (as in many
    # containers) each of them would compile it again.
    "$uv" pip install --python .venv/bin/python --require-hashes --compile-bytecode --requirement requirements-dev.txt
    local output
    # Loading it proves that it fits this TensorFlow.
    if ! output=$(.venv/bin/python -c '
import sys
import horovod.tensorflow
sys.exit(not horovod.tensorflow.gloo_built())' 2>&1); then
        say "$output"
        say "Horovod does not work here: run '$uv cache clean horovod', then make env again"
        exit 1
    fi
    echo "$inputs" >"$stamp"
    say "done"
}

if [ -z "${1-}" ]; then
    # All that decides what is in .venv. Make compares times, and so calls after other edits and checkouts too.
    inputs=$({
        cat requirements-dev.txt
        awk '/^\[/ { inside = /^\[+tool\.uv/ } inside' pyproject.toml
    } | sha256sum)
    if [ -e "$stamp" ] && [ "$(<"$stamp")" = "$inputs" ]; then
        touch "$stamp"
        exit
    fi
fi

missing=0
need() {
    say "missing: $1"
    missing=1
}

[ "$(uname -s)" = Linux ] || need "Linux, for which Horovod and TensorFlow are built here (on Windows: WSL 2)"
python=$(find_python) ||
    need "Python 3.10 to 3.13${PYTHON:+ (PYTHON=$PYTHON is not one)}: apt-get install python3 python3-venv, or set PYTHON=/path/to/python3.11"
if [ "${1-}" != lock ]; then
    find_compiler || need "a C++17 compiler, to build Horovod${CXX:+ (CXX=$CXX is not one)}: apt-get install g++"
    make --version >/dev/null 2>&1 || need "make, to build Horovod: apt-get install make"
fi
if ! uv=$(find_uv) && [ -n "$python" ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need "uv $uv_least or newer, or the venv module to fetch it with: apt-get install python3-venv"
fi
[ "$missing" = 0 ] || exit 2

if [ -z "$uv" ]; then
    fetch_uv
    uv=$PWD/.tools/bin/uv
fi

case ${1-} in
lock) lock "${@:2}" ;;
"") install ;;
*)
    say "unknown argument $1: give lock or nothing"
    exit 2
    ;;
esac
