"""Multiplications of a step, and the best rate of this machine. Import it after TensorFlow is set up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
import tf_keras as keras

#: Rows and columns of the matrix product that stands for the machine's best.
GEMM = 1536


def matrix_product(compute: str) -> Callable[[], object]:
    """A matrix product of GEMM x GEMM matrices of type ``compute``."""
    square = tf.random.normal([GEMM, GEMM], dtype=compute)
    return tf.function(lambda: tf.matmul(square, square))


def floating_point_operations(model: keras.Model) -> float:
    """Of convolutions and classifier, for one image. Backward counts twice forward, once for the stem."""
    total = 0.0
    for layer in model.layers:
        kernel = getattr(layer, "kernel", None)
        if kernel is not None:
            places = np.prod(layer.output_shape[1:3]) if len(kernel.shape) == 4 else 1
            total += (2 if layer.name == "stem" else 3) * 2 * float(np.prod(kernel.shape)) * places
    return total
