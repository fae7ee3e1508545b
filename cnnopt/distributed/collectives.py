"""Start ranks, pin GPUs, exchange, broadcast and compare values. The only file that imports Horovod."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cnnopt.distributed import cpu_tuning, gpus, host, rendezvous, slurm, xla_cache
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.world import LaunchError, World, count, launched, threads_per_rank
from cnnopt.errors import RunError

if TYPE_CHECKING:
    import tensorflow as tf


def prepare(world: World, *, verbose: bool, compiles: bool = False) -> dict[str, str]:
    """Set the environment variables that TensorFlow and Horovod read at start. Call before importing either.

    ``compiles``: whether XLA will compile the step; it keeps what it compiles for later processes. If it cannot compile
    for a GPU, one line says what is missing.

    A variable that the user has set is left alone, except those of host.FIXED. Returns the settings in force. Raises
    RendezvousError if this rank and the others cannot reach each other, LaunchError if a variable that must be a whole
    number is not one.
    """
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ and "HOROVOD_RANK" not in os.environ:
        # cnnopt.launch serves the rendezvous, but srun started the ranks, so their places come from srun.
        os.environ.update(slurm.horovod_variables(os.environ))
    rendezvous.check(gpu=host.has_gpu())
    threads = threads_per_rank(world)
    numbers = {
        "TF_NUM_INTRAOP_THREADS": str(threads),
        "TF_NUM_INTEROP_THREADS": "2",
        # A hung rank must end the job, so that it can be started again.
        "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "300",
        # We join tensors ourselves. Horovod joins those that are ready, so the order of a sum would depend on timing.
        "HOROVOD_FUSION_THRESHOLD": "0",
    }
    others = {**host.TENSORFLOW, "OMP_NUM_THREADS": str(threads)}
    if host.has_gpu():
        # A step takes milliseconds, and Horovod looks for work every millisecond. 0.1 is NVIDIA's setting in MLPerf.
        others["HOROVOD_CYCLE_TIME"] = "0.1"
        variables, lacking = gpus.for_xla(threads, ranks=world.size)
        os.environ.update(variables)
        others["XLA_FLAGS"] = variables["XLA_FLAGS"]
        if lacking and compiles and world.local_rank == 0:
            print(f"cnnopt: {platform.node()}: {lacking}", file=sys.stderr, flush=True)
    if compiles:
        others |= xla_cache.variables()
    if not verbose:
        others |= {**host.QUIET, "HOROVOD_LOG_LEVEL": "error"}
    settings = host.prepare({**numbers, **others})
    for name, default in numbers.items():
        # Horovod silently reads a word that is no number as 0. TensorFlow aborts if it cannot start its threads.
        number, most = count(settings[name]), 1024 if name.endswith("_THREADS") else 10**9
        if number is None or number > most:
            below = "" if number is None else f" up to {most:,}"
            raise LaunchError(
                f"{name}={settings[name][:20]}: must be a whole number{below}; unset it for the default, {default}"
            )
    return settings


def start(*, verbose: bool, share_gpus: bool = False) -> World:
    """Import TensorFlow and Horovod, start Horovod, and pin this rank to its GPU.

    On CPUs, Horovod's threads give way to the compute threads, and ranks that have the same cores divide them.

    Raises LaunchError if the world is not as large as the launcher said. N lone jobs look like one job of N ranks,
    and no other check would notice. Raises LaunchError also if two ranks have one GPU, unless ``share_gpus``.
    """
    quiet = contextlib.nullcontext if verbose else host.quiet_stderr
    with quiet(), host.uncollected():
        import tensorflow as tf
        import tf_keras

        # Horovod's callbacks do ``from keras import backend``, which would import Keras 3.
        sys.modules["keras"] = tf_keras
        import horovod.tensorflow.keras as hvd

    if not verbose:
        # Keras warns about every float16 run on a CPU. It uses Python's logger, which no variable controls.
        tf.get_logger().setLevel("ERROR")
    launch_info, launcher = launched()
    tf.config.threading.set_intra_op_parallelism_threads(int(os.environ["TF_NUM_INTRAOP_THREADS"]))
    tf.config.threading.set_inter_op_parallelism_threads(int(os.environ["TF_NUM_INTEROP_THREADS"]))
    before = cpu_tuning.threads()
    # Horovod: initialise before anything that needs the rank.
    world = launch_info
    # Gloo aborts if this host's name has no address. A lone process can do without Horovod.
    if launch_info.size > 1 or rendezvous.own_name_is_here():
        hvd.init()
        world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
    horovods = cpu_tuning.threads() - before
    if world.size != launch_info.size:
        raise LaunchError(
            f"{launcher or 'no launcher'} started {launch_info.size} processes but Horovod joined {world.size}: "
            "start it with horovodrun or cnnopt.launch, or build Horovod with the launcher's MPI (docs/slurm.md)"
        )
    check_gpus(_pin(world), share=share_gpus)
    if device() == "GPU":
        with quiet():
            _wake_gpu()
    mine = cpu_tuning.Given(hostname(), host.ALLOWED, int(os.environ["TF_NUM_INTRAOP_THREADS"]), device())
    # Gathering is collective, so ranks on GPUs take part too.
    cpu_tuning.tune(gather_objects(mine), world.rank, waiting=horovods)
    return world


def _pin(world: World) -> str | None:
    """Show TensorFlow one GPU of the host, chosen by local rank. TensorFlow takes its memory only as needed.

    Returns the GPU's identity, or None on CPUs.
    """
    import tensorflow as tf

    found = tf.config.list_physical_devices("GPU")
    given, visible = os.environ.get("SLURM_GPUS_ON_NODE", "0"), os.environ.get("CUDA_VISIBLE_DEVICES")
    # A user hides all GPUs with an empty CUDA_VISIBLE_DEVICES or with -1.
    if not found and given != "0" and visible not in ("", "-1"):
        of_these = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible}"
        raise LaunchError(
            f"SLURM gave {given} GPU on each node, but TensorFlow finds none{of_these}: look for the driver with "
            "nvidia-smi and for a TensorFlow with CUDA (docs/slurm.md), or train on CPUs with --gpus-per-node=0"
        )
    if not found:
        return None
    # Horovod: pin one GPU to each rank of a host.
    mine = found[world.local_rank % len(found)]
    tf.config.set_visible_devices(mine, "GPU")
    tf.config.experimental.set_memory_growth(mine, True)
    capability = tf.config.experimental.get_device_details(mine).get("compute_capability")
    line = gpus.too_new(capability, tf.sysconfig.get_build_info().get("cuda_compute_capabilities", []))
    if line and world.local_rank == 0:
        print(f"cnnopt: {platform.node()}: {line}", file=sys.stderr, flush=True)
    # TensorFlow's name ends in the number that CUDA gives the GPU in this process.
    return gpus.identity(int(mine.name.rpartition(":")[2]))


def _wake_gpu() -> None:
    """Let TensorFlow create its device and load cuDNN, which each run does sooner or later.

    TensorFlow 2.18 was seen to write a line about each to standard error, at any log level.
    """
    import tensorflow as tf

    tf.nn.conv2d(tf.ones([1, 8, 8, 1]), tf.ones([3, 3, 1, 1]), 1, "SAME").numpy()


def check_gpus(mine: str | None, *, share: bool) -> None:
    """Raise LaunchError on every rank if some ranks compute on one GPU, unless they may ``share``.

    ``mine`` is the identity of this rank's GPU, or None. The ranks are compared, because each may see its own GPU only.
    """
    line = gpus.shared(gather_objects((hostname(), mine)))
    if line and not share:
        raise LaunchError(line)


def hostname() -> str:
    """The name of this rank's host, as the launcher knows it."""
    return os.environ.get("HOROVOD_HOSTNAME") or platform.node()


