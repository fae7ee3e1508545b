"""Magnitude pruning: the kernels to prune, their masks, the schedule, and the measured sparsity.

Masks live outside the layers. ``prune_low_magnitude`` wraps the layers instead, and so assigns weights within the
autocast scope. Under mixed precision this either fails (tensorflow/model-optimization issue 409) or rounds the
float32 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras

from cnnopt.errors import RunError
from cnnopt.model.flat import View, read
from cnnopt.schedules import PruningWindow


class PruningError(RunError):
    """The weights do not have the required sparsity."""


Scope = Literal["uniform", "global"]


def prunable_kernels(model: keras.Model) -> list[View]:
    """The kernels of all convolutions and dense layers: the ones that tfmot's ``prune_low_magnitude`` prunes."""
    return [layer.kernel for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]


def num_pruned(size: int, sparsity: float) -> int:
    """The number of zeros among ``size`` weights at ``sparsity``.

    tfmot's rounding, kept = round(size x density). But tfmot keeps at least one weight of each kernel.
    """
    return size - round(size * (1 - sparsity))


def magnitude_mask(weights: tf.Tensor, sizes: Sequence[int], pruned: Sequence[int] | tf.Tensor) -> tf.Tensor:
    """bool [n]: True for a kept weight of ``weights``, float32 [n], which are ranked in consecutive parts of ``sizes``.

    Exactly ``pruned[i]`` entries of part i are False: those of smallest magnitude, and of equal magnitudes the lower
    indices. So equal weights give equal masks on every rank.
    """
    starts, parts = np.cumsum(sizes) - sizes, np.repeat(np.arange(len(sizes)), sizes)
    # Floats without sign have the same order as their bits read as integers. The bits are compared, because TensorFlow
    # treats floats below 1e-38 as zeros. The number of the part stands before them, so one sort serves all parts.
    magnitudes = tf.bitwise.bitwise_and(tf.bitcast(weights, tf.int32), 0x7FFFFFFF)
    keys = tf.cast(magnitudes, tf.int64) + tf.constant(parts << 31, tf.int64)
    ordered = tf.sort(keys)
    # The threshold is the largest pruned key of a part. As many of the entries that equal it are pruned as are missing.
    ends = tf.constant(starts, tf.int64) + tf.cast(pruned, tf.int64)
    thresholds = tf.where(tf.cast(pruned, tf.int64) > 0, tf.gather(ordered, tf.maximum(ends - 1, 0)), -1)
    missing = ends - tf.searchsorted(ordered, thresholds, out_type=tf.int64)
    threshold = tf.gather(thresholds, parts)
    equal = keys == threshold
    # Counted in float64, because TensorFlow has no cumulative sum of integers for a GPU.
    counted = tf.cumsum(tf.cast(equal, tf.float64))
    most = tf.gather(tf.pad(counted, [[1, 0]]), starts) + tf.cast(missing, tf.float64)
    return ~((keys < threshold) | (equal & (counted <= tf.gather(most, parts))))


