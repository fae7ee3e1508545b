"""Cores, variables and threads of a process, before TensorFlow is loaded."""

import gc
import os
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


@pytest.mark.parametrize(
    ("policy", "given", "starts", "tunables"),
    [
        ("always [madvise] never", None, 2, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", 1, "glibc.malloc.hugetlb=0"),
        ("[always] madvise never", None, 1, None),
        (None, None, 1, None),
    ],
    ids=["asked for", "the user knows better", "given to all", "no such kernel"],
)
def test_huge_pages_are_asked_for_once_where_the_kernel_waits_for_it(policy, given, starts, tunables, tmp_path):
    if policy is not None:
        (tmp_path / "enabled").write_text(policy)
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys; from pathlib import Path; from cnnopt.distributed import host\n"
        "print('start', flush=True); host.with_huge_pages(Path(sys.argv[1]))\n"
        "print(os.getpid(), sys.argv[2:], os.environ.get('GLIBC_TUNABLES'))"
    )
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    if given is not None:
        variables["GLIBC_TUNABLES"] = given
    command = [sys.executable, "-u", str(program), str(tmp_path / "enabled"), "--name", "a b"]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        output, _ = process.communicate(timeout=60)
    # The same process goes on, which launchers and signals know by its id.
    assert output.splitlines() == ["start"] * starts + [f"{process.pid} ['--name', 'a b'] {tunables}"]


def test_what_is_imported_is_not_searched_for_garbage_and_what_comes_after_is():
    before = gc.get_freeze_count()
    with host.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
