"""The synchronous step: scale -> backward, allreduce -> unscale -> finite everywhere? -> update -> mask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.model import fused, topology
from cnnopt.model.precision import DynamicLossScale, Precision
from cnnopt.model.pruning import Pruner, prunable_kernels
from cnnopt.model.resnet import FLOAT, Parts, pixel_statistics, resnet
from cnnopt.optim import muon
from cnnopt.optim.sgd import SGD
from cnnopt.schedules import LearningRate, PruningWindow, Timeline, parse_drops, parse_duration
from cnnopt.training.buckets import Exchange, choose


def _variable(initial: Any, dtype: tf.DType) -> Any:
    return field(default_factory=lambda: tf.Variable(initial, trainable=False, dtype=dtype))


@dataclass
class _RunState:
    """Variables beside the network's own. Held in an object that Keras does not look into, because a variable or a
    metric that is an attribute of a model counts among its weights.
    """

    averaged: list[tf.Variable]
    mask_of: list[tf.Variable | None]
    global_step: tf.Variable = _variable(0, tf.int64)  # noqa: RUF009 (a field with a factory, as dataclasses ask)
    requests: tf.Variable = _variable([0, 0], tf.float32)  # noqa: RUF009
    granted: tf.Variable = _variable([0, 0], tf.float32)  # noqa: RUF009
    loss: keras.metrics.Metric = field(default_factory=lambda: keras.metrics.Mean("loss"))
    accuracy: keras.metrics.Metric = field(default_factory=lambda: keras.metrics.Mean("accuracy"))


class SynchronousModel(keras.Model):
    """A network whose ``train_step`` leaves every rank with the same numbers.

    Allreduced in a step (buckets.py) are the gradients, the changes of BatchNorm's moving statistics (so that they too
    are equal on all ranks after every step) and two requests: a rank that was told to stop or to save puts 1 in its
    place, and all ranks see it after the same step, at no extra collective.
    """

    STOP, SAVE = 0, 1

    def prepare(
        self, *, learning_rate: np.ndarray, weight_decay: Sequence[float], label_smoothing: float, ema: float,
        pruner: Pruner, loss_scale: DynamicLossScale, exchange: Exchange,
    ) -> None:  # fmt: skip
        """Set what a step needs. ``learning_rate`` is float32 [total steps]: the rate of each step of the run;
        ``weight_decay`` is what of each trainable variable is added to its gradient.
        """
        self.learning_rates = tf.constant(learning_rate, tf.float32)
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.ema_decay = ema
        self.pruner = pruner
        self.loss_scale = loss_scale
        self.exchange = exchange
        self.moving = _moving_statistics(self)
        self.run = _RunState(
            averaged=[tf.Variable(w, trainable=False, name=f"ema/{w.name}") for w in self.weights] if ema else [],
            mask_of=pruner.masks_of(self.trainable_variables),
        )
        self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Averages over this rank's shard since the epoch began."""
        return [self.run.loss, self.run.accuracy]

    @property
    def epoch_sums(self) -> list[tf.Variable]:
        """What the metrics hold of this rank's part of the epoch so far."""
        return [variable for metric in self.metrics for variable in metric.variables]

    def losses_of(self, labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
        """Cross-entropy of each image, float32 [batch]; labels int64 [batch], logits [batch, classes]."""
        classes = logits.shape[-1]
        targets = tf.one_hot(labels, classes) * (1 - self.label_smoothing) + self.label_smoothing / classes
        return tf.nn.softmax_cross_entropy_with_logits(targets, logits)

    # Otherwise TensorFlow rewrites each function that is called below, Horovod's too: seconds that none of them needs.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: tuple[tf.Tensor, tf.Tensor]) -> dict[str, tf.Tensor]:
        """One update from this rank's shard of the global batch: uint8 images [shard, 32, 32, 3], int64 labels."""
        images, labels = data
        scaling = self.loss_scale.enabled
        scale = self.loss_scale.value.read_value() if scaling else 1.0
        moving_before = [m.read_value() for m in self.moving]
        with tf.GradientTape() as tape:
            logits = self(images, training=True)
            loss = tf.reduce_mean(self.losses_of(labels, logits))
            scaled_loss = loss * scale if scaling else loss
        gradients = tape.gradient(scaled_loss, self.trainable_variables)

        changes = [m - before for m, before in zip(self.moving, moving_before, strict=True)]
        shared, finite = self.exchange([*gradients, *changes, self.run.requests.read_value()])
        gradients, changes, granted = shared[: len(gradients)], shared[len(gradients) : -1], shared[-1]
        self.run.granted.assign(granted)
        if scaling:
            gradients = [g / scale for g in gradients]
            # The forward pass of a skipped step has overflowed perhaps, and would leave infinities here for good.
            changes = [tf.where(finite, change, 0.0) for change in changes]
        for variable, before, change in zip(self.moving, moving_before, changes, strict=True):
            variable.assign(before + change)
        if scaling:
            tf.cond(finite, lambda: self.update(gradients), tf.no_op)
        else:
            self.update(gradients)
        self.loss_scale.update(finite)
        self.run.global_step.assign_add(1)

        correct = tf.reduce_mean(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float32))
        # A skipped step is no part of the epoch's averages: its loss may be infinite.
        counts = tf.cast(finite, tf.float32) if scaling else None
        self.run.loss.update_state(tf.where(finite, loss, 0.0) if scaling else loss, counts)
        self.run.accuracy.update_state(correct, counts)
        return {"loss": loss, "finite": finite}

    def update(self, gradients: Sequence[tf.Tensor]) -> tf.Operation:
        """Weight decay, optimizer, masks, moving average of weights; gradients of pruned weights are 0."""
        variables = self.trainable_variables
        decayed = [
            g + decay * v if decay else g for g, v, decay in zip(gradients, variables, self.weight_decay, strict=True)
        ]
        self.optimizer.learning_rate.assign(tf.gather(self.learning_rates, self.run.global_step))
        # The exchange has aggregated them, and Keras' own aggregation cannot be traced inside the tf.cond of float16.
        self.optimizer.apply_gradients(zip(decayed, variables, strict=True), skip_gradients_aggregation=True)
        for variable, mask in zip(variables, self.run.mask_of, strict=True):
            if mask is not None:
                variable.assign(variable * mask)
        # A young average forgets its start sooner than an old one.
        age = tf.cast(self.run.global_step, tf.float32)
        decay = tf.minimum(self.ema_decay, (1 + age) / (10 + age))
        for average, weight in zip(self.run.averaged, self.weights, strict=False):
            average.assign_sub((1 - decay) * (average - weight))
        return tf.no_op()

    @tf.function(
        input_signature=[tf.TensorSpec([None, 32, 32, 3], tf.uint8), tf.TensorSpec([None], tf.int64)],
    )
    def evaluation_step(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """float64 [3]: number correct, sum of cross-entropies, number of images."""
        logits = self(images, training=False)
        correct = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=-1) == labels, tf.float64))
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        return tf.stack([correct, tf.reduce_sum(tf.cast(losses, tf.float64)), tf.cast(tf.size(labels), tf.float64)])

    @contextlib.contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """Within it the network has its averaged weights, where ``--ema`` keeps them."""
        kept = [w.numpy() for w in self.weights] if self.run.averaged else []
        for weight, average in zip(self.weights, self.run.averaged, strict=False):
            weight.assign(average)
        try:
            yield
        finally:
            for weight, value in zip(self.weights, kept, strict=False):
                weight.assign(value)

    def named_state(self) -> dict[str, tf.Variable]:
        """Every variable that a resumed run needs, by a stable name."""
        groups = {
            "weights": self.weights,
            "optimizer": self.optimizer.variables,
            "masks": self.pruner.masks,
            "loss_scale": self.loss_scale.variables,
            "ema": self.run.averaged,
        }
        state = {f"{group}/{i:03d}/{v.name}": v for group, members in groups.items() for i, v in enumerate(members)}
        return {**state, "global_step": self.run.global_step}

    def prune(self, step: int) -> None:
        """Renew the masks that are due after ``step`` steps; the averaged weights lose the same entries."""
        self.pruner.update(step)
        self.exchange.follow_masks()
        for average, weight in zip(self.run.averaged, self.weights, strict=False):
            for kernel, mask in zip(self.pruner.kernels, self.pruner.masks, strict=True):
                if kernel is weight:
                    average.assign(average * mask)

    def agree(self) -> str:
        """Compare weights and masks with the other ranks; returns their digest."""
        names = [(w.name, w) for w in self.weights] + [(m.name, m) for m in self.pruner.masks]
        return collectives.agree({name: variable.numpy() for name, variable in names})


