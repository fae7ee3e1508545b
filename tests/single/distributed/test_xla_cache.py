"""Where XLA keeps what it has compiled, and when it is left without a folder."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from cnnopt.distributed import host, xla_cache
from tests.helpers import ROOT
from tests.helpers.permissions import stopped_by_permissions


@pytest.mark.parametrize(
    ("cache", "expected"), [("{0}/cache", "{0}/cache"), ("", "{0}/.cache"), ("relative", "{0}/.cache")]
)
def test_the_folder_is_below_the_users_cache(cache, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    parent = Path(expected.format(tmp_path)) / "cnnopt/xla"
    found = xla_cache.variables({"XDG_CACHE_HOME": cache.format(tmp_path)})
    (place,) = parent.iterdir()
    assert place.name.startswith(importlib.metadata.version("tensorflow"))
    assert list(place.iterdir()) == []
    assert found == {"TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={place}"}


def test_other_gpus_and_another_processor_have_another_folder(tmp_path, monkeypatch):
    def named(*models: str) -> str:
        for number, model in enumerate(models):
            folder = tmp_path / "-".join(models) / f"0000:{number:02x}:00.0"
            folder.mkdir(parents=True)
            # As the driver writes it.
            (folder / "information").write_text(
                f"Model: \t\t {model}\nIRQ:   \t\t {number}\nGPU UUID: \t GPU-{number}\n"
            )
        return xla_cache.folder({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "-".join(models or ["none"])).name

    h100, a100, mixed, none = named("NVIDIA H100"), named("NVIDIA A100"), named("NVIDIA H100", "NVIDIA A100"), named()
    assert len({h100, a100, mixed, none}) == 4
    # Nothing but the kinds counts.
    assert named("NVIDIA H100", "NVIDIA H100") == h100
    monkeypatch.setattr(host, "cpu_flags", lambda: {"sse4_2"})
    assert xla_cache.folder({"XDG_CACHE_HOME": str(tmp_path)}, tmp_path / "none").name != none


def test_other_flags_of_xla_have_another_folder(tmp_path):
    given = [{}, {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, {"XLA_FLAGS": "--xla_gpu_autotune_level=4"}]
    assert len({xla_cache.folder({"XDG_CACHE_HOME": str(tmp_path), **flags}) for flags in given}) == 3


def test_a_file_system_without_room_is_not_given(tmp_path):
    code = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2**20, 2**20)); "
    code += "from cnnopt.distributed import xla_cache; print(xla_cache.variables())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"XDG_CACHE_HOME": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "{}\n"
    (place,) = (tmp_path / "cnnopt/xla").iterdir()
    assert list(place.iterdir()) == []


def test_a_path_that_is_no_folder_and_one_that_tensorflow_would_split_are_not_given(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert xla_cache.variables({"XDG_CACHE_HOME": str(file)}) == {}
    assert xla_cache.variables({"XDG_CACHE_HOME": str(tmp_path / "two words")}) == {}


def test_a_folder_that_may_not_be_written_is_not_given(tmp_path):
    place = xla_cache.folder({"XDG_CACHE_HOME": str(tmp_path)})
    place.mkdir(parents=True)
    place.chmod(0o500)
    code = "from cnnopt.distributed import xla_cache; print(xla_cache.variables())"
    found = subprocess.run(
        stopped_by_permissions([sys.executable, "-c", code]),
        env={"XDG_CACHE_HOME": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "{}\n"
