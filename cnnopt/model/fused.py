"""What a network computes between BatchNorm and the next convolution, each in one pass through memory.

For bfloat16 on a CPU alone. There TensorFlow's kernels for sums and ReLU, built for AVX, widen every number, compute
and round it again, operation by operation: an eighth of a step (docs/benchmarks.md, "A step"). XLA compiles them for
the processor at hand, and together. Values are rounded where TensorFlow rounds them, so of finite gradients the results
are the same, bit for bit, but for the sign of a gradient that is zero. In float32, for which TensorFlow's kernels are
fast, it is slower.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf
from tf_keras import layers

from cnnopt.model.resnet import Parts

Gradient = Callable[..., tf.Tensor]


def _compiled(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    return tf.function(function, autograph=False, jit_compile=True)


@_compiled
def _relu_of_sum(shortcut: tf.Tensor, branch: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(shortcut + branch)


@_compiled
def _through_relu(gradient: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    return tf.where(output > 0, gradient, tf.zeros([], gradient.dtype))


@_compiled
def _sum_through_relu(gradient: tf.Tensor, other: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    return tf.where(output > 0, gradient + other, tf.zeros([], gradient.dtype))


@tf.custom_gradient
def relu(inputs: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
    """``tf.nn.relu``, which TensorFlow fuses with a BatchNorm before it, and a gradient that is compiled."""
    output = tf.nn.relu(inputs)
    return output, lambda gradient: _through_relu(gradient, output)


@tf.custom_gradient
def join(shortcut: tf.Tensor, branch: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Gradient]:
    """relu(shortcut + branch), twice: once for each of its two readers, whose gradients can so be summed here."""
    output = _relu_of_sum(shortcut, branch)

    def gradient(of_one: tf.Tensor, of_other: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        both = _sum_through_relu(of_one, of_other, output)
        return both, both

    return (output, tf.identity(output)), gradient


class ReLU(layers.Layer):
    """``relu``."""

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """A tensor of any shape, to one of its shape and type."""
        return relu(inputs)


class Join(layers.Layer):
    """The end of a residual block: Add and ReLU, handed on to both branches of the block that follows."""

    def call(self, inputs: list[tf.Tensor], training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """[shortcut, branch], of one shape and type, to two tensors of these, which are the same."""
        if training:
            return join(*inputs)
        # XLA compiles for each shape anew, and evaluation has batches of other sizes.
        output = tf.nn.relu(tf.add(*inputs))
        return output, output


PARTS = Parts(relu=ReLU, join=Join)
