"""The CIFAR ResNet of He et al. 2016 (arXiv:1512.03385), section 4.2. This module does not use ranks or pruning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tf_keras import layers

from cnnopt.model import topology

# The network must be the same for every user. A user's ~/.keras/keras.json may differ; ``host.FIXED`` hides it.
keras.backend.set_image_data_format("channels_last")
keras.backend.set_floatx("float32")
keras.backend.set_epsilon(1e-7)


def pixel_statistics(images: np.ndarray, normalize: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float32, of uint8 images [n, 32, 32, 3]. Both broadcast against one image.

    ``channel`` gives [3] each. ``pixel-mean`` gives the mean image [32, 32, 3] and 255; standardised pixels are then
    in -1..1, as in the original study.
    """
    if normalize == "pixel-mean":
        return images.mean(axis=0, dtype=np.float64).astype(np.float32), np.full(1, 255, np.float32)
    # Images are counted in parts, because bincount converts its input to int64.
    counts = np.zeros([3, 256])
    for first in range(0, len(images), 1000):
        part = images[first : first + 1000]
        counts += [np.bincount(part[..., c].ravel(), minlength=256) for c in range(3)]
    counts /= images[..., 0].size
    mean = counts @ np.arange(256)
    std = np.sqrt(counts @ np.arange(256) ** 2 - mean**2)
    return mean.astype(np.float32), np.maximum(std, 1e-3).astype(np.float32)


class Standardize(layers.Layer):
    """(image - mean) / std. With this layer the network, and every file exported from it, takes raw pixels 0..255.

    ``mean`` and ``std`` broadcast against [batch, 32, 32, 3]. They are weights, not constants, so that a
    checkpoint holds them.
    """

    def __init__(self, mean: np.ndarray, std: np.ndarray, **kwargs: object) -> None:
        # Autocast would round mean and std to a half type, and standardise differently from the exported float32 file.
        super().__init__(autocast=False, **kwargs)
        for name, value in (("mean", mean), ("std", std)):
            initial = keras.initializers.Constant(value)
            weight = self.add_weight(
                name, value.shape, initializer=initial, trainable=False, experimental_autocast=False
            )
            setattr(self, name, weight)

    def call(self, images: tf.Tensor) -> tf.Tensor:
        """Standardise pixels [batch, 32, 32, 3] of any type. The result has the compute type."""
        return tf.cast((tf.cast(images, tf.float32) - self.mean) / self.std, self.compute_dtype)


