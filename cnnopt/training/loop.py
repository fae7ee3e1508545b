"""The training loop: the stream of image shards, epochs with Keras' hooks, and exact evaluation over all ranks."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset, batches
from cnnopt.distributed import collectives
from cnnopt.distributed.world import World
from cnnopt.schedules import Timeline
from cnnopt.training.step import SynchronousModel

_kept: list[tf.data.Iterator] = []


@contextlib.contextmanager
def training_stream(
    config: TrainConfig, data: Dataset, world: World, *, first_step: int, last_step: int
) -> Iterator[tf.data.Iterator]:
    """This rank's shards of the global batches ``first_step`` .. ``last_step - 1``, prepared ahead of the step.

    On leaving without an error, the stream is drained. A stream is kept and never destroyed: TensorFlow would hold
    Python's lock while it waits for the stream's thread, and this thread may be waiting for the same lock.
    """
    left = threading.Event()

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shards = batches(
            data.train_images,
            data.train_labels,
            batch_size=config.batch_size,
            seed=config.seed,
            augment=config.augment,
            first_step=first_step,
            last_step=last_step,
            rank=world.rank,
            size=world.size,
        )
        return itertools.takewhile(lambda _: not left.is_set(), shards)

    shard = config.batch_size // world.size
    signature = (tf.TensorSpec([shard, 32, 32, 3], tf.uint8), tf.TensorSpec([shard], tf.int64))
    stream = iter(tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(4))
    _kept.append(stream)
    yield stream
    left.set()
    for _ in stream:
        pass


def fit(
    model: SynchronousModel, stream: tf.data.Iterator, timeline: Timeline, callbacks: Sequence[keras.callbacks.Callback]
) -> None:
    """Train like Keras' ``fit``, from ``model.run.global_step`` on. An epoch need not be a whole number of steps.

    ``on_train_batch_end`` gets the number of steps done before the batch.
    """
    hooks = keras.callbacks.CallbackList(list(callbacks), model=model, add_history=False, add_progbar=False)
    step = int(model.run.global_step.numpy())
    train_function = model.make_train_function()
    model.stop_training = False
    model.exchange.follow_masks()
    hooks.on_train_begin()
    while step < timeline.total_steps and not model.stop_training:
        epoch = timeline.epoch_of(step)
        hooks.on_epoch_begin(epoch)
        end = min(timeline.epoch_end(epoch), timeline.total_steps)
        while step < end and not model.stop_training:
            hooks.on_train_batch_begin(step)
            logs = train_function(stream)
            hooks.on_train_batch_end(step, logs)
            step += 1
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
    sums = np.zeros([len(blocks), 3])
    with model.evaluation_weights():
        for i in range(world.rank, len(blocks), world.size):
            part = slice(blocks[i], blocks[i] + batch_size)
            sums[i] = model.evaluation_step(tf.constant(images[part]), tf.constant(labels[part])).numpy()
    total = collectives.allreduce_sum(tf.constant(sums), name="evaluation").numpy()
    correct, loss, count = total.sum(axis=0)
    return {"accuracy": correct / count, "loss": loss / count, "count": int(count)}
