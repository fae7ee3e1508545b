"""The compiled ReLU and residual sum equal TensorFlow's, bit for bit, and training uses them in bfloat16 on CPUs."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from cnnopt.model import fused
from cnnopt.model.precision import Precision
from cnnopt.training.build import build_model
from cnnopt.training.step import SynchronousModel
from cnnopt.training.xla import Compiler
from tests.helpers import ROOT, small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")
#: Not so small that a processor may take the number for zero. Sums overflow and are rounded.
SIZES = st.floats(2**-60, float(tf.bfloat16.max), width=32)
NUMBERS = st_numpy.arrays(np.float32, (2, 3, 16), elements=st.one_of(st.just(0.0), SIZES, SIZES.map(lambda x: -x)))


def bfloat16(numbers: np.ndarray) -> tf.Tensor:
    return tf.cast(numbers, tf.bfloat16)


def same(found: tf.Tensor, expected: tf.Tensor) -> None:
    """Equal numbers, of which 0 and -0 are the same."""
    assert found.dtype == expected.dtype == tf.bfloat16
    np.testing.assert_array_equal(tf.cast(found, tf.float32), tf.cast(expected, tf.float32))


@given(inputs=NUMBERS, gradient=NUMBERS)
def test_relu_and_its_gradient_are_those_of_tensorflow(inputs, gradient):
    x = bfloat16(inputs)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        found, expected = fused.relu(x), tf.nn.relu(x)
    same(found, expected)
    finite = tf.where(tf.math.is_finite(bfloat16(gradient)), bfloat16(gradient), 0)
    same(*(tape.gradient(output, x, output_gradients=finite) for output in (found, expected)))


@given(shortcut=NUMBERS, branch=NUMBERS, of_one=NUMBERS, of_other=NUMBERS)
def test_a_join_is_a_sum_and_a_relu_and_its_gradient_is_the_sum_of_two(shortcut, branch, of_one, of_other):
    inputs = [bfloat16(shortcut), bfloat16(branch)]
    # Half of the largest number, so that no sum is infinite, of which TensorFlow makes NaN where it multiplies by 0.
    gradients = [bfloat16(of_one / 4), bfloat16(of_other / 4)]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(inputs)
        found = fused.Join(dtype="bfloat16")(inputs, training=True)
        output = tf.nn.relu(tf.add(*inputs))
        expected = (output, tf.identity(output))
    for one, other in zip(found, expected, strict=True):
        same(one, other)
    for one, other in zip(*(tape.gradient(pair, inputs, gradients) for pair in (found, expected)), strict=True):
        same(one, other)


def test_halves_are_rounded_to_even():
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie half-way between two bfloat16 numbers, which are 2^-7 apart there.
    sums = fused.join(bfloat16(np.float32([1, 1 + 2**-7])), bfloat16(np.float32([2**-8, 2**-8])))[0]
    assert tf.cast(sums, tf.float32).numpy().tolist() == [1, 1 + 2**-6]


def test_nan_and_infinity_pass():
    x = bfloat16(np.float32([np.nan, -np.nan, np.inf, -np.inf]))
    for output in (fused.relu(x), *fused.Join(dtype="bfloat16")([x, x], training=True)):
        assert [str(number) for number in tf.cast(output, tf.float32).numpy()] == ["nan", "nan", "inf", "0.0"]


def test_no_gradient_passes_where_a_relu_is_0():
    # TensorFlow's kernel multiplies by 0, and so makes NaN of a gradient that is not finite.
    x = bfloat16(np.float32([-1, -1, 1, 1]))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        output, (one, other) = fused.relu(x), fused.Join(dtype="bfloat16")([x, tf.zeros_like(x)], training=True)
    gradient = bfloat16(np.float32([np.nan, np.inf, np.inf, np.nan]))
    for found in (tape.gradient(output, x, gradient), tape.gradient([one, other], x, [gradient, 0 * output])):
        assert [str(number) for number in tf.cast(found, tf.float32).numpy()] == ["0.0", "0.0", "inf", "nan"]


def test_xla_prints_nothing():
    program = (
        "from cnnopt.distributed import collectives, world\n"
        "collectives.prepare(world.World(), verbose=False)\n"
        "collectives.start(verbose=False); import tensorflow as tf; from cnnopt.model import fused\n"
        "x = tf.ones([2], tf.bfloat16); print(len(fused.Join(dtype='bfloat16')([x, x], training=True)))"
    )
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=120)
    assert (ended.stdout, ended.stderr) == ("2\n", "")


def trained(compute: Precision) -> tuple[dict[str, np.ndarray], SynchronousModel]:
    """The state after three steps, and the model."""
    config = small_runs.settings(precision="bfloat16", deterministic=True)
    model = build_model(config, small_runs.IMAGES, small_runs.timeline_of(config), compute, ranks=1)
    with small_runs.stream(config) as batches:
        for step in range(3):
            model.train(batches, step, step + 1)
    return small_runs.state(model), model


def operations(graph: tf.Graph) -> tuple[Counter[str], int]:
    """The operations that TensorFlow runs itself, by type, and the number of functions that XLA compiles."""
    functions = graph.as_graph_def().library.function
    compiled = [function for function in functions if "_XlaMustCompile" in function.attr]
    nodes = [*graph.as_graph_def().node, *(n for f in functions if f not in compiled for n in f.node_def)]
    return Counter(node.op for node in nodes), len(compiled)


def test_a_fused_network_trains_to_the_same_weights():
    state, model = trained(Precision("bfloat16", widen=False, reason="", fuse=True))
    expected, plain = trained(Precision("bfloat16", widen=False, reason=""))
    assert {type(layer) for layer in model.layers} >= {fused.ReLU, fused.Join}
    assert not {type(layer) for layer in plain.layers} & {fused.ReLU, fused.Join}
    assert state.keys() == expected.keys()
    for name, values in state.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    config = small_runs.settings(precision="bfloat16")
    with small_runs.stream(config) as batches:
        graph = model.train_call.get_concrete_function(batches.given(0, 1), batches.item, None).graph
    found, compiled = operations(graph)
    # The only sum left is that of the first block, whose input ends no block.
    assert (found["ReluGrad"], found["AddN"], compiled > 0) == (0, 1, True)
    # The last batch of an evaluation may have any size, and XLA would compile for it.
    found, compiled = operations(model.evaluation_step.get_concrete_function().graph)
    assert (found["Relu"], compiled) == (7, 0)


def test_a_network_that_is_compiled_as_a_whole_is_not_fused():
    config, compute = small_runs.settings(precision="bfloat16"), Precision("bfloat16", False, "", fuse=True)
    timeline = small_runs.timeline_of(config)
    model = build_model(config, small_runs.IMAGES, timeline, compute, ranks=1, compiler=Compiler(True))
    assert not any(isinstance(layer, fused.Join | fused.ReLU) for layer in model.layers)
