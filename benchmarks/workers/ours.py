"""One rank of this program: its model, stream and step, with what each request names.

Usage: python ours.py DEPTH BATCH_A_RANK PRECISION
Request: {"steps": 10, "exchange": "none|auto|dense|sparse", "wire": "float32|bfloat16|float16", "sparsity": 0.6,
          "optimizer": "sgd|muon", "gives_way": true, "bound": true, "bucketed": true, "resident": true,
          "compiled": true, "profile": true}

With ``"gives_way": false`` Horovod's threads get the priority of all others, for which this must be root; with
``"bound": false`` all threads may run on all cores of the host. Left out, they stay as they are. With
``"bucketed": false`` all is sent at once, when the last gradient is there. With ``"resident": true`` all steps train
one batch. With ``"compiled": true`` XLA compiles the step, and all steps are one call. Left out, a GPU decides, as in
the program. With ``"profile": true`` the answer says what a step spends on the GPU, and its seconds do not count.
"""

import contextlib
import functools
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import serve

from cnnopt.config import TrainConfig
from cnnopt.data import datasets
from cnnopt.data.stream import Draws
from cnnopt.distributed import collectives, cpu_tuning, host
from cnnopt.distributed.world import launched

depth, batch, asked = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if "ONE_GPU" in os.environ:
    # NCCL refuses two ranks of one host on the same GPU. So each rank says that it is another host.
    os.environ["NCCL_HOSTID"] = f"rank{os.environ['HOROVOD_RANK']}"
collectives.prepare(launched()[0], verbose=False, compiles=host.has_gpu())
world = collectives.start(verbose=False, share_gpus="ONE_GPU" in os.environ)
HOROVODS = [thread for thread in cpu_tuning.threads() if os.sched_getscheduler(thread) == os.SCHED_BATCH]

import horovod.tensorflow as hvd  # noqa: E402
import kernels  # noqa: E402
import tensorflow as tf  # noqa: E402

from cnnopt.model import precision  # noqa: E402
from cnnopt.model.flat import read  # noqa: E402
from cnnopt.model.pruning import magnitude_mask, num_pruned  # noqa: E402
from cnnopt.schedules import Timeline  # noqa: E402
from cnnopt.training.build import build_model  # noqa: E402
from cnnopt.training.step import SynchronousModel  # noqa: E402
from cnnopt.training.stream import training_stream  # noqa: E402
from cnnopt.training.xla import Compiler  # noqa: E402

IMAGES = datasets.load("synthetic", synthetic_sizes=(2048, 64))
GPU = collectives.device() == "GPU"
LIBRARY = "NCCL" if GPU and hvd.nccl_built() else "Gloo"
COMPUTE = precision.choose(asked, has_gpu=GPU)


def settings(exchange: str, wire: str, optimizer: str) -> tuple[TrainConfig, Timeline]:
    """A run that is longer than any comparison, at a rate that keeps it finite."""
    config = TrainConfig(dataset="synthetic", depth=depth, batch_size=batch * world.size, epochs=2000, base_lr=1e-3,
                         optimizer=optimizer, exchange=exchange, wire_dtype=wire)  # fmt: skip
    return config, Timeline(len(IMAGES.train_images), config.batch_size, config.epochs)


@functools.cache
def model(
    exchange: str, wire: str, optimizer: str, *, bucketed: bool = True, compiled: bool = False
) -> SynchronousModel:
    """The program's model; with the exchange ``none`` it is that of a lone rank, which sends nothing."""
    alone = exchange == "none"
    config, timeline = settings("dense" if alone else exchange, wire, optimizer)
    made = build_model(
        config, IMAGES, timeline, COMPUTE,
        ranks=1 if alone else world.size, bucketed=bucketed, compiler=Compiler(compiled),
    )  # fmt: skip
    collectives.broadcast(list(made.named_state().values()))
    return made


