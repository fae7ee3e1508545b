"""The allreduces of a step: a few vectors hold everything that the ranks share. Each is sent as soon as it is ready.

The sparse exchange leaves out the gradients of pruned weights. All ranks hold the same masks, so no indices are sent:
the kept entries are gathered, summed over the ranks, and put back. Nothing is lost, because a pruned weight stays zero
for any gradient. A mask update needs no dense step, because masks are computed from weights, which all ranks have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tensorflow as tf

from cnnopt.distributed import collectives

Kind = Literal["dense", "sparse"]

#: Sparse is chosen if it takes less than this share of the time of dense. Smaller differences are noise.
WORTHWHILE = 0.9


@dataclass(frozen=True)
class Choice:
    """The kind of exchange, and the reason for it."""

    kind: Kind
    reason: str


class Bucket:
    """A vector that is sent in one allreduce, float32 [size], and the entries that are kept: at first all."""

    def __init__(self, size: int, *, dense: bool, name: str) -> None:
        self.size, self.dense, self.name = size, dense, name
        # The first dimension is None: its length changes with the masks, and this must not trace the step again.
        self.kept = tf.Variable(
            np.ones(size, bool) if dense else np.arange(size)[:, np.newaxis], trainable=False,
            shape=[size] if dense else [None, 1],
        )  # fmt: skip

    def keep(self, kept: np.ndarray) -> None:
        """Keep the entries that are True in ``kept``, bool [size]. ``kept`` must be the same on all ranks."""
        self.kept.assign(kept if self.dense else np.argwhere(kept))

    def take(self, flat: tf.Tensor) -> tf.Tensor:
        """The entries to send, float32 [kept]; dense sends all of them."""
        return flat if self.dense else tf.gather_nd(flat, self.kept)

    def put_back(self, summed: tf.Tensor) -> tf.Tensor:
        """Put the kept entries back in their places, float32 [size], with 0 elsewhere."""
        kept = self.kept.read_value()
        if self.dense:
            return tf.where(kept, summed, 0.0)
        if collectives.device() == "GPU":
            # to_dense is avoided here: TensorFlow's sparse_to_dense_op.cc says that its GPU kernel accesses memory
            # illegally (b/184077412).
            return tf.tensor_scatter_nd_update(tf.zeros([self.size]), kept, summed)
        # to_dense takes a fifth of the time of the line above (docs/benchmarks.md, "Whose core it is").
        return tf.sparse.to_dense(tf.sparse.SparseTensor(kept, summed, [self.size]), validate_indices=False)


class Exchange:
    """Average float32 vectors of the lengths ``sizes`` over all ranks. Each is sent as soon as it is ready.

    With one size, the vectors are joined and sent as one. ``masks``, float32, 1 or 0, belong to the first entries of
    the joined vectors; the entries after them are always kept. ``wire`` is the type that is sent.
    """

    def __init__(
        self, sizes: Sequence[int], masks: tf.Variable, *, ranks: int, choice: Choice, wire: str,
        clock: Callable[[], tf.Tensor],
    ) -> None:  # fmt: skip
        self.masks, self.size = masks, sum(sizes)
        self.ranks, self.choice, self.wire, self.clock = ranks, choice, tf.as_dtype(wire), clock
        self.seconds = tf.Variable(0, trainable=False, dtype=tf.float64)
        self.bytes = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.buckets = [Bucket(size, dense=choice.kind == "dense", name=f"step.{i}") for i, size in enumerate(sizes)]

    def follow_masks(self) -> None:
        """From now on, send the entries that the masks keep."""
        kept = np.ones(self.size, bool)
        kept[: self.masks.shape[0]] = self.masks.numpy() != 0
        ends = np.cumsum([bucket.size for bucket in self.buckets])
        for bucket, part in zip(self.buckets, np.split(kept, ends[:-1]), strict=True):
            bucket.keep(part)

    def restart(self) -> None:
        """Count ``seconds`` and ``bytes`` from 0."""
        self.seconds.assign(0.0)
        self.bytes.assign(0)

    def __call__(self, vectors: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The means over all ranks, joined, float32 [size]; and whether all of them are finite on all ranks.

        Pruned entries come back as 0. They are not checked to be finite, because a sparse exchange does not send them.
        ``seconds`` counts from the moment the last vector is ready: sending while others are computed costs nothing.
        """
        if len(self.buckets) == 1:
            vectors = [tf.concat(vectors, 0)]
        taken = [bucket.take(flat) for bucket, flat in zip(self.buckets, vectors, strict=True)]
        with tf.control_dependencies(taken):
            before = self.clock()
        sums = [
            bucket.put_back(self.total(flat, bucket.name)) for bucket, flat in zip(self.buckets, taken, strict=True)
        ]
        total = tf.concat(sums, 0)
        with tf.control_dependencies([total]):
            self.seconds.assign_add(self.clock() - before)
        return total / self.ranks, tf.reduce_all(tf.math.is_finite(total))

    def total(self, flat: tf.Tensor, name: str) -> tf.Tensor:
        """The sum of ``flat`` over all ranks, float32 [kept]. Adds to ``bytes``. With one rank nothing is sent."""
        sent = tf.cast(flat, self.wire)
        if self.ranks > 1:
            self.bytes.assign_add(tf.size(sent, tf.int64) * self.wire.size)
            sent = collectives.allreduce_sum(sent, name)
        return tf.cast(sent, tf.float32)


def choose(
    asked: Literal["auto", "dense", "sparse"], *, size: int, prunable: int, sparsity: float, ranks: int, wire: str,
    deterministic: bool,
) -> Choice:  # fmt: skip
    """Decide ``--exchange``, with the same result on all ranks. This is a collective if it has to measure.

    ``size`` entries are exchanged. ``prunable`` of them are pruned to ``sparsity``, the mean over the steps of the run.
    """
    if asked != "auto":
        return Choice(asked, "as asked")
    if ranks == 1 or not sparsity:
        return Choice("dense", "one rank" if ranks == 1 else "nothing is pruned")
    if deterministic:
        return Choice("dense", "--deterministic measures nothing")
    dense, sparse = measure(size, kept=size - round(prunable * sparsity), ranks=ranks, wire=wire)
    times = f"measured {1e3 * sparse:.1f} ms for what is kept on average, {1e3 * dense:.1f} ms for all"
    return Choice("sparse" if sparse < WORTHWHILE * dense else "dense", times)


def measure(size: int, *, kept: int, ranks: int, wire: str, repeats: int = 7) -> tuple[float, float]:
    """Seconds for a dense exchange of ``size`` entries, and for a sparse exchange of ``kept`` of them.

    Both are rank 0's medians. They include gathering the entries, putting them back, and Horovod's cycle.
    """
    exchanges = []
    for kind in ("dense", "sparse"):
        masks = tf.Variable(tf.cast(np.random.default_rng(0).permutation(size) < kept, tf.float32), trainable=False)
        exchange = Exchange(
            [size], masks, ranks=ranks, choice=Choice(kind, ""), wire=wire, clock=lambda: tf.constant(0.0, tf.float64)
        )  # fmt: skip
        exchange.follow_masks()
        exchanges.append(tf.function(lambda flat, exchange=exchange: exchange([flat])[0], autograph=False))
    flat = tf.ones([size])
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for exchange, times in zip(exchanges, seconds, strict=True):
            start = time.perf_counter()
            exchange(flat).numpy()
            # The first call traces the function, so it is not counted.
            if repeat:
                times.append(time.perf_counter() - start)
    return collectives.broadcast_object(tuple(statistics.median(times) for times in seconds))
