"""Keras hooks that record a run: metrics.jsonl and TensorBoard.

``Measure`` runs on every rank. ``Record`` writes; it runs on rank 0 only, so it calls no collective.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import time
from pathlib import Path

import tensorflow as tf
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams import api as hparams
from tensorboard.summary.writer.record_writer import RecordWriter
from tf_keras.callbacks import Callback

from cnnopt.config import TrainConfig
from cnnopt.distributed import collectives
from cnnopt.run.atomic_files import WriteError
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline


class Measure(Callback):
    """Adds an epoch's speed and the values of the schedules to its logs. Runs on every rank, before ``Evaluate``.

    The first step of a process traces and compiles. In an epoch of several steps, the speed leaves this step out.
    """

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self.timeline = timeline
        self.compiled = False

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Start the clock."""
        self._restart(int(self.model.run.global_step.numpy()))

    def _restart(self, step: int) -> None:
        self.first_step = step
        self.model.exchange.restart()
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Restart the clock once the step is compiled."""
        if not self.compiled and batch + 1 < self.timeline.epoch_end(self.timeline.epoch_of(batch)):
            self._restart(batch + 1)
        self.compiled = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Add speed, exchange share and the values of the schedules."""
        assert logs is not None
        model = self.model
        step = int(model.run.global_step.numpy())
        steps = step - self.first_step
        seconds = time.perf_counter() - self.started
        # Ranks wait for each other in the exchange, the fastest rank longest. So the mean over the ranks is taken.
        (exchanging,) = collectives.mean([float(model.exchange.seconds.numpy())])
        logs.update(
            epoch=epoch + 1,
            step=step,
            seconds=seconds,
            images_per_second=steps * self.timeline.batch_size / seconds,
            step_seconds=seconds / steps,
            exchange_share=exchanging / seconds,
            exchange_bytes=int(model.exchange.bytes.numpy()) / steps,
            learning_rate=float(model.learning_rates[step - 1]),
            loss_scale=float(model.loss_scale.value.numpy()),
            skipped_steps=int(model.loss_scale.skipped.numpy()),
            target_sparsity=model.pruner.target(step),
        )


# The curves by group. TensorBoard shows the curves of one group side by side.
TRAIN_CURVES = {
    "epoch": ("accuracy", "loss"),
    "schedule": ("learning_rate", "loss_scale", "skipped_steps"),
    "speed": ("images_per_second", "step_seconds", "exchange_share", "exchange_bytes"),
}


class Record(Callback):
    """Rank 0: writes metrics.jsonl and TensorBoard's files, and adds the measured ``sparsity`` to the logs.

    On a full disk, TensorBoard loses points, and lines of metrics.jsonl wait for the next epoch. The line of the last
    epoch must be written, because the result is made from it.
    """

    def __init__(
        self, folder: RunFolder, config: TrainConfig, timeline: Timeline, first_step: int, console: Console
    ) -> None:
        super().__init__()
        self.folder, self.timeline, self.console = folder, timeline, console
        self.waiting: list[dict[str, float]] = []
        #: All lines of the run, including the waiting ones.
        self.recorded = folder.metrics()
        try:
            for name in ("train", "validation", "pruning", "hparams"):
                _continue_at(folder.tensorboard / name, first_step)
        except OSError as error:
            raise WriteError(f"{error.filename}: cannot be written ({error.strerror}); check the folder") from None
        self.writers = {
            # The path goes to C++ as bytes. Text would become UTF-8, even if the locale encodes file names otherwise.
            name: tf.summary.create_file_writer(os.fsencode(folder.tensorboard / name))
            for name in ("train", "validation", "pruning", "hparams")
        }
        with self.writers["hparams"].as_default():
            hparams.hparams({k: "" if v is None else v for k, v in config.identity().items()}, trial_id=config.name)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Write one line, and one point of every curve. Raises WriteError if the last epoch's line is not written."""
        assert logs is not None
        sparsities = self.model.pruner.sparsities()
        logs["sparsity"] = sparsities["total"]
        self.waiting.append({k: v if isinstance(v, int) else float(f"{v:.7g}") for k, v in logs.items()})
        self.recorded.append(self.waiting[-1])
        try:
            self._write_lines()
            self._draw(logs, sparsities)
        except (OSError, tf.errors.OpError) as error:
            why = f"cannot record epoch {epoch + 1} in {self.folder.path}: {error}"
            if self.waiting and logs["step"] == self.timeline.total_steps:
                raise WriteError(f"{why}; free some space, and the same command does it again") from None
            self.console.print(f"{why}; training goes on")

    def on_train_end(self, logs: dict | None = None) -> None:
        """Try once more to write waiting lines. A stopped run resumes after this epoch and would not write them."""
        with contextlib.suppress(OSError):
            self._write_lines()

    def _write_lines(self) -> None:
        while self.waiting:
            self.folder.append(self.waiting[0])
            del self.waiting[0]

    def _draw(self, logs: dict, sparsities: dict[str, float]) -> None:
        step = logs["step"]
        points = {
            "train": {f"{group}/{name}": logs[name] for group, names in TRAIN_CURVES.items() for name in names},
            "validation": {"epoch/accuracy": logs["val_accuracy"], "epoch/loss": logs["val_loss"]},
            "hparams": {"result/accuracy": logs["val_accuracy"]},
            "pruning": {
                "sparsity/target": logs["target_sparsity"],
                "sparsity/total": logs["sparsity"],
                **{f"sparsity_by_kernel/{name}": value for name, value in sparsities.items()},
            },
        }
        for writer, values in points.items():
            with self.writers[writer].as_default(step):
                for name, value in values.items():
                    tf.summary.scalar(name, value)
        with self.writers["pruning"].as_default(step):
            for kernel in self.model.pruner.kernels:
                weights = kernel.numpy()
                tf.summary.histogram(f"kept/{kernel.name.split('/')[0]}", weights[weights != 0])
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
    # the order of their names. This name sorts before that of the file that the next writer makes.
    name = f"events.out.tfevents.{int(now):010d}.{platform.node()}.{os.getpid()}.{next(_starts)}.resume"
    with (folder / name).open("wb") as file:
        for event in events:
            RecordWriter(file).write(event.SerializeToString())
