"""The synchronous step: scale -> backward, allreduce -> unscale -> finite everywhere? -> update -> mask."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.data.stream import cut
from cnnopt.distributed import collectives
from cnnopt.model.flat import Vectors, View, read
from cnnopt.model.precision import DynamicLossScale
from cnnopt.model.pruning import Pruner
from cnnopt.training.buckets import Exchange
from cnnopt.training.stream import Stream
from cnnopt.training.xla import Compiler


class RunState:
    """The run's variables that are not weights of the network. Keras counts every variable that is an attribute of a
    model as one of its weights, but does not look into this object.
    """

    def __init__(self, vectors: Vectors, *, average: bool) -> None:
        # Each variable needs a name, because Horovod broadcasts by name.
        def variable(initial: Any, name: str, dtype: tf.DType = tf.float32) -> tf.Variable:
            return tf.Variable(initial, trainable=False, name=name, dtype=dtype)

        # Both are float32 [weights]. masks: 1 for a kept weight. weight_decay: the part of a weight that is added to
        # its gradient.
        self.masks = variable(tf.ones_like(vectors.weights), "masks")
        self.weight_decay = variable(tf.zeros_like(vectors.weights), "weight_decay")
        both = {"average_of_weights": vectors.weights, "average_of_moving": vectors.moving}
        self.averaged = [variable(vector, name) for name, vector in both.items() if average]
        self.global_step = variable(0, "global_step", tf.int64)
        # Steps that were skipped since the last finite one, and the step at which the run diverged.
        self.skipped_in_a_row, self.diverged = (
            variable(0, name, tf.int64) for name in ("skipped_in_a_row", "diverged")
        )
        self.requests, self.granted = variable([0, 0], "requests"), variable([0, 0], "granted")
        # Sums over this rank's part of the epoch so far: losses, steps, accuracies, steps.
        self.sums = variable([0, 0, 0, 0], "sums")


class SynchronousModel(keras.Model):
    """A network whose ``train_step`` leaves every rank with the same numbers. ``build.build_model`` makes it.

    Its layers have views of two vectors (model/flat.py). A step allreduces (buckets.py) three things: the gradients;
    the changes of BatchNorm's moving statistics, so that these too are equal on all ranks after every step; and two
    requests. A rank that must stop or save sets its request to 1. All ranks see the request after the same step, and
    no extra collective is needed.
    """

    STOP, SAVE = 0, 1

    vectors: Vectors
    #: float32 [total steps]: the learning rate of each step of the run.
    learning_rates: tf.Tensor
    label_smoothing: float
    ema: float
    pruner: Pruner
    loss_scale: DynamicLossScale
    exchange: Exchange
    run: RunState
    compiler: Compiler

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that Horovod's callback broadcasts, beside the optimizer's: a few vectors hold all views."""
        return [self.vectors.weights, self.vectors.moving, self.run.masks, *self.run.averaged]

    @property
    def epoch_sums(self) -> list[View]:
        """The four entries of ``run.sums``, as scalar variables."""
        return [View(self.run.sums, i, tf.TensorShape([]), f"sum{i}") for i in range(4)]

    def end_epoch(self) -> dict[str, float]:
        """The mean loss and accuracy of this rank's part of the epoch; nan if float16 skipped all its steps.

        Resets the sums to 0.
        """
        sums = self.run.sums.numpy()
        self.run.sums.assign(tf.zeros(4))
        loss, accuracy = (float(total / steps) if steps else math.nan for total, steps in (sums[:2], sums[2:]))
        return {"loss": loss, "accuracy": accuracy}

    def losses_of(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The cross-entropy of each image, float32 [batch], from labels int64 [batch] and logits [batch, classes]."""
        classes = logits.shape[-1]
        targets = tf.one_hot(labels, classes) * (1 - self.label_smoothing) + self.label_smoothing / classes
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    def train(self, stream: Stream, first: int, last: int, *, several: bool = False) -> dict[str, tf.Tensor]:
        """Do the steps ``first`` to ``last - 1`` in one call of a TensorFlow function. Returns what the last returns.

        ``several``: calls have different numbers of steps, and the loop over them runs on the device.
        """
        steps = tf.constant(last - first) if several else None
        return self.train_call(stream.given(first, last), stream.item, steps)

    @functools.cached_property
    def train_call(self) -> tf.types.experimental.PolymorphicFunction:
        """``train``, as a TensorFlow function of a stream's tensors. It is traced once for each stream."""
        # A function that is not inlined is optimized by itself, so in a loop a step computes the same bits as alone.
        step = tf.function(self.train_step, autograph=False, experimental_attributes={"_noinline": True})

        def call(given: Any, item: Callable[..., Any], steps: tf.Tensor | None) -> dict[str, tf.Tensor]:
            if steps is None:
                return self.train_step(item(given, 0))
            nothing = {"loss": 0.0, "finite": True, "diverged": tf.constant(0, tf.int64)}
            return tf.while_loop(
                lambda i, _: i < steps,
                lambda i, _: (i + 1, step(item(given, i))),
                (0, nothing),
                parallel_iterations=1,
            )[1]

        # AutoGraph would rewrite each function called, Horovod's too. That takes seconds, and none needs it.
        return tf.function(call, autograph=False)

    def train_step(self, data: tuple[tf.Tensor, ...]) -> dict[str, tf.Tensor]:
        """Do one update from this rank's part of the global batch; ``data`` are arguments of ``forward_backward``.

        Returns the ``loss``, whether all sums of the exchange are ``finite``, and the step at which the run
        ``diverged``, 0 for none: the first one whose sums are not finite though the loss scale cannot be the cause.
        """
        packed, loss, correct = self._forward_backward(*data)
        return self._update(self.exchange.send(packed), loss, correct)

    # XLA may compile both. What Horovod sends is between them, outside of what is compiled.
    _forward_backward = functools.cached_property(lambda self: self.compiler.compiled(self.forward_backward))
    _update = functools.cached_property(lambda self: self.compiler.compiled(self.update))

    def forward_backward(
        self, images: tf.Tensor, labels: tf.Tensor, sources: tf.Tensor | None = None, draws: tf.Tensor | None = None
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor]:
        """Compute for uint8 images [shard, 32, 32, 3] and int64 labels, or for what ``draws`` (data/stream.py) cuts out
        of all images: the vectors to send, which are the gradients of each stage's weights times the loss scale, the
        changes of the moving statistics and the requests; the mean loss; the share that is classified correctly.
        """
        if draws is not None:
            images, labels = cut(images, sources, draws, tf.gather), tf.gather(labels, draws[0])
        vectors = self.vectors
        stages, moving = tf.split(vectors.weights, vectors.stages), vectors.moving.read_value()
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(stages)
            with vectors.reading(stages, moving, self.compute_dtype):
                logits = self(images, training=True)
                moved = vectors.moved()
            loss = tf.reduce_mean(self.losses_of(labels, logits))
            scaled_loss = loss * self.loss_scale.value if self.loss_scale.enabled else loss
        gradients = tape.gradient(scaled_loss, stages)
        # The last stage's gradients are ready first. The changes and requests, ready even earlier, go with them.
        last = tf.concat([gradients[-1], moved - moving, self.run.requests.read_value()], 0)
        correct = tf.reduce_mean(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float32))
        return self.exchange.pack([*gradients[:-1], last]), loss, correct

    def update(self, sums: list[tf.Tensor], loss: tf.Tensor, correct: tf.Tensor) -> dict[str, tf.Tensor]:
        """Do all that follows the exchange, from its sums over all ranks: the update, the counters, the metrics."""
        vectors, scaling = self.vectors, self.loss_scale.enabled
        means, finite = self.exchange.unpack(sums)
        gradient, changes, granted = tf.split(means, [vectors.weights.shape[0], vectors.moving.shape[0], 2])
        self.run.granted.assign(granted)
        metrics = tf.stack([loss, 1.0, correct, 1.0])
        if scaling:
            gradient /= self.loss_scale.value
            # The forward pass of a skipped step may have overflowed. Its infinities would stay in both for ever.
            changes, metrics = (tf.where(finite, values, 0.0) for values in (changes, metrics))
        vectors.moving.assign_add(changes)
        self.run.sums.assign_add(metrics)
        # A skipped step computes as every other, and gets the old values back. A condition would be asked of the host.
        learned = [vectors.weights, *self.run.averaged, *self.optimizer.variables] if scaling else []
        before = [variable.read_value() for variable in learned]
        self.learn(gradient)
        for variable, old in zip(learned, before, strict=True):
            variable.assign(tf.where(finite, variable, old))
        self.loss_scale.update(finite)
        return {"loss": loss, "finite": finite, "diverged": self._count(finite)}

    def _count(self, finite: tf.Tensor) -> tf.Tensor:
        """Count this step. Returns the step at which the run diverged, or 0."""
        run = self.run
        skipped = tf.where(~finite, run.skipped_in_a_row + 1, 0)
        step = run.global_step + 1
        now = (run.diverged == 0) & (skipped > self.loss_scale.most_skipped)
        diverged = tf.where(now, step, run.diverged)
        run.skipped_in_a_row.assign(skipped)
        run.global_step.assign(step)
        run.diverged.assign(diverged)
        return diverged

    def learn(self, gradient: tf.Tensor) -> None:
        """Apply weight decay, optimizer, masks and moving average of weights. Gradients of pruned weights are 0."""
        weights = self.vectors.weights
        decayed = gradient + self.run.weight_decay * weights
        self.optimizer.learning_rate.assign(tf.gather(self.learning_rates, self.run.global_step))
        # The exchange has aggregated the gradients.
        self.optimizer.apply_gradients([(decayed, weights)], skip_gradients_aggregation=True)
        weights.assign(weights * self.run.masks)
        # The decay is smaller in early steps, so that the average soon forgets the initial weights.
        age = tf.cast(self.run.global_step, tf.float32)
        decay = tf.minimum(self.ema, (1 + age) / (10 + age))
        for average, vector in self._averages():
            average.assign_sub((1 - decay) * (average - vector))

    def _averages(self) -> list[tuple[tf.Variable, tf.Variable]]:
        return list(zip(self.run.averaged, (self.vectors.weights, self.vectors.moving), strict=False))

    @functools.cached_property
    def evaluation_step(self) -> Callable[[tf.Tensor, tf.Tensor, tf.Tensor], tf.Tensor]:
        """``evaluation_sums`` as a TensorFlow function, traced once for all sizes."""
        images, labels = tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([None], tf.int64)
        signature = [images, labels, tf.TensorSpec([], tf.int64)]
        step = tf.function(self.evaluation_sums, signature, autograph=False, jit_compile=self.compiler.enabled or None)
        return self.compiler.announced(step, "the evaluation")

    def evaluation_sums(self, images: tf.Tensor, labels: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        """Of the first ``count`` images, float64 [3]: number correct, sum of cross-entropies, number of images."""
        vectors = self.vectors
        stages = tf.split(vectors.weights, vectors.stages)
        with vectors.reading(stages, vectors.moving.read_value(), self.compute_dtype):
            logits = self(images, training=False)
        correct = tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float64)
        losses = tf.cast(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), tf.float64)
        counts = tf.range(tf.size(labels, tf.int64)) < count
        sums = [tf.reduce_sum(tf.where(counts, values, 0.0)) for values in (correct, losses)]
        return tf.stack([*sums, tf.cast(count, tf.float64)])

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within this context the network has its averaged weights, if ``--ema`` keeps an average."""
        kept = [(vector, tf.identity(vector)) for _, vector in self._averages()]
        for average, vector in self._averages():
            vector.assign(average)
        try:
            yield
        finally:
            for vector, value in kept:
                vector.assign(value)

    def named_state(self) -> dict[str, tf.Variable]:
        """All variables that a resumed run needs, by stable names. Vectors are split into one part for each weight."""
        iteration, *slots = self.optimizer.variables
        moments = [w.like(s, s.name.replace("weights:0", w.name)) for w in self.trainable_weights for s in slots]
        groups = {
            "weights": [(w.name, w) for w in self.weights],
            "optimizer": [(v.name, v) for v in (iteration, *moments)],
            "masks": [(m.name, m) for m in self.pruner.masks],
            "loss_scale": [(v.name, v) for v in self.loss_scale.variables],
            "ema": [(f"ema/{w.name}:0", self._average_of(w)) for w in self.weights] if self.run.averaged else [],
        }
        state = {
            f"{group}/{i:03d}/{name}": variable
            for group, members in groups.items()
            for i, (name, variable) in enumerate(members)
        }
        return {**state, "global_step": self.run.global_step}

    def arrays(self) -> dict[str, np.ndarray]:
        """The values of ``named_state``, with one copy from the device for each vector."""
        state = self.named_state()
        return dict(zip(state, read(list(state.values())), strict=True))

    def _average_of(self, weight: tf.Variable) -> tf.Variable:
        for average, vector in self._averages():
            if getattr(weight, "vector", None) is vector:
                return weight.like(average, weight.name)
        # A weight that is neither learned nor a moving statistic does not change, so it is its own average.
        return weight

    def prune(self, step: int) -> None:
        """Renew the masks that are due after ``step`` steps. The averaged weights lose the same entries."""
        self.pruner.update(step)
        self.exchange.follow_masks()
        for average in self.run.averaged[:1]:
            average.assign(average * self.run.masks)

    def agree(self) -> str:
        """Compare weights and masks with those of the other ranks. Returns their digest."""
        variables = [*self.weights, *self.pruner.masks]
        return collectives.agree({v.name: value for v, value in zip(variables, read(variables), strict=True)})
