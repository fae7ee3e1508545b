"""What happens around the steps: masks, evaluation, checkpoints, signals, records, the progress on the screen.

Keras hooks. Those with a collective in them (``Prune``, ``Evaluate``, ``Save``, ``StopWhenTold``) are on every rank;
those that only write (``Record``, ``Show``) are on rank 0 and hold none.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.plugins.hparams import api as hparams
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tf_keras.callbacks import Callback

from cnnopt import checkpoint, distributed
from cnnopt.config import TrainConfig
from cnnopt.data import Dataset
from cnnopt.distributed import World
from cnnopt.errors import RunError
from cnnopt.record import RunFolder
from cnnopt.schedules import Duration, Timeline
from cnnopt.signals import StopRequest
from cnnopt.training import SynchronousModel, evaluate


class Prune(Callback):
    """Renews the masks when they are due, and compares them with the other ranks' before the next step."""

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Masks that are due before the first step."""
        if int(self.model.run.global_step.numpy()) == 0:
            self._prune(0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Masks that are due after ``batch + 1`` steps."""
        self._prune(batch + 1)

    def _prune(self, step: int) -> None:
        if self.model.pruner.due(step):
            self.model.prune(step)
            self.model.agree()


class Evaluate(Callback):
    """Adds ``val_accuracy`` and ``val_loss`` over all test images to the logs of an epoch."""

    def __init__(self, data: Dataset, world: World) -> None:
        super().__init__()
        self.data, self.world = data, world

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Each rank evaluates its share of the test images."""
        assert logs is not None
        result = evaluate(self.model, self.data.test_images, self.data.test_labels, self.world)
        logs.update(val_accuracy=result["accuracy"], val_loss=result["loss"])


class DivergedError(RunError):
    """The loss is not finite, so no further step can help."""


class StopIfDiverged(Callback):
    """Ends the run at the first loss that is not finite, unless the loss scale has caused and will cure it."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.skipped_in_a_row = 0

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Every rank sees the same flag, so every rank stops."""
        assert logs is not None
        if bool(logs["finite"]):
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        # From the largest scale to 1 there are 24 halvings.
        if self.model.loss_scale.enabled and self.skipped_in_a_row <= 24:
            return
        saved = checkpoint.list_steps(self.checkpoints)
        last = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before"
        raise DivergedError(f"step {batch + 1}: loss or gradients are not finite; lower --base-lr; {last}")


class StopWhenTold(Callback):
    """SIGTERM or SIGUSR1 on any rank stops all ranks after one and the same step; a later second one exits at once."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__()
        self.request = request
        self.stopped = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """From here on there is something to save."""
        self.request.training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        """What was to be saved has been saved."""
        self.request.training = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Put the request into this step's exchange."""
        if self.request.told:
            self.model.run.requests.assign(np.eye(2, dtype=np.float32)[SynchronousModel.STOP])

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stop where any rank asked for it."""
        if self.model.run.granted.numpy()[SynchronousModel.STOP] > 0:
            self.stopped = True
            self.model.stop_training = True


class Save(Callback):
    """Checkpoints by epochs, steps or minutes, when told to stop, and at the end. Rank 0 writes.

    Minutes are rank 0's: it asks for the save through the step's exchange, so all ranks agree on the step.
    """

    def __init__(
        self, every: Duration, timeline: Timeline, config: TrainConfig, folder: Path, world: World, console: Console
    ) -> None:
        super().__init__()
        self.every, self.timeline, self.config = every, timeline, config
        self.folder, self.world, self.console = folder, world, console
        self.saved_at = time.monotonic()
        self.due = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Rank 0 asks when the minutes are over."""
        if self.every.unit == "m" and self.world.first and time.monotonic() - self.saved_at > 60 * self.every.value:
            self.model.run.requests.assign(np.eye(2, dtype=np.float32)[SynchronousModel.SAVE])
            self.saved_at = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Save where a rank asked for it, or the steps are over, or the run is about to stop."""
        asked = self.every.unit == "m" and self.model.run.granted.numpy()[SynchronousModel.SAVE] > 0
        if asked:
            self.model.run.requests.assign(tf.zeros([2]))
        step = batch + 1
        by_steps = self.every.unit == "s" and step % max(1, round(self.every.value)) == 0
        self.due = asked or by_steps or self.model.stop_training
        # After an epoch's last step the epoch is evaluated and recorded first: a resumed run would not do it again.
        if self.due and step != self.timeline.epoch_end(self.timeline.epoch_of(batch)):
            self._save(step, None)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Save with the accuracy of the epoch, by which the best checkpoint is known."""
        assert logs is not None
        last = epoch + 1 == self.timeline.epochs
        by_epochs = self.every.unit == "e" and (epoch + 1) % max(1, round(self.every.value)) == 0
        if self.due or last or by_epochs:
            self._save(int(self.model.run.global_step.numpy()), logs["val_accuracy"])

    def _save(self, step: int, metric: float | None) -> None:
        # Of the part of an epoch that is done, so that a resumed run records the whole of it.
        epoch_sums = None if metric is not None else distributed.mean([float(v.numpy()) for v in self.model.epoch_sums])
        digest = self.model.agree()
        if not self.world.first:
            return
        state = {
            "images_seen": step * self.config.batch_size,
            "epoch": self.timeline.epoch_of(step),
            "identity": self.config.identity(),
            "weights_digest": digest,
            **({"epoch_sums": epoch_sums} if metric is None else {"metric": metric}),
        }
        arrays = {name: variable.numpy() for name, variable in self.model.named_state().items()}
        try:
            checkpoint.save(self.folder, step, arrays, state, keep=self.config.keep)
        except checkpoint.SaveError as error:
            if self.config.strict_save:
                raise
            self.console.print(f"{error}; training goes on", markup=False)