def device() -> str:
    """The device that this rank computes on: ``GPU`` or ``CPU``."""
    import tensorflow as tf

    return "GPU" if tf.config.get_visible_devices("GPU") else "CPU"


def _size() -> int:
    import horovod.tensorflow as hvd

    # A lone process on a host whose name has no address runs without Horovod.
    return hvd.size() if hvd.is_initialized() else 1


def callbacks() -> list[Any]:
    """Horovod's Keras callbacks: send rank 0's state to all ranks after the first step, and average epoch metrics.

    An empty list for a lone rank, which would only wait while they are traced.
    """
    import horovod.tensorflow.keras as hvd
    import tensorflow as tf

    if _size() == 1:
        return []
    broadcast = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    # The callback traces a broadcast of each variable. TensorFlow would otherwise rewrite Horovod's functions first.
    broadcast.on_batch_end = tf.autograph.experimental.do_not_convert(broadcast.on_batch_end)
    return [broadcast, hvd.callbacks.MetricAverageCallback()]


def allreduce_sum(flat: tf.Tensor, name: str) -> tf.Tensor:
    """The sum of a vector over all ranks. The vector has the same length on all of them.

    Horovod 0.28.1 has no allreduce of bfloat16 (horovod 4047). For bfloat16, each rank therefore sums one part of the
    vector in float32 and sends the rounded sums to all ranks. This is a reduce-scatter and an allgather (Thakur,
    Rabenseifner and Gropp 2005, for long messages). Together they send as many bytes as a ring.
    """
    import horovod.tensorflow as hvd
    import tensorflow as tf

    ranks = _size()
    if ranks == 1:
        return flat
    if flat.dtype != tf.bfloat16:
        # Horovod: the exchange of a step.
        return hvd.allreduce(flat, op=hvd.Sum, name=name)
    # alltoall and allgather only move bits, and every build of them supports float16.
    padded = tf.bitcast(tf.pad(flat, [[0, -tf.size(flat) % ranks]]), tf.float16)
    everyones = tf.bitcast(hvd.alltoall(padded, name=f"{name}.parts"), flat.dtype)
    mine = tf.reduce_sum(tf.cast(tf.reshape(everyones, [ranks, -1]), tf.float32), axis=0)
    sums = hvd.allgather(tf.bitcast(tf.cast(mine, flat.dtype), tf.float16), name=f"{name}.sums")
    return tf.bitcast(sums, flat.dtype)[: tf.size(flat)]


