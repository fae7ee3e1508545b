#!/usr/bin/env bash
# scripts/make_env.sh                    build .venv from requirements-dev.txt (make env)
# scripts/make_env.sh python             print the Python for .venv; if none fits, fetch one
# scripts/make_env.sh lock [--upgrade]   write requirements*.txt from pyproject.toml (make lock)
#
# PYTHON=/path/to/python3.11 chooses the interpreter, VENV=FOLDER a folder other than .venv, EXTRAS=1 the packages of
# requirements-extra.txt. Exit status 2: something must be installed first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Before uv 0.9, Horovod's build settings in pyproject.toml are a preview feature.
readonly uv_least=0.9
readonly venv=${VENV:-.venv} stamp=${VENV:-.venv}/.installed
readonly remedy="apt-get install python3 python3-venv where that is 3.10 to 3.13, or set PYTHON=/path/to/python3.13"

# If .venv is activated, this script would find the python and the uv of .venv, and delete them while in use.
for folder in "$(realpath --canonicalize-missing "$venv")" "$(realpath --canonicalize-missing --no-symlinks "$venv")"; do
    PATH=${PATH//"$folder/bin:"/}
done
unset VIRTUAL_ENV PYTHONHOME PYTHONPATH
# Horovod's inner make would inherit our MAKEFLAGS (serial, as soon as `make train ARGS=...` sets a variable). Without
# MAKEFLAGS it would run 8 compilers on any machine.
unset MAKEOVERRIDES MFLAGS
MAKEFLAGS=-j$(nproc)
export MAKEFLAGS
# Horovod needs the two files in scripts/horovod to compile against this TensorFlow (toolchain.cmake says why).
export CMAKE_TOOLCHAIN_FILE=$PWD/scripts/horovod/toolchain.cmake
# Only fetch_python fetches a Python, and only if the user does not forbid it. Everything is built with the Python that
# the checks below have seen.
readonly may_fetch=${UV_PYTHON_DOWNLOADS:-manual}
export UV_PYTHON_DOWNLOADS=never

say() { echo "make_env: $*" >&2; }

# Prints the first candidate that is Python 3.$1 to 3.$2 and can import the modules $3.
first_python() {
    local candidate
    # Run each candidate, do not only look it up: pyenv has shims on PATH for versions that it refuses to start.
    for candidate in "${@:4}"; do
        # Print the base executable, because a venv made from another venv breaks when the other one is deleted.
        "$candidate" -c "
import $3
if not (3, $1) <= sys.version_info[:2] <= (3, $2):
    sys.exit(1)
print(getattr(sys, '_base_executable', sys.executable))" 2>/dev/null && return
    done
    return 1
}

find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3.10 python3 "$PWD"/.tools/python/*/bin/python3.13)
    [ -z "${PYTHON-}" ] || candidates=("$PYTHON")
    first_python 10 13 sys "${candidates[@]}"
}

# Prints any Python that can fetch the locked uv.
find_helper() {
    first_python 8 99 "sys, ensurepip, venv" ${PYTHON:+"$PYTHON"} python3 python3.{13,12,11,10,9,8,14}
}

find_compiler() {
    local compiler
    # CMake tries compilers in this order. TensorFlow's headers are C++17.
    for compiler in ${CXX:-c++ g++ clang++}; do
        echo 'int main() {}' | "$compiler" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null && return
    done
    return 1
}

find_uv() {
    local candidate version
    for candidate in uv "$PWD/.tools/uv/bin/uv"; do
        version=$("$candidate" --version 2>/dev/null) || continue
        if printf '%s\n' "$uv_least" "${version#uv }" | sort --version-sort --check=silent; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Ends with one line: the thing that could not be fetched, the last line of the program that tried, and the remedy.
refused() {
    say "$1 could not be fetched ($(tail -n 1 <<<"$2" | sed -E 's/^ *(cause|hint|error): *//I')): $3"
    exit 2
}

fetch_uv() {
    local output
    "$helper" -m venv --clear .tools/uv
    sed -n '/^uv==/,/[^\\]$/p' requirements-dev.txt >.tools/uv/requirements.txt
    output=$(.tools/uv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes \
        --only-binary :all: --requirement .tools/uv/requirements.txt 2>&1) ||
        if [ -n "$python" ]; then
            refused uv "$output" "connect to a package index, or put uv $uv_least or newer on PATH"
        else
            refused "no Python 3.10 to 3.13 here, and uv, which would fetch one," "$output" "$remedy"
        fi
    say "fetched uv into .tools"
}

