"""Exact masks, schedules that reach the final sparsity, and zeros that stay zero."""

from fractions import Fraction

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnnopt.model.flat import View
from cnnopt.model.pruning import Pruner, PruningError, magnitude_mask, num_pruned, prunable_kernels
from cnnopt.schedules import PruningWindow
from cnnopt.training.callbacks import Prune
from tests.helpers import small_runs

SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=6)
# Few distinct values, so that there are many ties and zeros of both signs.
WEIGHTS = st.one_of(
    st.floats(-10, 10, width=32),
    st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0]),
)
KERNELS = st.lists(hnp.arrays(np.float32, SHAPES, elements=WEIGHTS), min_size=1, max_size=4)
SPARSITIES = st.one_of(st.sampled_from([0.0, 0.5, 0.6, 0.7, 0.9, 0.999]), st.floats(0, 0.9999))


def magnitude_masks(kernels: list[np.ndarray], sparsity: float, scope: str) -> list[np.ndarray]:
    sizes = [kernel.size for kernel in kernels]
    parts = [sum(sizes)] if scope == "global" else sizes
    flat = tf.constant(np.concatenate([kernel.ravel() for kernel in kernels]))
    mask = magnitude_mask(flat, parts, [num_pruned(size, sparsity) for size in parts]).numpy()
    split = np.split(mask, np.cumsum(sizes)[:-1])
    return [part.reshape(kernel.shape) for part, kernel in zip(split, kernels, strict=True)]


def normal_kernels(*shapes: tuple[int, ...]) -> list[View]:
    """Views of one vector, in which other weights come before, between and after them."""
    rng = np.random.default_rng(0)
    offsets = np.cumsum([3, *(int(np.prod(shape)) + 2 for shape in shapes)])
    vector = tf.Variable(rng.standard_normal(offsets[-1]).astype(np.float32))
    return [
        View(vector, int(offset), tf.TensorShape(shape), f"layer{i}/kernel:0")
        for i, (offset, shape) in enumerate(zip(offsets, shapes, strict=False))
    ]


def pruner(kernels, schedule="polynomial", final=0.6, initial=0.0, window=(4, 24, 4), scope="uniform") -> Pruner:
    masks = tf.Variable(tf.ones_like(kernels[0].vector))
    return Pruner(kernels, masks, schedule=schedule, final_sparsity=final, initial_sparsity=initial,
                  window=PruningWindow(*window), scope=scope)  # fmt: skip


# Masks ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10**6), st.sampled_from(["0", "1/2", "3/5", "7/10", "9/10", "19/20", "1/3"]))
def test_the_number_pruned_is_the_exact_share_rounded(size, sparsity):
    exact = size * Fraction(sparsity)
    assert abs(num_pruned(size, float(Fraction(sparsity))) - exact) <= Fraction(1, 2)


@settings(max_examples=200, deadline=None)
@given(KERNELS, SPARSITIES)
def test_uniform_masks_prune_the_smallest_of_each_kernel_exactly(kernels, sparsity):
    masks = magnitude_masks(kernels, sparsity, "uniform")
    for kernel, mask in zip(kernels, masks, strict=True):
        assert mask.dtype == bool
        assert mask.shape == kernel.shape
        assert np.sum(~mask) == num_pruned(kernel.size, sparsity)
        check_order(np.abs(kernel.ravel()), mask.ravel())


@settings(max_examples=200, deadline=None)
@given(KERNELS, SPARSITIES)
def test_global_masks_prune_the_smallest_of_all_exactly(kernels, sparsity):
    masks = magnitude_masks(kernels, sparsity, "global")
    assert [mask.shape for mask in masks] == [kernel.shape for kernel in kernels]
    size = sum(kernel.size for kernel in kernels)
    assert sum(int(np.sum(~mask)) for mask in masks) == num_pruned(size, sparsity)
    check_order(*(np.concatenate([part.ravel() for part in parts]) for parts in (map(np.abs, kernels), masks)))


def check_order(magnitudes: np.ndarray, mask: np.ndarray) -> None:
    """No kept weight is smaller than a pruned one, and of equal ones the first are pruned."""
    pruned = np.flatnonzero(~mask)
    if len(pruned) and mask.any():
        threshold = magnitudes[pruned].max()
        assert threshold <= magnitudes[mask].min()
        tied = np.flatnonzero(magnitudes == threshold)
        np.testing.assert_array_equal(mask[tied], np.sort(mask[tied]))


