"""The chosen compute type, float32 weights under each type, and the loss scale step by step."""

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
import tf_keras as keras

from cnnopt.distributed import host
from cnnopt.model import precision
from cnnopt.model.precision import DynamicLossScale, choose, cpu_has_bfloat16
from cnnopt.optim.muon import Muon
from tests.helpers import small_runs

ZEN3 = "processor\t: 0\nmodel name\t: AMD EPYC 7763\nflags\t\t: fpu sse2 avx avx2 fma bmi2 sha_ni vaes\n"
ZEN4 = "processor\t: 0\nmodel name\t: AMD EPYC 9654\nflags\t\t: fpu avx2 avx512f avx512_bf16 avx512_vnni\nbugs\t: x\n"
SAPPHIRE_RAPIDS = (
    "processor\t: 0\nmodel name\t: Intel Xeon 8480+\nflags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile amx_int8\n"
)
AMX_ONLY = "flags\t\t: fpu amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
NAMED = "model name\t: avx512_bf16 imitation\nflags\t\t: fpu avx2 my_avx512_bf16x\n"


@pytest.mark.parametrize(
    ("cpuinfo", "has"),
    [(ZEN3, False), (ZEN4, True), (SAPPHIRE_RAPIDS, True), (AMX_ONLY, True), (ARM, False), (NAMED, False), ("", False)],
)
def test_bfloat16_is_read_from_the_flags(cpuinfo, has, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_has_bfloat16(host.cpu_flags()) is has


@pytest.mark.parametrize(
    ("asked", "cpuinfo", "has_gpu", "compute", "widen"),
    [
        ("auto", ZEN3, False, "float32", False),
        ("auto", ZEN4, False, "bfloat16", False),
        ("auto", SAPPHIRE_RAPIDS, False, "bfloat16", False),
        ("auto", ZEN3, True, "float16", False),
        ("auto", ZEN4, True, "float16", False),
        ("float32", ZEN3, False, "float32", False),
        ("float32", ZEN4, False, "float32", False),
        ("float32", ZEN4, True, "float32", False),
        ("bfloat16", ZEN3, False, "bfloat16", True),
        ("bfloat16", ZEN4, False, "bfloat16", False),
        ("bfloat16", ZEN3, True, "bfloat16", False),
        ("float16", ZEN3, False, "float16", True),
        ("float16", SAPPHIRE_RAPIDS, False, "float16", True),
        ("float16", ZEN3, True, "float16", False),
    ],
)
def test_the_choice_for_the_hardware(asked, cpuinfo, has_gpu, compute, widen, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    chosen = choose(asked, has_gpu=has_gpu)
    assert (chosen.compute, chosen.widen) == (compute, widen)
    assert chosen.fuse == (compute == "bfloat16" and not widen and not has_gpu)
    assert chosen.scales_loss == (compute == "float16")
    assert chosen.reason


def test_a_machine_without_cpuinfo_computes_in_float32(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "none")
    assert choose("auto", has_gpu=False).compute == "float32"


@pytest.mark.parametrize(
    ("compute", "policy"), [("float32", "float32"), ("bfloat16", "mixed_bfloat16"), ("float16", "mixed_float16")]
)
def test_apply_sets_the_policy(compute, policy, float32_policy):
    precision.Precision(compute, widen=False, reason="").apply()
    assert keras.mixed_precision.global_policy().name == policy


# The loss scale ------------------------------------------------------------------------------------------------

T, F = True, False


@pytest.mark.parametrize(
    ("initial", "growth_steps", "finite", "scales", "finite_steps", "skipped"),
    [
        # Doubled after every third finite step in a row.
        (8, 3, [T, T, T, T, T, T, T], [8, 8, 16, 16, 16, 32, 32], [1, 2, 0, 1, 2, 0, 1], 0),
        # A step that is not finite halves it and starts the count again.
        (8, 3, [T, T, F, T, T, T, F, F], [8, 8, 4, 4, 4, 8, 4, 2], [1, 2, 0, 1, 2, 0, 0, 0], 3),
        # Never below 1, never above 2^24.
        (2, 9, [F, F, F, T], [1, 1, 1, 1], [0, 0, 0, 1], 3),
        (2.0**23, 1, [T, T, T, F], [2.0**24, 2.0**24, 2.0**24, 2.0**23], [0, 0, 0, 0], 1),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_the_loss_scale_step_by_step(initial, growth_steps, finite, scales, finite_steps, skipped, traced):
    scale = DynamicLossScale(True, initial=initial, growth_steps=growth_steps)
    update = tf.function(scale.update) if traced else scale.update
    seen = []
    for step in finite:
        update(tf.constant(step))
        seen.append((scale.value.numpy(), scale.finite_steps.numpy()))
    assert seen == list(zip(scales, finite_steps, strict=True))
    assert scale.skipped.numpy() == skipped


def test_the_loss_scale_starts_at_two_to_the_15_and_grows_after_1000_steps():
    scale = DynamicLossScale(True)
    assert scale.value.numpy() == 2.0**15
    scale.finite_steps.assign(998)
    scale.update(tf.constant(True))
    assert scale.value.numpy() == 2.0**15
    scale.update(tf.constant(True))
    assert scale.value.numpy() == 2.0**16


def test_a_disabled_loss_scale_is_one_for_ever():
    scale = DynamicLossScale(False)
    for finite in (True, False):
        scale.update(tf.constant(finite))
    assert [v.numpy() for v in scale.variables] == [1.0, 0, 0]


# Masters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compute", "half"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
def test_weights_are_float32_and_are_not_rounded(compute, half, float32_policy):
    config = small_runs.settings(precision=compute, sparsity=0.0)
    model = small_runs.build(config)
    assert {v.dtype for v in model.weights} == {tf.float32}
    assert {v.dtype for v in model.optimizer.variables[1:]} == {tf.float32}
    # Keras' LossScaleOptimizer around it would scale a second time, with a state that no checkpoint holds.
    assert type(model.optimizer) is Muon
    assert model.get_layer("stem").compute_dtype == compute
    assert model.get_layer("stage3_block1_conv2").compute_dtype == compute
    batch = small_runs.first_batch(config)
    before = {w.name: w.numpy() for w in model.weights}
    for _ in range(3):
        model.train_step(batch)
    for weight in model.weights:
        value = weight.numpy()
        if weight.name in ("mean:0", "std:0"):
            np.testing.assert_array_equal(value, before[weight.name])
            continue
        assert np.any(value != before[weight.name]), weight.name
        # Of float32 numbers 1 in 2^13 or fewer is a half-precision number by chance.
        assert np.mean(value == value.astype(half).astype(np.float32)) < 0.1, weight.name


def test_updates_too_small_for_a_half_type_are_not_lost(float32_policy):
    config = small_runs.settings(precision="bfloat16", sparsity=0.0, base_lr=1e-4, weight_decay=0.0, warmup="0s")
    model = small_runs.build(config)
    kernel = model.get_layer("stem").kernel
    before = kernel.numpy()
    model.train_step(small_runs.first_batch(config))
    change = np.abs(kernel.numpy() - before)
    assert change.max() > 0
    assert np.median(change) < np.median(np.abs(before)) / 2**8  # half a unit in bfloat16's last place
