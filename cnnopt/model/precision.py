"""The compute type, chosen for the hardware, and the dynamic loss scale that float16 needs."""

from __future__ import annotations

from dataclasses import dataclass

import tensorflow as tf
import tf_keras as keras

from cnnopt.distributed import host


def cpu_has_bfloat16(flags: set[str]) -> bool:
    """True if oneDNN has bfloat16 convolutions for these processor ``flags``: AVX512_BF16 or AMX."""
    return bool(flags & {"avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class Precision:
    """The compute type of a run. Weights, weight updates and BatchNorm statistics are float32 with every compute type.

    ``widen``: convolutions run in float32 (``resnet.Conv2D``). ``fuse``: a network that is not compiled as a whole is
    made of the parts in ``cnnopt.model.fused``.
    """

    compute: str
    widen: bool
    reason: str
    fuse: bool = False

    @property
    def scales_loss(self) -> bool:
        """True for float16 only: its smallest normal number, 6e-5, is larger than many gradients."""
        return self.compute == "float16"

    def apply(self) -> None:
        """Set the global Keras policy."""
        keras.mixed_precision.set_global_policy(self.compute if self.compute == "float32" else f"mixed_{self.compute}")


def choose(asked: str, *, has_gpu: bool) -> Precision:
    """Resolve ``auto``: float16 on a GPU, bfloat16 on a CPU with bfloat16 instructions, else float32."""
    if has_gpu:
        compute = "float16" if asked == "auto" else asked
        return Precision(compute, widen=False, reason="tensor cores" if compute != "float32" else "as asked")
    native = cpu_has_bfloat16(host.cpu_flags())
    if asked == "auto":
        if native:
            return Precision("bfloat16", widen=False, reason="this CPU has bfloat16 instructions", fuse=True)
        return Precision("float32", widen=False, reason="auto: this CPU has no bfloat16 instructions")
    if asked == "float32" or (asked == "bfloat16" and native):
        return Precision(asked, widen=False, reason="as asked", fuse=asked == "bfloat16")
    return Precision(asked, widen=True, reason=f"this CPU has no {asked} convolutions: operands widened to float32")


class DynamicLossScale:
    """A loss scale (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2) that adapts: halved when a gradient is not
    finite, doubled after ``growth_steps`` finite steps.

    Gradients are checked after the allreduce, so every rank takes the same decision and the scales stay equal.
    """

    def __init__(self, enabled: bool, *, initial: float = 2.0**15, growth_steps: int = 1000) -> None:
        self.enabled = enabled
        #: Steps in a row that may be skipped because of the scale: the largest, 2^24, is 1 after 24 halvings.
        self.most_skipped = 24 if enabled else 0
        self.growth_steps = growth_steps
        self.value = tf.Variable(initial if enabled else 1.0, trainable=False, name="loss_scale", dtype=tf.float32)
        self.finite_steps = tf.Variable(0, trainable=False, name="finite_steps", dtype=tf.int64)
        self.skipped = tf.Variable(0, trainable=False, name="skipped_steps", dtype=tf.int64)

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that a checkpoint must hold."""
        return [self.value, self.finite_steps, self.skipped]

    def update(self, finite: tf.Tensor) -> None:
        """Adapt the scale after a step. ``finite``: whether all summed gradients of the step were finite."""
        if not self.enabled:
            return
        grow = tf.logical_and(finite, self.finite_steps + 1 >= self.growth_steps)
        scale = tf.where(grow, self.value * 2.0, tf.where(finite, self.value, self.value / 2.0))
        self.value.assign(tf.clip_by_value(scale, 1.0, 2.0**24))
        self.finite_steps.assign(tf.where(tf.logical_and(finite, tf.logical_not(grow)), self.finite_steps + 1, 0))
        self.skipped.assign_add(tf.cast(tf.logical_not(finite), tf.int64))
