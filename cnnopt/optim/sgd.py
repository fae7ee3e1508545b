"""SGD with Nesterov momentum, as one operation for each tensor of weights."""

from __future__ import annotations

import tensorflow as tf
import tf_keras as keras


class SGD(keras.optimizers.SGD):
    """Keras' SGD with Nesterov momentum (Sutskever et al. 2013, section 2), computed by one TensorFlow kernel.

    Keras' optimizer uses ten small operations per tensor. TensorFlow needs longer to start them than to compute them.
    """

    def __init__(self, learning_rate: float, *, momentum: float) -> None:
        super().__init__(learning_rate, momentum=momentum, nesterov=True, jit_compile=False)

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        """Move ``variable`` by a gradient of the same shape and type."""
        tf.raw_ops.ResourceApplyKerasMomentum(
            var=variable.handle,
            accum=self.slot(variable).handle,
            lr=tf.cast(self.learning_rate, variable.dtype),
            grad=gradient,
            momentum=tf.cast(self.momentum, variable.dtype),
            use_nesterov=True,
        )

    def slot(self, variable: tf.Variable) -> tf.Variable:
        """The momentum of ``variable``."""
        return self.momentums[self._index_dict[self._var_key(variable)]]