def _moving_statistics(model: keras.Model) -> list[tf.Variable]:
    return [w for w in model.non_trainable_weights if "moving_" in w.name]


def _exchange(
    config: TrainConfig, model: keras.Model, pruner: Pruner, total_steps: int, *, ranks: int, bucketed: bool
) -> Exchange:
    """For the gradients, the changes of moving statistics, and two requests."""
    shared = [*model.trainable_variables, *_moving_statistics(model)]
    sizes = [*(int(np.prod(v.shape)) for v in shared), 2]
    choice = choose(
        config.exchange,
        size=sum(sizes),
        prunable=sum(int(np.prod(k.shape)) for k in pruner.kernels),
        sparsity=pruner.mean_target(total_steps),
        ranks=ranks,
        wire=config.wire_dtype,
        deterministic=config.deterministic,
    )
    # TensorFlow refuses to read the clock where determinism is asked for: the exchange then counts as 0 s.
    clock = (lambda: tf.constant(0.0, tf.float64)) if config.deterministic else tf.timestamp
    masks = [*pruner.masks_of(shared), None]
    return Exchange(
        sizes, masks, ranks=ranks, choice=choice, wire=config.wire_dtype, clock=clock,
        vectors=bucket_by_stage(model.trainable_variables, len(sizes)) if bucketed and ranks > 1 else None,
    )  # fmt: skip


