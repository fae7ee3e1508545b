"""The choice of a rank's GPU, tested on made-up device lists."""

import os
import sys

import pytest
import tensorflow as tf

from cnnopt.distributed import collectives
from cnnopt.distributed.world import World, threads_per_rank


@pytest.mark.parametrize(
    ("local_rank", "seen", "pinned"),
    [(0, 4, 0), (3, 4, 3), (2, 1, 0)],
    ids=["first of four", "last of four", "SLURM shows each rank its own"],
)
def test_each_rank_of_a_host_gets_one_gpu_and_takes_its_memory_as_needed(local_rank, seen, pinned, monkeypatch):
    # TensorFlow's answers are made up here; what it is told is ours.
    gpus = [tf.config.PhysicalDevice(f"/physical_device:GPU:{i}", "GPU") for i in range(seen)]
    told = []
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda device, kind: told.append(("visible", device)))
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda device, on: told.append((on, device)))
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: {"compute_capability": (8, 0)})
    collectives._pin(World(rank=local_rank + 4, size=8, local_rank=local_rank, local_size=4))
    assert told == [("visible", gpus[pinned]), (True, gpus[pinned])]


def test_without_a_gpu_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda *_: pytest.fail("there is none"))
    collectives._pin(World())


def test_a_gpu_that_slurm_gave_and_tensorflow_does_not_find_is_one_line(monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(collectives.LaunchError, match="SLURM gave 2 GPU on each node, but TensorFlow finds none"):
        collectives._pin(World())


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_gpus_that_the_user_has_hidden_are_not_missed(hidden, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    collectives._pin(World())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(collectives.LaunchError, match="TensorFlow finds none with CUDA_VISIBLE_DEVICES=7: look for"):
        collectives._pin(World())


BATCH = {"SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "16"}
TASK = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "b",
}
ALONE = {**TASK, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "16"}


@pytest.mark.parametrize(
    ("environ", "cores", "threads"),
    [
        ({}, 16, 4),
        ({}, 2, 1),
        ({"TF_NUM_INTRAOP_THREADS": "3"}, 16, 3),
        (BATCH, 16, 4),
        ({**BATCH, "SLURM_CPUS_PER_TASK": "2"}, 16, 2),
        ({**TASK, "SLURM_CPUS_PER_TASK": "4"}, 16, 4),
        ({**TASK, "SLURM_CPUS_PER_TASK": "4"}, 4, 4),
        ({**TASK, "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0xF,0xF0,0xF00,0xF000"}, 4, 4),
        ({**TASK, "SLURM_CPU_BIND_TYPE": "mask_cpu:", "SLURM_CPU_BIND_LIST": "0xFFFF"}, 16, 4),
        ({**TASK, "SLURM_CPU_BIND_TYPE": "none"}, 16, 4),
        (TASK, 16, 4),
        (ALONE, 16, 4),
        ({**BATCH, "OMPI_COMM_WORLD_RANK": "5", "SLURM_CPUS_PER_TASK": "8"}, 8, 8),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, 16, 4),
    ],
    ids=[
        "the host's cores shared", "never none", "as the user says", "one task of SLURM with four ranks",
        "no more than SLURM gives a task", "srun, unbound", "srun, bound", "srun, bound, not asked for",
        "srun, all in one mask",
        "srun, unbound, not asked for", "srun, not asked for", "four ranks in one task of srun", "mpirun, bound",
        "srun, in part",
    ],
)  # fmt: skip
def test_the_threads_of_a_rank_are_its_part_of_the_cores(environ, cores, threads, monkeypatch):
    monkeypatch.setattr(collectives.host, "cores", lambda: cores)
    assert threads_per_rank(World(rank=5, size=8, local_rank=1, local_size=4), environ) == threads


def test_horovod_joins_no_vectors_unless_told_to(monkeypatch):
    monkeypatch.setattr(collectives.host, "prepare", dict)
    found = collectives.prepare(World(), verbose=True)
    assert found["HOROVOD_FUSION_THRESHOLD"] == "0"


@pytest.mark.parametrize(("compiles", "lines"), [(True, 1), (False, 0)])
def test_on_a_gpu_xla_gets_its_threads_and_one_line_says_what_it_lacks(compiles, lines, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(collectives.host, "has_gpu", lambda: True)
    monkeypatch.setattr(collectives.host, "prepare", dict)
    monkeypatch.setattr(collectives.gpus, "DEFAULT_TOOLKIT", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    for name in collectives.gpus.NAMED_BY:
        monkeypatch.delenv(name, raising=False)
    for name, value in (("PATH", ""), ("XLA_FLAGS", "--xla_mine"), ("TF_NUM_INTRAOP_THREADS", "3")):
        monkeypatch.setenv(name, value)
    found = collectives.prepare(World(), verbose=True, compiles=compiles)
    assert found["XLA_FLAGS"] == os.environ["XLA_FLAGS"] == "--xla_mine --xla_gpu_force_compilation_parallelism=3"
    assert found["HOROVOD_CYCLE_TIME"] == "0.1"
    assert capfd.readouterr().err.count("XLA needs nvvm/libdevice/libdevice.10.bc and bin/ptxas of CUDA") == lines


def test_a_setting_that_hosts_have_settled_otherwise_is_one_line(monkeypatch):
    collectives.assert_same("--precision auto", "float32")
    monkeypatch.setattr(collectives, "gather_objects", lambda value: [("float16", "a"), ("float16", "a"), value])
    monkeypatch.setenv("HOROVOD_HOSTNAME", "b")
    collectives.assert_same("--precision auto", "float16")
    with pytest.raises(collectives.LaunchError, match=r"^--precision auto: float16 on a, float32 on b; name one"):
        collectives.assert_same("--precision auto", "float32")
