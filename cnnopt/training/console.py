"""The lines that rank 0 prints for the user: the start table and the result line."""

from __future__ import annotations

import contextlib
import sys
import textwrap
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from cnnopt.config import TrainConfig
from cnnopt.distributed import collectives, cpu_tuning
from cnnopt.distributed.world import World
from cnnopt.model.precision import Precision
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline
from cnnopt.training.step import SynchronousModel


def make_console(*, quiet: bool) -> Console:
    """The console of a run. It ignores $FORCE_COLOR, which would write a terminal's control codes into a log."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(quiet=quiet, force_terminal=terminal, highlight=False, markup=False, soft_wrap=True)


def start_table(
    console: Console,
    config: TrainConfig,
    folder: RunFolder,
    world: World,
    settings: Mapping[str, str],
    compute: Precision,
    model: SynchronousModel,
    timeline: Timeline,
) -> None:
    """Print the settings of the run that starts. This is a collective: every rank sends its host and device."""
    places = collectives.gather_objects((collectives.hostname(), collectives.device()))
    hosts = {name: [device for h, device in places if h == name] for name, _ in places}
    there = ", ".join(f"{name}: {len(d)} x {d[0]}" for name, d in hosts.items())
    if len(there) > 60:
        counts = sorted({len(devices) for devices in hosts.values()})
        there = f"{len(hosts)} hosts, {' or '.join(map(str, counts))} x {places[0][1]} each"
    exchange = model.exchange
    pruner, window = model.pruner, model.pruner.window
    weights = sum(int(np.prod(kernel.shape)) for kernel in pruner.kernels)
    pruning = (
        f"{len(pruner.kernels)} kernels, {weights:,} weights, {100 * config.sparsity:g}% zero "
        f"({config.sparsity_scope}), {config.sparsity_schedule} from step {window.begin} to {window.end}, "
        f"every {window.frequency}"
        if pruner.enabled
        else "none"
    )
    cutter = "device" if config.resident(gpu=collectives.device() == "GPU") else "host"
    images = f"{timeline.num_images:,} images, {timeline.num_images // world.size:,} a rank"
    held_out = f"; {config.validation:,} for validation" if config.validation else ""
    bound = ", each on separate cores" if cpu_tuning.is_bound() else ""
    rows = {
        "started": time.strftime("%Y-%m-%d %H:%M %Z"),
        "run": folder.path,
        "ranks": f"{world.size} ({there})",
        "threads": f"{settings['TF_NUM_INTRAOP_THREADS']} a rank{bound}",
        "data": f"{config.dataset}, {images}{held_out}",
        "batch": f"{config.batch_size} ({config.batch_size // world.size} a rank)",
        "length": f"{config.epochs} epochs, {timeline.total_steps:,} steps",
        "rate": f"{config.optimizer}, {config.lr_schedule}, peak {float(np.max(model.learning_rates)):.4g}",
        "precision": f"{compute.compute} ({compute.reason}), float32 weights",
        "step": f"{'compiled by XLA' if model.compiler.enabled else 'TensorFlow graph'}, batches made on the {cutter}",
        "exchange": f"{exchange.choice.kind} ({exchange.choice.reason}), {exchange.size:,} x {config.wire_dtype}",
        "model": f"ResNet-{config.depth}, {model.vectors.weights.shape[0]:,} parameters",
        "pruning": pruning,
    }
    for name, value in rows.items():
        lines = textwrap.wrap(str(value), max(console.width, 40) - 12, break_long_words=False, break_on_hyphens=False)
        console.print(
            "\n".join(f"  {head:<10}{line}" for head, line in zip([name, *[""] * len(lines)], lines, strict=False))
        )


def tensorboard_command(folder: RunFolder) -> str:
    """The command that starts TensorBoard, to type in the folder from which the run was started."""
    program = Path(sys.executable).with_name("tensorboard")
    # The folder of the start may be gone by now.
    with contextlib.suppress(OSError):
        if program.is_relative_to(Path.cwd()):
            program = program.relative_to(Path.cwd())
    return f"TensorBoard: {program} --logdir {folder.tensorboard}"


def final_line(result: Mapping[str, Any], folder: RunFolder) -> str:
    """The result line of a complete run: accuracy, sparsity, speed and folder."""
    validation = f" (validation {result['val_accuracy']:.2%})" if "val_accuracy" in result else ""
    return (
        f"test accuracy {result['test_accuracy']:.2%}{validation} at the last epoch, "
        f"sparsity {result['sparsity']:.2%}, {result['images_per_second']:.0f} images/s, "
        f"{result['minutes']:.1f} min of training: {folder.path}"
    )
