"""Views of vectors: variables of their own to Keras' layers, parts of a vector to the step."""

import itertools
import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from cnnopt.model import topology
from cnnopt.model.flat import Vectors, View, views
from cnnopt.model.resnet import resnet
from tests.helpers import small_runs

STATISTICS = {"mean": np.float32([125, 123, 114]), "std": np.float32([63, 62, 67])}
IMAGES = small_runs.IMAGES.test_images[:5]


def pair(policy: str) -> tuple[keras.Model, Vectors, keras.Model]:
    """A network of views, their vectors, and the same network of Keras' own variables."""
    keras.mixed_precision.set_global_policy(policy)
    keras.utils.set_random_seed(0)
    with views() as made:
        network = resnet(14, 10, **STATISTICS)
    keras.utils.set_random_seed(0)
    return network, Vectors(made), resnet(14, 10, **STATISTICS)


def same_weights(network: keras.Model, plain: keras.Model) -> None:
    for weight, expected in zip(network.weights, plain.weights, strict=True):
        assert (weight.name, weight.shape, weight.trainable) == (expected.name, expected.shape, expected.trainable)
        np.testing.assert_array_equal(weight.numpy(), expected.numpy(), err_msg=weight.name)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_network_of_views_is_one_of_variables(policy, float32_policy):
    network, vectors, plain = pair(policy)
    same_weights(network, plain)
    for training in (False, True):
        np.testing.assert_array_equal(network(IMAGES, training=training), plain(IMAGES, training=training))
    # Of one batch, the moving statistics have moved.
    same_weights(network, plain)
    changed = [value + 1 for value in plain.get_weights()]
    for model in (network, plain):
        model.set_weights(changed)
    same_weights(network, plain)
    assert network.count_params() == plain.count_params()
    sizes = [sum(int(np.prod(w.shape)) for w in part) for part in (plain.trainable_weights, plain.weights)]
    assert vectors.weights.shape == [sum(vectors.stages)] == [sizes[0]]
    assert vectors.moving.shape == [sizes[1] - sizes[0] - 6]  # the mean and deviation of three colours


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_layers_compute_with_what_is_read_and_their_gradients_are_those_of_variables(policy, float32_policy):
    network, vectors, plain = pair(policy)
    kept = [vector.numpy() for vector in (vectors.weights, vectors.moving)]
    stages = tf.split(2 * vectors.weights, vectors.stages)
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(stages)
        with vectors.reading(stages, vectors.moving.read_value(), network.get_layer("stem").compute_dtype):
            logits = network(IMAGES, training=True)
            moved = vectors.moved()
    for weight in plain.trainable_weights:
        weight.assign(2 * weight)
    with tf.GradientTape() as other:
        expected = plain(IMAGES, training=True)
    np.testing.assert_array_equal(logits, expected)
    vectors.weights.assign(tf.concat(tape.gradient(logits, stages), 0))
    gradients = other.gradient(expected, plain.trainable_weights)
    for weight, gradient in zip(network.trainable_weights, gradients, strict=True):
        np.testing.assert_allclose(weight.numpy(), gradient, rtol=1e-4, atol=1e-4, err_msg=weight.name)
    # What the layers have assigned is the reader's alone.
    np.testing.assert_array_equal(vectors.moving, kept[1])
    vectors.moving.assign(moved)
    for weight, wanted in zip(network.non_trainable_weights, plain.non_trainable_weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), wanted.numpy(), err_msg=weight.name)


def test_kernels_of_one_shape_are_side_by_side_in_their_stage(float32_policy):
    network, vectors, _ = pair("float32")
    assert [shape and (count, *shape) for count, shape in vectors.runs()] == [
        (1, 3, 3, 3, 16), (4, 3, 3, 16, 16), None, (1, 3, 3, 16, 32), (3, 3, 3, 32, 32), None,
        (1, 3, 3, 32, 64), (3, 3, 3, 64, 64), None,
    ]  # fmt: skip
    sizes = [count * (shape.num_elements() if shape else 1) for count, shape in vectors.runs()]
    assert sum(sizes) == sum(vectors.stages)
    ends = np.cumsum([0, *vectors.stages])
    for weight in network.trainable_weights:
        stage = {"stem": 0, "stage1": 0, "stage2": 1}.get(weight.name.split("_")[0].split("/")[0], 2)
        assert ends[stage] <= weight.offset < weight.offset + weight.size <= ends[stage + 1], weight.name
    places = sorted((weight.offset, weight.size) for weight in network.trainable_weights)
    assert all(offset + size == following for (offset, size), (following, _) in itertools.pairwise(places))


def test_a_view_sets_its_own_entries_alone():
    vector = tf.Variable(tf.range(6.0))
    view = View(vector, 2, tf.TensorShape([3, 1]), "some/part:0")
    view.assign([[7], [8], [9]])
    view.assign_add(3 * tf.ones([3, 1]))
    view.assign_sub(2 * tf.ones([3, 1]))
    np.testing.assert_array_equal(vector, [0, 1, 8, 9, 10, 5])
    np.testing.assert_array_equal(view + 1.0, [[9], [10], [11]])
    np.testing.assert_array_equal(view.like(tf.Variable(tf.zeros(6)), "other").numpy(), np.zeros([3, 1]))


@pytest.mark.parametrize("optimizer", ["sgd", "muon", "adam"])
def test_a_step_has_few_variables(optimizer, float32_policy):
    model = small_runs.build(small_runs.settings(optimizer=optimizer, ema=0.9))
    everyone = [*model.variables, *model.optimizer.variables]
    assert len(everyone) <= 12
    # Horovod broadcasts by name.
    assert len({variable.name for variable in everyone}) == len(everyone)
    # Weights, masks, their average and their momentum.
    assert sum(v.shape.num_elements() for v in everyone) > 4 * sum(model.vectors.stages)


@pytest.mark.parametrize(("optimizer", "slots"), [("sgd", "m"), ("muon", "m"), ("adam", "mv")])
def test_a_checkpoint_has_the_names_that_it_had_before_there_were_vectors(optimizer, slots, float32_policy):
    shapes = {"mean:0": (3,), "std:0": (3,), **topology.weight_shapes(8, 10)}
    learned = [name for name in shapes if not name.startswith(("mean", "std")) and "moving_" not in name]
    groups = {
        "weights": list(shapes),
        "optimizer": ["iteration:0", *(f"{slot}/{name}" for name in learned for slot in slots)],
        "masks": [f"mask/{name}:0" for name in learned if name.endswith("kernel:0")],
        "loss_scale": ["loss_scale:0", "finite_steps:0", "skipped_steps:0"],
        "ema": [f"ema/{name}:0" for name in shapes],
    }
    expected = [f"{group}/{i:03d}/{name}" for group, names in groups.items() for i, name in enumerate(names)]
    state = small_runs.state(small_runs.build(small_runs.settings(optimizer=optimizer, ema=0.9)))
    assert list(state) == [*expected, "global_step"]
    for name, value in state.items():
        weight = re.sub("^(mask|ema|m|v)/", "", name.split("/", 2)[-1]).split(":")[0]
        assert value.shape == shapes.get(f"{weight}:0", ()), name
