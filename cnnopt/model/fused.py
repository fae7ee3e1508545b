"""ReLU and the end of a residual block, for bfloat16 on CPUs: XLA compiles what lies between two convolutions.

TensorFlow's kernels for sums and ReLU widen each bfloat16 number, compute and round it, operation by operation. They
take an eighth of a step (docs/benchmarks.md, "Operations of a step"). Here XLA does the same work in one pass. It
rounds where TensorFlow rounds, so finite numbers are equal bit for bit, except for the sign of a gradient that is zero.

The compiled functions take pairs of bfloat16 numbers as one int32, because XLA is slow with types of 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import tensorflow as tf
from tf_keras import layers

from cnnopt.model.resnet import FLOAT

Gradient = Callable[..., tf.Tensor]


def _halves(pairs: tf.Tensor) -> list[tf.Tensor]:
    """The upper and the lower number of each pair, float32. A bfloat16 is the upper half of a float32."""
    upper = tf.bitwise.bitwise_and(pairs, -0x10000)
    return [tf.bitcast(bits, tf.float32) for bits in (upper, tf.bitwise.left_shift(pairs, 16))]


def _paired(halves: Sequence[tf.Tensor]) -> tf.Tensor:
    """Pairs, int32, of upper and lower numbers, float32, which are rounded to the nearest bfloat16, halves to even."""
    upper, lower = (tf.bitcast(half, tf.int32) for half in halves)
    upper, lower = (
        bits + 0x7FFF + tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, 16), 1) for bits in (upper, lower)
    )
    lower = tf.bitwise.bitwise_and(tf.bitwise.right_shift(lower, 16), 0xFFFF)
    return tf.bitwise.bitwise_or(tf.bitwise.bitwise_and(upper, -0x10000), lower)


def _compiled(function: Callable[..., tf.Tensor]) -> Callable[..., tf.Tensor]:
    """``function`` of float32 tensors, compiled, as one of pairs."""

    @functools.partial(tf.function, autograph=False, jit_compile=True)
    def of_pairs(*pairs: tf.Tensor) -> tf.Tensor:
        return _paired([function(*halves) for halves in zip(*map(_halves, pairs), strict=True)])

    return of_pairs


@_compiled
def _relu_of_sum(shortcut: tf.Tensor, branch: tf.Tensor) -> tf.Tensor:
    return tf.nn.relu(shortcut + branch)


@_compiled
def _through_relu(gradient: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    return tf.where(output > 0, gradient, 0.0)


@_compiled
def _sum_through_relu(gradient: tf.Tensor, other: tf.Tensor, output: tf.Tensor) -> tf.Tensor:
    return tf.where(output > 0, gradient + other, 0.0)


# Neither a bitcast nor a reshape copies anything.


def _pairs(numbers: tf.Tensor) -> tf.Tensor:
    """bfloat16 [..., an even number] as pairs, int32 [n / 2]."""
    return tf.bitcast(tf.reshape(numbers, [-1, 2]), tf.int32)


def _numbers(pairs: tf.Tensor, like: tf.Tensor) -> tf.Tensor:
    """Pairs, int32 [n / 2], as bfloat16 in the shape of ``like``."""
    return tf.reshape(tf.bitcast(pairs, tf.bfloat16), tf.shape(like))


@tf.custom_gradient
def relu(inputs: tf.Tensor) -> tuple[tf.Tensor, Gradient]:
    """``tf.nn.relu``, which TensorFlow fuses with the BatchNorm before it, and a compiled gradient."""
    output = tf.nn.relu(inputs)
    return output, lambda gradient: _numbers(_through_relu(_pairs(gradient), _pairs(output)), like=output)


@tf.custom_gradient
def join(shortcut: tf.Tensor, branch: tf.Tensor) -> tuple[tuple[tf.Tensor, tf.Tensor], Gradient]:
    """relu(shortcut + branch), once for each of its two readers. So the sum of their gradients is compiled too."""
    pairs = _relu_of_sum(_pairs(shortcut), _pairs(branch))
    output = _numbers(pairs, like=shortcut)

    def gradient(of_one: tf.Tensor, of_other: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        both = _numbers(_sum_through_relu(_pairs(of_one), _pairs(of_other), pairs), like=shortcut)
        return both, both

    return (output, tf.identity(output)), gradient


class ReLU(layers.Layer):
    """``relu`` in training. Evaluation has batches of other sizes, and XLA would compile for each."""

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """A tensor of any shape, to one of the same shape and type."""
        return relu(inputs) if training else tf.nn.relu(inputs)


class Join(layers.Layer):
    """``join`` in training: the end of a residual block, for the two readers of its output."""

    def call(self, inputs: list[tf.Tensor], training: bool = False) -> tuple[tf.Tensor, tf.Tensor]:
        """[shortcut, branch], of one shape and type, to the output, twice."""
        if training:
            return join(*inputs)
        output = tf.nn.relu(tf.add(*inputs))
        return output, output


PARTS = replace(FLOAT, relu=ReLU, join=Join)
