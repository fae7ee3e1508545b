"""One vector holds all weights of a network, another all its moving statistics. The layers have views of them.

So a step is a few operations over whole vectors, and it sends slices of these vectors to the other ranks. Keras'
layers, the masks, checkpoints and TensorBoard use a ``View`` like an ordinary variable.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from cnnopt.model import topology


class View(tf.Variable):
    """Some entries of a variable [n], as a variable with another shape and name. All are float32.

    Within ``Vectors.reading``, ``current`` is the view's value: a tensor, which may have the compute type.
    """

    def __init__(self, vector: tf.Variable, offset: int, shape: tf.TensorShape, name: str) -> None:
        self.vector, self.offset, self.size = vector, offset, shape.num_elements()
        self._shape, self._name = shape, name
        self.current: tf.Tensor | None = None

    name = property(lambda self: self._name)
    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self.vector.dtype)
    trainable = property(lambda self: self.vector.trainable)

    def like(self, vector: tf.Variable, name: str) -> View:
        """The same entries of another vector."""
        return View(vector, self.offset, self.shape, name)

    def value(self) -> tf.Tensor:
        """The current value, in the view's shape."""
        if self.current is not None:
            return self.current
        return tf.reshape(self.vector[self.offset : self.offset + self.size], self.shape)

    read_value = value

    def numpy(self) -> np.ndarray:
        """A copy of the current value."""
        return self.value().numpy()

    def assign(self, value: Any, *_: Any, **__: Any) -> None:
        """Set the entries. Within ``reading``, only ``current`` is set. Keras' other arguments are ignored."""
        if self.current is None:
            flat = tf.reshape(tf.cast(value, self.dtype), [-1])
            self.vector[self.offset : self.offset + self.size].assign(flat)
        else:
            self.current = value

    def assign_add(self, delta: Any, *_: Any, **__: Any) -> None:
        """Add ``delta`` to the entries."""
        self.assign(self.value() + delta)

    def assign_sub(self, delta: Any, *_: Any, **__: Any) -> None:
        """Subtract ``delta`` from the entries."""
        self.assign(self.value() - delta)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        # ``dtype`` is ignored: Keras asks for float32 and casts to the compute type, which ``current`` has already.
        return self.value()

    def __repr__(self) -> str:
        return f"<View {self.name!r} {self.shape}>"


def read(variables: Sequence[tf.Variable]) -> list[np.ndarray]:
    """The value of each variable. A vector that has many views is copied from its device once."""
    vectors = {id(view.vector): view.vector for view in variables if isinstance(view, View)}
    values = {key: vector.numpy() for key, vector in vectors.items()}
    return [
        values[id(variable.vector)][variable.offset : variable.offset + variable.size].reshape(variable.shape)
        if isinstance(variable, View)
        else variable.numpy()
        for variable in variables
    ]


@contextlib.contextmanager
def views() -> Iterator[list[View]]:
    """Within this context, the weights and moving statistics of new layers are views. The list has them as created."""
    made: list[View] = []

    def creator(make: Any, **settings: Any) -> tf.Variable:
        variable = make(**settings)
        # Other variables are constants or Keras' counters. They stay as they are.
        if not (variable.dtype.is_floating and (variable.trainable or "moving_" in variable.name)):
            return variable
        vector = make(initial_value=tf.reshape(variable, [-1]), trainable=variable.trainable)
        made.append(View(vector, 0, variable.shape, variable.name))
        return made[-1]

    with tf.variable_creator_scope(creator):
        yield made


@dataclass
class _Stage:
    """The weights of a stage, in the order of the vector. Weights of one shape are neighbours."""

    kernels: list[View] = field(default_factory=list)
    others: list[View] = field(default_factory=list)

    @property
    def views(self) -> list[View]:
        return [*self.kernels, *self.others]


class Vectors:
    """``weights``, float32 [n], and ``moving``, float32 [m]. The views in ``made`` become views of these two vectors.

    Weights are in the order of the stages, with the kernels of convolutions first in each stage. The last stage has
    three quarters of all weights. Its gradients are ready when two thirds of the backward pass are still to come.
    """

    def __init__(self, made: Sequence[View]) -> None:
        self._stages = [_Stage() for _ in topology.FILTERS]
        for view in made:
            if view.trainable:
                stage = self._stages[topology.stage_of(view.name) - 1]
                (stage.kernels if view.shape.rank == 4 else stage.others).append(view)
        self._moving = [view for view in made if not view.trainable]
        #: The number of weights of each stage.
        self.stages = [_size(stage.views) for stage in self._stages]
        self.weights = _joined([view for stage in self._stages for view in stage.views], "weights", trainable=True)
        self.moving = _joined(self._moving, "moving", trainable=False)

    def runs(self) -> list[tuple[int, tf.TensorShape | None]]:
        """The parts of ``weights`` in order: (number of adjacent kernels, their shape), or (number of others, None)."""
        found: list[tuple[int, tf.TensorShape | None]] = []
        for stage in self._stages:
            for shape, run in itertools.groupby(stage.kernels, key=lambda view: view.shape):
                found.append((len(list(run)), shape))
            found.append((_size(stage.others), None))
        return found

    @contextlib.contextmanager
    def reading(self, stages: Sequence[tf.Tensor], moving: tf.Tensor, compute: str) -> Iterator[None]:
        """Within this context, the layers compute with ``stages``, float32 each, and ``moving``, float32 [m]. Kernels
        are cast to ``compute``.
        """
        views, parts = [], []
        for stage, flat in zip(self._stages, stages, strict=True):
            kernels, others = tf.split(flat, [_size(stage.kernels), _size(stage.others)])
            # One cast for all kernels. Keras would use one for each kernel.
            parts += _split(tf.cast(kernels, compute), stage.kernels) + _split(others, stage.others)
            views += stage.views
        parts += _split(moving, self._moving)
        views += self._moving
        for view, part in zip(views, parts, strict=True):
            view.current = part
        try:
            yield
        finally:
            for view in views:
                view.current = None

    def moved(self) -> tf.Tensor:
        """The moving statistics that the layers have assigned, float32 [m]. To be called within ``reading``."""
        return tf.concat([_reshaped(view.value(), tf.TensorShape([view.size])) for view in self._moving], 0)


def _size(views: Sequence[View]) -> int:
    return sum(view.size for view in views)


def _split(flat: tf.Tensor, views: Sequence[View]) -> list[tf.Tensor]:
    parts = tf.split(flat, [view.size for view in views])
    return [_reshaped(part, view.shape) for part, view in zip(parts, views, strict=True)]


def _reshaped(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    # Most tensors already have their shape, and each reshape adds two operations to a step.
    return tensor if tensor.shape == shape else tf.reshape(tensor, shape)


def _joined(views: Sequence[View], name: str, *, trainable: bool) -> tf.Variable:
    vector = tf.Variable(tf.concat([view.vector for view in views], 0), name=name, trainable=trainable)
    offset = 0
    for view in views:
        view.vector, view.offset = vector, offset
        offset += view.size
    return vector