class Pruner:
    """The masks of one model, 1 for a kept weight of ``kernels``, and the schedule that renews them."""

    def __init__(
        self,
        kernels: Sequence[View],
        masks: tf.Variable,
        *,
        schedule: Literal["none", "constant", "polynomial"],
        final_sparsity: float,
        initial_sparsity: float,
        window: PruningWindow,
        scope: Scope,
    ) -> None:
        """``kernels`` are views of one vector, and ``masks`` is a vector of the same length."""
        self.kernels = list(kernels)
        self.masks = [kernel.like(masks, f"mask/{kernel.name}:0") for kernel in kernels]
        self._vectors = kernels[0].vector, masks
        # The places of the weights that are ranked, in the order in which equal ones are pruned.
        self._places = tf.constant(np.concatenate([np.arange(k.offset, k.offset + k.size) for k in kernels])[:, None])
        sizes = [kernel.size for kernel in kernels]
        self._sizes = [sum(sizes)] if scope == "global" else sizes
        self.scope = scope
        self.window = window
        self.final_sparsity = final_sparsity
        self.enabled = schedule != "none"
        if schedule == "polynomial" and window.end > window.begin:
            self._schedule = tfmot.sparsity.keras.PolynomialDecay(
                initial_sparsity=initial_sparsity,
                final_sparsity=final_sparsity,
                begin_step=window.begin,
                end_step=window.end,
                frequency=window.frequency,
            )
        elif self.enabled:
            self._schedule = tfmot.sparsity.keras.ConstantSparsity(
                final_sparsity, begin_step=window.begin, end_step=window.end, frequency=window.frequency
            )

    def due(self, step: int) -> bool:
        """True if the masks change after ``step`` steps."""
        return self.enabled and self.window.updates_after(step)

    def next_update(self, step: int) -> int | None:
        """The number of steps, more than ``step``, after which the masks change next; None if they stay."""
        return self.window.next_update(step) if self.enabled else None

    def target(self, step: int) -> float:
        """The sparsity of the masks after ``step`` steps."""
        if not self.enabled or step < self.window.begin:
            return 0.0
        last = min(step, self.window.end)
        last -= (last - self.window.begin) % self.window.frequency
        return float(self._schedule(tf.constant(last, tf.int64))[1])

    def mean_target(self, total_steps: int) -> float:
        """The mean of ``target`` over the steps of a run."""
        if not self.enabled:
            return 0.0
        changes = np.arange(self.window.begin, self.window.end + 1, self.window.frequency)
        lasting = np.diff(changes, append=total_steps)
        return float(np.sum(self._schedule(tf.constant(changes))[1].numpy() * lasting)) / total_steps

    def update(self, step: int) -> None:
        """Compute the masks that are due after ``step`` steps, and set the pruned weights to zero."""
        # The schedule computes in float32. At its end, the exact final sparsity is used instead.
        sparsity = self.final_sparsity if step >= self.window.end else self.target(step)
        weights, masks = self._vectors
        ranked = tf.gather_nd(weights.read_value(), self._places)
        kept = magnitude_mask(ranked, self._sizes, [num_pruned(size, sparsity) for size in self._sizes])
        mask = tf.tensor_scatter_nd_update(tf.ones_like(weights), self._places, tf.cast(kept, tf.float32))
        masks.assign(mask)
        weights.assign(tf.where(mask == 0, 0.0, weights))

    def _zeros(self) -> list[int]:
        """The number of exact zeros in each kernel."""
        return [int(np.sum(values == 0)) for values in read(self.kernels)]

    def sparsities(self) -> dict[str, float]:
        """The measured share of exact zeros: of each kernel, by its layer's name, and of all kernels as ``total``."""
        zeros, sizes = self._zeros(), [kernel.size for kernel in self.kernels]
        names = [kernel.name.split("/")[0] for kernel in self.kernels]
        shares = {name: zero / size for name, zero, size in zip(names, zeros, sizes, strict=True)}
        return {**shares, "total": sum(zeros) / sum(sizes)}

    def verify_final(self) -> None:
        """Raise PruningError unless the masks prune the target, within one weight, and all pruned weights are zero.

        The target is that of each kernel, or of all together. Kept weights may be zero too: weight decay shrinks one
        that has no gradient until it is.
        """
        if not self.enabled:
            return
        names, sizes = [kernel.name for kernel in self.kernels], [kernel.size for kernel in self.kernels]
        masks = read(self.masks)
        pruned = [int(np.sum(mask == 0)) for mask in masks]
        for name, weights, mask in zip(names, read(self.kernels), masks, strict=True):
            if wrong := int(np.sum(weights[mask == 0] != 0)):
                raise PruningError(f"{name}: {wrong} pruned weights are not zero")
        if self.scope == "global":
            names, sizes, pruned = ["all kernels"], [sum(sizes)], [sum(pruned)]
        for name, size, found in zip(names, sizes, pruned, strict=True):
            wanted = num_pruned(size, self.final_sparsity)
            if abs(found - wanted) > 1:
                raise PruningError(f"{name}: {found} of {size} weights are pruned; --sparsity asks for {wanted}")
