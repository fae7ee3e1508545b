"""Muon: the momentum of each convolution's kernel is orthogonalized before it moves the kernel.

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon).
Bernstein and Newhouse 2024 (arXiv:2409.20325, Story II): an orthogonal step is steepest descent in the spectral norm.
"Gram Newton-Schulz" (dao-lab.ai/blog/2026/gram-newton-schulz): the iteration on Gram matrices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from cnnopt.optim.sgd import SGD

#: a, b, c of x -> a x + b x^3 + c x^5 on singular values, from Jordan. Five in a row map (0.002, 1] to 0.68 to 1.2.
QUINTIC = (3.4445, -4.7750, 2.0315)
#: Iterations on one Gram matrix, before it is computed again from x. Each iteration multiplies the matrix's rounding
#: error by twelve. After five in a row with a GPU's TensorFloat-32, only noise would be left.
ITERATIONS = (3, 2)
#: The spectral norm of a kernel's step, as a fraction of the learning rate of all other weights.
SPECTRAL_STEP = 0.1
#: [rows, columns] of the kernels of a CIFAR ResNet of any depth.
SHAPES = ((27, 16), (144, 16), (144, 32), (288, 32), (288, 64), (576, 64))


def orthogonalized(matrices: tf.Tensor) -> tf.Tensor:
    """U V^T of each U S V^T in float32 [n, rows, columns], rows >= columns, by Newton-Schulz iterations.

    The result is approximate: singular values above 0.002 of the norm become 0.68 to 1.2, which is enough for a step.
    Smaller ones grow by a factor of at most 485, and zeros stay zeros.

    An iteration is x -> x p(x^T x), so x^T x -> p x^T x p. All work but the first and last product is done with
    matrices [columns, columns]. These have a ninth of the kernel's size if input and output channels are equal.
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
    """Muon for the kernels of convolutions, SGD with Nesterov momentum for all other weights.

    ``runs`` lists the parts of the vector of weights, in order: (number of kernels, their shape [height, width, input
    channels, output channels]), or (number of other weights, None). ``weight_decay`` shrinks the kernels as much as
    under SGD, where it is added to the gradient and momentum multiplies it by 1 / (1 - momentum). The gradients of
    kernels must not contain the weight decay.
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
        """Move ``variable`` by a gradient. Both are float32 [weights]."""
        rate, slot = self.learning_rate, self.slot(variable)
        # The momentum of the other weights contains the learning rate, as in TensorFlow's kernel for SGD.
        pull = tf.where(self.orthogonal, 1.0, -rate) * gradient
        momentum = self.momentum * slot + pull
        steps = tf.split(self.momentum * momentum + pull, self.sizes)
        for i, (count, shape) in enumerate(self.runs):
            if shape is not None:
                # One column for each output channel. Kernels of one shape share a few operations.
                step = orthogonalized(tf.reshape(steps[i], [count, -1, shape[-1]]))
                steps[i] = -rate * SPECTRAL_STEP * tf.reshape(step, [-1])
        shrunk = tf.where(self.orthogonal, 1 - rate * self.shrinkage, 1.0) * variable
        slot.assign(momentum)
        variable.assign(shrunk + tf.concat(steps, 0))


def digest() -> str:
    """A digest, 6 hexadecimal digits, of orthogonalized matrices of each shape as this host computes them.

    Another processor, or another number of threads, may add in another order. All other computations after the
    exchange are done weight by weight, and give equal results on all hosts.
    """
    found = hashlib.sha256()
    for shape in SHAPES:
        matrices = np.random.default_rng(0).standard_normal([4, *shape]).astype(np.float32)
        found.update(orthogonalized(tf.constant(matrices)).numpy().tobytes())
    return found.hexdigest()[:6]
