"""Cores and priorities of this rank's threads: ranks of one host divide its cores, and threads that wait give way.

Measured in docs/benchmarks.md, "Whose core it is". Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from cnnopt.distributed import host

#: What is added to the nice value of a thread that gives way: it gets a tenth of a core that another wants too.
NICER = 10


@dataclass(frozen=True)
class Given:
    """What a rank has been given: its host and cores, how many threads it computes with, and ``GPU`` or ``CPU``."""

    host: str
    cores: frozenset[int]
    threads: int
    device: str


def core_slice(everyone: Sequence[Given], rank: int) -> tuple[int, int] | None:
    """Which part of its cores, of how many, a rank is to keep to; None where it may run on all.

    Ranks that have the same cores divide them, where parts are of one size, as all wait for the slowest, and have a
    core for each thread. Ranks that a launcher has bound apart have not the same. With GPUs little runs on cores.
    """
    mine = everyone[rank]
    sharing = [other for other, given in enumerate(everyone) if (given.host, given.cores) == (mine.host, mine.cores)]
    # 0 threads are as many as there are cores.
    threads = max(everyone[other].threads or len(mine.cores) for other in sharing)
    fits = len(mine.cores) % len(sharing) == 0 and threads * len(sharing) <= len(mine.cores)
    if len(sharing) == 1 or not fits or any(everyone[other].device == "GPU" for other in sharing):
        return None
    return sharing.index(rank), len(sharing)


def tune(everyone: Sequence[Given], rank: int, *, waiting: Iterable[int]) -> None:
    """Give ``rank``, which this process is, its part of the cores where ``everyone``'s ranks share them.

    On a CPU the threads ``waiting``, which are Horovod's, give way to those that compute: they look for work a thousand
    times a second, on the same cores.
    """
    if everyone[rank].device == "CPU":
        give_way(waiting)
    if (place := core_slice(everyone, rank)) is not None:
        bind(part(everyone[rank].cores, *place))


def threads() -> set[int]:
    """The threads of this process, by the kernel's ids; none where it does not list them."""
    with contextlib.suppress(OSError):
        return {int(name) for name in os.listdir("/proc/self/task")}
    return set()


def part(given: Iterable[int], index: int, count: int, system: Path = Path("/sys/devices/system/cpu")) -> set[int]:
    """Part ``index`` of ``count`` of the given cores, next to each other: hyperthreads of a core, cores of a socket."""

    def place(core: int) -> tuple[int, ...]:
        names = ("physical_package_id", "core_id")
        with contextlib.suppress(OSError, ValueError):
            return (*(int((system / f"cpu{core}/topology/{name}").read_text()) for name in names), core)
        return (0, core, core)

    ordered = sorted(given, key=place)
    return set(ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count])


def bind(mine: Set[int], instead_of: Set[int] = host.ALLOWED) -> None:
    """Let all threads that run on the cores ``instead_of``, and what they start, run on those of ``mine`` alone.

    A thread that the user has bound elsewhere is left alone. Where the kernel refuses, nothing but speed is lost.
    """
    for thread in threads():
        with contextlib.suppress(OSError):
            if os.sched_getaffinity(thread) == instead_of:
                os.sched_setaffinity(thread, mine)


def unbind() -> None:
    """After ``bind``: let these threads run on all cores that this process was started with."""
    bind(host.ALLOWED, instead_of=os.sched_getaffinity(0))


def is_bound() -> bool:
    """Whether this thread runs on other cores than those that this process was started with."""
    return os.sched_getaffinity(0) != host.ALLOWED


def give_way(waiting: Iterable[int]) -> None:
    """Keep threads that wake often from interrupting those that compute; they run on once a core is free, or by turns.

    By SCHED_BATCH, which preempts nobody (sched(7)). Not by SCHED_IDLE: beside one busy program of anybody's on the
    same core, the exchange would wait for that (docs/benchmarks.md, "Whose core it is"). A policy that the user has
    chosen is left alone. Where the kernel refuses, or the thread has ended, nothing but speed is lost.
    """
    for thread in waiting:
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
