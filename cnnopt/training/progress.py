"""A Keras hook that shows on rank 0 how far a run is: a bar on a terminal, lines with the time of day in a log."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from tf_keras.callbacks import Callback

from cnnopt.run.run_folder import monitored
from cnnopt.schedules import Timeline

#: Seconds between two changes of what the bar says. A text that changes faster cannot be read.
LOOK = 1.0
#: Seconds without a line after which a log gets one.
SILENCE = 300.0


def duration(seconds: float) -> str:
    """Such as ``0:07``, ``12:34``, ``1:02:03`` or ``2d 03:04``; hours and minutes after days."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Pace:
    """The speed of a run, from the end of its first call on, which compiles."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self.start: tuple[int, float] | None = None

    def mark(self, step: int, now: float) -> None:
        """Note that ``step`` steps are done at ``now``."""
        self.step, self.now = step, now
        if self.start is None:
            self.start = step, now

    @property
    def left(self) -> str:
        """The time to the end of the run, evaluations included; ``?`` as long as nothing is known."""
        assert self.start is not None
        step, began = self.start
        if self.step == step:
            return "?"
        return duration((self.timeline.total_steps - self.step) * (self.now - began) / (self.step - step))


class Show(Callback):
    """Rank 0: a bar on a terminal, and a line an epoch. A log also gets a line after ``SILENCE`` seconds without one.

    The bar shows the epoch, and the time left of the run.
    """

    def __init__(self, timeline: Timeline, console: Console) -> None:
        super().__init__()
        self.timeline, self.console, self.pace = timeline, console, Pace(timeline)
        self.progress: Progress | None = None
        self.looked = self.spoke = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Start the bar of this epoch."""
        self.first = int(self.model.run.global_step.numpy())
        self.epoch = f"epoch {epoch + 1}/{self.timeline.epochs}"
        self.began: tuple[int, float] | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
            )
            # Without the two redirect_... flags, rich would print errors to standard output. The cursor is shown,
            # because os._exit would leave it hidden.
            self.progress = Progress(
                *columns, console=self.console, transient=True, redirect_stdout=False, redirect_stderr=False,
                expand=True,
            )  # fmt: skip
            self.progress.start()
            self.console.show_cursor(True)
            end = min(self.timeline.epoch_end(epoch), self.timeline.total_steps)
            self.task = self.progress.add_task("steps", total=end - self.first, epoch=self.epoch, state="")

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Move the bar to step ``batch + 1``. Show the loss, the speed and the time left, at most once a second."""
        assert logs is not None
        now = time.monotonic()
        if self.progress is not None:
            self.progress.update(self.task, completed=batch + 1 - self.first)
        if self.began is None:
            # The speed of an epoch leaves its first call out, which may compile.
            self.began = batch + 1, now
            self.pace.mark(batch + 1, now)
        if now - self.looked < LOOK or batch + 1 == self.began[0]:
            return
        self.looked = now
        self.pace.mark(batch + 1, now)
        if self.progress is not None:
            self.progress.update(self.task, state=self._state(batch + 1, now, logs))
        elif now - self.spoke >= SILENCE:
            self._say(f"{self.epoch} step {batch + 1}/{self.timeline.total_steps} {self._state(batch + 1, now, logs)}")

    def _state(self, step: int, now: float, logs: Mapping[str, Any]) -> str:
        assert self.began is not None
        first, began = self.began
        speed = (step - first) * self.timeline.batch_size / max(now - began, 1e-9)
        return f"loss {float(logs['loss']):.4f} {speed:.0f} img/s {self.pace.left} left"

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Print the line of this epoch."""
        assert logs is not None
        self.clear()
        self.pace.mark(int(self.model.run.global_step.numpy()), time.monotonic())
        split = monitored(logs)
        fields = {
            "epoch": f"epoch {epoch + 1:>3}/{self.timeline.epochs}",
            "loss": f"loss {logs['loss']:.4f}",
            "train": f"train {logs['accuracy']:.1%}",
            split: f"{split} {logs[f'{split}_accuracy']:.2%}",
            "zeros": f"zeros {logs['sparsity']:.1%}",
            "speed": f"{logs['images_per_second']:.0f} img/s",
        }
        if self.console.is_terminal:
            self.console.print("  ".join(fields.values()))
        else:
            del fields["train"]
            self._say(" ".join([*fields.values(), f"{self.pace.left} left"]))

    def _say(self, text: str) -> None:
        self.spoke = time.monotonic()
        self.console.print(f"{time.strftime('%H:%M')} {text}")

    def clear(self) -> None:
        """Remove the progress bar, so that no half-drawn bar is left."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
