"""Build the model of a run from its settings: network, optimizer, masks, schedules and exchange."""

from __future__ import annotations

import tensorflow as tf
import tf_keras as keras

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.model import fused
from cnnopt.model.flat import Vectors, views
from cnnopt.model.precision import DynamicLossScale, Precision
from cnnopt.model.pruning import Pruner, prunable_kernels
from cnnopt.model.resnet import FLOAT, Parts, pixel_statistics, resnet
from cnnopt.optim import muon
from cnnopt.optim.sgd import SGD
from cnnopt.schedules import LearningRate, PruningWindow, Timeline, parse_drops, parse_duration
from cnnopt.training.buckets import Exchange, choose
from cnnopt.training.step import RunState, SynchronousModel
from cnnopt.training.xla import Compiler


def build_model(
    config: TrainConfig, data: Dataset, timeline: Timeline, precision: Precision, *, ranks: int,
    parts: Parts = FLOAT, bucketed: bool = True, compiler: Compiler | None = None,
) -> SynchronousModel:  # fmt: skip
    """Build the network, its optimizer, masks and schedules from ``config``. ``config.seed`` decides the weights.

    ``ranks``: the number of ranks that exchange; 1 sends nothing. ``parts``: the layers that the network is made of.
    ``compiler``: compiles the step and the evaluation; None leaves both as plain TensorFlow graphs. ``bucketed``: a
    plain step sends gradients in buckets, each as soon as it is ready. False sends all in one, as a compiled step does,
    whose gradients are ready at once.
    """
    keras.utils.set_random_seed(config.seed)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    precision.apply()
    compiler = compiler or Compiler()
    if precision.fuse and parts is FLOAT and not compiler.enabled:
        parts = fused.PARTS
    mean, std = pixel_statistics(data.train_images, config.normalize)
    with views() as made:
        network = resnet(config.depth, data.num_classes, mean=mean, std=std, widen=precision.widen, parts=parts)
    vectors = Vectors(made)
    model = SynchronousModel(network.inputs, network.outputs, name=network.name)

    begin, end, frequency = (
        timeline.steps(parse_duration(d)) for d in (config.prune_begin, config.prune_end, config.prune_frequency)
    )
    kernels, run = prunable_kernels(model), RunState(vectors, average=bool(config.ema))
    model.pruner = Pruner(
        kernels,
        run.masks,
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
        collectives.assert_same(
            "--optimizer muon", muon.digest(), remedy="choose --optimizer sgd, or start the ranks on hosts of one kind"
        )
    model.compile()
    # The optimizer is not given to compile(), which would wrap it in Keras' own loss scale under mixed_float16.
    model.optimizer = _optimizer(config.optimizer, rate.peak, decay, vectors)
    model.optimizer.build([vectors.weights])
    for kernel in kernels:
        # Muon applies weight decay to the kernels of convolutions itself.
        if not (orthogonal and kernel.shape.rank == 4):
            kernel.like(run.weight_decay, kernel.name).assign(tf.fill(kernel.shape, decay))
    model.vectors, model.run, model.compiler = vectors, run, compiler
    model.learning_rates = tf.constant([rate(step) for step in range(timeline.total_steps)], tf.float32)
    model.label_smoothing, model.ema = config.label_smoothing, config.ema
    model.loss_scale = DynamicLossScale(precision.scales_loss or config.wire_dtype == "float16")
    model.exchange = _exchange(
        config, model, timeline.total_steps, ranks=ranks, bucketed=bucketed and not compiler.enabled
    )
    return model


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