def test_ties_fall_to_the_lower_index_and_all_zero_weights_are_counted_too():
    equal = np.array([1, -1, 1, -1, 1], np.float32)
    np.testing.assert_array_equal(magnitude_masks([equal], 0.4, "uniform")[0], [False, False, True, True, True])
    zeros = np.zeros((2, 5), np.float32)
    np.testing.assert_array_equal(magnitude_masks([zeros], 0.3, "uniform")[0].ravel(), [False] * 3 + [True] * 7)
    np.testing.assert_array_equal(
        np.concatenate(magnitude_masks([equal, equal], 0.6, "global")), [False] * 6 + [True] * 4
    )


def test_global_ranking_leaves_large_weights_where_uniform_does_not():
    kernels = [np.full(10, 5, np.float32), np.arange(10, dtype=np.float32) / 10]
    assert [int(mask.sum()) for mask in magnitude_masks(kernels, 0.5, "global")] == [10, 0]
    assert [int(mask.sum()) for mask in magnitude_masks(kernels, 0.5, "uniform")] == [5, 5]


def test_an_update_changes_only_the_weights_that_it_prunes():
    kernels = normal_kernels((20, 50), (7,), (3, 3))
    vector, before = kernels[0].vector, kernels[0].vector.numpy()
    pruning = pruner(kernels, scope="global")
    pruning.update(24)
    masks = pruning.masks[0].vector.numpy()
    np.testing.assert_array_equal(vector, np.where(masks == 1, before, 0))
    assert np.sum(masks == 0) == num_pruned(1016, 0.6)
    assert np.sum(masks == 1) == len(before) - num_pruned(1016, 0.6)


# Schedules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.6), (0.5, 0.7), (0.5, 0.9), (0.6, 0.6)])
def test_the_polynomial_is_tfmots_formula_at_each_update_and_holds_between(initial, final):
    pruning = pruner(normal_kernels((20, 50)), initial=initial, final=final, window=(4, 24, 4))
    for step in range(40):
        last_update = min(step, 24) // 4 * 4
        formula = final + (initial - final) * (1 - (last_update - 4) / 20) ** 3 if step >= 4 else 0.0
        assert pruning.target(step) == pytest.approx(formula, abs=1e-7), step
    theirs = tfmot.sparsity.keras.PolynomialDecay(initial, final, 4, 24, power=3, frequency=4)
    for step in range(4, 25, 4):
        assert pruning.target(step) == float(theirs(tf.constant(step, tf.int64))[1])


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("final", [0.6, 0.7, 1 / 3, 0.95])
def test_the_ramp_ends_at_the_asked_sparsity_exactly(final, scope):
    kernels = normal_kernels((3, 3, 16, 16), (64, 10), (7,))
    pruning = pruner(kernels, final=final, scope=scope)
    zeros = []
    for step in range(30):
        assert pruning.due(step) == (step in (4, 8, 12, 16, 20, 24))
        if pruning.due(step):
            pruning.update(step)
            zeros.append(sum(int(np.sum(kernel.numpy() == 0)) for kernel in kernels))
    assert zeros == sorted(zeros)
    if scope == "uniform":
        assert [int(np.sum(k.numpy() == 0)) for k in kernels] == [num_pruned(n, final) for n in (2304, 640, 7)]
    assert abs(zeros[-1] - num_pruned(2951, final)) <= (1.5 if scope == "uniform" else 0)
    for kernel, mask in zip(kernels, pruning.masks, strict=True):
        np.testing.assert_array_equal(mask.numpy(), (kernel.numpy() != 0).astype(np.float32))
    pruning.verify_final()


def test_the_end_is_the_asked_sparsity_to_the_last_digit_though_the_schedule_is_float32():
    kernels = normal_kernels((5,))
    pruning = pruner(kernels, final=0.9, window=(0, 8, 4))
    pruning.update(8)
    # As a float32 number 0.9 is a little less, and keeps a weight more.
    assert num_pruned(5, 0.9) == 5
    assert num_pruned(5, pruning.target(8)) == 4
    assert not np.any(kernels[0].numpy())


def test_constant_sparsity_is_there_from_its_first_update():
    pruning = pruner(normal_kernels((100,)), schedule="constant", final=0.25, window=(3, 9, 3))
    assert [pruning.target(step) for step in (0, 2, 3, 5, 9, 20)] == [0, 0, 0.25, 0.25, 0.25, 0.25]
    pruning.update(3)
    assert pruning.sparsities() == {"layer0": 0.25, "total": 0.25}


@pytest.mark.parametrize("schedule", ["constant", "polynomial"])
@pytest.mark.parametrize("window", [(0, 0, 1), (7, 7, 1)])
def test_a_window_of_one_update_prunes_at_once(schedule, window):
    kernels = normal_kernels((50, 2))
    pruning = pruner(kernels, schedule=schedule, window=window)
    assert [step for step in range(20) if pruning.due(step)] == [window[0]]
    pruning.update(window[0])
    assert pruning.target(window[0]) == pytest.approx(0.6)
    pruning.verify_final()


