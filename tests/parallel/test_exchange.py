"""The exchange of two ranks: what it sends, counted; that sparse is dense bit for bit; one collective, one trace."""

import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(900)
WORKER = str(Path(__file__).with_name("exchange_worker.py"))
VARIANTS = ["dense/float32/muon", "sparse/float32/muon", "sparse/float16/muon",
            "dense/float32/sgd", "sparse/float32/sgd"]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(start, tmp_path_factory) -> tuple[list[dict], list[dict[str, np.ndarray]]]:
    """What each of two ranks has counted, and the state that it ended with, of every variant."""
    dest = tmp_path_factory.mktemp("exchange")
    job = start(2, WORKER, str(dest), *VARIANTS)
    assert job.wait() == 0, job.output()
    found = [json.loads((dest / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return found, [dict(np.load(dest / f"rank{rank}.npz")) for rank in (0, 1)]


def state(arrays: dict[str, np.ndarray], variant: str) -> dict[str, np.ndarray]:
    return {name.split(":", 1)[1]: value for name, value in arrays.items() if name.startswith(f"{variant}:")}


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
def test_sparse_training_is_dense_training_bit_for_bit(ranks, optimizer):
    found, arrays = ranks
    dense, sparse = (f"{kind}/float32/{optimizer}" for kind in ("dense", "sparse"))
    assert found[0][sparse]["losses"] == found[0][dense]["losses"]
    dense, sparse = state(arrays[0], dense), state(arrays[0], sparse)
    assert any(name.startswith("optimizer/") for name in dense)
    assert dense.keys() == sparse.keys()
    for name, value in dense.items():
        assert value.tobytes() == sparse[name].tobytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_hold_the_same_bits(ranks, variant):
    first, second = (state(arrays, variant) for arrays in ranks[1])
    for name, value in first.items():
        assert value.tobytes() == second[name].tobytes(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_bytes_on_the_wire_are_those_of_what_is_kept(ranks, variant):
    for found in (rank[variant] for rank in ranks[0]):
        each = 2 if "float16" in variant else 4
        always = found["size"] - found["prunable"]
        kept = found["kept"] if variant.startswith("sparse") else [found["prunable"]] * 16
        # The masks change at steps 2, 4, 6, 8 and 10 of 16.
        assert len(set(found["kept"])) >= 5
        assert found["bytes"] == [each * (always + count) for count in kept]
        if variant.startswith("sparse/float32"):
            kernels = found["bytes"][-1] - 4 * always
            assert kernels == pytest.approx((1 - 0.9) * 4 * found["prunable"], rel=0.02)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_one_collective_and_is_traced_once(ranks, variant):
    for found in (rank[variant] for rank in ranks[0]):
        assert found["collectives"] == {"HorovodAllreduce": 1}
        assert found["traces"] == 1


def test_a_float16_wire_learns_what_float32_does(ranks):
    whole, half = (ranks[0][0][f"sparse/{wire}/muon"]["losses"] for wire in ("float32", "float16"))
    np.testing.assert_allclose(half, whole, rtol=0.02)
    assert half != whole


def test_auto_measures_and_all_ranks_choose_alike(ranks):
    first, second = (rank["auto"] for rank in ranks[0])
    assert first == second
    assert first["kind"] in ("dense", "sparse")
    assert first["reason"].startswith("measured ")
