"""The step: its arithmetic against numpy, skipped steps, exact evaluation, one trace."""

import math
import re

import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from cnnopt.distributed.world import World
from cnnopt.run import checkpoint
from cnnopt.training import loop
from cnnopt.training.callbacks import DivergedError, Prune, StopIfDiverged
from tests.helpers import small_runs

pytestmark = pytest.mark.usefixtures("float32_policy")


class Losses(keras.callbacks.Callback):
    """What each step reports."""

    def __init__(self):
        super().__init__()
        self.losses, self.epochs, self.batches = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(batch)
        self.losses.append(float(logs["loss"]))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append((epoch, logs["loss"], logs["accuracy"]))


# A whole small run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_a_run_learns_in_one_trace(compute):
    config = small_runs.settings(precision=compute)
    model, seen = small_runs.build(config), Losses()
    small_runs.fit(model, config, [StopIfDiverged(None), Prune(), seen])
    assert seen.batches == list(range(24))
    assert np.mean(seen.losses[-4:]) < 0.6 * np.mean(seen.losses[:4])
    assert [epoch for epoch, _, _ in seen.epochs] == [0, 1, 2]
    for i, (_, loss, _) in enumerate(seen.epochs):
        assert loss == pytest.approx(np.mean(seen.losses[8 * i : 8 * i + 8]), rel=1e-5)
    assert seen.epochs[-1][2] > 0.5
    assert int(model.run.global_step.numpy()) == 24
    assert model.train_call.experimental_get_tracing_count() == 1
    assert model.loss_scale.skipped.numpy() == 0
    assert model.pruner.sparsities()["total"] == pytest.approx(0.6, abs=2e-4)
    # A second fit, as after a resume in the same process, traces nothing anew.
    model.run.global_step.assign(22)
    small_runs.fit(model, config, [])
    assert int(model.run.global_step.numpy()) == 24
    assert model.train_call.experimental_get_tracing_count() == 1


def test_fit_stops_after_the_step_that_asks_for_it_and_calls_no_epoch_end():
    config = small_runs.settings(sparsity=0.0, epochs=2)

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 10

    model, seen = small_runs.build(config), Losses()
    small_runs.fit(model, config, [Stop(), seen])
    assert int(model.run.global_step.numpy()) == 11
    assert [epoch for epoch, _, _ in seen.epochs] == [0]
    small_runs.fit(model, config, [seen])
    assert seen.batches == list(range(16))
    assert [epoch for epoch, _, _ in seen.epochs] == [0, 1]


