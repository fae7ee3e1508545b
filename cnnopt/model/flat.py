"""All weights of a network in one vector and all its moving statistics in another; its layers have views of them.

A step is then a few operations over whole vectors, and what it sends to the other ranks is slices of them. Keras'
layers, the masks, checkpoints and TensorBoard take a ``View`` for a variable of its own.
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
    """Some entries of a variable [n] as a variable of another shape and name; all are float32.

    ``current`` is what it holds within ``reading``: a tensor, which may be of the compute type.
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
        """What it holds now, of its shape."""
        if self.current is not None:
            return self.current
        return tf.reshape(self.vector[self.offset : self.offset + self.size], self.shape)

    read_value = value

    def numpy(self) -> np.ndarray:
        """A copy of what it holds."""
        return self.value().numpy()

    def assign(self, value: Any, *_: Any, **__: Any) -> None:
        """Set its entries; within ``reading`` its reader's alone. Takes what else Keras gives to a variable."""
        if self.current is None:
            flat = tf.reshape(tf.cast(value, self.dtype), [-1])
            self.vector[self.offset : self.offset + self.size].assign(flat)
        else:
            self.current = value

    def assign_add(self, delta: Any, *_: Any, **__: Any) -> None:
        """Add to its entries."""
        self.assign(self.value() + delta)

    def __tf_tensor__(self, dtype: tf.DType | None = None, name: str | None = None) -> tf.Tensor:
        # Keras asks for float32, to cast it to the compute type, which ``current`` is of by now.
        return self.value()

    def __repr__(self) -> str:
        return f"<View {self.name!r} {self.shape}>"


@contextlib.contextmanager
def views() -> Iterator[list[View]]:
    """Within it layers make views of their weights and moving statistics; the list has them, in the order made."""
    made: list[View] = []

    def creator(make: Any, **settings: Any) -> tf.Variable:
        variable = make(**settings)
        # What is neither is a constant, or one of Keras' counters.
        if not (variable.dtype.is_floating and (variable.trainable or "moving_" in variable.name)):
            return variable
        vector = make(initial_value=tf.reshape(variable, [-1]), trainable=variable.trainable)
        made.append(View(vector, 0, variable.shape, variable.name))
        return made[-1]

    with tf.variable_creator_scope(creator):
        yield made


@dataclass
class _Stage:
    """The weights of a stage, in the order of the vector; those of one shape are neighbours."""

    kernels: list[View] = field(default_factory=list)
    others: list[View] = field(default_factory=list)

    @property
    def views(self) -> list[View]:
        return [*self.kernels, *self.others]


class Vectors:
    """``weights`` and ``moving``, float32 [n] and [m]: what ``made``, views of vectors of their own, become views of.

    Weights are in the order of the stages, in each of which the kernels of convolutions come first. The last stage has
    three quarters of all weights, and their gradients are there when two thirds of the backward pass are to come.
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
        """How ``weights`` are made up: the number of kernels of a shape side by side, or of other weights and None."""
        found: list[tuple[int, tf.TensorShape | None]] = []
        for stage in self._stages:
            for shape, run in itertools.groupby(stage.kernels, key=lambda view: view.shape):
                found.append((len(list(run)), shape))
            found.append((_size(stage.others), None))
        return found

    @contextlib.contextmanager
    def reading(self, stages: Sequence[tf.Tensor], moving: tf.Tensor, compute: str) -> Iterator[None]:
        """Within it the layers compute with these, float32 in ``stages`` and [m]; kernels are of type ``compute``."""
        views, parts = [], []
        for stage, flat in zip(self._stages, stages, strict=True):
            kernels, others = tf.split(flat, [_size(stage.kernels), _size(stage.others)])
            # One operation for them all, where Keras has one for each.
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
        """Within ``reading``: the moving statistics that the layers have assigned, float32 [m]."""
        return tf.concat([_reshaped(view.value(), tf.TensorShape([view.size])) for view in self._moving], 0)


def _size(views: Sequence[View]) -> int:
    return sum(view.size for view in views)


def _split(flat: tf.Tensor, views: Sequence[View]) -> list[tf.Tensor]:
    parts = tf.split(flat, [view.size for view in views])
    return [_reshaped(part, view.shape) for part, view in zip(parts, views, strict=True)]


def _reshaped(tensor: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    # Most have their shape by now, and each reshape is two operations of a step.
    return tensor if tensor.shape == shape else tf.reshape(tensor, shape)


def _joined(views: Sequence[View], name: str, *, trainable: bool) -> tf.Variable:
    vector = tf.Variable(tf.concat([view.vector for view in views], 0), name=name, trainable=trainable)
    offset = 0
    for view in views:
        view.vector, view.offset = vector, offset
        offset += view.size
    return vector
