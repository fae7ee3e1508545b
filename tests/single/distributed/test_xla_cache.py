"""Where XLA keeps what it has compiled, and when it is left without a folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from cnnopt.distributed import xla_cache
from tests.helpers import ROOT
from tests.helpers.permissions import stopped_by_permissions


@pytest.mark.parametrize(
    ("cache", "expected"), [("{0}/cache", "{0}/cache"), ("", "{0}/.cache"), ("relative", "{0}/.cache")]
)
def test_the_folder_is_below_the_users_cache(cache, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    place = Path(expected.format(tmp_path)) / "cnnopt/xla"
    environ = {"XDG_CACHE_HOME": cache.format(tmp_path)}
    assert xla_cache.variables(environ) == {"TF_XLA_FLAGS": f"--tf_xla_persistent_cache_directory={place}"}
    assert place.is_dir()


def test_a_path_that_is_no_folder_and_one_that_tensorflow_would_split_are_not_given(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert xla_cache.variables({"XDG_CACHE_HOME": str(file)}) == {}
    assert xla_cache.variables({"XDG_CACHE_HOME": str(tmp_path / "two words")}) == {}


def test_a_folder_that_may_not_be_written_is_not_given(tmp_path):
    place = tmp_path / "cnnopt/xla"
    place.mkdir(parents=True)
    place.chmod(0o500)
    code = "from cnnopt.distributed import xla_cache; print(xla_cache.variables())"
    found = subprocess.run(
        stopped_by_permissions([sys.executable, "-c", code]),
        env={"XDG_CACHE_HOME": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "{}\n"