@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
@pytest.mark.parametrize("window", [(4, 24, 4), (0, 0, 1), (3, 3, 1), (0, 30, 7), (10, 30, 20)])
def test_the_mean_target_is_that_of_every_step(schedule, window):
    made = pruner(normal_kernels((2, 3)), schedule=schedule, window=window)
    each = [made.target(step) for step in range(30)]
    assert made.mean_target(30) == pytest.approx(np.mean(each), abs=1e-6)


def test_without_a_schedule_nothing_is_due_and_zeros_are_no_error():
    kernels = normal_kernels((10, 10))
    pruning = pruner(kernels, schedule="none", final=0.0)
    assert not any(pruning.due(step) for step in range(50))
    assert pruning.target(24) == 0.0
    kernels[0].assign(1e-30 * kernels[0])
    kernels[0].assign(1e-30 * kernels[0])
    assert pruning.sparsities()["total"] == 1.0
    pruning.verify_final()


# Measured sparsity ---------------------------------------------------------------------------------------------


def test_sparsities_are_the_zeros_in_the_weights_not_in_the_masks():
    kernels = normal_kernels((10, 10), (50,))
    pruning = pruner(kernels)
    pruning.update(24)
    assert pruning.sparsities() == {"layer0": 0.6, "layer1": 0.6, "total": 0.6}
    values = kernels[1].numpy()
    values[values == 0] = 1e-30
    kernels[1].assign(values)
    assert pruning.sparsities() == {"layer0": 0.6, "layer1": 0.0, "total": 0.4}


@pytest.mark.parametrize(("wrong", "accepted"), [(0, True), (1, True), (-1, True), (2, False), (-2, False)])
def test_two_pruned_weights_more_or_fewer_in_one_kernel_fail_the_run(wrong, accepted):
    kernels = normal_kernels((100, 10), (40,))
    pruning = pruner(kernels)
    pruning.update(24)
    mask, values = pruning.masks[0].numpy().ravel(), kernels[0].numpy().ravel()
    chosen = np.flatnonzero(mask == (wrong > 0))[: abs(wrong)]
    mask[chosen], values[chosen] = wrong < 0, 0
    pruning.masks[0].assign(mask.reshape(100, 10))
    kernels[0].assign(values.reshape(100, 10))
    if accepted:
        pruning.verify_final()
    else:
        with pytest.raises(PruningError, match=rf"^layer0/kernel:0: {600 + wrong} of 1000 weights are pruned; .* 600$"):
            pruning.verify_final()


def test_a_pruned_weight_that_is_not_zero_fails_the_run():
    kernels = normal_kernels((100, 10), (40,))
    pruning = pruner(kernels)
    pruning.update(24)
    values = kernels[0].numpy().ravel()
    values[np.flatnonzero(values == 0)[:1]] = 1e-38
    kernels[0].assign(values.reshape(100, 10))
    with pytest.raises(PruningError, match=r"^layer0/kernel:0: 1 pruned weights are not zero$"):
        pruning.verify_final()


def test_kept_weights_may_become_zero():
    # Weight decay shrinks a weight without gradient until float32 has nothing smaller.
    kernels = normal_kernels((100, 10), (40,))
    pruning = pruner(kernels)
    pruning.update(24)
    kernels[0].assign(tf.zeros((100, 10)))
    pruning.verify_final()
    assert pruning.sparsities()["layer0"] == 1


def test_the_global_scope_is_verified_in_all():
    kernels = normal_kernels((100, 10), (40,))
    pruning = pruner(kernels, scope="global")
    pruning.update(24)
    pruning.verify_final()
    pruning.masks[0].assign(tf.zeros((100, 10)))
    kernels[0].assign(tf.zeros((100, 10)))
    with pytest.raises(PruningError, match=r"^all kernels: 10\d\d of 1040 weights are pruned; .* 624$"):
        pruning.verify_final()


# In a network --------------------------------------------------------------------------------------------------


def test_the_kernels_taken_are_those_tfmot_takes(float32_policy):
    model = small_runs.build(small_runs.settings())
    kernels = prunable_kernels(model)
    assert len(kernels) == 8  # the stem, six convolutions, the classifier
    plain = keras.Sequential(
        [keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(),
         keras.layers.Flatten(), keras.layers.Dense(2)]
    )  # fmt: skip
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(plain)
    theirs = [v.name for layer in wrapped.layers for v, _, _ in getattr(layer, "pruning_vars", [])]
    assert [kernel.name for kernel in prunable_kernels(plain)] == theirs