fetch_python() {
    local output
    output=$(UV_PYTHON_DOWNLOADS=$may_fetch "$uv" python install --no-bin --install-dir .tools/python 3.13 2>&1) ||
        refused "no Python 3.10 to 3.13 here, and one" "$output" "$remedy"
    python=$(find_python)
    say "no Python 3.10 to 3.13 here: fetched $("$python" --version) into .tools"
}

lock() {
    local compile=("$uv" pip compile pyproject.toml --universal --python-version 3.10 --generate-hashes
        --no-header --no-annotate --quiet)
    # uv keeps the versions that are already in an output file, if pyproject.toml allows them. Each file starts as a
    # copy of the larger one, so that all three have the same versions.
    "${compile[@]}" --group dev --group extra "$@" --output-file requirements-extra.txt >/dev/null
    cp requirements-extra.txt requirements-dev.txt
    "${compile[@]}" --group dev --output-file requirements-dev.txt >/dev/null
    cp requirements-dev.txt requirements.txt
    "${compile[@]}" --output-file requirements.txt >/dev/null
    # Remove the upper bound: with it in every line, pip on Python 3.14 would skip every package and report success.
    sed -i "s/python_full_version < '3.14' and //" requirements.txt requirements-dev.txt requirements-extra.txt
}

# Prints a digest of everything that decides the content of an environment built from the file $1.
inputs() {
    {
        # The programs of an environment that was moved or copied start the Python of its old place.
        realpath "$venv"
        cat "$1" scripts/horovod/*
        awk '/^\[/ { inside = /^\[+tool\.uv/ } inside' pyproject.toml
    } | sha256sum
}

install() {
    say "building $venv with $("$python" --version); the first time Horovod is compiled, about 3 minutes on 2 cores"
    # Always start empty: an interrupted set-up leaves nothing behind, and Horovod is never older than its TensorFlow.
    "$uv" venv --quiet --clear --python "$python" "$venv"
    # Compile bytecode now, because every rank imports TensorFlow. With PYTHONDONTWRITEBYTECODE set (as in many
    # containers) each rank would compile TensorFlow again.
    "$uv" pip install --python "$venv/bin/python" --require-hashes --compile-bytecode --requirement "$requirements"
    local output
    # A successful import proves that Horovod fits this TensorFlow.
    if ! output=$("$venv/bin/python" -c '
import sys
import horovod.tensorflow
sys.exit(not horovod.tensorflow.gloo_built())' 2>&1); then
        say "$output"
        say "Horovod does not work here: run '$uv cache clean horovod', then make env again"
        exit 1
    fi
    inputs "$requirements" >"$stamp"
    say "done"
}

requirements="requirements-dev.txt"
[ -z "${EXTRAS-}" ] || requirements="requirements-extra.txt"

case ${1-} in
lock | python) ;;
"")
    if [ -e "$stamp" ]; then
        # An environment with the extras also serves users who do not ask for them.
        # An environment whose base Python is gone is built again.
        if "$venv/bin/python" -c "" 2>/dev/null; then
            for file in "$requirements" requirements-extra.txt; do
                [ "$(<"$stamp")" != "$(inputs "$file")" ] || exit 0
            done
        fi
    elif [ ! -e "$venv/pyvenv.cfg" ] && [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
        say "$venv is there, but no Python environment: set VENV to another folder, or remove it"
        exit 2
    fi
    ;;
*)
    say "unknown argument $1: give lock, python or nothing"
    exit 2
    ;;
esac

missing=0
need() {
    say "missing: $1"
    missing=1
}

[ "$(uname -s)" = Linux ] || need "Linux, for which Horovod and TensorFlow are built here (on Windows: WSL 2)"
uv=$(find_uv) || uv=""
python=$(find_python) || python=""
if [ -z "$python" ] && [ -n "${PYTHON-}" ]; then
    need "Python 3.10 to 3.13 (PYTHON=$PYTHON is not one): $remedy"
elif [ -z "$uv" ] && ! helper=$(find_helper); then
    what="Python 3.10 to 3.13"
    [ -z "$python" ] || what="uv $uv_least or newer, or the venv module to fetch it with"
    need "$what: apt-get install python3 python3-venv"
fi
if [ -z "${1-}" ]; then
    find_compiler || need "a C++17 compiler, to build Horovod${CXX:+ (CXX=$CXX is not one)}: apt-get install g++"
    make --version >/dev/null 2>&1 || need "make, to build Horovod: apt-get install make"
fi
[ "$missing" = 0 ] || exit 2

if [ -z "$uv" ]; then
    fetch_uv
    uv=$PWD/.tools/uv/bin/uv
fi
[ -n "$python" ] || fetch_python

case ${1-} in
lock) lock "${@:2}" ;;
python) echo "$python" ;;
*) install ;;
esac
