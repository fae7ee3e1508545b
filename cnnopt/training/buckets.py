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


class Exchange:
    """Average float32 vectors of the lengths ``sizes`` over all ranks. Each is sent as soon as it is ready.

    With one size, the vectors are joined and sent as one. ``masks``, float32, 1 or 0, belong to the first entries of
    the joined vectors; the entries after them are always kept. ``wire`` is the type that is sent.

    ``pack`` and ``unpack`` are arithmetic, which XLA may compile. ``send``, between them, is never compiled: Horovod,
    the clock, and the number of kept entries, which changes with the masks.
    """

    def __init__(
        self, sizes: Sequence[int], masks: tf.Variable, *, ranks: int, choice: Choice, wire: str,
        clock: Callable[[], tf.Tensor],
    ) -> None:  # fmt: skip
        self.masks, self.size = masks, sum(sizes)
        self.ranks, self.choice, self.wire, self.clock = ranks, choice, tf.as_dtype(wire), clock
        self.seconds = tf.Variable(0, trainable=False, dtype=tf.float64)
        self.bytes = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.step_bytes = tf.Variable(0, trainable=False, dtype=tf.int64)
        #: The number of entries that each bucket sends.
        self.entries = list(sizes)
        # The indices of the kept entries of each bucket, for a sparse exchange. The first dimension is None: its length
        # changes with the masks, and this must not trace the step again.
        self.kept = [
            tf.Variable(np.arange(size)[:, np.newaxis], trainable=False, shape=[None, 1])
            for size in sizes
            if choice.kind == "sparse"
        ]
        self.sizes = list(sizes)

    def follow_masks(self) -> None:
        """From now on, send the entries that the masks keep, and count their bytes."""
        if self.kept:
            for variable, part in zip(self.kept, tf.split(self._is_kept(), self.sizes), strict=True):
                variable.assign(tf.where(part))
            self.entries = [int(tf.shape(variable)[0]) for variable in self.kept]
        self.step_bytes.assign(sum(self.entries) * self.wire.size if self.ranks > 1 else 0)

    def _is_kept(self) -> tf.Tensor:
        """bool [size]: whether an entry is kept."""
        others = self.size - self.masks.shape[0]
        return tf.pad(self.masks, [[0, others]], constant_values=1.0) != 0

    def restart(self) -> None:
        """Count ``seconds`` and ``bytes`` from 0."""
        self.seconds.assign(0.0)
        self.bytes.assign(0)

    def __call__(self, vectors: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The means over all ranks, joined, float32 [size]; and whether all of them are finite on all ranks.

        Pruned entries come back as 0. They are not checked to be finite, because a sparse exchange does not send them.
        """
        return self.unpack(self.send(self.pack(vectors)))

    def pack(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The vector of each bucket: in the type of the wire for a dense exchange, else float32."""
        if len(self.sizes) == 1:
            vectors = [tf.concat(vectors, 0)]
        return list(vectors) if self.kept else [tf.cast(flat, self.wire) for flat in vectors]

    def send(self, vectors: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        """The sums over all ranks of what ``pack`` returned. With one rank nothing is sent, and ``seconds`` stays 0.

        ``seconds`` counts from the moment the last vector is ready: sending while others are computed costs nothing.
        """
        if self.kept:
            vectors = [
                tf.cast(tf.gather_nd(flat, kept), self.wire) for flat, kept in zip(vectors, self.kept, strict=True)
            ]
        if self.ranks > 1:
            # The clock is on the host, so a GPU's step waits for it. One rank does without.
            with tf.control_dependencies(vectors):
                before = self.clock()
            vectors = [collectives.allreduce_sum(flat, f"step.{i}") for i, flat in enumerate(vectors)]
        if self.kept:
            vectors = [
                _put_back(tf.cast(flat, tf.float32), kept.read_value(), size)
                for flat, kept, size in zip(vectors, self.kept, self.sizes, strict=True)
            ]
        if self.ranks > 1:
            with tf.control_dependencies(vectors):
                self.seconds.assign_add(self.clock() - before)
        return list(vectors)

    def unpack(self, sums: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
        """The means and whether they are finite, as ``__call__`` returns them, from the sums. Adds to ``bytes``."""
        total = tf.cast(tf.concat(sums, 0), tf.float32)
        if not self.kept:
            total = tf.where(self._is_kept(), total, 0.0)
        self.bytes.assign_add(self.step_bytes)
        return total / self.ranks, tf.reduce_all(tf.math.is_finite(total))


def _put_back(summed: tf.Tensor, kept: tf.Tensor, size: int) -> tf.Tensor:
    """Put the entries ``kept``, int64 [n, 1], back in their places, float32 [size], with 0 elsewhere."""
    if collectives.device() == "GPU":
        # to_dense is avoided here: TensorFlow's sparse_to_dense_op.cc says that its GPU kernel accesses memory
        # illegally (b/184077412).
        return tf.tensor_scatter_nd_update(tf.zeros([size]), kept, summed)
    # On CPUs to_dense takes less than a fifth of the time of the line above (660,000 entries, 40% kept, one thread).
    return tf.sparse.to_dense(tf.sparse.SparseTensor(kept, summed, [size]), validate_indices=False)


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
