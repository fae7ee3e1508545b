"""The training stream as the step takes it: batches that the host has cut, or images that stay on the device."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from cnnopt.data.datasets import Dataset
from cnnopt.data.stream import Draws, batches

_kept: list[tf.data.Iterator] = []


class Stream(Protocol):
    """Batches for ``SynchronousModel.train``."""

    def given(self, first: int, last: int) -> Any:
        """The tensors that the steps ``first`` to ``last - 1`` take, for ``item``. Streams go forward only."""

    @staticmethod
    def item(given: Any, i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The arguments of ``SynchronousModel.forward_backward`` for step ``first + i``, in a graph."""


class HostStream:
    """Batches that numpy cuts on the host, in the order of ``iterator``."""

    def __init__(self, iterator: tf.data.Iterator) -> None:
        self.iterator = iterator

    def given(self, first: int, last: int) -> tf.data.Iterator:
        """The iterator."""
        return self.iterator

    @staticmethod
    def item(given: tf.data.Iterator, i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The next batch."""
        return next(given)


class DeviceStream:
    """All images stay on the device, which cuts the batches. The host sends what was drawn for the steps of a call."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, draws: Draws) -> None:
        self.draws = draws
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draws")
        self._ahead: dict[int, Future[np.ndarray]] = {}
        self.resident = tf.constant(images.reshape(-1, 3)), tf.constant(labels, tf.int64), tf.constant(draws.sources)
        # int64 [steps, 3, shard]: TensorFlow would keep int32 on the host. The number of steps must not trace again.
        self.drawn = tf.Variable(np.zeros([0, 3, draws.shard], np.int64), trainable=False, shape=[None, 3, draws.shard])

    def given(self, first: int, last: int) -> tuple[tf.Tensor | tf.Variable, ...]:
        """The resident tensors and what was drawn for the steps."""
        drawn = [self._ahead.pop(s).result() if s in self._ahead else self.draws(s) for s in range(first, last)]
        # While the device computes these steps, the thread draws as many more.
        for step in set(range(last, 2 * last - first)) - self._ahead.keys():
            self._ahead[step] = self._thread.submit(self.draws, step)
        self.drawn.assign(np.stack(drawn))
        return *self.resident, self.drawn

    @staticmethod
    def item(given: tuple[tf.Tensor | tf.Variable, ...], i: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """The resident tensors and what was drawn for one step."""
        *resident, draws = given
        return *resident, draws[i]


@contextlib.contextmanager
def training_stream(
    data: Dataset, draws: Draws, *, first_step: int, last_step: int, resident: bool = False
) -> Iterator[Stream]:
    """This rank's parts of the global batches ``first_step`` to ``last_step - 1``.

    ``resident``: all images stay on the device. Otherwise a thread prepares batches ahead of the step. On leaving
    without an error, its iterator is drained. It is kept and never destroyed: TensorFlow would hold Python's lock while
    it waits for the iterator's thread, and this thread may be waiting for the same lock.
    """
    if resident:
        yield DeviceStream(data.train_images, data.train_labels, draws)
        return
    left = threading.Event()

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        shards = batches(data.train_images, data.train_labels, draws, first_step=first_step, last_step=last_step)
        return itertools.takewhile(lambda _: not left.is_set(), shards)

    signature = (tf.TensorSpec([draws.shard, 32, 32, 3], tf.uint8), tf.TensorSpec([draws.shard], tf.int64))
    options = tf.data.Options()
    # There is nothing to tune, and the thread that would tune may hold up the end of the process.
    options.autotune.enabled = False
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(4)
    iterator = iter(dataset.with_options(options))
    _kept.append(iterator)
    yield HostStream(iterator)
    left.set()
    for _ in iterator:
        pass
