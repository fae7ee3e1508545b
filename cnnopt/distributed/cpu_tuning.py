"""Set cores and priorities of threads: ranks of one host divide its cores, and waiting threads give way.

Measured in docs/benchmarks.md, "Whose core it is". Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from cnnopt.distributed import host

#: Added to the nice value of a thread that gives way: it gets a tenth of a core that another thread wants too.
NICER = 10


@dataclass(frozen=True)
class Given:
    """The resources of a rank: its host, its cores, its number of compute threads, and ``GPU`` or ``CPU``."""

    host: str
    cores: frozenset[int]
    threads: int
    device: str


def core_slice(everyone: Sequence[Given], rank: int) -> tuple[int, int] | None:
    """The part of its cores that ``rank`` keeps to, as (index, number of parts); None if it may run on all.

    Ranks with the same cores divide them on two conditions. The parts have equal size, because all ranks wait for the
    slowest. Each part has a core for each thread. Ranks that a launcher has bound to separate cores do not divide
    them. Ranks with a GPU do not either, because little runs on their cores.
    """
    mine = everyone[rank]
    sharing = [other for other, given in enumerate(everyone) if (given.host, given.cores) == (mine.host, mine.cores)]
    # 0 threads means one for each core.
    threads = max(everyone[other].threads or len(mine.cores) for other in sharing)
    fits = len(mine.cores) % len(sharing) == 0 and threads * len(sharing) <= len(mine.cores)
    if len(sharing) == 1 or not fits or any(everyone[other].device == "GPU" for other in sharing):
        return None
    return sharing.index(rank), len(sharing)


def tune(everyone: Sequence[Given], rank: int, *, waiting: Iterable[int]) -> None:
    """Bind this process, which is ``rank``, to its part of the cores if ranks in ``everyone`` share them.

    On a CPU, the threads ``waiting`` (Horovod's) give way to the compute threads. They look for work a thousand times
    a second, on the same cores.
    """
    if everyone[rank].device == "CPU":
        give_way(waiting)
    if (place := core_slice(everyone, rank)) is not None:
        bind(part(everyone[rank].cores, *place))


def threads() -> set[int]:
    """The kernel's ids of this process's threads. Empty if the kernel does not list them."""
    with contextlib.suppress(OSError):
        return {int(name) for name in os.listdir("/proc/self/task")}
    return set()


def part(given: Iterable[int], index: int, count: int, system: Path = Path("/sys/devices/system/cpu")) -> set[int]:
    """Part ``index`` of ``count`` of the cores. Its cores are neighbours: hyperthreads of a core, cores of a socket."""

    def place(core: int) -> tuple[int, ...]:
        names = ("physical_package_id", "core_id")
        with contextlib.suppress(OSError, ValueError):
            return (*(int((system / f"cpu{core}/topology/{name}").read_text()) for name in names), core)
        return (0, core, core)

    ordered = sorted(given, key=place)
    return set(ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count])


def bind(mine: Set[int], instead_of: Set[int] = host.ALLOWED) -> None:
    """Bind all threads that run on the cores ``instead_of``, and all that they start, to the cores ``mine``.

    A thread that the user has bound elsewhere is left alone. If the kernel refuses, only speed is lost.
    """
    for thread in threads():
        with contextlib.suppress(OSError):
            if os.sched_getaffinity(thread) == instead_of:
                os.sched_setaffinity(thread, mine)


def unbind() -> None:
    """Undo ``bind``: let these threads run on all cores that this process was started with."""
    bind(host.ALLOWED, instead_of=os.sched_getaffinity(0))


def is_bound() -> bool:
    """Whether this thread's cores differ from those that this process was started with."""
    return os.sched_getaffinity(0) != host.ALLOWED


def give_way(waiting: Iterable[int]) -> None:
    """Keep threads that wake often from interrupting compute threads. They run once a core is free, or take turns.

    They get SCHED_BATCH, which preempts nobody (sched(7)). With SCHED_IDLE, the exchange would wait for any busy
    program on the same core. A policy that the user has chosen is left alone.
    If the kernel refuses, or the thread has ended, only speed is lost.
    """
    for thread in waiting:
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(thread) == os.SCHED_OTHER:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
                os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
