"""The exchange of buckets in one process, and the size of the step's graph."""

import numpy as np
import pytest
import tensorflow as tf

from cnnopt.config import TrainConfig
from cnnopt.training.buckets import Choice, Exchange, choose
from cnnopt.training.callbacks import Prune
from tests.helpers import small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")
AUTO = {"size": 100, "prunable": 80, "sparsity": 0.5, "ranks": 2, "wire": "float32", "deterministic": False}


def exchange(kind: str, mask: np.ndarray, wire: str = "float32") -> Exchange:
    """Of a bucket whose entries have a mask but for the last, and of one of two entries that are always kept."""
    made = Exchange([mask.size + 1, 2], tf.Variable(mask), ranks=1, choice=Choice(kind, ""), wire=wire,
                    clock=tf.timestamp)  # fmt: skip
    made.follow_masks()
    return made


@pytest.mark.parametrize(
    ("kind", "device", "puts_back"),
    [("dense", "CPU", "SelectV2"), ("sparse", "CPU", "SparseToDense"), ("sparse", "GPU", "TensorScatterUpdate")],
)
def test_what_is_pruned_comes_back_as_zero_and_the_rest_as_it_was(kind, device, puts_back, monkeypatch):
    # The operations that a GPU gets, on this CPU.
    monkeypatch.setattr("cnnopt.distributed.collectives.device", lambda: device)
    mask = np.float32([1, 0, 1, 0, 0, 1])
    gradient, other = tf.constant([1.5, 2, 3, 4, 5, 6, -9]), tf.constant([7.0, -8.0])
    step = tf.function(exchange(kind, mask), autograph=False)
    used = {operation.type for operation in step.get_concrete_function([gradient, other]).graph.get_operations()}
    assert used & {"SelectV2", "SparseToDense", "TensorScatterUpdate"} == {puts_back}
    found, finite = step([gradient, other])
    np.testing.assert_array_equal(found, [1.5, 0, 3, 0, 0, 6, -9, 7, -8])
    assert finite


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_only_what_is_kept_must_be_finite(kind, bad):
    mask = np.float32([1, 0])
    found, finite = exchange(kind, mask)([tf.constant([1.0, bad, 2.0]), tf.zeros([2])])
    assert finite
    np.testing.assert_array_equal(found, [1, 0, 2, 0, 0])
    assert not exchange(kind, mask)([tf.constant([bad, 1.0, 2.0]), tf.zeros([2])])[1]
    assert not exchange(kind, mask)([tf.zeros([3]), tf.constant([0.0, bad])])[1]


def test_a_value_beyond_the_type_of_the_wire_is_not_finite():
    value = tf.constant([70000.0, 0.0])
    assert exchange("dense", np.float32([1]))([value, tf.zeros([2])])[1]
    assert not exchange("dense", np.float32([1]), wire="float16")([value, tf.zeros([2])])[1]


def test_masks_may_change_both_ways_without_a_new_trace():
    mask = np.ones(6, np.float32)
    made = exchange("sparse", mask)
    step = tf.function(lambda: made([tf.range(1.0, 8.0), tf.constant([8.0, 9.0])])[0])
    for zeros in ([], [0], [0, 3, 4], [1], [0, 1, 2, 3, 4, 5]):
        kept = np.ones(6, np.float32)
        kept[zeros] = 0
        made.masks.assign(kept)
        made.follow_masks()
        np.testing.assert_array_equal(step(), [*(kept * np.arange(1, 7)), 7, 8, 9])
    assert step.experimental_get_tracing_count() == 1


@pytest.mark.parametrize(
    ("asked", "changes", "kind", "reason"),
    [
        ("sparse", {"ranks": 1}, "sparse", "as asked"),
        ("dense", {}, "dense", "as asked"),
        ("auto", {"ranks": 1}, "dense", "one rank"),
        ("auto", {"sparsity": 0.0}, "dense", "nothing is pruned"),
        ("auto", {"deterministic": True}, "dense", "--deterministic measures nothing"),
    ],
)
def test_what_needs_no_measurement_is_chosen_without_one(asked, changes, kind, reason):
    assert choose(asked, **{**AUTO, **changes}) == Choice(kind, reason)


@pytest.mark.parametrize(("sparse_seconds", "kind"), [(0.89, "sparse"), (0.91, "dense"), (1.5, "dense")])
def test_what_is_clearly_faster_is_chosen(sparse_seconds, kind, monkeypatch):
    asked = {}
    # The clock is made up; tests/parallel/test_exchange.py measures.
    monkeypatch.setattr(
        "cnnopt.training.buckets.measure", lambda size, **given: asked.update(given, size=size) or (1, sparse_seconds)
    )
    chosen = choose("auto", **AUTO)
    assert chosen.kind == kind
    assert chosen.reason == f"measured {1e3 * sparse_seconds:.1f} ms for what is kept on average, 1000.0 ms for all"
    assert asked == {"size": 100, "kept": 60, "ranks": 2, "wire": "float32"}


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_a_run_is_the_same_with_either_exchange(optimizer):
    states = []
    for kind in ("dense", "sparse"):
        config = small_runs.settings(exchange=kind, optimizer=optimizer)
        model = small_runs.build(config)
        small_runs.fit(model, config, [Prune()])
        assert model.train_call.experimental_get_tracing_count() == 1
        states.append(small_runs.state(model))
    for name, value in states[0].items():
        assert value.tobytes() == states[1][name].tobytes(), name


def operations(config: TrainConfig) -> int:
    """In the graph of a step and the functions that it calls."""
    model = small_runs.build(config)
    with small_runs.stream(config) as batches:
        graph = model.train_call.get_concrete_function(batches.given(0, 1), batches.item, None).graph.as_graph_def()
    return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)


def added(depth: int, without: dict[str, str], having: dict[str, str]) -> int:
    """How many more operations a step has with the settings ``having`` than with ``without``."""
    return operations(small_runs.settings(depth=depth, **having)) - operations(
        small_runs.settings(depth=depth, **without)
    )


# Each operation costs microseconds. How many one layer takes is TensorFlow's affair; that these take none is ours.
def test_sending_what_is_kept_adds_no_operations_for_a_layer():
    ways = [{"optimizer": "sgd", "exchange": kind} for kind in ("dense", "sparse")]
    assert added(14, *ways) == added(8, *ways)


def test_muon_adds_operations_for_a_shape_of_kernel_and_none_for_a_kernel():
    # The convolutions of both networks have six shapes.
    ways = [{"optimizer": name} for name in ("sgd", "muon")]
    assert added(14, *ways) <= added(8, *ways)
