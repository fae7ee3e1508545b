"""What a process finds out about its host, and asks of it, before TensorFlow is loaded."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cnnopt import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("limit", "cores"),
    [("max 100000", 3), ("200000 100000", 2), ("150000 100000", 2), ("20000 100000", 1), ("900000 100000", 3), ("", 3)],
)
def test_threads_are_for_the_cores_that_a_container_is_paid_for(limit, cores, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 5})
    assert environment.cores(tmp_path, tmp_path) == 3
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/pod/one\n")
    (tmp_path / "pod/one").mkdir(parents=True)
    (tmp_path / "pod/one/cpu.max").write_text(limit)
    assert environment.cores(tmp_path, tmp_path) == cores


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
        "import os, sys; from pathlib import Path; from cnnopt import environment\n"
        "print('start', flush=True); environment.with_huge_pages(Path(sys.argv[1]))\n"
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


def scheduling(thread: int) -> tuple[int, int]:
    return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)


def test_a_thread_gives_way_and_no_other_thread_does():
    done = threading.Event()
    before = environment.threads()
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        started, mine = waiting.native_id, scheduling(os.getpid())
        assert started in environment.threads() - before
        # One that has ended since is nobody's loss.
        environment.give_way([started, 2**22 + 1])
        assert scheduling(started) == (os.SCHED_BATCH, min(19, mine[1] + 10))
        assert scheduling(os.getpid()) == mine != scheduling(started)
    finally:
        done.set()
        waiting.join()


def test_what_is_imported_is_not_searched_for_garbage_and_what_comes_after_is():
    before = gc.get_freeze_count()
    with environment.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
