"""scripts/make_env.sh settles on a Python: the newest that fits, or a fetched one, or one line that says what to do."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.helpers import ROOT

PYENV = Path.home() / ".pyenv/versions"
# What the script itself calls.
PROGRAMS = [
    "bash",
    "cat",
    "dirname",
    "env",
    "head",
    "ls",
    "mkdir",
    "nproc",
    "realpath",
    "sed",
    "sha256sum",
    "sort",
    "tail",
    "uname",
]


def old_python() -> Path:
    """A Python 3.9, too old to train with and new enough to run uv."""
    found = sorted(PYENV.glob("3.9.*/bin/python3.9"))
    if not found:
        pytest.skip(f"no Python 3.9 in {PYENV}")
    return found[-1]


@pytest.fixture
def machine(tmp_path):
    """A copy of what the script reads, on a machine that has no Python, and a folder for its programs."""
    for name in ("scripts/make_env.sh", "requirements-dev.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for name in PROGRAMS:
        add(tmp_path, name, Path(str(shutil.which(name))))
    return tmp_path


def add(machine: Path, name: str, program: Path) -> None:
    (machine / "bin" / name).symlink_to(program)


def uv() -> Path:
    """The uv of the development environment."""
    return Path(sys.prefix) / "bin/uv"


def settle(machine: Path, *before: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``make_env.sh python``, which settles the interpreter and builds nothing."""
    # No settings of this machine, which may have packages at hand without a network.
    ours = ("PYTHON", "VENV", "UV_", "PIP_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "UV_CACHE_DIR": str(machine / "cache")}
    environment |= {"PATH": str(machine / "bin"), **variables}
    command = [*before, str(machine / "scripts/make_env.sh"), "python"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal, which exits with 2."""
    assert (done.returncode, done.stdout) == (2, ""), done
    (line,) = done.stderr.splitlines()
    assert line.startswith("make_env: ")
    return line


def published(folder: Path) -> str:
    """The address of a list of Pythons that holds one, made of a Python 3.13 of this machine."""
    found = sorted(PYENV.glob("3.13.*/bin/python3.13"))
    if not found:
        pytest.skip(f"no Python 3.13 in {PYENV}")
    home, archive = found[-1].parents[1], folder / "python.tar.gz"
    # No tests and no installed packages: they are most of its bytes.
    left_out = ("test", "site-packages", "__pycache__", "config-3.13-x86_64-linux-gnu", "share")
    with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
        packed.add(home, "python", filter=lambda member: None if Path(member.name).name in left_out else member)
    machine = platform.machine()
    entry = {
        "name": "cpython",
        "arch": {"family": machine, "variant": None},
        "os": "linux",
        "libc": "gnu",
        "major": 3,
        "minor": 13,
        "patch": int(home.name.split(".")[2]),
        "prerelease": "",
        "url": archive.as_uri(),
        "sha256": None,
        "variant": None,
    }
    listed = folder / "pythons.json"
    listed.write_text(json.dumps({f"cpython-{home.name}-linux-{machine}-gnu": entry}))
    return listed.as_uri()


def test_a_python_is_fetched_where_the_only_one_is_too_old(machine):
    add(machine, "python3", old_python())
    add(machine, "uv", uv())
    home = machine / "home"
    home.mkdir()
    address = published(machine)
    done = settle(machine, UV_PYTHON_DOWNLOADS_JSON_URL=address, HOME=str(home))
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("make_env: no Python 3.10 to 3.13 here: fetched Python 3.13.")
    python = Path(done.stdout.strip())
    assert python.is_relative_to(machine / ".tools")
    # Horovod is compiled against its headers.
    told = "import sysconfig; print(sysconfig.get_path('include'))"
    include = subprocess.run([python, "-c", told], capture_output=True, text=True, check=True).stdout.strip()
    assert (Path(include) / "Python.h").is_relative_to(machine / ".tools")
    assert (Path(include) / "Python.h").exists()
    # The user's own folders stay as they are.
    assert not list(home.rglob("python*"))

    again = settle(machine, HOME=str(home))
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")


def without_network() -> list[str]:
    """The words before a command that cut it off."""
    words = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("unshare --net is not allowed here")
    return [unshare, *words[1:]]


@pytest.mark.parametrize("has_uv", [True, False])
def test_without_network_one_line_names_the_remedy(machine, has_uv):
    cut_off = without_network()
    add(machine, "python3", old_python())
    if has_uv:
        add(machine, "uv", uv())
    line = only_line(settle(machine, *cut_off))
    assert line.startswith("make_env: no Python 3.10 to 3.13 here")
    assert "could not be fetched" in line
    assert "apt-get install python3 python3-venv" in line
    assert "PYTHON=/path/to/python3.13" in line
    assert not list(machine.glob(".venv"))


def test_a_user_who_forbids_downloads_is_obeyed(machine):
    add(machine, "python3", old_python())
    add(machine, "uv", uv())
    line = only_line(settle(machine, UV_PYTHON_DOWNLOADS="never"))
    assert "could not be fetched" in line
    assert "apt-get install python3 python3-venv" in line


def test_without_any_python_one_line_names_its_packages(machine):
    line = only_line(settle(machine))
    assert line == "make_env: missing: Python 3.10 to 3.13: apt-get install python3 python3-venv"


def test_a_chosen_python_that_is_too_old_is_named(machine):
    python = old_python()
    line = only_line(settle(machine, PYTHON=str(python)))
    assert f"PYTHON={python} is not one" in line


def test_the_newest_python_is_taken(machine):
    add(machine, "uv", uv())
    for name in ("3.10", "3.12", "3.9"):
        found = sorted(PYENV.glob(f"{name}.*/bin/python{name}"))
        if not found:
            pytest.skip(f"no Python {name} in {PYENV}")
        add(machine, f"python{name}", found[-1])
    done = settle(machine)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).name == "python3.12"


@pytest.mark.parametrize("target", ["env", "clean"])
def test_a_folder_with_a_space_is_refused_and_nothing_is_removed(target, tmp_path):
    (tmp_path / "my").mkdir()
    command = ["make", "--file", ROOT / "Makefile", target, "VENV=my envs"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("VENV=my envs: give one folder, without spaces.  Stop.\n")
    assert (tmp_path / "my").exists()


def test_a_folder_of_something_else_is_not_replaced(machine):
    (machine / "papers").mkdir()
    (machine / "papers/thesis.tex").write_text("")
    environment = {"PATH": str(machine / "bin"), "VENV": "papers"}
    done = subprocess.run([machine / "scripts/make_env.sh"], env=environment, capture_output=True, text=True)
    assert "papers is there, but no Python environment" in only_line(done)
    assert (machine / "papers/thesis.tex").exists()


@pytest.mark.parametrize(("python", "place", "status"), [("works", "here", 0), ("gone", "here", 2),
                                                         ("works", "elsewhere", 2)])  # fmt: skip
def test_an_environment_that_is_broken_or_was_moved_is_built_again(machine, python, place, status):
    (machine / "scripts/horovod").mkdir()
    (machine / "scripts/horovod/toolchain.cmake").write_text("")
    (machine / "elsewhere/bin").mkdir(parents=True)
    target = Path(sys.executable) if python == "works" else machine / "none"
    (machine / "elsewhere/bin/python").symlink_to(target)
    for name in ("awk", "bash"):
        if not (machine / "bin" / name).exists():
            add(machine, name, Path(str(shutil.which(name))))
    inputs = 'venv=elsewhere; eval "$(sed -n "/^inputs()/,/^}/p" scripts/make_env.sh)"; inputs requirements-dev.txt'
    command = f"({inputs}) >elsewhere/.installed; [ {place} = here ] || mv elsewhere moved"
    environment = {"PATH": str(machine / "bin") + ":/bin:/usr/bin"}
    subprocess.run(["bash", "-c", command], cwd=machine, env=environment, check=True)
    # A Python that does not exist ends the set-up before it builds anything.
    environment = {"PATH": str(machine / "bin"), "VENV": "elsewhere" if place == "here" else "moved", "PYTHON": "none"}
    done = subprocess.run([machine / "scripts/make_env.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done
    assert ("PYTHON=none" in done.stderr) == bool(status)
