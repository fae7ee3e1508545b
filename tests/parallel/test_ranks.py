"""Runs with 1, 2 and 4 ranks, compared with each other."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.timeout(900)
WORKER = str(Path(__file__).with_name("ranks_worker.py"))


@dataclass
class Ranks:
    found: list[dict]
    arrays: list[dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def worlds(start, tmp_path_factory) -> dict[int, Ranks]:
    """What the ranks of worlds of 1, 2 and 4 have found; the larger ones evaluate the weights of the first."""
    worlds, weights = {}, []
    for size in (1, 2, 4):
        dest = tmp_path_factory.mktemp(f"world{size}")
        job = start(size, WORKER, str(dest), *weights)
        assert job.wait() == 0, job.output()
        weights = [str(tmp_path_factory.getbasetemp() / "world10" / "rank0.npz")]
        found = [json.loads((dest / f"rank{rank}.json").read_text()) for rank in range(size)]
        arrays = [dict(np.load(dest / f"rank{rank}.npz")) for rank in range(size)]
        worlds[size] = Ranks(found, arrays)
    return worlds


@pytest.mark.parametrize("size", [2, 4])
def test_state_is_equal_bit_for_bit_on_all_ranks(worlds, size):
    first, *others = worlds[size].arrays
    for trained in ("", "float32/muon/"):
        assert any(name.startswith(f"{trained}masks/") for name in first)
    for rank, other in enumerate(others, start=1):
        assert other.keys() == first.keys()
        for name, value in first.items():
            assert value.tobytes() == other[name].tobytes(), f"{name} on rank {rank}"


def mean_losses(ranks: Ranks, name: str) -> np.ndarray:
    return np.mean([found[name] for found in ranks.found], axis=0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_divide_the_cores_into_equal_parts_where_they_can(worlds, size):
    cores = os.sched_getaffinity(0)
    theirs = [{tuple(found) for found in rank["cores"] if found is not None} for rank in worlds[size].found]
    # All threads of a rank, those that TensorFlow has started since too, have one set.
    assert {len(sets) for sets in theirs} == {1}
    parts = [set(*sets) for sets in theirs]
    if size == 1 or len(cores) % size:
        assert parts == [cores] * size
    else:
        assert sum(map(len, parts)) == len(cores)
        assert set.union(*parts) == cores


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["losses", "float32/muon"])
def test_loss_curve_does_not_depend_on_the_number_of_ranks(worlds, size, name):
    # The first loss differs by BatchNorm's statistics alone, which each rank takes over its own shard (Goyal et al.
    # 2017, section 2.3); later ones by what that does to the weights.
    alone, together = mean_losses(worlds[1], name), mean_losses(worlds[size], name)
    assert len(alone) == len(together) == 16
    np.testing.assert_allclose(together[0], alone[0], rtol=0.01)
    np.testing.assert_allclose(together, alone, rtol=0.05)
    assert together[-1] < 0.75 * together[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_image_is_seen_once_an_epoch(worlds, size):
    seen = [index for found in worlds[size].found for index in found["epoch"]]
    # 500 images do not divide over every batch: what the last batch holds beyond the epoch is the next one's.
    extra = -500 % (50 * size)
    assert len(seen) == 500 + extra
    counts = np.bincount(seen, minlength=500)
    assert counts.min() == 1
    assert counts.sum() == 500 + extra


@pytest.mark.parametrize("size", [1, 2, 4])
def test_horovods_threads_give_way_to_those_that_compute(worlds, size):
    # Horovod's loop, and with other ranks Gloo's; those of TensorFlow and Python are more.
    least = 1 if size == 1 else 2
    for found in worlds[size].found:
        policy, nice = found["main thread"]
        assert policy == os.SCHED_OTHER
        assert least <= found["threads"].count([os.SCHED_BATCH, min(19, nice + 10)]) <= 4
        assert found["threads"].count([policy, nice]) > 4


@pytest.mark.parametrize("size", [2, 4])
def test_sharded_evaluation_equals_that_of_one_process_exactly(worlds, size):
    alone = worlds[1].found[0]["evaluation"]
    assert alone["count"] == 301
    for found in worlds[size].found:
        assert found["evaluation"] == alone


@pytest.mark.parametrize("size", [2, 4])
def test_a_wrong_mask_is_caught_on_all_ranks_and_named(worlds, size):
    for found in worlds[size].found:
        assert f"rank {size - 1} " in found["wrong_mask"]
        assert "mask/stage2_block1_conv1" in found["wrong_mask"]


def test_an_overflow_on_one_rank_skips_the_step_on_all(worlds):
    for found in worlds[2].found:
        assert found["overflow"] == 2 * [{"finite": False, "unchanged": True, "skipped": 1, "moved_after": True}]


@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_half_precision_trains_prunes_and_keeps_float32_weights(worlds, compute):
    first, second = worlds[2].arrays
    losses = mean_losses(worlds[2], f"{compute}/sgd")
    assert losses[-1] < 0.75 * losses[0]
    kernels = kernels_of(first, f"{compute}/sgd")
    for name, kernel in kernels.items():
        assert kernel.dtype == np.float32
        assert kernel.tobytes() == second[name].tobytes()
        rounded = kernel.astype(np.float16).astype(np.float32) if compute == "float16" else bfloat16(kernel)
        kept = kernel != 0
        assert np.mean(rounded[kept] != kernel[kept]) > 0.9, name


def test_muon_trains_in_half_precision(worlds):
    losses = mean_losses(worlds[2], "float16/muon")
    assert losses[-1] < 0.85 * losses[0]
    first = worlds[2].arrays[0]
    for name, kernel in kernels_of(first, "float16/muon").items():
        assert not np.array_equal(kernel, first[name.replace("muon/", "sgd/")]), name


def kernels_of(arrays: dict[str, np.ndarray], trained: str) -> dict[str, np.ndarray]:
    found = {n: v for n, v in arrays.items() if n.startswith(f"{trained}/weights/") and n.endswith("kernel:0")}
    assert len(found) == 8
    return found


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values with the lower 16 bits cut off: equal to the values only if they fit in bfloat16."""
    return (values.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_kernel_ends_at_exactly_the_asked_sparsity(worlds, size):
    state = worlds[size].arrays[0]
    masks = [value for name, value in state.items() if name.startswith("masks/")]
    kernels = [v for n, v in state.items() if n.startswith("weights/") and n.endswith("kernel:0")]
    assert len(masks) == len(kernels) == 8
    for mask, kernel in zip(masks, kernels, strict=True):
        assert int(np.sum(kernel == 0)) == int(np.sum(mask == 0)) == kernel.size - round(kernel.size * 0.4)