class Measure(Callback):
    """Adds to the logs of an epoch how fast it went and where the schedules are. On every rank, before ``Record``.

    The first step of a process traces and compiles, and is no part of the speed of an epoch of several steps.
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
        """Start again once the step is compiled."""
        if not self.compiled and batch + 1 < self.timeline.epoch_end(self.timeline.epoch_of(batch)):
            self._restart(batch + 1)
        self.compiled = True

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Speed, exchange share, schedules."""
        assert logs is not None
        model = self.model
        step = int(model.run.global_step.numpy())
        steps = step - self.first_step
        seconds = time.perf_counter() - self.started
        logs.update(
            epoch=epoch + 1,
            step=step,
            seconds=seconds,
            images_per_second=steps * self.timeline.batch_size / seconds,
            step_seconds=seconds / steps,
            exchange_share=float(model.exchange.seconds.numpy()) / seconds,
            exchange_bytes=int(model.exchange.bytes.numpy()) / steps,
            learning_rate=float(model.learning_rates[step - 1]),
            loss_scale=float(model.loss_scale.value.numpy()),
            skipped_steps=int(model.loss_scale.skipped.numpy()),
            target_sparsity=model.pruner.target(step),
        )


# TensorBoard shows the curves of a group side by side.
TRAIN_CURVES = {
    "epoch": ("accuracy", "loss"),
    "schedule": ("learning_rate", "loss_scale", "skipped_steps"),
    "speed": ("images_per_second", "step_seconds", "exchange_share", "exchange_bytes"),
}


class Record(Callback):
    """Rank 0: metrics.jsonl and TensorBoard, and the measured ``sparsity`` in the logs."""

    def __init__(self, folder: RunFolder, config: TrainConfig, first_step: int) -> None:
        super().__init__()
        self.folder, self.config = folder, config
        for name in ("train", "validation", "pruning", "hparams"):
            _continue_at(folder.tensorboard / name, first_step)
        self.writers = {
            name: tf.summary.create_file_writer(str(folder.tensorboard / name))
            for name in ("train", "validation", "pruning", "hparams")
        }
        with self.writers["hparams"].as_default():
            hparams.hparams({k: "" if v is None else v for k, v in config.identity().items()}, trial_id=config.name)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """One line, and one point of every curve."""
        assert logs is not None
        sparsities = self.model.pruner.sparsities()
        logs["sparsity"] = sparsities["total"]
        self.folder.append({k: v if isinstance(v, int) else float(f"{v:.7g}") for k, v in logs.items()})
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


def _continue_at(folder: Path, step: int) -> None:
    """Tell TensorBoard to forget what an earlier process wrote after ``step``: that is done again."""
    writer = EventFileWriter(str(folder), filename_suffix=".resume")
    start = SessionLog(status=SessionLog.START)
    writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
    writer.close()


class Show(Callback):
    """Rank 0: a progress bar on a terminal, and one line an epoch everywhere."""

    def __init__(self, timeline: Timeline, console: Console) -> None:
        super().__init__()
        self.timeline, self.console = timeline, console
        self.progress: Progress | None = None

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Start the bar of this epoch."""
        if self.console.is_terminal:
            columns = (
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.start()
            first = int(self.model.run.global_step.numpy())
            end = min(self.timeline.epoch_end(epoch), self.timeline.total_steps)
            self.task = self.progress.add_task("steps", total=end - first, epoch=epoch + 1)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Advance the bar."""
        if self.progress is not None:
            self.progress.advance(self.task)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """The line of this epoch."""
        assert logs is not None
        self._clear()
        self.console.print(
            f"epoch {epoch + 1:>3}/{self.timeline.epochs}  loss {logs['loss']:.4f}  train {logs['accuracy']:.2%}  "
            f"test {logs['val_accuracy']:.2%}  sparsity {logs['sparsity']:.2%}  lr {logs['learning_rate']:.4f}  "
            f"{logs['images_per_second']:.0f} images/s  exchange {logs['exchange_share']:.0%}"
        )

    def on_train_end(self, logs: dict | None = None) -> None:
        """Leave no half-drawn bar."""
        self._clear()

    def _clear(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