class Conv2D(layers.Conv2D):
    """A convolution that can run in float32 on hardware without half-precision instructions.

    On a CPU without instructions for bfloat16 or float16, TensorFlow's kernels for that type are more than ten times
    slower than those for float32 (docs/how-it-works.md, "Precision"). The operands are already rounded to the half
    type. Widening them to float32 gives the result of half-precision units with float32 accumulators. The sums stay
    float32 and go to BatchNorm before they are rounded, as in a fused kernel.
    """

    def __init__(self, *args: object, widen: bool = False, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.widen = widen

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """Convolve as Keras does. If ``widen`` is set, compute in float32 and return float32."""
        if self.widen:
            inputs, kernel = tf.cast(inputs, tf.float32), tf.cast(kernel, tf.float32)
        return super().convolution_op(inputs, kernel)


class IdentityShortcut(layers.Layer):
    """Option A of section 3.3: subsample by 2 and pad the new channels with zeros. It has no parameters.

    The paper uses this shortcut on CIFAR ("identity shortcuts in all cases"). So parameter counts equal the paper's.
    """

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """[batch, h, w, c] to [batch, h/2, w/2, 2c]."""
        channels = inputs.shape[-1]
        # Pooling over windows of one pixel equals [:, ::2, ::2], and its kernels are much faster (docs/benchmarks.md).
        every_other = tf.nn.avg_pool2d(inputs, ksize=1, strides=2, padding="VALID")
        return tf.pad(every_other, [[0, 0], [0, 0], [0, 0], [channels // 2, channels // 2]])


@dataclass(frozen=True)
class Parts:
    """The layers that a network is made of.

    ``cnnopt.export.qat`` has parts that compute like int8 arithmetic, ``cnnopt.export.formats`` standard layers, and
    ``cnnopt.model.fused`` the parts that are fast in bfloat16 on CPUs.

    ``join`` makes the layer that ends a block: [shortcut, branch] to relu(shortcut + branch), once for each of the two
    readers of it. None makes an Add and a ReLU. ``rounded(tensor, name)`` is called on every tensor that an int8 file
    stores between two operators.
    """

    standardize: Callable[..., layers.Layer] = Standardize
    convolution: Callable[..., layers.Layer] = Conv2D
    dense: Callable[..., layers.Layer] = layers.Dense
    shortcut: Callable[..., Callable[[tf.Tensor], tf.Tensor]] = IdentityShortcut
    relu: Callable[..., layers.Layer] = layers.ReLU
    join: Callable[..., layers.Layer] | None = None
    rounded: Callable[[tf.Tensor, str], tf.Tensor] = lambda tensor, name: tensor


FLOAT = Parts()


def resnet(
    depth: int, num_classes: int, *, mean: np.ndarray, std: np.ndarray, widen: bool = False, parts: Parts = FLOAT
) -> keras.Model:
    """A ResNet v1 of ``depth`` = 6n+2 layers: raw pixels [batch, 32, 32, 3] to float32 logits [batch, num_classes].

    ``topology`` gives the names and shapes of the layers, and raises ValueError for another depth. ``widen`` runs
    half-precision convolutions in float32 (see ``Conv2D``). Kernels are drawn from the global Keras seed with He
    initialisation. Convolutions have no bias, because BatchNorm follows each of them.
    """

    def conv_bn(x: tf.Tensor, filters: int, strides: int, name: str) -> tf.Tensor:
        x = parts.convolution(
            filters,
            3,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            widen=widen,
            name=name,
        )(x)
        # The BatchNorm's output is rounded by the layer that follows.
        dtype = "float32" if widen else None
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, dtype=dtype, name=f"{name}_bn")(x)

    def relu(x: tf.Tensor, name: str) -> tf.Tensor:
        return parts.rounded(parts.relu(name=name)(x), name)

    def join(shortcut: tf.Tensor, branch: tf.Tensor, name: str) -> tuple[tf.Tensor, tf.Tensor]:
        if parts.join is not None:
            return parts.join(name=f"{name}_relu2")([shortcut, branch])
        x = relu(layers.Add(name=f"{name}_add")([shortcut, branch]), f"{name}_relu2")
        return x, x

    images = keras.Input((32, 32, 3), name="pixels", dtype="float32")
    x = parts.standardize(mean, std, name="standardize")(images)
    x = shortcut = relu(conv_bn(x, topology.FILTERS[0], 1, "stem"), "stem_relu")
    for block in topology.blocks(depth):
        if block.downsamples:
            shortcut = parts.shortcut(name=f"{block.name}_shortcut")(shortcut)
        strides = 2 if block.downsamples else 1
        y = relu(conv_bn(x, block.filters, strides, f"{block.name}_conv1"), f"{block.name}_relu1")
        y = parts.rounded(conv_bn(y, block.filters, 1, f"{block.name}_conv2"), f"{block.name}_conv2")
        x, shortcut = join(shortcut, y, block.name)
    x = parts.rounded(layers.GlobalAveragePooling2D(name="pool")(x), "pool")
    # Logits are float32 under every policy, because the softmax of half-precision logits loses small probabilities.
    x = parts.dense(num_classes, kernel_initializer="he_normal", dtype="float32", name="classifier")(x)
    return keras.Model(images, parts.rounded(x, "classifier"), name=f"resnet{depth}")
