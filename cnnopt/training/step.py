"""The synchronous step: scale -> backward, allreduce -> unscale -> finite everywhere? -> update -> mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tensorflow as tf
import tf_keras as keras

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.model.flat import Vectors, View, views
from cnnopt.model.precision import DynamicLossScale, Precision
from cnnopt.model.pruning import Pruner, prunable_kernels
from cnnopt.model.resnet import FLOAT, Parts, pixel_statistics, resnet
from cnnopt.optim import muon
from cnnopt.optim.sgd import SGD
from cnnopt.schedules import LearningRate, PruningWindow, Timeline, parse_drops, parse_duration
from cnnopt.training.buckets import Exchange, choose


class _RunState:
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
        self.requests, self.granted = variable([0, 0], "requests"), variable([0, 0], "granted")
        # Sums over this rank's part of the epoch so far: losses, steps, accuracies, steps.
        self.sums = variable([0, 0, 0, 0], "sums")


class SynchronousModel(keras.Model):
    """A network whose ``train_step`` leaves every rank with the same numbers. ``build_model`` makes it.

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
    run: _RunState

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables that Horovod's callback broadcasts, beside the optimizer's: a few vectors hold all views."""
        return [self.vectors.weights, self.vectors.moving, self.run.masks, *self.run.averaged]

    @property
    def epoch_sums(self) -> list[View]:
        """The four entries of ``run.sums``, as scalar variables."""
        return [View(self.run.sums, i, tf.TensorShape([]), f"sum{i}") for i in range(4)]

    def end_epoch(self) -> dict[str, float]:
        """The mean loss and accuracy of this rank's part of the epoch. Resets the sums to 0."""
        loss, losses, accuracy, accuracies = self.run.sums.numpy()
        self.run.sums.assign(tf.zeros(4))
        return {"loss": float(loss / max(losses, 1)), "accuracy": float(accuracy / max(accuracies, 1))}

    def losses_of(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """The cross-entropy of each image, float32 [batch], from labels int64 [batch] and logits [batch, classes]."""
        classes = logits.shape[-1]
        targets = tf.one_hot(labels, classes) * (1 - self.label_smoothing) + self.label_smoothing / classes
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    # Without this, AutoGraph rewrites each function called below, Horovod's too. That takes seconds, and none needs it.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Do one update from this rank's shard of the global batch: uint8 images [shard, 32, 32, 3], int64 labels."""
        vectors, scaling = self.vectors, self.loss_scale.enabled
        gradients, changes, loss, correct = self.forward_backward(*data)
        # The last stage's gradients are ready first. The changes and requests, ready even earlier, go with them.
        last = tf.concat([gradients[-1], changes, self.run.requests.read_value()], 0)
        means, finite = self.exchange([*gradients[:-1], last])
        gradient, changes, granted = tf.split(means, [vectors.weights.shape[0], vectors.moving.shape[0], 2])
        self.run.granted.assign(granted)
        sums = tf.stack([loss, 1.0, correct, 1.0])
        if scaling:
            gradient /= self.loss_scale.value
            # The forward pass of a skipped step may have overflowed. Its infinities would stay in both for ever.
            changes, sums = (tf.where(finite, values, 0.0) for values in (changes, sums))
        vectors.moving.assign_add(changes)
        self.run.sums.assign_add(sums)
        if scaling:
            tf.cond(finite, lambda: self.update(gradient), tf.no_op)
        else:
            self.update(gradient)
        self.loss_scale.update(finite)
        self.run.global_step.assign_add(1)
        return {"loss": loss, "finite": finite}

    def forward_backward(
        self, images: tf.Tensor, labels: tf.Tensor
    ) -> tuple[list[tf.Tensor], tf.Tensor, tf.Tensor, tf.Tensor]:
        """Compute for one shard: the gradients of each stage's weights, times the loss scale; the changes of the
        moving statistics; the mean loss; the share of images that are classified correctly.
        """
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
        correct = tf.reduce_mean(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float32))
        return gradients, moved - moving, loss, correct

    def update(self, gradient: tf.Tensor) -> tf.Operation:
        """Apply weight decay, optimizer, masks and moving average of weights. Gradients of pruned weights are 0."""
        weights = self.vectors.weights
        decayed = gradient + self.run.weight_decay * weights
        self.optimizer.learning_rate.assign(tf.gather(self.learning_rates, self.run.global_step))
        # The exchange has aggregated the gradients. Keras' aggregation cannot be traced inside the tf.cond of float16.
        self.optimizer.apply_gradients([(decayed, weights)], skip_gradients_aggregation=True)
        weights.assign(weights * self.run.masks)
        # The decay is smaller in early steps, so that the average soon forgets the initial weights.
        age = tf.cast(self.run.global_step, tf.float32)
        decay = tf.minimum(self.ema, (1 + age) / (10 + age))
        for average, vector in self._averages():
            average.assign_sub((1 - decay) * (average - vector))
        return tf.no_op()

    def _averages(self) -> list[tuple[tf.Variable, tf.Variable]]:
        return list(zip(self.run.averaged, (self.vectors.weights, self.vectors.moving), strict=False))

    @tf.function(
        input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([None], tf.int64)],
    )
    def evaluation_step(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """float64 [3]: number correct, sum of cross-entropies, number of images."""
        vectors = self.vectors
        stages = tf.split(vectors.weights, vectors.stages)
        with vectors.reading(stages, vectors.moving.read_value(), self.compute_dtype):
            logits = self(images, training=False)
        correct = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float64))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.stack([correct, tf.reduce_sum(tf.cast(losses, tf.float64)), tf.cast(tf.size(labels), tf.float64)])

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
        names = [(w.name, w) for w in self.weights] + [(m.name, m) for m in self.pruner.masks]
        return collectives.agree({name: variable.numpy() for name, variable in names})


