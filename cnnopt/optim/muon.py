"""Muon: the momentum of each convolution's kernel is orthogonalized before it moves the kernel.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon);
that an orthogonal step is steepest descent in the spectral norm is section 2 of Bernstein and Newhouse 2024
(arXiv:2409.20325). Iterating on Gram matrices: "Gram Newton-Schulz" (dao-lab.ai/blog/2026/gram-newton-schulz).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from cnnopt.optim.sgd import SGD

#: Of x -> a x + b x^3 + c x^5 on singular values: Jordan's, which bring those in (0.001, 1] to about 0.7 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
#: Iterations in one go. A rounding error of a Gram matrix grows twelvefold in each, so it is computed anew in between:
#: after five a GPU's TensorFloat-32 would leave noise.
ITERATIONS = (3, 2)
#: Spectral norm of a kernel's step, as a part of the learning rate that all other weights have.
SPECTRAL_STEP = 0.1
#: [rows, columns] of the kernels of a CIFAR ResNet of any depth.
SHAPES = ((27, 16), (144, 16), (144, 32), (288, 32), (288, 64), (576, 64))


def orthogonalized(matrices: tf.Tensor) -> tf.Tensor:
    """U V^T of each U S V^T in float32 [n, rows, columns], rows >= columns, by Newton-Schulz iterations.

    Only about: the singular values come out between 0.7 and 1.2, which is all that a step needs. Zeros stay zeros.
    An iteration is x -> x p(x^T x), and so x^T x -> p x^T x p: all but the ends is done with matrices of
    [columns, columns], a ninth of the kernel between equal numbers of channels.
    """
    a, b, c = QUINTIC
    diagonal = a * tf.eye(matrices.shape[-1])
    x = matrices / (tf.norm(matrices, axis=[-2, -1], keepdims=True) + 1e-7)
    for iterations in ITERATIONS:
        gram = tf.matmul(x, x, transpose_a=True)
        product = p = diagonal + b * gram + c * tf.matmul(gram, gram)
        for _ in range(iterations - 1):
            gram = tf.matmul(tf.matmul(p, gram), p)
            p = diagonal + b * gram + c * tf.matmul(gram, gram)
            product = tf.matmul(product, p)
        x = tf.matmul(x, product)
    return x


class Muon(SGD):
    """Muon for the kernels of convolutions, SGD with Nesterov momentum for all else.

    ``weight_decay`` shrinks those kernels by as much as the same number, added to the gradient, would under SGD: its
    momentum sums up to 1 / (1 - momentum) of each. Their gradients are to come without it.
    """

    def __init__(self, learning_rate: float, *, momentum: float, weight_decay: float) -> None:
        super().__init__(learning_rate, momentum=momentum)
        self.shrinkage = weight_decay / (1 - momentum)

    def apply_gradients(self, grads_and_vars: Sequence[tuple[tf.Tensor, tf.Variable]], **kwargs: Any) -> Any:
        """As in Keras: float32 gradients of the shapes of their variables."""
        pairs = list(grads_and_vars)
        groups: dict[tuple[int, ...], list[tuple[tf.Tensor, tf.Variable]]] = {}
        for gradient, variable in pairs:
            if orthogonalizes(variable):
                groups.setdefault(tuple(variable.shape), []).append((gradient, variable))
        # Kernels of one shape together: a few operations for them all.
        for group in groups.values():
            self._step(*zip(*group, strict=True))
        return super().apply_gradients([pair for pair in pairs if not orthogonalizes(pair[1])], **kwargs)

    def _step(self, gradients: Sequence[tf.Tensor], kernels: Sequence[tf.Variable]) -> None:
        """Move kernels that have one shape, [height, width, input channels, output channels]."""
        slots = [self.slot(kernel) for kernel in kernels]
        gradient = tf.stack(gradients)
        momentum = self.momentum * tf.stack(slots) + gradient
        ahead = self.momentum * momentum + gradient
        # One column for each output channel.
        matrices = tf.reshape(ahead, [len(kernels), -1, ahead.shape[-1]])
        step = tf.reshape(orthogonalized(matrices), ahead.shape)
        rate = self.learning_rate
        moved = (1 - rate * self.shrinkage) * tf.stack(kernels) - rate * SPECTRAL_STEP * step
        for variables, values in ((slots, momentum), (kernels, moved)):
            for variable, value in zip(variables, tf.unstack(values), strict=True):
                variable.assign(value)


def orthogonalizes(variable: tf.Variable) -> bool:
    """True for the weights that Muon takes, the kernels of convolutions."""
    return variable.shape.rank == 4


def digest() -> str:
    """Of an orthogonalized matrix of each shape as this host computes it, in 6 hexadecimal digits.

    Other processors, or another number of threads, may add in another order. All else that follows the exchange is done
    weight by weight, and comes out alike everywhere.
    """
    found = hashlib.sha256()
    for shape in SHAPES:
        matrices = np.random.default_rng(0).standard_normal([4, *shape]).astype(np.float32)
        found.update(orthogonalized(tf.constant(matrices)).numpy().tobytes())
    return found.hexdigest()[:6]
