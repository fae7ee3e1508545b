"""The real model, stream and loop of the program, with a ResNet-8 and a few synthetic images."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import tensorflow as tf
from rich.console import Console

from cnnopt.config import TrainConfig
from cnnopt.data import datasets
from cnnopt.data.stream import Draws
from cnnopt.distributed.world import World
from cnnopt.model import precision
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline, parse_duration
from cnnopt.training import callbacks, loop, metrics
from cnnopt.training.build import build_model
from cnnopt.training.step import SynchronousModel
from cnnopt.training.stream import Stream, training_stream
from cnnopt.training.xla import Compiler

IMAGES = datasets.load("synthetic", seed=0, synthetic_sizes=(256, 75))


def settings(**changes: object) -> TrainConfig:
    """ResNet-8 on 256 images in batches of 32: 8 steps an epoch."""
    defaults = {"dataset": "synthetic", "depth": 8, "batch_size": 32, "epochs": 3, "precision": "float32",
                "warmup": "4s", "prune_begin": "4s", "prune_end": "16s", "prune_frequency": "4s"}  # fmt: skip
    return TrainConfig(**{**defaults, **changes})


def timeline_of(config: TrainConfig) -> Timeline:
    return Timeline(len(IMAGES.train_images), config.batch_size, config.epochs)


def build(config: TrainConfig, compiler: Compiler | None = None) -> SynchronousModel:
    compute = precision.choose(config.precision, has_gpu=False)
    return build_model(config, IMAGES, timeline_of(config), compute, ranks=1, compiler=compiler)


def stream(config: TrainConfig, first_step: int = 0) -> AbstractContextManager[Stream]:
    draws = Draws(len(IMAGES.train_images), batch_size=config.batch_size, seed=config.seed, augment=config.augment)
    return training_stream(
        IMAGES,
        draws,
        first_step=first_step,
        last_step=timeline_of(config).total_steps,
        resident=config.resident(gpu=False),
    )


def first_batch(config: TrainConfig) -> tuple[tf.Tensor, ...]:
    with stream(config) as batches:
        return batches.item(batches.given(0, 1), tf.constant(0))


def fit(model: SynchronousModel, config: TrainConfig, callbacks: Sequence) -> None:
    """Train from the model's current step to the end of the run."""
    with stream(config, int(model.run.global_step.numpy())) as batches:
        loop.fit(model, batches, timeline_of(config), callbacks, steps_per_call=config.call_length(gpu=False))


def writers(
    config: TrainConfig, folder: RunFolder, first_step: int, console: Console
) -> tuple[metrics.Record, callbacks.Save]:
    """The hooks that write the records and the checkpoints, as the program makes them."""
    timeline, identity = timeline_of(config), config.identity()
    record = metrics.Record(folder, timeline, first_step, console, split="test", hyperparameters=identity)
    save = callbacks.Save(
        parse_duration(config.save_every, "esm"), timeline, folder.checkpoints, World(), console,
        settings={"identity": identity, "resume": config.resume}, recorded=record.recorded,
        keep=config.keep, strict=config.strict_save,
    )  # fmt: skip
    return record, save


def state(model: SynchronousModel) -> dict[str, np.ndarray]:
    return {name: variable.numpy() for name, variable in model.named_state().items()}