# Arithmetic ----------------------------------------------------------------------------------------------------


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("optimizer", "smoothing"), [("sgd", 0.0), ("sgd", 0.2), ("adam", 0.1)])
def test_one_step_is_the_formula(optimizer, smoothing):
    decay = 0.3
    config = small_runs.settings(
        optimizer=optimizer, label_smoothing=smoothing, weight_decay=decay, warmup="0s", sparsity=0.0, base_lr=0.08
    )
    model = small_runs.build(config)
    images, labels = small_runs.first_batch(config)
    classifier = model.get_layer("classifier")
    pooled = keras.Model(model.input, model.get_layer("pool").output)
    features = pooled(images, training=True).numpy().astype(np.float64)
    kernel, bias = (w.numpy().astype(np.float64) for w in classifier.weights)

    logits = features @ kernel + bias
    targets = np.eye(10)[labels.numpy()] * (1 - smoothing) + smoothing / 10
    loss = -np.mean(np.sum(targets * np.log(softmax(logits)), axis=1))
    error = (softmax(logits) - targets) / len(logits)
    gradients = [features.T @ error + decay * kernel, error.sum(axis=0)]  # no decay of the bias

    logs = model.train_step((images, labels))
    assert float(logs["loss"]) == pytest.approx(loss, rel=1e-5)
    assert bool(logs["finite"])
    assert model.end_epoch()["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels.numpy()))
    rate = 0.08 * (32 / 128 if optimizer == "sgd" else math.sqrt(32 / 128))
    for weight, before, gradient in zip(classifier.weights, (kernel, bias), gradients, strict=True):
        # Nesterov momentum's first step is 1.9 times the gradient; Adam's is its sign, but for epsilon.
        epsilon = 1e-7 / np.sqrt(1 - 0.999)
        change = 1.9 * gradient if optimizer == "sgd" else gradient / (np.abs(gradient) + epsilon)
        np.testing.assert_allclose(weight.numpy(), before - rate * change, rtol=1e-4, atol=1e-5)


def test_weight_decay_is_on_kernels_alone():
    batch = small_runs.first_batch(small_runs.settings())
    changes = {"optimizer": "sgd", "sparsity": 0.0, "warmup": "0s"}
    models = [small_runs.build(small_runs.settings(weight_decay=d, **changes)) for d in (0.0, 0.5)]
    before = [w.numpy() for w in models[0].trainable_weights]
    for model in models:
        model.train_step(batch)
    rate = 0.2 * 32 / 128
    for start, plain, decayed in zip(before, *(m.trainable_weights for m in models), strict=True):
        expected = 1.9 * rate * 0.5 * start if "kernel" in plain.name else np.zeros_like(start)
        np.testing.assert_allclose(plain.numpy() - decayed.numpy(), expected, atol=1e-6, err_msg=plain.name)


def test_each_step_takes_its_own_rate():
    config = small_runs.settings(warmup="4s", lr_schedule="step", lr_drops="6s:0.5", sparsity=0.0, epochs=1)
    model = small_runs.build(config)
    batch, rates = small_runs.first_batch(config), []
    for _ in range(8):
        model.train_step(batch)
        rates.append(float(model.optimizer.learning_rate.numpy()))
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.05, 0.05], rel=1e-6)


def test_the_average_of_the_weights_is_the_formula():
    config = small_runs.settings(ema=0.9, sparsity=0.0)
    model = small_runs.build(config)
    batch = small_runs.first_batch(config)
    expected = [w.numpy().astype(np.float64) for w in model.weights]
    for step in range(4):
        model.train_step(batch)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = [decay * e + (1 - decay) * w.numpy() for e, w in zip(expected, model.weights, strict=True)]
    averages = [value for name, value in small_runs.state(model).items() if name.startswith("ema/")]
    for average, value in zip(averages, expected, strict=True):
        np.testing.assert_allclose(average, value, rtol=1e-5, atol=1e-6)


# Overflow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "optimizer"), [("backward", "sgd"), ("forward", "adam")])
def test_an_overflow_skips_the_update_and_halves_the_scale(where, optimizer):
    config = small_runs.settings(precision="float16", optimizer=optimizer, sparsity=0.0, ema=0.9)
    model = small_runs.build(config)
    batch = small_runs.first_batch(config)
    assert bool(model.train_step(batch)["finite"])
    model.loss_scale.value.assign(2.0**24 if where == "backward" else 4.0)
    if where == "forward":
        model.get_layer("stem").kernel.assign_add(tf.fill([3, 3, 3, 16], 1e6))
    before, sums = small_runs.state(model), model.run.sums.numpy()
    assert not bool(model.train_step(batch)["finite"])
    after = small_runs.state(model)
    # The loss of a forward pass that has overflowed is no number.
    np.testing.assert_array_equal(model.run.sums, sums)
    assert any("moving_variance" in name for name in after)
    assert any(name.startswith("optimizer/") and np.any(value) for name, value in after.items())
    counters = {"loss_scale/000/loss_scale:0": 2.0**23 if where == "backward" else 2.0,
                "loss_scale/001/finite_steps:0": 0, "loss_scale/002/skipped_steps:0": 1, "global_step": 2}  # fmt: skip
    for name, value in after.items():
        assert np.all(np.isfinite(value)), name
        np.testing.assert_array_equal(value, counters.get(name, before[name]), err_msg=name)
    if where == "backward":
        model.loss_scale.value.assign(256.0)
        assert bool(model.train_step(batch)["finite"])
        assert np.any(small_runs.state(model)["weights/002/stem/kernel:0"] != after["weights/002/stem/kernel:0"])


