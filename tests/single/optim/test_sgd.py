"""Our SGD against Keras' SGD, which needs ten operations for the same step."""

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.optim.sgd import SGD


def test_it_is_keras_sgd_with_nesterov_momentum():
    rng = np.random.default_rng(0)
    shapes = [(3, 3, 4, 8), (8,), (8, 10)]
    ours, theirs = SGD(0.1, momentum=0.9), keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, jit_compile=False)
    start = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    states = [(optimizer, [tf.Variable(value) for value in start]) for optimizer in (ours, theirs)]
    for optimizer, variables in states:
        optimizer.build(variables)
    for rate in (0.1, 0.3, 0.02):
        gradients = [tf.constant(rng.standard_normal(shape), tf.float32) for shape in shapes]
        for optimizer, variables in states:
            optimizer.learning_rate.assign(rate)
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
    (_, found), (_, expected) = states
    for moved, wanted, before in zip(found, expected, start, strict=True):
        np.testing.assert_allclose(moved.numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
        assert np.abs(moved.numpy() - before).min() > 0
    # What a checkpoint holds has the same names and numbers, so runs that were begun with Keras' go on.
    for ours_has, theirs_has in zip(ours.variables, theirs.variables, strict=True):
        assert ours_has.name == theirs_has.name
        np.testing.assert_allclose(ours_has.numpy(), theirs_has.numpy(), rtol=1e-5, atol=1e-6)
