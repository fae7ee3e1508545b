"""Muon: the momentum of each convolution's kernel is orthogonalized before it moves the kernel.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon);
that an orthogonal step is steepest descent in the spectral norm is section 2 of Bernstein and Newhouse 2024
(arXiv:2409.20325). Iterating on Gram matrices: "Gram Newton-Schulz" (dao-lab.ai/blog/2026/gram-newton-schulz).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

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

    ``runs`` says what the one vector of weights is made of, part after part: (number of kernels, their shape [height,
    width, input channels, output channels]), or (number of other weights, None). ``weight_decay`` shrinks the kernels
    by as much as the same number, added to the gradient, would under SGD: its momentum sums up to 1 / (1 - momentum) of
    each. Their gradients are to come without it.
    """

    def __init__(
        self,
        learning_rate: float,
        *,
        momentum: float,
        weight_decay: float,
        runs: Sequence[tuple[int, tf.TensorShape | None]],
    ) -> None:
        super().__init__(learning_rate, momentum=momentum)
        self.shrinkage = weight_decay / (1 - momentum)
        self.runs = runs
        self.sizes = [count * (shape.num_elements() if shape else 1) for count, shape in runs]
        self.orthogonal = tf.repeat([shape is not None for _, shape in runs], self.sizes)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        """Move ``variable`` by a gradient, float32 [weights] both."""
        rate, slot = self.learning_rate, self.slot(variable)
        # As TensorFlow's kernel for SGD has it, the momentum of the other weights contains the rate.
        pull = tf.where(self.orthogonal, 1.0, -rate) * gradient
        momentum = self.momentum * slot + pull
        steps = tf.split(self.momentum * momentum + pull, self.sizes)
        for i, (count, shape) in enumerate(self.runs):
            if shape is not None:
                # One column for each output channel; kernels of one shape together, a few operations for them all.
                step = orthogonalized(tf.reshape(steps[i], [count, -1, shape[-1]]))
                steps[i] = -rate * SPECTRAL_STEP * tf.reshape(step, [-1])
        shrunk = tf.where(self.orthogonal, 1 - rate * self.shrinkage, 1.0) * variable
        slot.assign(momentum)
        variable.assign(shrunk + tf.concat(steps, 0))


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
