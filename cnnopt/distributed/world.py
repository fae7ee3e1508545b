"""This process among all processes of the run, as its launcher says, before anything is imported to ask."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cnnopt.distributed import host, slurm


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """The one rank that writes and prints."""
        return self.rank == 0


# What each launcher tells its processes: rank, size, local rank, local size.
_LAUNCHERS = {
    "horovodrun": ("HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    "mpirun": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}
# Of MPICH and Intel MPI. srun sets the first two too, where it speaks their protocol.
_MPIEXEC = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def launched(environ: Mapping[str, str] = os.environ) -> tuple[World, str | None]:
    """What the launcher says of this process, and the launcher's name; one process and None without a launcher."""
    for launcher, names in _LAUNCHERS.items():
        if world := _world(environ, names):
            return world, launcher
    if world := _world(slurm.horovod_variables(environ), _LAUNCHERS["horovodrun"]):
        return world, "srun"
    if world := _world(environ, _MPIEXEC):
        return world, "mpiexec"
    return World(), None


def _world(environ: Mapping[str, str], names: Sequence[str]) -> World | None:
    if names[0] not in environ or names[1] not in environ:
        return None
    return World(*(int(environ.get(name, "01"[i % 2])) for i, name in enumerate(names)))


def threads_per_rank(world: World, environ: Mapping[str, str] = os.environ) -> int:
    """Compute threads of this rank: as many as the user says, else its part of the cores that it sees."""
    if environ.get("TF_NUM_INTRAOP_THREADS", "").isdigit():
        return max(1, int(environ["TF_NUM_INTRAOP_THREADS"]))
    cores, asked = host.cores(), environ.get("SLURM_CPUS_PER_TASK", "")
    is_task = slurm.horovod_variables(environ).get("HOROVOD_LOCAL_SIZE") == str(world.local_size)
    # mpirun starts a rank for each task of the job, and binds it by itself.
    is_task = is_task or "OMPI_COMM_WORLD_RANK" in environ
    if not (is_task and (asked.isdigit() or slurm.binds_tasks(environ))):
        # It shares them with the other ranks of its host, or of a task of SLURM in which another launcher started it.
        cores = max(1, cores // world.local_size)
    return max(1, min(cores, int(asked))) if asked.isdigit() else cores
