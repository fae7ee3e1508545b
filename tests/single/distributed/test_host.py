"""Cores, variables and threads of a process, before TensorFlow is loaded."""

import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def topology(folder: Path, places: dict[int, tuple[int, int]]) -> Path:
    """/sys/devices/system/cpu of a host whose processors are at these sockets and cores."""
    for cpu, place in places.items():
        (folder / f"cpu{cpu}/topology").mkdir(parents=True)
        for name, number in zip(("physical_package_id", "core_id"), place, strict=True):
            (folder / f"cpu{cpu}/topology/{name}").write_text(f"{number}\n")
    return folder


def test_a_part_of_the_cores_holds_whole_cores_of_one_socket(tmp_path):
    # Two sockets of two cores of two hyperthreads, numbered as Linux often does: 0 and 4 are one core.
    layout = topology(tmp_path, {cpu: (cpu % 2, cpu // 2 % 2) for cpu in range(8)})
    assert [host.part(range(8), i, 2, layout) for i in range(2)] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert [host.part(range(8), i, 4, layout) for i in range(4)] == [{0, 4}, {2, 6}, {1, 5}, {3, 7}]


@given(cores=st.sets(st.integers(0, 500), min_size=1), data=st.data())
def test_parts_of_the_cores_are_all_of_them_and_differ_by_one_at_most(cores, data):
    count = data.draw(st.integers(1, len(cores)))
    parts = [host.part(cores, i, count, Path("/none")) for i in range(count)]
    assert sum(map(len, parts)) == len(cores)
    assert set.union(*parts) == cores
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_bound_are_all_threads_and_what_they_start_until_the_process_gets_its_cores_back():
    program = (
        "import os, threading; from cnnopt.distributed import host as e\n"
        "done = threading.Event(); early = threading.Thread(target=done.wait); early.start()\n"
        "one = {min(e.ALLOWED)}; e.bind(one); e.bind({max(e.ALLOWED)}, instead_of=set())\n"
        "late = threading.Thread(target=done.wait); late.start()\n"
        "assert len(e.threads()) == 3 and all(os.sched_getaffinity(t) == one for t in e.threads())\n"
        "print(e.is_bound()); e.unbind(); print(e.is_bound()); done.set()"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60).stdout
    assert output.split() == [str(len(os.sched_getaffinity(0)) > 1), "False"]


def scheduling(thread: int) -> tuple[int, int]:
    return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)


def test_a_thread_gives_way_and_no_other_thread_does():
    done = threading.Event()
    before = host.threads()
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        started, mine = waiting.native_id, scheduling(os.getpid())
        assert started in host.threads() - before
        # One that has ended since is nobody's loss.
        host.give_way([started, 2**22 + 1])
        assert scheduling(started) == (os.SCHED_BATCH, min(19, mine[1] + 10))
        assert scheduling(os.getpid()) == mine != scheduling(started)
    finally:
        done.set()
        waiting.join()


def test_what_is_imported_is_not_searched_for_garbage_and_what_comes_after_is():
    before = gc.get_freeze_count()
    with host.uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()