@functools.cache
def masks(sparsity: float) -> list[np.ndarray]:
    """For all kernels, equal on all ranks."""
    kernels = read(model("dense", "float32", "sgd").pruner.kernels)
    sizes = [kernel.size for kernel in kernels]
    flat = tf.constant(np.concatenate([kernel.ravel() for kernel in kernels]))
    mask = magnitude_mask(flat, sizes, [num_pruned(size, sparsity) for size in sizes]).numpy()
    parts = np.split(mask, np.cumsum(sizes)[:-1])
    return [part.reshape(kernel.shape) for part, kernel in zip(parts, kernels, strict=True)]


class ResidentBatch:
    """A stream of one batch, which stays on the device."""

    def __init__(self, batch: Iterable[tf.Tensor]) -> None:
        self.batch = tuple(tf.identity(tensor) for tensor in batch)

    def given(self, first: int, last: int) -> tuple[tf.Tensor, ...]:
        """The batch."""
        return self.batch

    @staticmethod
    def item(given: tuple[tf.Tensor, ...], i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The batch again."""
        return given


@functools.cache
def resident_batch() -> ResidentBatch:
    """The next batch of the stream."""
    return ResidentBatch(next(stream.iterator))


def peak_bytes() -> int:
    """The most memory that TensorFlow has had on the GPU, or this process on CPUs."""
    if GPU:
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def processor_seconds() -> float:
    """What Horovod's threads have computed so far."""
    return sum(int(Path(f"/proc/self/task/{t}/schedstat").read_text().split()[0]) for t in HOROVODS) / 1e9


def set_priority(gives_way: bool) -> None:
    """Let Horovod's threads give way, or take them back."""
    if not HOROVODS:
        raise RuntimeError("no thread gives way here: the kernel has refused it, or this is a GPU")
    for thread in HOROVODS:
        if os.sched_getscheduler(thread) != os.SCHED_OTHER:
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, 0))
    if gives_way:
        cpu_tuning.give_way(HOROVODS)


def block(
    steps: int, exchange: str = "dense", wire: str = "float32", sparsity: float = 0.6, optimizer: str = "sgd",
    gives_way: bool | None = None, bound: bool | None = None, bucketed: bool = True, resident: bool = False,
    compiled: bool = GPU, profile: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Train for some steps, with the peers' optimizer unless told; tell how long that took and what was sent."""
    if gives_way is not None:
        set_priority(gives_way)
    if bound is not None:
        cores = host.ALLOWED if bound else set(range(os.cpu_count() or 1))
        cpu_tuning.bind(cores, instead_of=os.sched_getaffinity(0))
    mine = model(exchange, wire, optimizer, bucketed=bucketed, compiled=compiled)
    for variable, mask in zip(mine.pruner.masks, masks(sparsity), strict=True):
        variable.assign(mask.astype(np.float32))
    mine.exchange.follow_masks()
    mine.exchange.restart()
    # All ranks start together.
    collectives.gather_objects(0)
    before = processor_seconds()
    batches = resident_batch() if resident else stream
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with tf.profiler.experimental.Profile(folder) if profile else contextlib.nullcontext():
            for length in [steps] if compiled else steps * [1]:
                mine.train(batches, 0, length, several=compiled)
            mine.run.global_step.numpy()
        seconds = time.perf_counter() - start
        spent = kernels.spent(kernels.read(Path(folder)), steps) if profile else None
    return {
        "seconds": seconds,
        "spent": spent,
        "peak_bytes": peak_bytes(),
        "horovods_seconds": processor_seconds() - before,
        "bytes": int(mine.exchange.bytes.numpy()) / steps,
        # The last stage's is ready first.
        "vectors": [entries * mine.exchange.wire.size for entries in reversed(mine.exchange.entries)],
        "compute": COMPUTE.compute,
        "exchange": mine.exchange.choice.kind,
        "library": LIBRARY,
    }


CONFIG, TIMELINE = settings("dense", "float32", "sgd")
DRAWS = Draws(len(IMAGES.train_images), batch_size=CONFIG.batch_size, seed=CONFIG.seed, augment=CONFIG.augment,
              rank=world.rank, size=world.size)  # fmt: skip
with training_stream(IMAGES, DRAWS, first_step=0, last_step=TIMELINE.total_steps) as stream:
    serve(block)