class ZerosStay(keras.callbacks.Callback):
    """Counts, after every step, weights and averaged weights that are not zero where the mask is."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong, self.averages_wrong, self.pruned_with_momentum, self.totals = 0, 0, 0, []

    def on_train_batch_end(self, batch, logs=None):
        model = self.model
        state = small_runs.state(model)
        for kernel, mask in zip(model.pruner.kernels, model.pruner.masks, strict=True):
            off = mask.numpy() == 0
            self.wrong += int(np.sum(kernel.numpy()[off] != 0))
            average = next(value for name, value in state.items() if name.endswith(f"ema/{kernel.name}:0"))
            self.averages_wrong += int(np.sum(average[off] != 0))
            moving = next(value for name, value in state.items() if name.endswith(f"/m/{kernel.name}"))
            self.pruned_with_momentum += int(np.sum(moving[off] != 0))
        self.totals.append(model.pruner.sparsities()["total"])


@pytest.mark.parametrize(
    ("compute", "optimizer", "scope"),
    [
        ("float32", "sgd", "global"),
        ("bfloat16", "sgd", "uniform"),
        ("float16", "adam", "uniform"),
        ("bfloat16", "muon", "global"),
    ],
)
def test_pruned_weights_stay_zero_under_momentum_and_the_end_is_exact(compute, optimizer, scope, float32_policy):
    config = small_runs.settings(precision=compute, optimizer=optimizer, sparsity_scope=scope, ema=0.5, epochs=3)
    model, zeros = small_runs.build(config), ZerosStay()
    small_runs.fit(model, config, [Prune(), zeros])
    assert zeros.wrong == 0
    assert zeros.averages_wrong == 0
    # Not because nothing would have moved them: the optimizer still carries them along.
    assert zeros.pruned_with_momentum > 1000
    targets = [model.pruner.target(step) for step in range(1, 25)]
    assert zeros.totals == pytest.approx(targets, abs=2e-4)
    assert targets[3] == 0.0
    assert targets[-1] == pytest.approx(0.6)
    sizes = [int(np.prod(kernel.shape)) for kernel in model.pruner.kernels]
    found = [int(np.sum(kernel.numpy() == 0)) for kernel in model.pruner.kernels]
    if scope == "uniform":
        assert found == [num_pruned(size, 0.6) for size in sizes]
    else:
        assert sum(found) == num_pruned(sum(sizes), 0.6)
    model.pruner.verify_final()
    if compute == "float16":
        assert model.loss_scale.value.numpy() > 1


# Why masks live outside the layers here: tensorflow/model-optimization issue 409, open since 2020.


def fit_with_prune_low_magnitude(classifier_type: str | None) -> keras.Model:
    """One step at a learning rate of 0, so that only the pruning can change a weight."""
    keras.utils.set_random_seed(0)
    keras.mixed_precision.set_global_policy("mixed_float16")
    classifier = keras.layers.Dense(2, dtype=classifier_type)
    plain = keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.Flatten(),
                              classifier])  # fmt: skip
    schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, begin_step=0, frequency=1)
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(plain, pruning_schedule=schedule)
    wrapped.compile(keras.optimizers.SGD(0.0), "mse")
    pruning_step = tfmot.sparsity.keras.UpdatePruningStep()
    wrapped.fit(tf.ones((4, 8, 8, 3)), tf.ones((4, 2)), verbose=0, callbacks=[pruning_step])
    return wrapped


def test_prune_low_magnitude_fails_under_mixed_float16_with_a_float32_classifier(float32_policy):
    with pytest.raises(TypeError, match="Input 'y' of 'Mul' Op has type float16 that does not match type float32"):
        fit_with_prune_low_magnitude("float32")


def test_prune_low_magnitude_rounds_the_float32_weights_where_it_runs(float32_policy):
    kernel = fit_with_prune_low_magnitude(None).layers[0].trainable_weights[0]
    kept = kernel.numpy()[kernel.numpy() != 0]
    assert kernel.dtype == tf.float32
    assert len(kept) == kernel.shape.num_elements() // 2
    np.testing.assert_array_equal(kept, kept.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_ours_rounds_no_weight_and_takes_a_float32_classifier(compute, float32_policy):
    model = small_runs.build(small_runs.settings(precision=compute, sparsity_scope="uniform"))
    before = [kernel.numpy() for kernel in model.pruner.kernels]
    assert model.get_layer("classifier").compute_dtype == "float32"
    assert model.get_layer("stem").compute_dtype == compute
    model.prune(16)
    for kernel, value in zip(model.pruner.kernels, before, strict=True):
        kept = kernel.numpy() != 0
        assert np.sum(~kept) == num_pruned(kept.size, 0.6)
        np.testing.assert_array_equal(kernel.numpy()[kept], value[kept])
