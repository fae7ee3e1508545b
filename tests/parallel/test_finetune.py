"""Quantization-aware fine-tuning under horovodrun: zeros stay, ranks agree, one record is written."""

import json

import numpy as np
import pytest

from cnnopt.distributed.host import cores
from cnnopt.export import trained
from tests.helpers.exported_run import make_run

pytestmark = pytest.mark.timeout(900)


def test_two_ranks_fine_tune_with_the_masks_of_the_run(start, tmp_path):
    path = make_run(tmp_path / "run", validation=128)
    run = trained.read(path)
    flags = "--qat 1 --clusters 16 --variants int8-qat,clustered-int8-qat --calibration 64"
    job = start(2, "-m", "cnnopt.quantize", str(path), *flags.split())
    assert job.wait() == 0, job.output()
    assert "ranks: 2" in job.output()
    for clusters in (0, 16):
        check(run, trained.read(run.fine_tuned(1, clusters)), clusters)
    # By the first rank, which has become cnnopt.quantize again.
    report = json.loads((path / "report.json").read_text())
    assert [entry["name"] for entry in report["files"]] == ["float32", "int8-qat", "clustered-int8-qat"]
    assert report["calibration"]["count"] == 64
    # And which has all cores again, not a rank's part of them.
    assert report["machine"]["cores"] == cores()


def check(run, tuned, clusters):
    environment = json.loads((tuned.path / "env.json").read_text())
    assert environment["ranks"] == 2
    (line,) = [json.loads(text) for text in (tuned.path / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == tuned.step == (512 - 128) // 128
    # The epoch is evaluated on the validation images of the run, the result on the test images, on both ranks.
    assert line["val_accuracy"] * 128 == pytest.approx(round(line["val_accuracy"] * 128), abs=1e-4)
    assert tuned.result["test_accuracy"] * 128 == pytest.approx(round(tuned.result["test_accuracy"] * 128), abs=1e-3)
    assert line["exchange_share"] > 0
    state = json.loads((tuned.checkpoint / "state.json").read_text())["state"]
    # The digest on which both ranks agreed when they saved.
    assert len(state["weights_digest"]) == 64
    for layer, kernel in run.kernels().items():
        np.testing.assert_array_equal(tuned.masks[layer], run.masks[layer])
        assert np.all(tuned.kernels()[layer][~run.masks[layer]] == 0)
        assert not np.array_equal(tuned.kernels()[layer], kernel)
    ranges = {name: value for name, value in tuned.weights.items() if name.endswith(trained.RANGE)}
    assert all(low <= 0 for name, low in ranges.items() if "relu" in name and name.endswith("moving_min:0"))
    centroids = {name: value for name, value in tuned.weights.items() if name.endswith(trained.CENTROIDS)}
    assert {value.shape for value in centroids.values()} == ({(clusters - 1,)} if clusters else set())
    assert all(high > 0 for name, high in ranges.items() if name.endswith("moving_max:0"))
