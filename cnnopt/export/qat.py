"""The network in int8 arithmetic, for fine-tuning: its weights and activations are fake-quantized.

Source: Jacob et al. 2018 (arXiv:1712.05877), section 3. Weights are symmetric about zero, so a pruned weight is exactly
zero in int8 too. Convolutions have a scale for each output channel, so BatchNorm's factor for a channel cancels: a
kernel has the same int8 codes before and after BatchNorm is folded into it, as the file does. The classifier has one
scale, because the converter refuses more there ("'tfl.transpose' op has mismatched quantized axes", TensorFlow 2.18.1).

With clustering, each weight is first replaced by the nearest of its kernel's centroids (``cnnopt.export.clustering``)
and then rounded. The centroids stay fixed, and the weights move between them.

tfmot's scheme that keeps zeros (``Default8BitPrunePreserveQuantizeScheme``, 0.8.1) supports neither this network's
layers nor mixed precision: docs/quantize.md, "Fine-tuning".
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tf_keras import layers

from cnnopt.export.clustering import SMALLEST, boundaries
from cnnopt.export.trained import CENTROIDS, RANGE
from cnnopt.model import resnet


class FakeQuantize(layers.Layer):
    """Rounds activations to 256 levels, one of which is zero. The range of the levels follows that of the batches."""

    momentum = 0.99

    def build(self, shape: tf.TensorShape) -> None:
        """Make the range, which is empty until the first batch."""
        self.low, self.high = (
            self.add_weight(name.removesuffix(":0"), (), initializer="zeros", trainable=False) for name in RANGE
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The rounded inputs. Gradients pass through the rounding unchanged; values outside the range get none."""
        if training:
            momentum = tf.where(self.low == self.high, 0.0, self.momentum)
            batch = tf.stop_gradient(tf.stack([tf.reduce_min(inputs), tf.reduce_max(inputs)]))
            for variable, value in zip((self.low, self.high), tf.unstack(batch), strict=True):
                variable.assign(momentum * variable + (1 - momentum) * value)
        low, high = tf.minimum(self.low, 0.0), tf.maximum(self.high, 0.0)
        return tf.quantization.fake_quant_with_min_max_vars(inputs, low, high)


def _limit(kernel: tf.Tensor, per_channel: bool) -> tf.Tensor:
    """The largest magnitude of a kernel [..., out], for each output channel or in total."""
    largest = tf.reduce_max(tf.abs(kernel), axis=list(range(len(kernel.shape) - 1)) if per_channel else None)
    # A fully pruned channel has no range.
    return tf.stop_gradient(tf.maximum(largest, SMALLEST))


def fake_quantized(kernel: tf.Tensor, *, per_channel: bool) -> tf.Tensor:
    """A kernel [..., out] rounded to -127..127 times a scale. Each output channel has one scale, or all share one."""
    limit = _limit(kernel, per_channel)
    if per_channel:
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, -limit, limit, narrow_range=True)
    return tf.quantization.fake_quant_with_min_max_vars(kernel, -limit, limit, narrow_range=True)


def clustered(kernel: tf.Tensor, centroids: tf.Tensor, *, per_channel: bool) -> tf.Tensor:
    """``clustering.assign`` of a kernel [..., out]. Gradients pass through the replacement unchanged."""

    @tf.grad_pass_through
    def assign(kernel: tf.Tensor) -> tf.Tensor:
        limit = _limit(kernel, per_channel)
        nearest = tf.searchsorted(boundaries(centroids), tf.reshape(kernel / limit, [-1]))
        return tf.where(kernel == 0, 0.0, tf.reshape(tf.gather(centroids, nearest), kernel.shape) * limit)

    return assign(kernel)


class _Rounded(layers.Layer):
    """A layer with a fake-quantized kernel. If ``clusters`` is not 0, the kernel is clustered first."""

    per_channel: bool

    def __init__(self, *args: Any, clusters: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clusters = clusters

    def build(self, shape: tf.TensorShape) -> None:
        """Make the kernel and, with clustering, its centroids, which must be set before the first batch."""
        super().build(shape)
        if self.clusters:
            name = CENTROIDS.removesuffix(":0")
            self.centroids = self.add_weight(name, [self.clusters - 1], initializer="zeros", trainable=False)

    def rounded(self, kernel: tf.Tensor) -> tf.Tensor:
        """The kernel with the values that the int8 file will have."""
        if self.clusters:
            kernel = clustered(kernel, self.centroids.read_value(), per_channel=self.per_channel)
        return fake_quantized(kernel, per_channel=self.per_channel)


class Standardize(resnet.Standardize):
    """(image - mean) / std, rounded before and after each operator."""

    def __init__(self, mean: np.ndarray, std: np.ndarray, **kwargs: object) -> None:
        super().__init__(mean, std, **kwargs)
        self.pixels, self.centred, self.scaled = (FakeQuantize(name=name) for name in ("pixels", "centred", "scaled"))

    def call(self, images: tf.Tensor, training: bool = False) -> tf.Tensor:
        """Pixels [batch, 32, 32, 3] of any type to float32."""
        pixels = self.pixels(tf.cast(images, tf.float32), training=training)
        return self.scaled(self.centred(pixels - self.mean, training=training) / self.std, training=training)


class Conv2D(_Rounded, resnet.Conv2D):
    """A convolution with a scale for each output channel."""

    per_channel = True

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """As in Keras."""
        return super().convolution_op(inputs, self.rounded(kernel))


class Dense(_Rounded, layers.Dense):
    """A dense layer with one scale."""

    per_channel = False

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """As in Keras."""
        return tf.matmul(inputs, self.rounded(self.kernel)) + self.bias


def parts(clusters: int = 0) -> resnet.Parts:
    """The parts for ``cnnopt.model.resnet.resnet``. Kernels have at most ``clusters`` values; 0 allows all of int8.

    No rounding is needed between BatchNorm and ReLU, because the file has one operator for both.
    """
    return resnet.Parts(
        Standardize,
        functools.partial(Conv2D, clusters=clusters),
        functools.partial(Dense, clusters=clusters),
        rounded=lambda tensor, name: FakeQuantize(name=f"{name}_range")(tensor),
    )


def gain(model: keras.Model, layer: str) -> np.ndarray:
    """BatchNorm's factor for each output channel of a kernel, float [out]; 1 for the classifier."""
    if layer == "classifier":
        return np.ones(model.get_layer(layer).kernel.shape[-1])
    norm = model.get_layer(f"{layer}_bn")
    return norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
