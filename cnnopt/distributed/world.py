"""The place of this process in the run, read from the launcher's variables before Horovod is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnnopt.distributed import host, rendezvous, slurm
from cnnopt.errors import UserError


@dataclass(frozen=True)
class World:
    """The place of this process among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """True for rank 0, the only rank that writes and prints."""
        return self.rank == 0


class LaunchError(UserError):
    """The ranks that started are not the ranks that were asked for. The message is one line."""


# The variables of each launcher for its processes: rank, size, local rank, local size.
_LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
# Two more of horovodrun, with Horovod's defaults: the rank among those with the same local rank, and their number.
_CROSS = {"HOROVOD_CROSS_RANK": "0", "HOROVOD_CROSS_SIZE": "1"}
# The variables of MPICH and Intel MPI. srun also sets the first two if it speaks their protocol.
_MPIEXEC = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_REMEDY = "start with horovodrun, cnnopt.launch, srun or mpirun, or unset the variables, if another job has left them"


def launched(environ: Mapping[str, str] = os.environ) -> tuple[World, str | None]:
    """The place that the launcher gave this process, and the launcher's name. Without one: one process and None.

    Raises LaunchError if the launcher's variables are incomplete or do not fit together. A process would otherwise
    take itself for another rank, or for the only one.
    """
    for launcher, names in _LAUNCHERS.items():
        if world := _world(environ, names):
            return world, launcher
    try:
        of_srun = slurm.horovod_variables(environ)
    except ValueError as error:
        raise LaunchError(f"{error}: {_REMEDY}") from None
    if world := _world(of_srun, _LAUNCHERS["horovodrun"]):
        return world, "srun"
    if world := _world(environ, _MPIEXEC):
        return world, "mpiexec"
    if "RANK" in environ and environ.get("WORLD_SIZE", "1") != "1":
        raise LaunchError(
            f"RANK={environ['RANK']}, WORLD_SIZE={environ['WORLD_SIZE']}: Horovod does not read those of torchrun; "
            f"{_REMEDY}"
        )
    # One process of several that trains alone is not noticed, and Gloo aborts if nobody answers at this address.
    if (address := environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")) is not None:
        raise LaunchError(f"HOROVOD_GLOO_RENDEZVOUS_ADDR={address}, but HOROVOD_RANK is not set: {_REMEDY}")
    return World(), None


def is_first(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process does the work that one process does for all. Also true if its launcher is gone."""
    try:
        world, launcher = launched(environ)
    except LaunchError:
        return True
    return world.first or (launcher == "horovodrun" and not rendezvous.answers(environ))


def _world(environ: Mapping[str, str], names: Sequence[str]) -> World | None:
    """The place that these variables give; None without them. Raises LaunchError if they do not fit together."""
    # Horovod reads its local and cross ones also without a rank, and Gloo aborts.
    telling, cross = (names, _CROSS) if names == _LAUNCHERS["horovodrun"] else (names[:2], {})
    if environ.keys().isdisjoint([*telling, *cross]):
        return None
    given = {name: environ.get(name) for name in names}
    if given[names[1]] == "1":
        # A size of 1 is enough: it settles the other three.
        given = {name: value or "01"[i % 2] for i, (name, value) in enumerate(given.items())}
    values = [*given.values(), *(environ.get(name, usual) for name, usual in cross.items())]
    rank, size, local_rank, local_size, *across = (-1 if (n := count(value)) is None else n for value in values)
    fits = 0 <= rank < size and 0 <= local_rank < local_size <= size
    if not fits or (across and not 0 <= across[0] < across[1]):
        given |= {name: environ[name] for name in cross if name in environ}
        said = ", ".join(f"{name} is not set" if value is None else f"{name}={value}" for name, value in given.items())
        raise LaunchError(f"{said}: {_REMEDY}")
    return World(rank, size, local_rank, local_size)


def count(text: str | None) -> int | None:
    """The number that a variable gives; None where it is none, or is none of ranks, threads or seconds."""
    return int(text) if text and text.isdecimal() and len(text) < 10 else None


def threads_per_rank(world: World, environ: Mapping[str, str] = os.environ) -> int:
    """The number of compute threads of this rank: the user's number, else its share of the cores that it sees."""
    if (chosen := count(environ.get("TF_NUM_INTRAOP_THREADS"))) is not None:
        return max(1, chosen)
    cores, asked = host.cores(), count(environ.get("SLURM_CPUS_PER_TASK"))
    # mpirun starts one rank for each task of the job, and binds the rank itself.
    is_task = "OMPI_COMM_WORLD_RANK" in environ
    # If another launcher has started this rank, srun's variables may be incomplete.
    with contextlib.suppress(ValueError):
        is_task = is_task or slurm.horovod_variables(environ).get("HOROVOD_LOCAL_SIZE") == str(world.local_size)
    if not (is_task and (asked is not None or slurm.binds_tasks(environ))):
        # This rank shares the cores with others: of its host, or of the SLURM task in which a launcher started them.
        cores = max(1, cores // world.local_size)
    return cores if asked is None else max(1, min(cores, asked))
