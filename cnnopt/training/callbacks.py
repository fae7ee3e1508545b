"""Keras hooks that act between two steps: masks, evaluation, checkpoints, signals, failures. They run on every rank."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.errors import RunError
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import monitored
from cnnopt.schedules import Duration, Timeline
from cnnopt.training.loop import Boundary, evaluate
from cnnopt.training.step import SynchronousModel


class Prune(Boundary):
    """Renews the masks when they are due, and compares them with those of the other ranks before the next step.

    Calls ``say`` with a warning when a kernel has lost its last weight.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__()
        self.say = say
        self.empty: set[str] = set()

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Renew masks that are due before the first step."""
        if int(self.model.run.global_step.numpy()) == 0:
            self._prune(0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Renew masks that are due after ``batch + 1`` steps."""
        self._prune(batch + 1)

    def next_step(self, step: int) -> int | None:
        """The next mask update."""
        return self.model.pruner.next_update(step)

    def _prune(self, step: int) -> None:
        if self.model.pruner.due(step):
            self.model.prune(step)
            self.model.agree()
            now = [name for name, share in self.model.pruner.sparsities().items() if share == 1 and name != "total"]
            if new := [name for name in now if name not in self.empty]:
                self.say(
                    f"warning: after step {step} all weights of {', '.join(new)} are zero, and nothing passes through; "
                    "use a lower --sparsity, or --sparsity-scope uniform, to keep some"
                )
            self.empty = set(now)


class DivergedError(RunError):
    """Gradients or loss are not finite, so further steps cannot help."""


class Evaluate(Callback):
    """Adds accuracy and loss of the monitored split to an epoch's logs: ``val_accuracy`` and ``val_loss`` of all
    validation images, or ``test_accuracy`` and ``test_loss`` of all test images if there are no validation images.
    """

    def __init__(self, data: Dataset, world: World) -> None:
        super().__init__()
        self.data, self.world = data, world

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Each rank evaluates its share of the images. Raises DivergedError if nothing is left to train and the loss
        is not finite: the last step may have been too large, and no step follows that would notice.
        """
        assert logs is not None
        split = self.data.monitored
        result = evaluate(self.model, *self.data.split(split), self.world)
        trained = int(self.model.run.global_step.numpy()) == len(self.model.learning_rates)
        if trained and not math.isfinite(result["loss"]):
            raise DivergedError(
                f"the {split} loss is not finite after the last step; a lower learning rate (--base-lr) may help"
            )
        logs.update({f"{split}_accuracy": result["accuracy"], f"{split}_loss": result["loss"]})


class StopIfDiverged(Callback):
    """Ends the run at the first gradients that are not finite, unless a lower loss scale may still mend it."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self.checkpoints = checkpoints

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Raise DivergedError if the run must end. Every rank sees the same numbers, so every rank stops."""
        assert logs is not None
        if not (step := int(logs["diverged"])):
            return
        saved = checkpoint.list_steps(self.checkpoints)
        last = f"the last checkpoint is {saved[-1]}" if saved else "no checkpoint was saved before"
        raise DivergedError(
            f"step {step}: the gradients are not finite; a lower learning rate (--base-lr) may help; {last}"
        )


class EndIfStalled(Callback):
    """Ends this rank if a step does not end because another rank hangs. Python code cannot interrupt the wait in C++.

    The limit is ``$HOROVOD_STALL_SHUTDOWN_TIME_SECONDS``; 0 means never. Horovod has a shutdown after the same time.
    But it raises an error on the waiting ranks only if Horovod's thread still runs on the rank that hangs.
    """

    def __init__(self, peers: PeerStatus, world: World) -> None:
        super().__init__()
        self.peers, self.world = peers, world
        self.limit = float(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
        self.since: float | None = None
        self.compiled = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Start the thread that watches, if there are other ranks to wait for."""
        if self.limit > 0 and self.world.size > 1:
            threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Start the clock. It runs within steps only: work between steps, and compiling the first, may take longer."""
        if self.compiled:
            self.since = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stop the clock: this step has ended."""
        self.since, self.compiled = None, True

    def _watch(self) -> None:
        while True:
            time.sleep(min(1, self.limit / 4))
            if (since := self.since) is not None and time.monotonic() - since > self.limit:
                self.peers.speak(self.world.rank)
                os._exit(RunError.exit_status)