def exchange_addresses(peers: PeerStatus) -> None:
    """Tell every rank the addresses at which the ranks answer."""
    if _size() > 1:
        peers.places = gather_objects(peers.open())


def is_exchange_failure(error: Exception) -> bool:
    """True if ``error`` is an error of TensorFlow about an exchange in which Horovod has lost another rank."""
    if launched()[0].size == 1 or not type(error).__module__.startswith("tensorflow"):
        return False
    # Ignore quoted source files: the folders in their paths may be named horovod too.
    return "horovod" in re.sub(r'File "[^"]*"', "", str(error)).lower()


def broadcast(variables: Sequence[tf.Variable]) -> None:
    """Give all ranks rank 0's values in one message; ``hvd.broadcast_variables`` traces one for each variable."""
    for variable, value in zip(variables, broadcast_object([v.numpy() for v in variables]), strict=True):
        variable.assign(value)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on all ranks."""
    import horovod.tensorflow as hvd

    return value if _size() == 1 else hvd.broadcast_object(value, root_rank=0)


def gather_objects(value: Any) -> list[Any]:
    """Return the ``value`` of every rank, ordered by rank, on all ranks."""
    import horovod.tensorflow as hvd

    return [value] if _size() == 1 else hvd.allgather_object(value)


def assert_same(
    flag: str, value: str, *, remedy: str = "name one, or start the ranks on hosts of one kind"
) -> None:  # fmt: skip
    """Raise LaunchError on every rank, with ``remedy``, unless ``flag`` has the same value on all ranks."""
    everyone = gather_objects((value, hostname()))
    if len({settled for settled, _ in everyone}) > 1:
        found = ", ".join(f"{settled} on {name}" for settled, name in dict.fromkeys(everyone))
        raise LaunchError(f"{flag}: {found}; {remedy}")


def mean(values: Sequence[float]) -> list[float]:
    """The mean of each value over all ranks."""
    return [float(value) for value in np.mean(gather_objects(list(values)), axis=0)]


class DisagreementError(RunError):
    """Ranks hold different numbers although they must hold the same."""


def agree(tensors: Mapping[str, np.ndarray]) -> str:
    """Compare digests of named arrays over all ranks. Returns one digest of all the arrays.

    Raises DisagreementError on every rank. It names the first tensor that differs, and the ranks whose value is not
    the most common one.
    """
    mine = [hashlib.sha256(value.tobytes()).hexdigest() for value in tensors.values()]
    everyone = gather_objects(mine)
    for name, *digests in zip(tensors, *everyone, strict=True):
        common = max(digests, key=digests.count)
        odd = [str(rank) for rank, digest in enumerate(digests) if digest != common]
        if odd:
            raise DisagreementError(f"rank {', '.join(odd)} differs from the other ranks in {name}; training stopped")
    return hashlib.sha256("".join(mine).encode()).hexdigest()


def shutdown() -> None:
    """Shut Horovod down and run on all cores that this process was given. All other ranks must do the same."""
    import horovod.tensorflow as hvd

    if hvd.is_initialized():
        hvd.shutdown()
    cpu_tuning.unbind()
