"""Calls of several steps: the same bits as single steps, ends where hooks act, and nothing asked of the host inside."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from cnnopt.schedules import PruningWindow
from cnnopt.training.callbacks import Prune
from cnnopt.training.loop import LONGEST_CALL, Boundary, CallLength
from tests.helpers import small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")


class Calls(keras.callbacks.Callback):
    """The steps of each call, and what each epoch has summed."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.epochs, self.losses = [], [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.first.append(batch)

    def on_train_batch_end(self, batch, logs=None):
        self.last.append(batch)
        self.losses.append(float(logs["loss"]))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, logs["loss"], logs["accuracy"]))


def trained(hooks=(), **changes) -> tuple[dict[str, np.ndarray], Calls]:
    config = small_runs.settings(deterministic=True, **changes)
    model, calls = small_runs.build(config), Calls()
    small_runs.fit(model, config, [Prune(), calls, *hooks])
    assert model.train_call.experimental_get_tracing_count() == 1
    return small_runs.state(model), calls


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name


# What is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "precision", "augment"),
    [("muon", "float32", "standard"), ("adam", "float16", "shift"), ("sgd", "bfloat16", "none")],
)
def test_several_steps_a_call_on_either_stream_are_single_steps_bit_for_bit(optimizer, precision, augment):
    changes = {"optimizer": optimizer, "precision": precision, "augment": augment, "ema": 0.9, "batch_size": 20}
    single, calls = trained(**changes)
    assert calls.first == calls.last == list(range(39))
    for stream, steps in (("device", "1"), ("device", "5"), ("host", "5")):
        several, others = trained(stream=stream, steps_per_call=steps, **changes)
        same(several, single)
        assert others.epochs == calls.epochs
        assert others.losses == [calls.losses[step] for step in others.last]


def test_a_call_ends_with_the_epoch_and_where_masks_change():
    # 256 images in batches of 20: the epochs end after 13, 26 and 39 steps. The masks change after 4, 8, 12 and 16.
    _, calls = trained(batch_size=20, steps_per_call="5")
    ends = [4, 8, 12, 13, 16, 21, 26, 31, 36, 39]
    assert [last + 1 for last in calls.last] == ends
    assert calls.first == [0, *ends[:-1]]


def test_a_call_ends_where_any_hook_acts():
    class At(Boundary):
        def next_step(self, step):
            return 7 if step < 7 else None

    _, calls = trained(hooks=[At()], sparsity=0.0, epochs=1, steps_per_call="100")
    assert [last + 1 for last in calls.last] == [7, 8]


def test_a_run_may_go_on_with_calls_of_another_length_and_the_other_stream():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch + 1 == 12

    whole, _ = trained()
    config = small_runs.settings(deterministic=True, steps_per_call="5", stream="device")
    first = small_runs.build(config)
    small_runs.fit(first, config, [Prune(), Stop()])
    assert int(first.run.global_step.numpy()) == 12
    config = small_runs.settings(deterministic=True, steps_per_call="3")
    second = small_runs.build(config)
    for name, variable in second.named_state().items():
        variable.assign(first.named_state()[name].numpy())
    small_runs.fit(second, config, [Prune()])
    same(small_runs.state(second), whole)


def test_the_step_at_which_a_run_diverged_is_found_inside_a_call():
    config = small_runs.settings(precision="float16", sparsity=0.0, stream="device", epochs=20)
    model = small_runs.build(config)
    bias = model.get_layer("classifier").bias

    def diverged(first: int, last: int) -> int:
        return int(model.train(stream, first, last, several=True)["diverged"].numpy())

    with small_runs.stream(config) as stream:
        # A loss scale is given 24 halvings to cure it, again after each finite step.
        for first in (0, 25):
            bias.assign(tf.fill([10], np.nan))
            assert diverged(first, first + 24) == 0
            bias.assign(tf.zeros([10]))
            assert diverged(first + 24, first + 25) == 0
        bias.assign(tf.fill([10], np.nan))
        assert diverged(50, 80) == 75
        assert diverged(80, 81) == 75


# What is asked of the host -------------------------------------------------------------------------------------


def operations(graph: tf.Graph) -> set[str]:
    """The kinds of operations of a graph and of all functions that it calls."""
    definition = graph.as_graph_def()
    bodies = [definition.node, *(function.node_def for function in definition.library.function)]
    return {node.op for node in itertools.chain(*bodies)}


def test_inside_a_call_nothing_is_asked_of_the_host():
    kinds = {}
    for stream in ("host", "device"):
        config = small_runs.settings(precision="float16", stream=stream, ema=0.9)
        model = small_runs.build(config)
        with small_runs.stream(config) as source:
            function = model.train_call.get_concrete_function(source.given(0, 2), source.item, tf.constant(2))
        kinds[stream] = operations(function.graph)
    # The host's batches come through an iterator, the device's do not.
    assert "IteratorGetNext" in kinds["host"]
    assert {"While", "StatefulPartitionedCall", "GatherV2"} <= kinds["device"]
    conditions = {"If", "StatelessIf", "Case", "Where", "Assert", "Switch", "Merge"}
    assert not kinds["device"] & {"IteratorGetNext", "PyFunc", "EagerPyFunc", "PrintV2", *conditions}


def test_the_condition_of_the_loop_is_the_number_of_steps_alone():
    config = small_runs.settings(stream="device")
    model = small_runs.build(config)
    with small_runs.stream(config) as source:
        function = model.train_call.get_concrete_function(source.given(0, 2), source.item, tf.constant(2))
    (loop,) = [operation for operation in function.graph.get_operations() if operation.type == "While"]
    condition = function.graph._get_function(loop.get_attr("cond").name).graph
    used = [
        operation.type for operation in condition.get_operations() if operation.type not in ("Placeholder", "Const")
    ]
    assert [kind for kind in used if kind != "Identity"] == ["Less"]


# How many steps ------------------------------------------------------------------------------------------------


def test_the_length_of_a_call_follows_the_clock_and_leaves_out_the_call_that_compiles():
    length = CallLength(None)
    assert length.steps == 1
    found = []
    for seconds in (30.0, 0.01, 0.08, 0.64 / 8, 5.0, 100.0):
        length.took(length.steps, seconds)
        found.append(length.steps)
    assert found == [1, 8, 50, 312, 31, 1]
    assert LONGEST_CALL == 0.5


def test_a_length_that_was_asked_for_stays():
    length = CallLength(7)
    for seconds in (1.0, 100.0, 1e-3):
        length.took(7, seconds)
        assert length.steps == 7


@pytest.mark.parametrize("window", [(4, 24, 4), (0, 0, 1), (3, 3, 1), (0, 28, 7)])
def test_the_next_mask_update_is_the_first_after_a_step(window):
    made = PruningWindow(*window)
    for step in range(40):
        later = [after for after in range(step + 1, 60) if made.updates_after(after)]
        assert made.next_update(step) == (later[0] if later else None)