def test_an_epoch_of_skipped_steps_has_no_loss():
    config = small_runs.settings(precision="float16", sparsity=0.0)
    model = small_runs.build(config)
    model.get_layer("classifier").bias.assign(tf.fill([10], np.nan))
    assert not bool(model.train_step(small_runs.first_batch(config))["finite"])
    assert all(map(math.isnan, model.end_epoch().values()))


@pytest.mark.parametrize("saved", [False, True])
def test_without_a_loss_scale_the_first_gradients_that_are_not_finite_end_the_run(saved, tmp_path):
    config = small_runs.settings(sparsity=0.0)
    model = small_runs.build(config)
    model.get_layer("classifier").bias.assign(tf.fill([10], np.nan))
    model.run.global_step.assign(4)
    logs = model.train_step(small_runs.first_batch(config))
    assert not bool(logs["finite"])
    watch = StopIfDiverged(tmp_path / "checkpoints")
    watch.set_model(model)
    last = "no checkpoint was saved before"
    if saved:
        last = f"the last checkpoint is {checkpoint.save(tmp_path / 'checkpoints', 3, {}, {})}"
    said = r"^step 5: the gradients are not finite; a lower learning rate \(--base-lr\) may help; "
    with pytest.raises(DivergedError, match=f"{said}{re.escape(last)}$"):
        watch.on_train_batch_end(4, logs)


# Evaluation ----------------------------------------------------------------------------------------------------


def accuracy_and_loss(model) -> tuple[float, float]:
    """Of all test images at once, in numpy."""
    images, labels = small_runs.IMAGES.test_images, small_runs.IMAGES.test_labels
    logits = model(tf.constant(images), training=False).numpy().astype(np.float64)
    log_likelihood = np.log(softmax(logits))[np.arange(len(labels)), labels]
    return np.sum(logits.argmax(axis=1) == labels) / len(labels), -np.mean(log_likelihood)


def test_evaluation_counts_every_image_once_with_the_average_where_there_is_one():
    config = small_runs.settings(ema=0.99, sparsity=0.0)
    model = small_runs.build(config)
    batch = small_runs.first_batch(config)
    for _ in range(3):
        model.train_step(batch)
    images, labels = small_runs.IMAGES.test_images, small_runs.IMAGES.test_labels
    weights = model.get_weights()
    averages = [value for name, value in small_runs.state(model).items() if name.startswith("ema/")]
    plain = accuracy_and_loss(model)
    model.set_weights(averages)
    averaged = accuracy_and_loss(model)
    assert plain[1] != averaged[1]
    model.set_weights(weights)

    for batch_size in (200, 75, 20, 1):
        found = loop.evaluate(model, images, labels, World(), batch_size=batch_size)
        assert found["count"] == len(images) == 75
        assert found["accuracy"] == averaged[0]
        assert found["loss"] == pytest.approx(averaged[1], rel=1e-5)
        for weight, value in zip(model.weights, weights, strict=True):
            np.testing.assert_array_equal(weight.numpy(), value)
    model.run.averaged.clear()
    found = loop.evaluate(model, images, labels, World(), batch_size=20)
    assert (found["accuracy"], found["loss"]) == (plain[0], pytest.approx(plain[1], rel=1e-5))


# What is built ------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights():
    one, two, other = (small_runs.build(small_runs.settings(seed=seed)) for seed in (3, 3, 4))
    for first, second, third in zip(one.weights, two.weights, other.weights, strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
        if "kernel" in first.name:
            assert np.all(np.std(first.numpy() - third.numpy()) > 0.01)
