"""Muon against its definition by the singular value decomposition, in float64."""

import hashlib

import numpy as np
import pytest
import tensorflow as tf

from cnnopt.distributed.collectives import LaunchError
from cnnopt.optim import muon
from tests.helpers import small_runs


@pytest.mark.parametrize("shape", [(3, 27, 16), (2, 576, 64), (1, 8, 8)])
def test_singular_values_come_near_1_and_singular_vectors_stay(shape):
    matrices = np.random.default_rng(0).standard_normal(shape)
    found = muon.orthogonalized(tf.constant(matrices, tf.float32)).numpy()
    for matrix, result in zip(matrices, found, strict=True):
        left, _, right = np.linalg.svd(matrix, full_matrices=False)
        gains = left.T @ result @ right.T
        np.testing.assert_allclose(gains, np.diag(np.diag(gains)), atol=1e-4)
        assert np.diag(gains).min() > 0.6
        assert np.diag(gains).max() < 1.3


def spectral_error(matrix: np.ndarray) -> float:
    """Of the iterations on a matrix, against the same on its singular values in float64."""
    found = muon.orthogonalized(tf.constant(matrix[np.newaxis], tf.float32)).numpy()[0]
    return np.linalg.norm(found - orthogonal(matrix), 2)


@pytest.mark.parametrize("smallest", [1, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(144, 16), (576, 64)])
def test_rounding_errors_stay_small_whatever_the_singular_values(shape, smallest, monkeypatch):
    rng = np.random.default_rng(0)
    rows, columns = shape
    left, right = (np.linalg.qr(rng.standard_normal([n, columns])).Q for n in (rows, columns))
    matrix = (left * np.geomspace(1, smallest, columns)) @ right.T
    assert spectral_error(matrix) < 1e-4

    matmul = tf.matmul

    def tensor_float_32(x: tf.Tensor) -> tf.Tensor:
        """As a GPU rounds what it multiplies: to the nearest of 10 bits after the first."""
        bits = tf.bitcast(x, tf.uint32)
        return tf.bitcast(tf.bitwise.bitwise_and(bits + 0x1000, tf.constant(0xFFFFE000, tf.uint32)), tf.float32)

    monkeypatch.setattr(tf, "matmul", lambda x, y, **how: matmul(tensor_float_32(x), tensor_float_32(y), **how))
    rounded = spectral_error(matrix)
    assert 1e-4 < rounded < 0.1
    monkeypatch.setattr(muon, "ITERATIONS", (5,))
    assert spectral_error(matrix) > 3 * rounded or smallest == 1


def test_a_gradient_of_zeros_moves_nothing():
    np.testing.assert_array_equal(muon.orthogonalized(tf.zeros([2, 6, 4])), np.zeros([2, 6, 4]))


def orthogonal(kernel: np.ndarray) -> np.ndarray:
    """A kernel [height, width, in, out] with the singular vectors of the given one, [everything else, out]."""
    left, values, right = np.linalg.svd(kernel.reshape(-1, kernel.shape[-1]).astype(np.float64), full_matrices=False)
    a, b, c = muon.QUINTIC
    values = values / np.linalg.norm(values)
    for _ in range(sum(muon.ITERATIONS)):
        values = a * values + b * values**3 + c * values**5
    return ((left * values) @ right).reshape(kernel.shape)


def joined(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([array.ravel() for array in arrays.values()])


def test_two_steps_are_the_formula():
    rate, momentum, decay = 0.3, 0.9, 0.02
    rng = np.random.default_rng(1)
    shapes = {"conv": (3, 3, 4, 8), "same_shape": (3, 3, 4, 8), "dense": (8, 3), "beta": (8,), "after": (3, 3, 8, 4)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    variable = tf.Variable(joined(weights))
    runs = [(2, tf.TensorShape(shapes["conv"])), (32, None), (1, tf.TensorShape(shapes["after"]))]
    optimizer = muon.Muon(rate, momentum=momentum, weight_decay=decay, runs=runs)
    optimizer.build([variable])
    slots = {name: np.zeros(shape) for name, shape in shapes.items()}
    for _ in range(2):
        gradients = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        optimizer.apply_gradients([(tf.constant(joined(gradients)), variable)])
        for name, gradient in gradients.items():
            slots[name] = momentum * slots[name] + gradient
            ahead = gradient + momentum * slots[name]
            if len(shapes[name]) == 4:
                shrunk = weights[name] * (1 - rate * decay / (1 - momentum))
                weights[name] = shrunk - rate * muon.SPECTRAL_STEP * orthogonal(ahead)
            else:
                weights[name] = weights[name] - rate * ahead
    np.testing.assert_allclose(variable.numpy(), joined(weights), atol=2e-5)


def test_a_run_decays_each_kernel_once_and_nothing_else(float32_policy):
    config = small_runs.settings(optimizer="muon", weight_decay=0.3, sparsity=0.0)
    model = small_runs.build(config)
    for weight in model.trainable_weights:
        decay = weight.like(model.run.weight_decay, "decay").numpy()
        assert np.all(decay == np.float32(0.3 if weight.name == "classifier/kernel:0" else 0.0)), weight.name
    assert model.optimizer.shrinkage == pytest.approx(3.0)


def test_the_digest_is_of_every_shape_that_is_orthogonalized(monkeypatch, float32_policy):
    runs = small_runs.build(small_runs.settings(depth=20)).vectors.runs()
    shapes = {(shape[:-1].num_elements(), shape[-1]) for _, shape in runs if shape is not None}
    assert len(shapes) == 6
    here, orthogonalized = muon.digest(), muon.orthogonalized
    for shape in shapes:

        def elsewhere(matrices: tf.Tensor, odd: tuple[int, int] = shape) -> tf.Tensor:
            """As on a processor that rounds matrices of this shape otherwise."""
            rounding = 1e-6 if tuple(matrices.shape[1:]) == odd else 0.0
            return orthogonalized(matrices) * (1 + rounding)

        monkeypatch.setattr(muon, "orthogonalized", elsewhere)
        assert muon.digest() != here, shape


def test_ranks_that_would_step_otherwise_are_refused(monkeypatch, float32_policy):
    here = muon.digest()
    assert here == muon.digest()
    there = hashlib.sha256(b"another processor").hexdigest()[:6]
    monkeypatch.setattr("cnnopt.distributed.collectives.gather_objects", lambda value: [(there, "a"), value])
    monkeypatch.setenv("HOROVOD_HOSTNAME", "b")
    with pytest.raises(
        LaunchError,
        match=f"^--optimizer muon: {there} on a, {here} on b; choose --optimizer sgd, or start the ranks on hosts of",
    ):
        small_runs.build(small_runs.settings(optimizer="muon"))
