"""The training loop: calls of the step, epochs with Keras' hooks, and exact evaluation over all ranks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.distributed import collectives
from cnnopt.distributed.world import World
from cnnopt.schedules import Timeline
from cnnopt.training.step import SynchronousModel
from cnnopt.training.stream import Stream

#: Seconds that a call of several steps may take. A stop is seen after the call in which it was asked for and the next
#: one, and horovodrun kills ranks 5 seconds after it has told them to stop.
LONGEST_CALL = 0.5


class Boundary(keras.callbacks.Callback):
    """A hook that must act right after certain steps. A call of several steps ends there."""

    def next_step(self, step: int) -> int | None:
        """The number of steps, more than ``step``, after which this hook acts next; None for never."""
        raise NotImplementedError


class CallLength:
    """The number of steps of a call, equal on all ranks: ``asked``, or as many as ``LONGEST_CALL`` allows if None."""

    def __init__(self, asked: int | None) -> None:
        self.steps, self.measures = asked or 1, asked is None
        self.compiled = False

    def took(self, steps: int, seconds: float) -> None:
        """Follow the time of a call. This is a collective if it measures: rank 0's clock counts for all."""
        if self.measures and self.compiled:
            seconds = collectives.broadcast_object(seconds)
            self.steps = max(1, min(int(LONGEST_CALL * steps / seconds), 8 * self.steps))
        self.compiled = True


def fit(
    model: SynchronousModel,
    stream: Stream,
    timeline: Timeline,
    callbacks: Sequence[keras.callbacks.Callback],
    *,
    steps_per_call: int | None = 1,
) -> None:
    """Train like Keras' ``fit``, from ``model.run.global_step`` on. An epoch need not be a whole number of steps.

    Between calls of ``steps_per_call`` steps (None: measured) the hooks act. A call ends early at the end of an epoch
    and where a ``Boundary`` asks for it. ``on_train_batch_begin`` gets the number of steps done before the call's first
    step, ``on_train_batch_end`` that before its last.
    """
    hooks = keras.callbacks.CallbackList(list(callbacks), model=model, add_history=False, add_progbar=False)
    boundaries = [hook for hook in callbacks if isinstance(hook, Boundary)]
    step, length = int(model.run.global_step.numpy()), CallLength(steps_per_call)
    train = model.compiler.announced(model.train, "the step")
    model.stop_training = False
    model.exchange.follow_masks()
    hooks.on_train_begin()
    while step < timeline.total_steps and not model.stop_training:
        epoch = timeline.epoch_of(step)
        hooks.on_epoch_begin(epoch)
        end = min(timeline.epoch_end(epoch), timeline.total_steps)
        while step < end and not model.stop_training:
            following = (hook.next_step(step) for hook in boundaries)
            last = min(end, step + length.steps, *(at for at in following if at is not None))
            hooks.on_train_batch_begin(step)
            started = time.perf_counter()
            logs = train(stream, step, last, several=steps_per_call != 1)
            # Reading a value waits for the device.
            logs = {name: value.numpy() for name, value in logs.items()}
            length.took(last - step, time.perf_counter() - started)
            step = last
            hooks.on_train_batch_end(step - 1, logs)
        if step == end:
            hooks.on_epoch_end(epoch, model.end_epoch())
    hooks.on_train_end()


def evaluate(
    model: SynchronousModel, images: np.ndarray, labels: np.ndarray, world: World, *, batch_size: int = 200
) -> dict[str, float]:
    """Exact top-1 accuracy and mean loss over all images, uint8 [n, 32, 32, 3]. One rank evaluates each image.

    The results do not depend on the number of ranks: the images are cut into fixed blocks of ``batch_size``, each
    block is computed by one rank, and the sums are in float64.
    """
    blocks = range(0, len(images), batch_size)
    # XLA compiles for one shape, so the last block is filled up.
    size = batch_size if model.compiler.enabled else 1
    sums = np.zeros([len(blocks), 3])
    mine: dict[int, tf.Tensor] = {}
    with model.evaluation_weights():
        for i in range(world.rank, len(blocks), world.size):
            part = slice(blocks[i], blocks[i] + batch_size)
            mine[i] = model.evaluation_step(*_filled(images[part], labels[part], size))
        # Only now, because reading a value waits for the device.
        for i, value in mine.items():
            sums[i] = value.numpy()
    total = collectives.allreduce_sum(tf.constant(sums), name="evaluation").numpy()
    correct, loss, count = total.sum(axis=0)
    return {"accuracy": correct / count, "loss": loss / count, "count": int(count)}


def _filled(images: np.ndarray, labels: np.ndarray, size: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Images and labels, filled up to ``size`` with empty ones, and the number of real ones."""
    missing = max(0, size - len(labels))

    def filled(values: np.ndarray) -> tf.Tensor:
        return tf.constant(np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)))

    return filled(images), filled(labels), tf.constant(len(labels), tf.int64)
