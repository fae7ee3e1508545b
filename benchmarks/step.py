#!/usr/bin/env python
"""Time of a step and of its parts, in one process, and the rate of a step against that of matrix products.

The whole step takes turns with the same step without pruning, with one resident batch and no input pipeline, and with
another optimizer. The convolutions and normalizations of each stage take turns by themselves, forward and backward.
Saving and recording are timed as the training thread waits for them.

    .venv/bin/python benchmarks/step.py --depth 44 --batch 128 --rounds 10 --out docs/benchmarks/step.json
"""

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from side_by_side import arguments, median_and_spread, report, table

from cnnopt.distributed import collectives
from cnnopt.distributed.world import World

collectives.prepare(World(), verbose=False)
collectives.start(verbose=False)

import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402
from arithmetic import GEMM, floating_point_operations, matrix_product  # noqa: E402
from rich.console import Console  # noqa: E402

from cnnopt.config import TrainConfig  # noqa: E402
from cnnopt.data import datasets  # noqa: E402
from cnnopt.data.stream import Draws  # noqa: E402
from cnnopt.model import precision  # noqa: E402
from cnnopt.model.resnet import IdentityShortcut  # noqa: E402
from cnnopt.run import checkpoint  # noqa: E402
from cnnopt.run.run_folder import RunFolder  # noqa: E402
from cnnopt.schedules import Timeline  # noqa: E402
from cnnopt.training import metrics  # noqa: E402
from cnnopt.training.build import build_model  # noqa: E402
from cnnopt.training.curves import CURVES  # noqa: E402
from cnnopt.training.step import SynchronousModel  # noqa: E402
from cnnopt.training.stream import HostStream, Stream, training_stream  # noqa: E402


