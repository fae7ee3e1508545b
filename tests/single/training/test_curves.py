"""What TensorBoard shows of a run, read by TensorBoard."""

import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnnopt import pictures
from cnnopt.training.curves import CURVES, Curves, _continue_at
from tests.helpers import event_files

LAYERS = ("stem", "stage1_block1_conv1", "classifier")


def open_curves(folder, first_step=0):
    settings = {"depth": 8, "precision": "float32", "expect": None}
    return Curves(folder, first_step, evaluated="validation", trial="run", settings=settings)


def draw(curves, step, zeros):
    """One epoch that ends at ``step``, in which the layers have these shares of zeros."""
    logs = {name: float(step) for names in CURVES.values() for name in names}
    logs |= {"step": step, "target_sparsity": 0.5, "val_accuracy": step / 100, "val_loss": 1.0}
    shares = {**dict(zip(LAYERS, zeros, strict=True)), "total": float(np.mean(zeros))}
    curves.draw(logs, shares, {name: np.ones(3, np.float32) for name in LAYERS}, minutes=step / 10)


def age(folder):
    """Let the event files be of an earlier second, with which their names begin: TensorBoard reads them in order."""
    for path in folder.glob("*/events.out.tfevents.*"):
        head, second, rest = re.fullmatch(r"(\D+)(\d+)(.*)", path.name).groups()
        path.rename(path.with_name(f"{head}{int(second) - 100:010d}{rest}"))


def test_a_run_has_two_entries_whose_groups_come_before_those_of_quantizing(tmp_path):
    draw(open_curves(tmp_path), 8, (0.1, 0.2, 0.3))
    assert {path.name for path in tmp_path.iterdir()} == {"train", "validation"}
    tags = {tag for path in tmp_path.iterdir() for tag in event_files.curves(path).Tags()["tensors"]}
    assert max(tag.partition("/")[0] for tag in tags if not tag.startswith("_")) < "quantize"


def test_hparams_has_a_row_with_accuracy_zeros_and_minutes(tmp_path):
    curves = open_curves(tmp_path / "run" / "tb")
    draw(curves, 8, (0.1, 0.2, 0.3))
    draw(curves, 16, (0.1, 0.2, 0.6))
    ((settings, results),) = event_files.table(tmp_path)
    assert settings == {"depth": 8, "precision": "float32", "expect": ""}
    expected = {"epoch/accuracy": 0.16, "epoch/loss": 1.0, "epoch/zeros": 0.3, "epoch/minutes": 1.6}
    assert results == pytest.approx(expected)


def test_the_zeros_of_each_layer_and_step_are_a_picture(tmp_path):
    curves = open_curves(tmp_path)
    history = {8: (0.0, 0.0, 0.0), 16: (0.1, 0.5, 0.9), 24: (0.2, 0.6, 1.0)}
    for step, zeros in history.items():
        draw(curves, step, zeros)
    found = event_files.image(event_files.curves(tmp_path / "train"), "pruning/zeros_by_layer")
    np.testing.assert_array_equal(
        found, pictures.zeros({step: dict(zip(LAYERS, zeros, strict=True)) for step, zeros in history.items()})
    )
    # The cells are the last columns of the picture: three of 24 pixels, and below a line of text 16 pixels a layer.
    left = next(x for x in range(found.shape[1]) if (found[22 + 32, x : x + 24] == pictures.shade(0)).all())
    for column, zeros in enumerate(history.values()):
        for row, share in enumerate(zeros):
            assert tuple(found[22 + 8 + 16 * row, left + 24 * column + 12]) == pictures.shade(share)


def test_a_resumed_run_draws_one_curve_and_one_picture(tmp_path):
    curves = open_curves(tmp_path)
    for step in (8, 16, 24):
        draw(curves, step, (0.1, 0.2, step / 100))
    # Stopped after step 24, and the newest good checkpoint is of step 8.
    age(tmp_path)
    curves = open_curves(tmp_path, 8)
    for step in (16, 24):
        draw(curves, step, (0.1, 0.2, step / 50))
    events = event_files.curves(tmp_path / "train")
    assert event_files.points(events, "pruning_by_layer/classifier") == pytest.approx({8: 0.08, 16: 0.32, 24: 0.48})
    history = {8: 0.08, 16: 0.32, 24: 0.48}
    np.testing.assert_allclose(
        event_files.image(events, "pruning/zeros_by_layer"),
        pictures.zeros({step: dict(zip(LAYERS, (0.1, 0.2, share), strict=True)) for step, share in history.items()}),
        atol=1,
    )


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """It had entries for pruning and for HParams, whose later points must go as well."""
    import tensorflow as tf

    for name in ("pruning", "hparams"):
        _continue_at(tmp_path / name, 0)
        with tf.summary.create_file_writer(str(tmp_path / name)).as_default():
            for step in (8, 16):
                tf.summary.scalar("sparsity/total", 0.5, step)
    age(tmp_path)
    draw(open_curves(tmp_path, 8), 16, (0.1, 0.2, 0.3))
    for name in ("pruning", "hparams"):
        assert list(event_files.points(event_files.curves(tmp_path / name), "sparsity/total")) == [8]


def test_files_that_are_cut_short_or_damaged_keep_the_history(tmp_path):
    draw(open_curves(tmp_path), 8, (0.1, 0.2, 0.3))
    for path in (tmp_path / "train").iterdir():
        path.write_bytes(path.read_bytes()[:-7])
    (tmp_path / "train/events.out.tfevents.0.damaged").write_bytes(b"\xff" * 100)
    assert open_curves(tmp_path, 8).zeros[8] == pytest.approx(dict(zip(LAYERS, (0.1, 0.2, 0.3), strict=True)))


def test_a_folder_that_tensorboard_cannot_read_only_costs_the_history(tmp_path, monkeypatch):
    draw(open_curves(tmp_path), 8, (0.1, 0.2, 0.3))

    def unreadable(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(EventAccumulator, "Reload", unreadable)
    curves = open_curves(tmp_path, 8)
    assert curves.zeros == {}
    draw(curves, 16, (0.1, 0.2, 0.3))
    assert list(curves.zeros) == [16]
