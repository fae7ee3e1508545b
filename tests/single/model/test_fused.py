"""XLA's functions between convolutions equal TensorFlow's operations bit for bit."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cnnopt.model import fused, precision
from cnnopt.model.resnet import FLOAT
from cnnopt.training.step import SynchronousModel, build_model
from tests.helpers import ROOT, small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")
SHAPE = (2, 3, 16)
# Neither so large that a sum overflows, nor so small that a processor may take it for zero.
NUMBERS = st_numpy.arrays(
    np.float32, SHAPE, elements=st.one_of(st.just(0.0), st.just(-0.0), st.floats(2**-60, 2**60, width=32),
                                          st.floats(-(2**60), -(2**-60), width=32)),
)  # fmt: skip


def bfloat16(numbers: np.ndarray) -> tf.Tensor:
    return tf.cast(numbers, tf.bfloat16)


def same(found: tf.Tensor, expected: tf.Tensor) -> None:
    """Equal numbers; 0 and -0 are."""
    assert found.dtype == expected.dtype == tf.bfloat16
    np.testing.assert_array_equal(tf.cast(found, tf.float32), tf.cast(expected, tf.float32))


@given(inputs=NUMBERS, gradient=NUMBERS)
def test_relu_and_its_gradient_are_tensorflows(inputs, gradient):
    x = bfloat16(inputs)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        found, expected = fused.relu(x), tf.nn.relu(x)
    same(found, expected)
    same(*(tape.gradient(output, x, output_gradients=bfloat16(gradient)) for output in (found, expected)))


@given(shortcut=NUMBERS, branch=NUMBERS, of_one=NUMBERS, of_other=NUMBERS)
def test_a_join_is_a_sum_and_a_relu_and_sums_what_comes_back(shortcut, branch, of_one, of_other):
    inputs = [bfloat16(shortcut), bfloat16(branch)]
    gradients = [bfloat16(of_one), bfloat16(of_other)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        found = fused.Join(dtype="bfloat16")(inputs, training=True)
        output = tf.nn.relu(tf.add(*inputs))
        expected = (output, tf.identity(output))
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    for one, other in zip(*(tape.gradient(pair, inputs, gradients) for pair in (found, expected)), strict=True):
        same(one, other)


def test_what_is_not_a_number_is_handed_on():
    x = bfloat16(np.float32([np.nan, np.inf, -np.inf, 1]))
    for output in (fused.relu(x), *fused.Join(dtype="bfloat16")([x, x], training=True)):
        assert list(map(str, tf.cast(output, tf.float32).numpy()[:3])) == ["nan", "inf", "0.0"]


def test_where_a_relu_is_0_no_gradient_passes_not_even_one_that_is_not_finite():
    # TensorFlow's own makes NaN of it, as it multiplies by 0.
    x = bfloat16(np.float32([-1, -1, 1]))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        output, (one, other) = fused.relu(x), fused.Join(dtype="bfloat16")([x, tf.zeros_like(x)], training=True)
    gradient = bfloat16(np.float32([np.nan, np.inf, np.inf]))
    for found in (tape.gradient(output, x, gradient), tape.gradient([one, other], x, [gradient, 0 * output])):
        assert list(map(str, tf.cast(found, tf.float32).numpy())) == ["0.0", "0.0", "inf"]


def test_xla_says_nothing_of_itself():
    program = (
        "from cnnopt.distributed import collectives as d, world\n"
        "d.prepare(world.World(), deterministic=False, verbose=False)\n"
        "d.start(verbose=False); import tensorflow as tf; from cnnopt.model import fused\n"
        "fused.Join()([tf.ones([2]), tf.ones([2])], training=True)"
    )
    command, root = [sys.executable, "-c", program], ROOT
    ended = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True, timeout=120)
    assert "XLA" not in ended.stderr


def trained(parts) -> tuple[dict[str, np.ndarray], SynchronousModel]:
    """The state after three steps in bfloat16, and the model."""
    config = small_runs.settings(precision="bfloat16", deterministic=True)
    compute = precision.Precision("bfloat16", widen=False, reason="")
    model = build_model(config, small_runs.IMAGES, small_runs.timeline_of(config), compute, ranks=1, parts=parts)
    model.make_train_function()
    with small_runs.stream(config) as batches:
        for _ in range(3):
            model.train_function(batches)
    return small_runs.state(model), model


def operations(graph: tf.Graph) -> tuple[Counter[str], int]:
    """Of what TensorFlow runs itself, by type, and how many functions XLA compiles."""
    functions = graph.as_graph_def().library.function
    compiled = [function for function in functions if "_XlaMustCompile" in function.attr]
    nodes = [*graph.as_graph_def().node, *(n for f in functions if f not in compiled for n in f.node_def)]
    return Counter(node.op for node in nodes), len(compiled)


def test_a_network_of_them_trains_to_the_same_weights():
    state, _ = trained(fused.PARTS)
    expected, _ = trained(FLOAT)
    assert state.keys() == expected.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    untrained = small_runs.state(small_runs.build(small_runs.settings(precision="bfloat16")))
    kernels = [name for name in state if name.startswith("weights/") and "kernel" in name]
    assert len(kernels) == 8
    assert all(np.any(untrained[name] != state[name]) for name in kernels)


@pytest.mark.parametrize("fuse", [True, False])
def test_a_network_is_made_of_them_where_the_precision_asks_for_it(fuse):
    config = small_runs.settings(precision="bfloat16")
    compute = precision.Precision("bfloat16", widen=False, reason="", fuse=fuse)
    model = build_model(config, small_runs.IMAGES, small_runs.timeline_of(config), compute, ranks=1)
    found = {type(layer) for layer in model.layers} & {fused.ReLU, fused.Join}
    assert found == ({fused.ReLU, fused.Join} if fuse else set())


def test_training_compiles_and_evaluation_whose_last_batch_may_be_of_any_size_does_not():
    _, model = trained(fused.PARTS)
    with small_runs.stream(small_runs.settings()) as batches:
        found, compiled = operations(model.train_function.get_concrete_function(batches).graph)
    assert compiled
    # The sum of the gradients of the first block's branches: the stem's ReLU is no join.
    assert (found["ReluGrad"], found["AddN"]) == (0, 1)
    found, compiled = operations(model.evaluation_step.get_concrete_function().graph)
    assert (found["Relu"], compiled) == (7, 0)
