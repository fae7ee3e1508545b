"""Which cores and which priority the threads of a rank get."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from cnnopt.distributed import cpu_tuning
from tests.helpers import ROOT


def given(host: str = "a", cores: int = 8, threads: int = 2, device: str = "CPU", first: int = 0) -> cpu_tuning.Given:
    return cpu_tuning.Given(host, frozenset(range(first, first + cores)), threads, device)


@pytest.mark.parametrize(
    ("everyone", "places"),
    [
        ([given()], [None]),
        ([given()] * 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ([given("a"), given("b"), given("a"), given("b")], [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ([given(cores=4), given(cores=4, first=4)], [None, None]),
        ([given(cores=4)] * 2 + [given(cores=4, first=4)] * 2, [(0, 2), (1, 2), (0, 2), (1, 2)]),
        ([given(cores=4), given(cores=4, first=2)], [None, None]),
        ([given(cores=3, threads=1)] * 2, [None, None]),
        ([given(cores=2, threads=1)] * 4, [None] * 4),
        ([given(threads=5)] * 2, [None, None]),
        ([given(threads=1), given(threads=5)], [None, None]),
        ([given(threads=0)] * 2, [None, None]),
        ([given(), given(device="GPU")], [None, None]),
        ([given("a"), given("a"), given("b", device="GPU")], [(0, 2), (1, 2), None]),
    ],
    ids=[
        "alone", "one host", "two hosts", "bound apart", "two to a socket", "bound to some that are the same",
        "parts of two sizes", "more ranks than cores", "more threads than a part", "one with more threads",
        "threads by TensorFlow", "a GPU beside", "a GPU elsewhere",
    ],
)  # fmt: skip
def test_ranks_that_have_the_same_cores_divide_them(everyone, places):
    assert [cpu_tuning.core_slice(everyone, rank) for rank in range(len(everyone))] == places


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
    assert [cpu_tuning.part(range(8), i, 2, layout) for i in range(2)] == [{0, 2, 4, 6}, {1, 3, 5, 7}]
    assert [cpu_tuning.part(range(8), i, 4, layout) for i in range(4)] == [{0, 4}, {2, 6}, {1, 5}, {3, 7}]


@hypothesis.given(cores=st.sets(st.integers(0, 500), min_size=1), data=st.data())
def test_parts_of_the_cores_are_all_of_them_and_differ_by_one_at_most(cores, data):
    count = data.draw(st.integers(1, len(cores)))
    parts = [cpu_tuning.part(cores, i, count, Path("/none")) for i in range(count)]
    assert sum(map(len, parts)) == len(cores)
    assert set.union(*parts) == cores
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_bound_are_all_threads_and_what_they_start_until_the_process_gets_its_cores_back():
    program = (
        "import os, threading; from cnnopt.distributed import cpu_tuning as e, host\n"
        "done = threading.Event(); early = threading.Thread(target=done.wait); early.start()\n"
        "one = {min(host.ALLOWED)}; e.bind(one); e.bind({max(host.ALLOWED)}, instead_of=set())\n"
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
    before = cpu_tuning.threads()
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        started, mine = waiting.native_id, scheduling(os.getpid())
        assert started in cpu_tuning.threads() - before
        # One that has ended since is nobody's loss.
        cpu_tuning.give_way([started, 2**22 + 1])
        assert scheduling(started) == (os.SCHED_BATCH, min(19, mine[1] + 10))
        assert scheduling(os.getpid()) == mine != scheduling(started)
    finally:
        done.set()
        waiting.join()
