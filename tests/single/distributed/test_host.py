"""Cores, variables and threads of a process, before TensorFlow is loaded."""

import gc
import subprocess
import sys

import pytest

from cnnopt.distributed import host
from tests.helpers import ROOT


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 3), ("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1), ("900000 100000", 3), ("", 3)],
)
def test_threads_are_for_the_cores_that_a_container_is_paid_for(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "ALLOWED", {0, 1, 5})
    assert host.cores(tmp_path, tmp_path) == 3
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/pod/one\n")
    (tmp_path / "pod/one").mkdir(parents=True)
    (tmp_path / "pod/one/cpu.max").write_text(limit)
    assert host.cores(tmp_path, tmp_path) == cores


@pytest.mark.parametrize(
    ("driver", "visible", "may"),
    [(True, None, True), (True, "1", True), (True, "", False), (True, "-1", False), (False, None, False)],
)
def test_a_gpu_needs_its_driver_and_may_be_hidden(driver, visible, may, tmp_path):
    if driver:
        (tmp_path / "nvidiactl").touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert host.has_gpu(environ, tmp_path / "nvidiactl") is may


HELD_BACK = """
import os, sys, tempfile
from cnnopt.distributed import host

def none():
    raise FileNotFoundError("No usable temporary directory found")

tempfile._get_default_tempdir = none
with host.quiet_stderr():
    os.write(2, b"noise of C++")
with host.quiet_stderr():
    os.write(2, b"what led to it: ")
    sys.exit("wrong")
"""


def test_errors_are_held_back_without_a_folder_for_temporary_files():
    done = subprocess.run([sys.executable, "-c", HELD_BACK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "what led to it: wrong\n")


def test_what_is_imported_is_not_searched_for_garbage_and_what_comes_after_is():
    before = gc.get_freeze_count()
    with host.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
