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
from cnnopt.schedules import PruningWindow


class PruningError(RunError):
    """The weights do not have the required sparsity."""


Scope = Literal["uniform", "global"]


def prunable_kernels(model: keras.Model) -> list[tf.Variable]:
    """The kernels of all convolutions and dense layers: the ones that tfmot's ``prune_low_magnitude`` prunes."""
    return [layer.kernel for layer in model.layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]


def num_pruned(size: int, sparsity: float) -> int:
    """The number of zeros among ``size`` weights at ``sparsity``. tfmot's rounding: kept = round(size x density)."""
    return size - round(size * (1 - sparsity))


def magnitude_masks(kernels: Sequence[tf.Tensor], sparsity: float, scope: Scope) -> list[tf.Tensor]:
    """Boolean masks for float32 kernels: True for a kept weight, and exactly as many False as ``sparsity`` asks for.

    ``uniform`` prunes each kernel to ``sparsity``; ``global`` ranks the weights of all kernels together.
    Among weights of equal magnitude, the lower index is pruned first. So equal weights give equal masks on every rank.
    """
    flat = [tf.reshape(kernel, [-1]) for kernel in kernels]
    if scope == "global":
        masks = tf.split(_largest(tf.concat(flat, 0), sparsity), [len(part) for part in flat])
    else:
        masks = [_largest(part, sparsity) for part in flat]
    return [tf.reshape(mask, kernel.shape) for mask, kernel in zip(masks, kernels, strict=True)]


def _largest(weights: tf.Tensor, sparsity: float) -> tf.Tensor:
    """bool [n]: False for the entries of ``weights`` [n] that ``sparsity`` prunes."""
    pruned = num_pruned(len(weights), sparsity)
    # Floats without sign have the same order as their bits read as integers. The bits are compared, because TensorFlow
    # treats floats below 1e-38 as zeros.
    magnitudes = tf.bitwise.bitwise_and(tf.bitcast(weights, tf.int32), 0x7FFFFFFF)
    # The threshold is the largest pruned magnitude. ``ties`` weights of exactly this magnitude are pruned too.
    threshold = tf.sort(magnitudes)[pruned - 1] if pruned else -1
    below, equal = magnitudes < threshold, magnitudes == threshold
    ties = pruned - tf.math.count_nonzero(below, dtype=tf.int32)
    return ~(below | (equal & (tf.cumsum(tf.cast(equal, tf.int32)) <= ties)))


class Pruner:
    """The masks of one model, 1 for a kept weight of ``kernels``, and the schedule that renews them."""

    def __init__(
        self,
        kernels: Sequence[tf.Variable],
        masks: Sequence[tf.Variable],
        *,
        schedule: Literal["none", "constant", "polynomial"],
        final_sparsity: float,
        initial_sparsity: float,
        window: PruningWindow,
        scope: Scope,
    ) -> None:
        self.kernels, self.masks = list(kernels), list(masks)
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
        masks = magnitude_masks(self.kernels, sparsity, self.scope)
        for variable, kernel, mask in zip(self.masks, self.kernels, masks, strict=True):
            variable.assign(tf.cast(mask, tf.float32))
            kernel.assign(tf.where(mask, kernel, 0.0))

    def sparsities(self) -> dict[str, float]:
        """The measured share of exact zeros: of each kernel, by its layer's name, and of all kernels as ``total``."""
        zeros = {k.name.split("/")[0]: (int(np.sum(k.numpy() == 0)), int(np.prod(k.shape))) for k in self.kernels}
        total = (sum(z for z, _ in zeros.values()), sum(n for _, n in zeros.values()))
        return {name: z / n for name, (z, n) in {**zeros, "total": total}.items()}

    def verify_final(self) -> None:
        """Raise PruningError unless the number of zeros is the target, within one weight: per kernel, or in total.

        A dense run has no target: weights become zeros by themselves when weight decay shrinks them for long enough.
        """
        if not self.enabled:
            return
        zeros = [int(np.sum(kernel.numpy() == 0)) for kernel in self.kernels]
        sizes = [int(np.prod(kernel.shape)) for kernel in self.kernels]
        names = [kernel.name for kernel in self.kernels]
        if self.scope == "global":
            zeros, sizes, names = [sum(zeros)], [sum(sizes)], ["all kernels"]
        for name, found, size in zip(names, zeros, sizes, strict=True):
            wanted = num_pruned(size, self.final_sparsity)
            if abs(found - wanted) > 1:
                raise PruningError(f"{name} ends with {found} zeros of {size} weights; --sparsity asks for {wanted}")
