"""The exchange between ranks: its bytes and collectives, one trace, and sparse equal to dense bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

pytestmark = pytest.mark.timeout(900)
WORKER = str(Path(__file__).with_name("exchange_worker.py"))
VARIANTS = ["dense/float32/muon", "sparse/float32/muon", "sparse/float16/muon",
            "dense/bfloat16/muon", "sparse/bfloat16/muon",
            "dense/float32/sgd", "sparse/float32/sgd"]  # fmt: skip


OTHERWISE = ["sparse/float32/sgd/several", "sparse/float32/sgd/compiled"]


@pytest.fixture(scope="module")
def ranks(start, tmp_path_factory) -> tuple[list[dict], list[dict[str, np.ndarray]]]:
    """What each of two ranks has counted, and the state that it ended with, of every variant."""
    dest = tmp_path_factory.mktemp("exchange")
    job = start(2, WORKER, str(dest), *VARIANTS, *OTHERWISE)
    assert job.wait() == 0, job.output()
    found = [json.loads((dest / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return found, [dict(np.load(dest / f"rank{rank}.npz")) for rank in (0, 1)]


def state(arrays: dict[str, np.ndarray], variant: str) -> dict[str, np.ndarray]:
    return {name.split(":", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{variant}:")}


@pytest.mark.parametrize("trained", ["float32/muon", "float32/sgd", "bfloat16/muon"])
def test_sparse_training_is_dense_training_bit_for_bit(ranks, trained):
    found, arrays = ranks
    dense, sparse = (f"{kind}/{trained}" for kind in ("dense", "sparse"))
    assert found[0][sparse]["losses"] == found[0][dense]["losses"]
    dense, sparse = state(arrays[0], dense), state(arrays[0], sparse)
    assert any(name.startswith("optimizer/") for name in dense)
    assert dense.keys() == sparse.keys()
    for name, value in dense.items():
        assert value.tobytes() == sparse[name].tobytes(), name


def test_calls_of_several_steps_on_resident_images_are_single_steps(ranks):
    found, arrays = ranks
    assert found[0]["sparse/float32/sgd/several"]["traces"] == 1
    for rank in arrays:
        single, several = state(rank, "sparse/float32/sgd"), state(rank, "sparse/float32/sgd/several")
        assert single.keys() == several.keys()
        for name, value in single.items():
            assert value.tobytes() == several[name].tobytes(), name


def test_compiled_steps_learn_what_plain_ones_do(ranks):
    plain, compiled = (ranks[0][0][f"sparse/float32/sgd/{how}"]["losses"] for how in ("several", "compiled"))
    np.testing.assert_allclose(compiled, plain, rtol=0.05)


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERWISE])
def test_ranks_hold_the_same_bits(ranks, variant):
    first, second = (state(arrays, variant) for arrays in ranks[1])
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_on_the_wire_are_those_of_what_is_kept(ranks, variant):
    for found in (rank[variant] for rank in ranks[0]):
        each = 4 if "float32" in variant else 2
        always = found["size"] - found["prunable"]
        kept = found["kept"] if variant.startswith("sparse") else [found["prunable"]] * 16
        # The masks change at steps 2, 4, 6, 8 and 10 of 16.
        assert len(set(found["kept"])) >= 5
        assert found["bytes"] == [each * (always + count) for count in kept]
        if variant.startswith("sparse/float32"):
            kernels = found["bytes"][-1] - 4 * always
            assert kernels == pytest.approx((1 - 0.9) * 4 * found["prunable"], rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_three_collectives_or_twice_as_many_of_bfloat16_and_is_traced_once(ranks, variant):
    for found in (rank[variant] for rank in ranks[0]):
        one, two = {"HorovodAllreduce": 3}, {"HorovodAlltoall": 3, "HorovodAllgather": 3}
        assert found["collectives"] == (two if "bfloat16" in variant else one)
        assert found["traces"] == 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_sent_waits_for_the_gradients_of_its_own_stage_alone(ranks, variant):
    # ResNet-8 has two kernels in a stage, and one before the first.
    waits = [2, 2, 2, 2, 3, 3] if "bfloat16" in variant else [2, 2, 3]
    assert all(rank[variant]["waits_for"] == waits for rank in ranks[0])


@pytest.mark.parametrize("wire", ["bfloat16", "float16"])
def test_a_wire_of_halves_learns_what_float32_does(ranks, wire):
    whole, half = (ranks[0][0][f"sparse/{name}/muon"]["losses"] for name in ("float32", wire))
    np.testing.assert_allclose(half, whole, rtol=0.02)
    assert half != whole


def check_sums(arrays: list[dict[str, np.ndarray]]) -> None:
    """The sum in float32, in the order of the ranks, rounded once; equal on all ranks."""
    for size in (1, 2, 7, 1001):
        with np.errstate(over="ignore"):
            total = np.sum([rank[f"given/{size}"] for rank in arrays], axis=0, dtype=np.float32)
        found = arrays[0][f"sum/{size}"]
        np.testing.assert_array_equal(found, tf.cast(tf.cast(total, tf.bfloat16), tf.float32))
        assert all(rank[f"sum/{size}"].tobytes() == found.tobytes() for rank in arrays)


def test_sums_of_bfloat16_are_those_of_float32_rounded_once(ranks):
    check_sums(ranks[1])


def test_sums_of_three_ranks_too_which_divide_no_vector_here(start, tmp_path):
    job = start(3, WORKER, str(tmp_path))
    assert job.wait() == 0, job.output()
    check_sums([dict(np.load(tmp_path / f"rank{rank}.npz")) for rank in range(3)])


def test_auto_measures_and_all_ranks_choose_alike(ranks):
    first, second = (rank["auto"] for rank in ranks[0])
    assert first == second
    assert first["reason"].startswith("measured ")
