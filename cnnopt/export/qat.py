"""The network as int8 arithmetic computes it, to be fine-tuned: its weights and activations are fake-quantized.

Jacob et al. 2018 (arXiv:1712.05877), section 3. Weights are symmetric about zero, so a pruned weight is exactly zero in
int8 too. Convolutions have a scale for each output channel, so what BatchNorm multiplies a channel by cancels: the int8
codes of a kernel are those of the kernel with BatchNorm folded into it, as the file has it. The classifier has one
scale, as the converter refuses more there ("'tfl.transpose' op has mismatched quantized axes", TensorFlow 2.18.1).

Where it is to be clustered too, each weight is replaced by the nearest of its kernel's centroids
(``cnnopt.export.clustering``) before it is rounded. The centroids stay as they are and the weights move between them.

tfmot's scheme that holds zeros (``Default8BitPrunePreserveQuantizeScheme``, 0.8.1) takes neither this network's layers
nor mixed precision: docs/quantize.md, "Fine-tuning".
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
    """Rounds activations to 256 levels, one of which is zero, of a range that follows those of the batches."""

    momentum = 0.99

    def build(self, shape: tf.TensorShape) -> None:
        """Make the range; it is empty until a batch is seen."""
        self.low, self.high = (
            self.add_weight(name.removesuffix(":0"), (), initializer="zeros", trainable=False) for name in RANGE
        )

    def call(self, inputs: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The inputs, rounded. Gradients pass as if they were not, but not those of values outside the range."""
        if training:
            momentum = tf.where(self.low == self.high, 0.0, self.momentum)
            batch = tf.stop_gradient(tf.stack([tf.reduce_min(inputs), tf.reduce_max(inputs)]))
            for variable, value in zip((self.low, self.high), tf.unstack(batch), strict=True):
                variable.assign(momentum * variable + (1 - momentum) * value)
        low, high = tf.minimum(self.low, 0.0), tf.maximum(self.high, 0.0)
        return tf.quantization.fake_quant_with_min_max_vars(inputs, low, high)


def _limit(kernel: tf.Tensor, per_channel: bool) -> tf.Tensor:
    """The largest magnitude of each output channel of a kernel [..., out], or of all."""
    largest = tf.reduce_max(tf.abs(kernel), axis=list(range(len(kernel.shape) - 1)) if per_channel else None)
    # A channel that is pruned as a whole has no range of its own.
    return tf.stop_gradient(tf.maximum(largest, SMALLEST))


def fake_quantized(kernel: tf.Tensor, *, per_channel: bool) -> tf.Tensor:
    """A kernel [..., out] rounded to -127..127 times a scale, one for each output channel or one for all."""
    limit = _limit(kernel, per_channel)
    if per_channel:
        return tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, -limit, limit, narrow_range=True)
    return tf.quantization.fake_quant_with_min_max_vars(kernel, -limit, limit, narrow_range=True)


def clustered(kernel: tf.Tensor, centroids: tf.Tensor, *, per_channel: bool) -> tf.Tensor:
    """``clustering.assign`` of a kernel [..., out]. Gradients pass as if each weight were what it is replaced by."""

    @tf.grad_pass_through
    def assign(kernel: tf.Tensor) -> tf.Tensor:
        limit = _limit(kernel, per_channel)
        nearest = tf.searchsorted(boundaries(centroids), tf.reshape(kernel / limit, [-1]))
        return tf.where(kernel == 0, 0.0, tf.reshape(tf.gather(centroids, nearest), kernel.shape) * limit)

    return assign(kernel)


class _Rounded(layers.Layer):
    """A layer whose kernel is fake-quantized, and clustered before that where ``clusters`` is not 0."""

    per_channel: bool

    def __init__(self, *args: Any, clusters: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clusters = clusters

    def build(self, shape: tf.TensorShape) -> None:
        """Make the kernel and, where it is clustered, its centroids, to be set before a batch is seen."""
        super().build(shape)
        if self.clusters:
            name = CENTROIDS.removesuffix(":0")
            self.centroids = self.add_weight(name, [self.clusters - 1], initializer="zeros", trainable=False)

    def rounded(self, kernel: tf.Tensor) -> tf.Tensor:
        """The kernel as the int8 file will have it."""
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
    """For ``cnnopt.model.resnet.resnet``, with kernels of at most ``clusters`` values; 0: as many as int8 has.

    BatchNorm and ReLU need no rounding between them: the file has one operator for both.
    """
    return resnet.Parts(
        Standardize,
        functools.partial(Conv2D, clusters=clusters),
        functools.partial(Dense, clusters=clusters),
        rounded=lambda tensor, name: FakeQuantize(name=f"{name}_range")(tensor),
    )


def gain(model: keras.Model, layer: str) -> np.ndarray:
    """What BatchNorm multiplies each output channel of a kernel by, float [out]; 1 for the classifier."""
    if layer == "classifier":
        return np.ones(model.get_layer(layer).kernel.shape[-1])
    norm = model.get_layer(f"{layer}_bn")
    return norm.gamma.numpy() / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
