"""Validation images drive a run, and the test images are seen once, at its end; runs of before there were any go on."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tf_keras.callbacks import Callback

from cnnopt import compare, groups
from cnnopt.data import datasets
from cnnopt.data.datasets import Dataset
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.model import precision
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder
from cnnopt.training import callbacks, resume, session
from cnnopt.training.build import build_model
from tests.helpers import small_runs

TIMED = {"seconds", "images_per_second", "step_seconds", "exchange_share", "minutes"}


class StopAfter(Callback):
    """Ends the run after ``step`` steps, with a checkpoint."""

    def __init__(self, step: int | None) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        self.model.stop_training = batch + 1 == self.step


def run(path: Path, images: Dataset, *, stop_after: int | None = None, **settings: object) -> tuple[RunFolder, str]:
    """A run on ``images``, as the program does it, and its result line."""
    held_out, place = len(images.validation_images), {"run_dir": str(path), "name": "run"}
    config = small_runs.settings(validation=held_out, deterministic=True, keep=1, **place, **settings)
    timeline, compute = small_runs.timeline_of(config), precision.choose("float32", has_gpu=False)
    model, folder = build_model(config, images, timeline, compute, ranks=1), RunFolder.of(config)
    folder.open(config, {})
    resume.restore(model, config, folder, World(), say=print)
    rank = session.Rank(World(), Console(quiet=True), StopRequest(), PeerStatus("test"))
    session.train(rank, model, images, config, folder, masks=[StopAfter(stop_after), callbacks.Prune()])
    return folder, "" if stop_after else session.finish(rank, model, images, folder)


def lasting(record: dict) -> dict:
    return {name: value for name, value in record.items() if name not in TIMED}


def points(folder: Path) -> dict[tuple[str, int], bytes]:
    """All values of a folder of TensorBoard, of scalars and histograms, by tag and step."""
    events = EventAccumulator(str(folder)).Reload()
    return {
        (tag, event.step): event.tensor_proto.SerializeToString()
        for tag in events.Tags()["tensors"]
        if tag.rpartition("/")[2] not in TIMED
        for event in events.Tensors(tag)
    }


def content(folder: RunFolder) -> dict[str, object]:
    """Everything in the files of a run that depends neither on the clock nor on where they are, by file."""
    found: dict[str, object] = {"config.json": folder.config_file.read_text()}
    found["metrics.jsonl"] = [lasting(json.loads(line)) for line in folder.metrics_file.read_text().splitlines()]
    for path in checkpoint.list_steps(folder.checkpoints):
        saved = checkpoint.load(path)
        arrays = {name: array.tobytes() for name, array in saved.arrays.items()}
        found[path.name] = arrays, {**saved.state, "metrics": [lasting(line) for line in saved.state["metrics"]]}
    found |= {f"tb/{path.name}": points(path) for path in folder.tensorboard.iterdir()}
    result = lasting(json.loads(folder.result_file.read_text()))
    found["result.json"] = {k: v for k, v in result.items() if k not in ("line", "test_accuracy", "test_loss")}
    return found


@pytest.mark.parametrize("validation", [64, 0])
def test_the_test_images_change_the_final_figures_alone_unless_they_are_the_monitored_ones(tmp_path, validation):
    images = datasets.load("synthetic", seed=0, validation=validation, synthetic_sizes=(256 + validation, 75))
    noise = np.random.default_rng(0).integers(256, size=images.test_images.shape, dtype=np.uint8)
    (first, line), (second, other_line) = (
        run(tmp_path / name, data)
        for name, data in (("a", images), ("b", dataclasses.replace(images, test_images=noise)))
    )
    results = [json.loads(folder.result_file.read_text()) for folder in (first, second)]
    assert results[0]["test_loss"] != results[1]["test_loss"]
    assert line.startswith("test accuracy ")
    assert line.partition(" (validation ")[0] != other_line.partition(" (validation ")[0]
    one, two = content(first), content(second)
    differing = {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}
    last = "step-00000024"
    assert last in one
    if validation:
        assert differing == set()
        assert "tb/validation" in one
        assert (f"(validation {results[0]['val_accuracy']:.2%})") in line
    else:
        assert {"metrics.jsonl", "tb/test", last} <= differing


def test_the_validation_images_decide_which_checkpoint_is_the_best(tmp_path):
    images = datasets.load("synthetic", seed=0, validation=64, synthetic_sizes=(320, 75))
    folder, _ = run(tmp_path, images, epochs=4)
    lines = folder.metrics()
    assert all("test_accuracy" not in line and "val_accuracy" in line for line in lines)
    best = max(lines, key=lambda line: line["val_accuracy"])
    kept = {
        saved.step: saved.state["metric"] for saved in map(checkpoint.load, checkpoint.list_steps(folder.checkpoints))
    }
    assert kept[best["step"]] == pytest.approx(best["val_accuracy"], rel=1e-6)
    assert set(kept) == {best["step"], lines[-1]["step"]}
    result = folder.result()
    assert result["val_accuracy"] == lines[-1]["val_accuracy"]
    assert result["val_accuracy"] * 64 == pytest.approx(round(result["val_accuracy"] * 64), abs=1e-4)
    assert result["test_accuracy"] * 75 == pytest.approx(round(result["test_accuracy"] * 75), abs=1e-4)


def as_an_earlier_version(folder: RunFolder) -> None:
    """Give the files of a run the names that they had before there were validation images."""

    def renamed(line: dict) -> dict:
        return {name.replace("test_", "val_"): value for name, value in line.items()}

    lines = [renamed(line) for line in folder.metrics()]
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for path in checkpoint.list_steps(folder.checkpoints):
        saved = checkpoint.load(path)
        del saved.state["identity"]["validation"]
        saved.state["metrics"] = [renamed(line) for line in saved.state["metrics"]]
        checkpoint.save(folder.checkpoints, saved.step, saved.arrays, saved.state, keep=9)
    stored = json.loads(folder.config_file.read_text())
    del stored["identity"]["validation"]
    folder.config_file.write_text(json.dumps(stored))
    (folder.tensorboard / "test").rename(folder.tensorboard / "validation")
    if folder.result_file.exists():
        result = json.loads(folder.result_file.read_text())
        named = {"test_accuracy": "accuracy", "test_loss": "loss"}
        folder.result_file.write_text(json.dumps({named.get(name, name): value for name, value in result.items()}))


def test_a_run_of_an_earlier_version_goes_on_under_the_new_names(tmp_path, capsys):
    whole, _ = run(tmp_path / "whole", small_runs.IMAGES)
    parts, _ = run(tmp_path / "parts", small_runs.IMAGES, stop_after=19)
    as_an_earlier_version(parts)
    assert "val_accuracy" in parts.metrics_file.read_text()
    assert [line["test_loss"] for line in parts.metrics()] == [line["test_loss"] for line in whole.metrics()[:2]]
    run(tmp_path / "parts", small_runs.IMAGES)
    assert "resumed after step 19" in capsys.readouterr().out
    assert "val_" not in parts.metrics_file.read_text()
    assert not (parts.tensorboard / "validation").exists()
    expected, found = content(whole), content(parts)
    # A run that was stopped adds up the losses of one epoch in two parts.
    assert found.keys() == expected.keys()
    for name in ("tb/test", "result.json", "config.json"):
        assert found[name] == expected[name], name
    assert found["step-00000024"][0] == expected["step-00000024"][0]


def grouped(*folders: RunFolder) -> list[groups.Group]:
    return groups.by_settings([groups.read(folder.path) for folder in folders])


def test_a_complete_run_of_an_earlier_version_is_read_as_it_was_meant(tmp_path):
    folder, _ = run(tmp_path, small_runs.IMAGES)
    lines, result, row = folder.metrics(), folder.result(), compare.training_rows(grouped(folder))
    as_an_earlier_version(folder)
    assert "accuracy" in json.loads(folder.result_file.read_text())
    assert (folder.metrics(), folder.result()) == (lines, result)
    assert compare.training_rows(grouped(folder)) == row
    assert row[0][compare.COLUMNS.index("test %")] == f"{100 * result['test_accuracy']:.2f}"


def test_a_comparison_has_the_accuracy_of_validation_and_of_test_images(tmp_path):
    images = datasets.load("synthetic", seed=0, validation=64, synthetic_sizes=(320, 75))
    stopped, _ = run(tmp_path / "stopped", images, stop_after=17)
    (done, _), (plain, _) = run(tmp_path / "done", images), run(tmp_path / "plain", small_runs.IMAGES)
    columns, rows = compare.tables(grouped(done, stopped, plain))[0]
    val, test = columns.index("val %"), columns.index("test %")
    result = done.result()
    assert rows[0][val] == f"{100 * result['val_accuracy']:.2f}"
    assert rows[0][test] == f"{100 * result['test_accuracy']:.2f}"
    assert (rows[1][val] != "", rows[1][test]) == (True, "")
    assert (rows[2][val], rows[2][test]) == ("", f"{100 * plain.result()['test_accuracy']:.2f}")
    columns, _ = compare.tables(grouped(plain))[0]
    assert "val %" not in columns
