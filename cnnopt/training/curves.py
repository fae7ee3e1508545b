"""A run in TensorBoard: two entries, for training and for evaluation. ``cnnopt.export.tensorboard`` adds a third.

HParams shows the entry of the evaluation, whose few scalars are its columns.
"""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams import api as hparams
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray

from cnnopt import pictures
from cnnopt.run.run_folder import monitored

#: The curves of training by group. TensorBoard shows the curves of a group side by side, and sorts the groups by name:
#: those of ``quantize/`` come after all of these.
CURVES = {
    "epoch": ("accuracy", "loss"),
    "learning": ("learning_rate", "loss_scale", "skipped_steps"),
    "performance": ("images_per_second", "step_seconds", "exchange_share", "exchange_bytes"),
}
BY_LAYER = "pruning_by_layer/"


class Curves:
    """Writes the curves below ``folder``. Methods raise OSError or tf.errors.OpError if the disk refuses them."""

    def __init__(
        self, folder: Path, first_step: int, *, evaluated: str, trial: str, settings: Mapping[str, Any]
    ) -> None:
        """``evaluated`` names the entry of the evaluation. ``trial`` and ``settings`` are for HParams."""
        self.train, self.evaluated = folder / "train", folder / evaluated
        # Runs of earlier versions had more entries.
        for old in (place for place in (folder / "pruning", folder / "hparams") if place.exists()):
            _continue_at(old, first_step)
        for place in (self.train, self.evaluated):
            _continue_at(place, first_step)
        #: The share of zeros of each layer after each recorded step, for the heat map.
        self.zeros = _zeros(self.train) if first_step else {}
        # The path goes to C++ as bytes. Text would become UTF-8, even if the locale encodes file names otherwise.
        self.writers = {
            place: tf.summary.create_file_writer(os.fsencode(place)) for place in (self.train, self.evaluated)
        }
        with self.writers[self.evaluated].as_default():
            hparams.hparams({name: "" if value is None else value for name, value in settings.items()}, trial_id=trial)

    def draw(
        self, logs: Mapping[str, Any], sparsities: Mapping[str, float], kept: Mapping[str, np.ndarray], minutes: float
    ) -> None:
        """One point of each curve at ``logs["step"]``. ``kept``: the weights of each layer that are not zero."""
        step = int(logs["step"])
        by_layer = {name: value for name, value in sparsities.items() if name != "total"}
        self.zeros[step] = by_layer
        evaluated = {f"epoch/{name}": logs[f"{monitored(logs)}_{name}"] for name in ("accuracy", "loss")}
        points = {
            self.train: {
                **{f"{group}/{name}": logs[name] for group, names in CURVES.items() for name in names},
                "pruning/target": logs["target_sparsity"],
                "pruning/total": sparsities["total"],
                **{f"{BY_LAYER}{name}": value for name, value in by_layer.items()},
            },
            self.evaluated: {**evaluated, "epoch/zeros": sparsities["total"], "epoch/minutes": minutes},
        }
        for place, values in points.items():
            with self.writers[place].as_default(step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
        with self.writers[self.train].as_default(step):
            for name, weights in kept.items():
                tf.summary.histogram(f"kept/{name}", weights)
            tf.summary.image("pruning/zeros_by_layer", pictures.zeros(self.zeros)[np.newaxis])
        for writer in self.writers.values():
            writer.flush()


_starts = itertools.count()


def _continue_at(folder: Path, step: int) -> None:
    """Tell TensorBoard to drop the points that an earlier process wrote after ``step``: those steps are done again."""
    now = time.time()
    events = [
        Event(wall_time=now, file_version="brain.Event:2"),
        Event(wall_time=now, step=step + 1, session_log=SessionLog(status=SessionLog.START)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard's EventFileWriter is not used, because it gives its path to C++ as text. TensorBoard reads files in
    # the order of their names. This name sorts before that of the file that the next writer makes: zero is less than
    # the number that a writer has in its place, of which this process may have made many in this second.
    name = f"events.out.tfevents.{int(now):010d}.{platform.node()}.{os.getpid()}.0.{next(_starts)}.resume"
    with (folder / name).open("wb") as file:
        for event in events:
            RecordWriter(file).write(event.SerializeToString())


def _zeros(folder: Path) -> dict[int, dict[str, float]]:
    """The share of zeros of each layer by step, as TensorBoard shows them now. Empty if it cannot read the folder."""
    found: dict[int, dict[str, float]] = {}
    try:
        events = EventAccumulator(str(folder), size_guidance={TENSORS: 0}).Reload()
    # ValueError: the name of the folder is not UTF-8.
    except (OSError, ValueError, tf.errors.OpError):
        return found
    for tag in events.Tags()["tensors"]:
        if tag.startswith(BY_LAYER):
            for event in events.Tensors(tag):
                value = float(make_ndarray(event.tensor_proto))
                found.setdefault(event.step, {})[tag.removeprefix(BY_LAYER)] = value
    return found