def _exchange(
    config: TrainConfig, model: SynchronousModel, total_steps: int, *, ranks: int, bucketed: bool
) -> Exchange:
    """Make the exchange of the gradients, the changes of moving statistics, and two requests."""
    *stages, last = model.vectors.stages
    sizes = [*stages, last + model.vectors.moving.shape[0] + 2]
    choice = choose(
        config.exchange,
        size=sum(sizes),
        prunable=sum(kernel.size for kernel in model.pruner.kernels),
        sparsity=model.pruner.mean_target(total_steps),
        ranks=ranks,
        wire=config.wire_dtype,
        deterministic=config.deterministic,
    )
    # With --deterministic, TensorFlow refuses to read the clock. The exchange then counts as 0 s.
    clock = (lambda: tf.constant(0.0, tf.float64)) if config.deterministic else tf.timestamp
    sizes = sizes if bucketed else [sum(sizes)]
    return Exchange(sizes, model.run.masks, ranks=ranks, choice=choice, wire=config.wire_dtype, clock=clock)


def _optimizer(name: str, rate: float, decay: float, vectors: Vectors) -> keras.optimizers.Optimizer:
    if name == "adam":
        return keras.optimizers.Adam(rate, jit_compile=False)
    if name == "muon":
        return muon.Muon(rate, momentum=0.9, weight_decay=decay, runs=vectors.runs())
    return SGD(rate, momentum=0.9)


def build_model(
    config: TrainConfig, data: Dataset, timeline: Timeline, precision: Precision, *, ranks: int,
    parts: Parts = FLOAT, bucketed: bool = True,
) -> SynchronousModel:  # fmt: skip
    """Build the network, its optimizer, masks and schedules from ``config``. ``config.seed`` decides the weights.

    ``ranks``: the number of ranks that exchange; 1 sends nothing. ``parts``: the layers that the network is made of.
    ``bucketed``: True sends gradients in buckets, each as soon as it is ready; False sends all in one.
    """
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    precision.apply()
    mean, std = pixel_statistics(data.train_images, config.normalize)
    with views() as made:
        network = resnet(config.depth, data.num_classes, mean=mean, std=std, widen=precision.widen, parts=parts)
    vectors = Vectors(made)
    model = SynchronousModel(network.inputs, network.outputs, name=network.name)

    begin, end, frequency = (
        timeline.steps(parse_duration(d)) for d in (config.prune_begin, config.prune_end, config.prune_frequency)
    )
    kernels, run = prunable_kernels(model), _RunState(vectors, average=bool(config.ema))
    model.pruner = Pruner(
        kernels,
        [kernel.like(run.masks, f"mask/{kernel.name}:0") for kernel in kernels],
        schedule=config.sparsity_schedule,
        final_sparsity=config.sparsity,
        initial_sparsity=config.initial_sparsity,
        window=PruningWindow.aligned(begin, end, frequency),
        scope=config.sparsity_scope,
    )
    rate = LearningRate(
        peak=config.peak_rate(),
        warmup_steps=timeline.steps(parse_duration(config.warmup)),
        total_steps=timeline.total_steps,
        schedule=config.lr_schedule,
        drops=tuple((timeline.steps(when), factor) for when, factor in parse_drops(config.lr_drops)),
    )
    decay, orthogonal = config.weight_decay, config.optimizer == "muon"
    assert decay is not None
    if orthogonal:
        collectives.assert_same("--optimizer muon", muon.digest(), remedy="choose --optimizer sgd")
    model.compile()
    # The optimizer is not given to compile(), which would wrap it in Keras' own loss scale under mixed_float16.
    model.optimizer = _optimizer(config.optimizer, rate.peak, decay, vectors)
    model.optimizer.build([vectors.weights])
    for kernel in kernels:
        # Muon applies weight decay to the kernels of convolutions itself.
        if not (orthogonal and kernel.shape.rank == 4):
            kernel.like(run.weight_decay, kernel.name).assign(tf.fill(kernel.shape, decay))
    model.vectors, model.run = vectors, run
    model.learning_rates = tf.constant([rate(step) for step in range(timeline.total_steps)], tf.float32)
    model.label_smoothing, model.ema = config.label_smoothing, config.ema
    model.loss_scale = DynamicLossScale(precision.scales_loss or config.wire_dtype == "float16")
    model.exchange = _exchange(config, model, timeline.total_steps, ranks=ranks, bucketed=bucketed)
    return model