def turns(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after two that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 2):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if number > 1:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def strided(images: tf.Tensor) -> tf.Tensor:
    """The usual form of ``IdentityShortcut``, a strided slice."""
    channels = images.shape[-1]
    return tf.pad(images[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [channels // 2, channels // 2]])


def parts(model: SynchronousModel, batch: int, compute: str) -> dict[str, Callable[[], object]]:
    """A matrix product, and the layers that a network is made of, forward and backward, by stage."""
    found = {"GEMM": matrix_product(compute)}
    for stage, (side, filters) in enumerate(((32, 16), (16, 32), (8, 64)), start=1):
        images = tf.random.normal([batch, side, side, filters], dtype=compute)
        convolution = type(model.get_layer("stem"))(
            filters, 3, padding="same", use_bias=False, widen=model.get_layer("stem").widen
        )
        norm = keras.Sequential([keras.layers.BatchNormalization(), type(model.get_layer("stem_relu"))()])
        layers = {"convolution": convolution, "BatchNorm, ReLU": norm}
        if stage < 3:
            layers["shortcut after it"] = IdentityShortcut()
            layers["the same by a strided slice"] = keras.layers.Lambda(strided)
        for name, layer in layers.items():
            layer(images)

            def both(layer=layer, images=images):
                with tf.GradientTape() as tape:
                    tape.watch(images)
                    output = layer(images, training=True)
                # With the default gradients, which are ones, TensorFlow computes the linear parts ahead of the step.
                return tape.gradient(output, [images, *layer.trainable_weights], output_gradients=output)

            found[f"stage {stage} {name}"] = tf.function(both)
    return found


def build(
    config: TrainConfig, images: datasets.Dataset, compute: precision.Precision, streams: ExitStack
) -> tuple[SynchronousModel, Stream]:
    """A model with its final sparsity, and its stream, which ``streams`` ends."""
    timeline = Timeline(len(images.train_images), config.batch_size, config.epochs)
    model = build_model(config, images, timeline, compute, ranks=1)
    if config.sparsity:
        model.prune(1)
    draws = Draws(len(images.train_images), batch_size=config.batch_size, seed=config.seed, augment=config.augment)
    stream = training_stream(images, draws, first_step=0, last_step=timeline.total_steps)
    return model, streams.enter_context(stream)


def saving_and_recording(model: SynchronousModel, rounds: int) -> dict[str, list[float]]:
    """A checkpoint and the records of an epoch, as the training thread waits for them."""
    logs = {name: 0.0 for names in CURVES.values() for name in names}
    logs |= {"step": 1, "test_accuracy": 0.0, "test_loss": 0.0, "target_sparsity": 0.6, "sparsity": 0.6}
    logs |= {"seconds": 1.0, "step_seconds": 1.0}
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        timeline, settings = Timeline(100, 1, 1), TrainConfig().identity()
        recorder = metrics.Record(
            folder, timeline, 0, Console(quiet=True), split="test", hyperparameters=settings
        )  # fmt: skip
        recorder.set_model(model)

        def save() -> None:
            checkpoint.save(folder.checkpoints, 1, model.arrays(), {}, keep=3)

        return turns({"save": save, "record": lambda: recorder.on_epoch_end(0, dict(logs))}, rounds)


def profile(
    depth: int, batch: int, rounds: int, images: datasets.Dataset, asked: str, streams: ExitStack
) -> tuple[str, dict]:
    """The table of one network, and every figure."""
    compute = precision.choose(asked, has_gpu=collectives.device() == "GPU")
    config = TrainConfig(dataset="synthetic", depth=depth, batch_size=batch, epochs=40, base_lr=1e-3, name="step",
                         optimizer="sgd", prune_begin="0s", prune_end="1s")  # fmt: skip
    pruned, stream = build(config, images, compute, streams)
    dense, dense_stream = build(replace(config, sparsity=0.0), images, compute, streams)
    orthogonal, orthogonal_stream = build(replace(config, optimizer="muon"), images, compute, streams)
    resident = HostStream(iter(tf.data.Dataset.from_tensors(next(stream.iterator)).repeat()))
    whole = {
        "the step": lambda: pruned.train(stream, 0, 1),
        "without pruning": lambda: dense.train(dense_stream, 0, 1),
        "without the input pipeline": lambda: pruned.train(resident, 0, 1),
        "with Muon": lambda: orthogonal.train(orthogonal_stream, 0, 1),
    }
    seconds = turns(whole, rounds) | turns(parts(pruned, batch, compute.compute), rounds)
    seconds |= saving_and_recording(pruned, max(3, rounds // 10))
    medians = {name: median_and_spread(values) for name, values in seconds.items()}
    step, gemm = medians["the step"][0], 2 * GEMM**3 / medians["GEMM"][0]
    rate = floating_point_operations(pruned) * batch / step
    rows = [[name, f"{1e3 * m:.2f}", f"{spread:.0%}", f"{m / step:.1%}"] for name, (m, spread) in medians.items()]
    text = (
        f"ResNet-{depth}, {compute.compute}, batch {batch}: {batch / step:.0f} images/s. What convolutions and "
        f"classifier multiply, over the whole step: {rate / 1e9:.0f} GFLOP/s, {rate / gemm:.2f} of the "
        f"{gemm / 1e9:.0f} GFLOP/s of a matrix product of {GEMM} x {GEMM}\n\n"
        + table(["part", "ms", "spread", "of a step"], rows)
    )
    return text, {"compute": compute.compute, "gemm": gemm, "rate": rate, "seconds": seconds}


def main() -> None:
    """Measure, print the tables, write every figure."""
    args = arguments(__doc__, blocks=False).parse_args()
    images = datasets.load("synthetic", synthetic_sizes=(50000, 64))
    with ExitStack() as streams:
        found = {
            str(depth): profile(depth, args.batch, args.rounds, images, args.precision, streams) for depth in args.depth
        }
    runs = {depth: content for depth, (_, content) in found.items()}
    report(args.out, "\n\n".join(text for text, _ in found.values()), {"batch": args.batch, "runs": runs})


if __name__ == "__main__":
    sys.exit(main())
