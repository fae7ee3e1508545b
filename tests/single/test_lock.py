"""The lock (requirements*.txt) is in step with pyproject.toml, and holds no address."""

import re

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers import ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUNTIME = PROJECT["project"]["dependencies"]
DEV = PROJECT["dependency-groups"]["dev"]
EXTRA = PROJECT["dependency-groups"]["extra"]
FILES = ["requirements.txt", "requirements-dev.txt", "requirements-extra.txt"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def entries(file_name: str) -> list[tuple[Requirement, list[str]]]:
    """Every entry of a requirements file, with its hashes."""
    text = (ROOT / file_name).read_text().replace("\\\n", " ")
    found = []
    for line in text.splitlines():
        stated, *hashes = line.split("--hash=")
        found.append((Requirement(stated.strip()), [hash.strip() for hash in hashes]))
    return found


def version_of(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    return specifier.version


def applies(marker: Marker | None, python: str) -> bool:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    return marker is None or marker.evaluate(environment)


def pinned(file_name: str, python: str) -> dict[str, str]:
    """Name to version, as an installer on Linux with this Python would read the file."""
    pairs = [
        (canonicalize_name(requirement.name), version_of(requirement))
        for requirement, _ in entries(file_name)
        if applies(requirement.marker, python)
    ]
    assert len(pairs) == len(dict(pairs)), "a package is pinned twice"
    return dict(pairs)


@pytest.mark.parametrize("file_name", FILES)
def test_each_entry_is_one_version_with_hashes(file_name):
    for requirement, hashes in entries(file_name):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
        assert requirement.url is None
        assert hashes, f"{requirement} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", hash) for hash in hashes), requirement


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(
    ("file_name", "direct"), list(zip(FILES, [RUNTIME, RUNTIME + DEV, RUNTIME + DEV + EXTRA], strict=True))
)
def test_each_direct_dependency_is_pinned_as_pyproject_allows(file_name, direct, python):
    versions = pinned(file_name, python)
    for requirement in map(Requirement, direct):
        if not applies(requirement.marker, python):
            continue
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{requirement} is not in {file_name}: run make lock"
        assert requirement.specifier.contains(versions[name], prereleases=True), (
            f"{file_name} pins {name}=={versions[name]}, pyproject.toml says {requirement}: run make lock"
        )


@pytest.mark.parametrize("python", PYTHONS)
def test_each_file_holds_the_smaller_one(python):
    runtime, dev, extra = (pinned(name, python) for name in FILES)
    assert runtime.items() <= dev.items() <= extra.items()


def test_the_dev_group_is_not_in_the_runtime_file():
    runtime = pinned("requirements.txt", "3.11")
    assert runtime.keys().isdisjoint({"pytest", "mypy", "ruff", "hypothesis", "uv"})


def test_every_supported_python_is_checked():
    specifiers = Requirement(f"python{PROJECT['project']['requires-python']}").specifier
    minors = [f"3.{minor}" for minor in range(20)]
    assert [minor for minor in minors if specifiers.contains(minor)] == PYTHONS


def test_the_lock_holds_no_address():
    # Each user has an index of their own; uv.lock, which records one, is not committed for that reason.
    for name in FILES:
        assert "://" not in (ROOT / name).read_text()


def test_the_image_compiles_with_the_cuda_of_its_lock():
    (compiler,) = re.findall(r"nvidia/cuda:(\d+\.\d+)", (ROOT / "docker/Dockerfile").read_text())
    locked = dict(re.findall(r"^(nvidia-\S+)==(\S+)", (ROOT / "docker/requirements-gpu.txt").read_text(), re.MULTILINE))
    assert locked["nvidia-cuda-nvcc-cu12"].startswith(f"{compiler}.")


def test_docs_compile_horovod_as_make_env_does():
    text = (ROOT / "docs/install.md").read_text()
    for name, value in PROJECT["tool"]["uv"]["extra-build-variables"]["horovod"].items():
        # With pip alone, and in an environment of one's own.
        assert text.count(f"{name}={value}") >= 2, name
    (version,) = re.findall(r"pip install .* (horovod==\S+)", text)
    assert version in RUNTIME
