"""What decides between two steps: masks, evaluation, checkpoints, signals, failures. Keras hooks, on every rank."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.errors import RunError
from cnnopt.run import checkpoint
from cnnopt.schedules import Duration, Timeline
from cnnopt.training.loop import evaluate
from cnnopt.training.step import SynchronousModel


class Prune(Callback):
    """Renews the masks when they are due, and compares them with the other ranks' before the next step.

    ``say`` hears of each kernel that has just lost its last weight.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__()
        self.say = say
        self.empty: set[str] = set()

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
            now = [name for name, share in self.model.pruner.sparsities().items() if share == 1 and name != "total"]
            if new := [name for name in now if name not in self.empty]:
                self.say(
                    f"warning: after step {step} all weights of {', '.join(new)} are zero, and nothing passes through; "
                    "a lower --sparsity, or --sparsity-scope uniform, keeps some"
                )
            self.empty = set(now)


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
        raise DivergedError(
            f"step {batch + 1}: loss or gradients are not finite; a lower learning rate (--base-lr) may help; {last}"
        )


class EndIfStalled(Callback):
    """Ends this rank where a step does not end: another rank hangs, and what waits for it in C++ hears nothing.

    After ``$HOROVOD_STALL_SHUTDOWN_TIME_SECONDS``; 0 means never. Horovod's own shutdown after that time raises an
    error on the waiting ranks only if the rank that hangs still lets Horovod's thread take part in it.
    """

    def __init__(self, peers: PeerStatus, world: World) -> None:
        super().__init__()
        self.peers, self.world = peers, world
        self.limit = float(os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"])
        self.since: float | None = None
        self.compiled = False

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Start the thread that watches, where there is a rank to wait for."""
        if self.limit > 0 and self.world.size > 1:
            threading.Thread(target=self._watch, name="stall", daemon=True).start()

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """The clock runs in a step only: nothing bounds what lies between two, nor the compilation of the first."""
        if self.compiled:
            self.since = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """This step has ended."""
        self.since, self.compiled = None, True

    def _watch(self) -> None:
        while True:
            time.sleep(min(1, self.limit / 4))
            if (since := self.since) is not None and time.monotonic() - since > self.limit:
                self.peers.speak(self.world.rank)
                os._exit(RunError.exit_status)


class StopWhenTold(Callback):
    """A signal to any rank stops all ranks after one and the same step; a later second one exits at once."""

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
            self.model.run.requests[SynchronousModel.STOP].assign(1.0)

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
        self, every: Duration, timeline: Timeline, config: TrainConfig, folder: Path, world: World, console: Console,
        recorded: Sequence[dict],
    ) -> None:  # fmt: skip
        """``recorded``: the lines of metrics.jsonl so far, which go with the checkpoint."""
        super().__init__()
        self.recorded = recorded
        self.every, self.timeline, self.config = every, timeline, config
        self.folder, self.world, self.console = folder, world, console
        self.saved_at = time.monotonic()
        self.due = False

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        """Rank 0 asks when the minutes are over."""
        if self.every.unit == "m" and self.world.first and time.monotonic() - self.saved_at > 60 * self.every.value:
            self.model.run.requests[SynchronousModel.SAVE].assign(1.0)
            self.saved_at = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: dict | None = None) -> None:
        """Save where a rank asked for it, or the steps are over, or the run is about to stop."""
        asked = self.every.unit == "m" and self.model.run.granted.numpy()[SynchronousModel.SAVE] > 0
        if asked:
            self.model.run.requests[SynchronousModel.SAVE].assign(0.0)
        step = batch + 1
        by_steps = self.every.unit == "s" and step % round(self.every.value) == 0
        self.due = asked or by_steps or self.model.stop_training
        # After an epoch's last step the epoch is evaluated and recorded first: a resumed run would not do it again.
        if self.due and step != self.timeline.epoch_end(self.timeline.epoch_of(batch)):
            self._save(step, None, vital=self.model.stop_training)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Save with the accuracy of the epoch, by which the best checkpoint is known."""
        assert logs is not None
        step = int(self.model.run.global_step.numpy())
        last = step == self.timeline.total_steps
        if self.due or last or (self.every.unit == "e" and (epoch + 1) % round(self.every.value) == 0):
            self._save(step, logs["val_accuracy"], vital=last or self.model.stop_training)

    def _save(self, step: int, metric: float | None, *, vital: bool) -> None:
        """``vital``: nothing comes after it that could make up for it, so a failure is the run's. Raises SaveError."""
        # Of the part of an epoch that is done, so that a resumed run records the whole of it.
        epoch_sums = None if metric is not None else collectives.mean([float(v.numpy()) for v in self.model.epoch_sums])
        state = {
            "images_seen": step * self.config.batch_size,
            "epoch": self.timeline.epoch_of(step),
            "identity": self.config.identity(),
            "precision": self.model.compute_dtype,
            "resume": self.config.resume,
            # An append to a file may be lost where the power fails, and a checkpoint is not.
            "metrics": list(self.recorded),
            "weights_digest": self.model.agree(),
            **({"epoch_sums": epoch_sums} if metric is None else {"metric": metric}),
        }
        failure = self._write(step, state) if self.world.first else None
        if vital or self.config.strict_save:
            # On all ranks, so that none ends as if it had been saved.
            failure = collectives.broadcast_object(failure)
            if failure:
                raise checkpoint.SaveError(failure)
        elif failure:
            self.console.print(f"{failure}; training goes on")

    def _write(self, step: int, state: dict[str, Any]) -> str | None:
        arrays = {name: variable.numpy() for name, variable in self.model.named_state().items()}
        try:
            checkpoint.save(self.folder, step, arrays, state, keep=self.config.keep)
        except checkpoint.SaveError as error:
            return str(error)
        return None