def bucket_by_stage(gradients: Sequence[tf.Variable], count: int) -> list[list[int]]:
    """Which of ``count`` tensors are sent together, by places; ``gradients`` are the first of them.

    The last stage has three quarters of all gradients, and they are there when two thirds of the backward pass are
    still to come, in which they travel. What is no gradient is there before.
    """
    buckets: list[list[int]] = [[] for _ in topology.FILTERS]
    for place in range(count):
        stage = topology.stage_of(gradients[place].name) if place < len(gradients) else len(buckets)
        buckets[len(buckets) - stage].append(place)
    return buckets


def _optimizer(name: str, rate: float, decay: float) -> keras.optimizers.Optimizer:
    if name == "adam":
        return keras.optimizers.Adam(rate, jit_compile=False)
    if name == "muon":
        return muon.Muon(rate, momentum=0.9, weight_decay=decay)
    return SGD(rate, momentum=0.9)


def build_model(
    config: TrainConfig, data: Dataset, timeline: Timeline, precision: Precision, *, ranks: int,
    parts: Parts | None = None, bucketed: bool = True,
) -> SynchronousModel:  # fmt: skip
    """The network, its optimizer, masks and schedules, as ``config`` says; weights are those of ``config.seed``.

    ``ranks``: that exchange; with 1 nothing is sent. ``parts``: the layers that the network is made of, if not those
    that ``precision`` asks for. ``bucketed``: send gradients in buckets, each as soon as it is there, or all in one.
    """
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    precision.apply()
    mean, std = pixel_statistics(data.train_images, config.normalize)
    parts = parts or (fused.PARTS if precision.fuse else FLOAT)
    network = resnet(config.depth, data.num_classes, mean=mean, std=std, widen=precision.widen, parts=parts)
    model = SynchronousModel(network.inputs, network.outputs, name=network.name)

    begin, end, frequency = (
        timeline.steps(parse_duration(d)) for d in (config.prune_begin, config.prune_end, config.prune_frequency)
    )
    pruner = Pruner(
        prunable_kernels(model),
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
    # Handed to compile(), it would come back wrapped in a loss scale of Keras' own under mixed_float16.
    model.optimizer = _optimizer(config.optimizer, rate.peak, decay)
    model.prepare(
        learning_rate=np.array([rate(step) for step in range(timeline.total_steps)], np.float32),
        weight_decay=[
            decay if "kernel" in v.name and not (orthogonal and muon.orthogonalizes(v)) else 0.0
            for v in model.trainable_variables
        ],
        label_smoothing=config.label_smoothing,
        ema=config.ema,
        pruner=pruner,
        loss_scale=DynamicLossScale(precision.scales_loss or config.wire_dtype == "float16"),
        exchange=_exchange(config, model, pruner, timeline.total_steps, ranks=ranks, bucketed=bucketed),
    )
    return model