class StopWhenTold(Callback):
    """Stops all ranks after the same step when any rank gets a signal. A second signal later exits at once."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__()
        self.request = request
        self.stopped = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """From here on, a stop has something to save."""
        self.request.training = True

    def on_train_end(self, logs: dict | None = None) -> None:
        """From here on, nothing is left to save."""
        self.request.training = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Add this rank's stop request to this step's exchange."""
        if self.request.told:
            self.model.run.requests[SynchronousModel.STOP].assign(1.0)

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Stop if any rank asked to stop."""
        if self.model.run.granted.numpy()[SynchronousModel.STOP] > 0:
            self.stopped = True
            self.model.stop_training = True


class Save(Boundary):
    """Saves checkpoints every so many epochs, steps or minutes, at a requested stop, and at the end. Rank 0 writes.

    Rank 0 counts the minutes. It asks for the save through the step's exchange, so all ranks save at the same step.
    """

    def __init__(
        self, every: Duration, timeline: Timeline, folder: Path, world: World, console: Console, *,
        settings: Mapping[str, Any], recorded: Sequence[dict], keep: int, strict: bool,
    ) -> None:  # fmt: skip
        """Stores in each checkpoint: ``settings``, by which a resumed run knows its checkpoints, and ``recorded``, the
        lines of metrics.jsonl so far. The newest ``keep`` stay, besides the best. ``strict``: a failed save is fatal.
        """
        super().__init__()
        self.settings, self.recorded, self.keep, self.strict = settings, recorded, keep, strict
        self.every, self.timeline = every, timeline
        self.folder, self.world, self.console = folder, world, console
        self.saved_at = time.monotonic()
        self.due = False

    def next_step(self, step: int) -> int | None:
        """The next save by steps."""
        return (step // (every := round(self.every.value)) + 1) * every if self.every.unit == "s" else None

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Rank 0 asks for a save when the minutes are over."""
        if self.every.unit == "m" and self.world.first and time.monotonic() - self.saved_at > 60 * self.every.value:
            self.model.run.requests[SynchronousModel.SAVE].assign(1.0)
            self.saved_at = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Save if a rank asked for it, if the number of steps is reached, or if the run is about to stop."""
        asked = self.every.unit == "m" and self.model.run.granted.numpy()[SynchronousModel.SAVE] > 0
        if asked:
            self.model.run.requests[SynchronousModel.SAVE].assign(0.0)
        step = batch + 1
        by_steps = self.every.unit == "s" and step % round(self.every.value) == 0
        self.due = asked or by_steps or self.model.stop_training
        # After an epoch's last step, save in on_epoch_end. The epoch must be evaluated and recorded first, because
        # a resumed run would not do it again.
        if self.due and step != self.timeline.epoch_end(self.timeline.epoch_of(batch)):
            self._save(step, None, vital=self.model.stop_training)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Save with the accuracy of the epoch, which decides the best checkpoint."""
        assert logs is not None
        step = int(self.model.run.global_step.numpy())
        last = step == self.timeline.total_steps
        if self.due or last or (self.every.unit == "e" and (epoch + 1) % round(self.every.value) == 0):
            self._save(step, logs[f"{monitored(logs)}_accuracy"], vital=last or self.model.stop_training)

    def _save(self, step: int, metric: float | None, *, vital: bool) -> None:
        """Save a checkpoint. ``vital``: no later save follows, so a failure ends the run. Raises SaveError."""
        # The sums over the part of the epoch that is done. With them a resumed run can record the whole epoch.
        epoch_sums = None if metric is not None else collectives.mean([float(v.numpy()) for v in self.model.epoch_sums])
        state = {
            **self.settings,
            "images_seen": step * self.timeline.batch_size,
            "epoch": self.timeline.epoch_of(step),
            "precision": self.model.compute_dtype,
            # A power failure may lose a line that was appended to a file. A checkpoint survives it.
            "metrics": list(self.recorded),
            "weights_digest": self.model.agree(),
            **({"epoch_sums": epoch_sums} if metric is None else {"metric": metric}),
        }
        failure = self._write(step, state) if self.world.first else None
        if vital or self.strict:
            # Raise on all ranks, so that no rank exits as if the save had succeeded.
            failure = collectives.broadcast_object(failure)
            if failure:
                raise checkpoint.SaveError(failure)
        elif failure:
            self.console.print(f"{failure}; training goes on")

    def _write(self, step: int, state: dict[str, Any]) -> str | None:
        try:
            checkpoint.save(self.folder, step, self.model.arrays(), state, keep=self.keep)
        except checkpoint.SaveError as error:
            return str(error)
        return None
