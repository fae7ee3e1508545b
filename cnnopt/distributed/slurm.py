"""Translate srun's variables for its tasks into those that Horovod reads. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Mapping


def tasks_per_node(text: str) -> list[int]:
    """The number of tasks on each node of a step, in node order: ``2(x3),1`` is [2, 2, 2, 1].

    Raises ValueError for text that srun does not write.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={text}: expected counts such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def binds_tasks(environ: Mapping[str, str]) -> bool:
    """True if srun has bound each of its tasks to separate cores.

    A list with one mask does not bind single tasks: srun writes it to hold all tasks together in their step.
    """
    kind, cores = environ.get("SLURM_CPU_BIND_TYPE", ""), environ.get("SLURM_CPU_BIND_LIST", "")
    return kind.startswith("rank") or (kind.startswith(("mask_cpu", "map_cpu")) and len({*cores.split(",")}) > 1)


def horovod_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Rank, size and host of this srun task. Empty if this process is no srun task.

    Only srun sets SLURM_STEP_NUM_TASKS. A batch script has a SLURM_PROCID too, but is one process. Raises ValueError
    if some of the variables are missing or do not fit together.
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_NUM_TASKS" not in environ:
        return {}
    for name in ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_NODEID", "SLURM_LOCALID"):
        if not environ.get(name, "").isdecimal():
            raise ValueError(f"{name}={environ[name]}: no number" if name in environ else f"{name} is not set")
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURMD_NODENAME"):
        if not environ.get(name):
            raise ValueError(f"{name} is not set")
    counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    node, local_rank = int(environ["SLURM_NODEID"]), int(environ["SLURM_LOCALID"])
    if node >= len(counts) or local_rank >= counts[node] or str(sum(counts)) != environ["SLURM_STEP_NUM_TASKS"]:
        raise ValueError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} does not fit SLURM_NODEID={node}, "
            f"SLURM_LOCALID={local_rank} and SLURM_STEP_NUM_TASKS={environ['SLURM_STEP_NUM_TASKS']}"
        )
    # Horovod's "cross" ranks are those with the same local rank on all nodes that have one.
    peers = [peer for peer, count in enumerate(counts) if count > local_rank]
    return {
        "HOROVOD_RANK": environ["SLURM_PROCID"],
        "HOROVOD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(counts[node]),
        "HOROVOD_CROSS_RANK": str(peers.index(node)),
        "HOROVOD_CROSS_SIZE": str(len(peers)),
        "HOROVOD_HOSTNAME": environ["SLURMD_NODENAME"],
    }
