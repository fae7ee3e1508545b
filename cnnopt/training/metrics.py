"""Keras hooks that record a run: metrics.jsonl and TensorBoard.

``Measure`` runs on every rank. ``Record`` writes; it runs on rank 0 only, so it calls no collective.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import tensorflow as tf
from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt.distributed import collectives
from cnnopt.model.flat import read
from cnnopt.run.atomic_files import WriteError
from cnnopt.run.run_folder import RunFolder, minutes
from cnnopt.schedules import Timeline
from cnnopt.training.curves import Curves


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


class Record(Callback):
    """Rank 0: writes metrics.jsonl and TensorBoard's files, and adds the measured ``sparsity`` to the logs.

    On a full disk, TensorBoard loses points, and lines of metrics.jsonl wait for the next epoch. The line of the last
    epoch must be written, because the result is made from it.
    """

    def __init__(
        self, folder: RunFolder, timeline: Timeline, first_step: int, console: Console, *,
        split: str, hyperparameters: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """``split``: the one that is evaluated after each epoch, ``val`` or ``test``."""
        super().__init__()
        self.folder, self.timeline, self.console = folder, timeline, console
        self.waiting: list[dict[str, float]] = []
        #: All lines of the run, including the waiting ones.
        self.recorded = folder.metrics()
        try:
            # Earlier versions called the entry of the test images "validation".
            if split == "test" and not (folder.tensorboard / "test").exists():
                with contextlib.suppress(FileNotFoundError):
                    (folder.tensorboard / "validation").rename(folder.tensorboard / "test")
            self.curves = Curves(
                folder.tensorboard, first_step, evaluated={"val": "validation", "test": "test"}[split],
                trial=folder.path.name, settings=hyperparameters,
            )  # fmt: skip
        except OSError as error:
            raise WriteError(
                f"{error.filename or folder.tensorboard}: cannot be written ({error.strerror}); check the folder"
            ) from None

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Write one line, and one point of every curve. Raises WriteError if the last epoch's line is not written."""
        assert logs is not None
        sparsities = self.model.pruner.sparsities()
        logs["sparsity"] = sparsities["total"]
        self.waiting.append({k: v if isinstance(v, int) else float(f"{v:.7g}") for k, v in logs.items()})
        self.recorded.append(self.waiting[-1])
        try:
            self._write_lines()
            kernels = self.model.pruner.kernels
            pairs = zip(kernels, read(kernels), strict=True)
            kept = {kernel.name.split("/")[0]: values[values != 0] for kernel, values in pairs}
            self.curves.draw(logs, sparsities, kept, minutes(self.recorded))
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
