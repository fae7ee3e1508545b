"""The step that XLA has compiled is the plain one: weights to the last bits, masks and counters exactly."""

import dataclasses
import re

import numpy as np
import pytest
import tf_keras as keras

from cnnopt.distributed.world import World
from cnnopt.export import qat
from cnnopt.model import precision
from cnnopt.training import loop
from cnnopt.training.build import build_model
from cnnopt.training.callbacks import Prune
from cnnopt.training.xla import Compiler
from tests.helpers import small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")


def compiled(**changes):
    """A model that XLA compiles, its configuration, and the lines that it says."""
    said: list[str] = []
    config = small_runs.settings(batch_size=64, epochs=1, prune_begin="0s", prune_end="0s", warmup="0s", **changes)
    return small_runs.build(config, Compiler(True, said.append)), config, said


@pytest.mark.parametrize(
    ("optimizer", "exchange", "compute", "tolerance"),
    [("muon", "dense", "float32", 0.01), ("sgd", "sparse", "float32", 0.01), ("adam", "dense", "float16", 0.2)],
)
def test_a_compiled_run_is_the_plain_one_and_is_traced_once(optimizer, exchange, compute, tolerance):
    """Four steps, in calls of three, whose batches the device cuts: against single steps whose batches numpy cuts."""
    changes = {"optimizer": optimizer, "exchange": exchange, "precision": compute, "sparsity_schedule": "constant",
               "ema": 0.9, "base_lr": 1e-3 if optimizer == "adam" else 0.05}  # fmt: skip
    model, config, said = compiled(stream="device", steps_per_call="3", **changes)
    plain, epochs = small_runs.build(config), []
    initial = small_runs.state(plain)

    class Epochs(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            epochs.append(logs["loss"])

    for each, how in ((model, config), (plain, dataclasses.replace(config, stream="host", steps_per_call="1"))):
        small_runs.fit(each, how, [Prune(), Epochs()])
        each.pruner.verify_final()
    assert model.train_call.experimental_get_tracing_count() == 1
    assert epochs[0] == pytest.approx(epochs[1], rel=tolerance)
    found, expected = small_runs.state(model), small_runs.state(plain)
    for name, value in expected.items():
        if name.startswith(("masks/", "loss_scale/", "global_step")) or "iteration" in name:
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        if name.startswith("weights/") and "kernel" in name:
            np.testing.assert_array_equal(found[name] == 0, value == 0, err_msg=name)
        # Against what four steps have changed.
        change = np.abs(value - initial[name]).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=tolerance * change, err_msg=name)
    assert [re.sub(r"\d", "", line) for line in said] == ["XLA compiled the step in . s"]

    # 75 images: the last block of 32 has 11. XLA compiles for one shape.
    images, labels = small_runs.IMAGES.test_images, small_runs.IMAGES.test_labels
    found, expected = (loop.evaluate(each, images, labels, World(), batch_size=32) for each in (model, plain))
    assert found["count"] == expected["count"] == 75
    assert found["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert said[1].startswith("XLA compiled the evaluation in ")
    assert len(said) == 2


def test_a_compiled_step_that_overflows_is_skipped():
    model, config, _ = compiled(precision="float16", optimizer="adam", ema=0.9)
    batch = small_runs.first_batch(config)
    assert bool(model.train_step(batch)["finite"])
    model.loss_scale.value.assign(2.0**24)
    before, sums = small_runs.state(model), model.run.sums.numpy()
    assert not bool(model.train_step(batch)["finite"])
    np.testing.assert_array_equal(model.run.sums, sums)
    counters = {"loss_scale/000/loss_scale:0": 2.0**23, "loss_scale/001/finite_steps:0": 0,
                "loss_scale/002/skipped_steps:0": 1, "global_step": 2}  # fmt: skip
    for name, value in small_runs.state(model).items():
        np.testing.assert_array_equal(value, counters.get(name, before[name]), err_msg=name)


def test_fine_tuning_for_int8_is_compiled_too():
    losses = []
    for compiler in (Compiler(True), None):
        config = small_runs.settings(sparsity=0.0)
        compute, timeline = precision.choose("float32", has_gpu=False), small_runs.timeline_of(config)
        model = build_model(
            config, small_runs.IMAGES, timeline, compute, ranks=1, parts=qat.parts(16), compiler=compiler
        )
        for layer in ("stem", "classifier"):
            model.get_layer(layer).centroids.assign(np.linspace(-1, 1, 15, dtype=np.float32))
        losses.append(float(model.train_step(small_runs.first_batch(config))["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_a_compiled_step_is_two_operations_and_the_exchange_whatever_the_depth():
    found = []
    for depth in (8, 14):
        model, config, _ = compiled(depth=depth)
        with small_runs.stream(config) as batches:
            graph = model.train_call.get_concrete_function(batches.given(0, 1), batches.item, None).graph
        found.append([operation.type for operation in graph.get_operations()])
    assert found[0] == found[1]
    working = [kind for kind in found[0] if kind not in ("Placeholder", "Const", "Identity", "NoOp")]
    assert working.count("StatefulPartitionedCall") == 2
    # All gradients are ready at once, so they are sent as one.
    assert len(model.exchange.sizes) == 1
    assert len(working) < 20
