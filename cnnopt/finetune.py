"""Quantization-aware fine-tuning of a finished run, on all ranks of the launcher: python -m cnnopt.finetune RUN EPOCHS

``python -m cnnopt.quantize RUN --qat EPOCHS`` starts it. The network is that of ``cnnopt.export.qat``; the step, the
exchange and the comparison of ranks are those of ``cnnopt.training``; the masks are those that the run ended with. It
has a run folder of its own in RUN/qat/, and goes on where it was stopped. Exit status as of train_hvd.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

from cnnopt import data, distributed, program
from cnnopt.config import TrainConfig
from cnnopt.errors import UserError
from cnnopt.export import trained
from cnnopt.presence import Presence
from cnnopt.record import RunFolder
from cnnopt.signals import STOPPED, StopRequest

#: Peak learning rate as a share of the run's, annealed by a cosine: what NVIDIA's pytorch-quantization recommends.
RATE = 0.01


def settings_of(run: trained.TrainedRun, epochs: int) -> TrainConfig:
    """The configuration of ``run``, but for what fine-tuning does otherwise. Raises TrainedError."""
    folder = run.fine_tuned(epochs)
    try:
        config = TrainConfig(**run.identity)
    except TypeError as error:
        raise trained.TrainedError(f"{run.path}: config.json is of another version of cnnopt ({error})") from None
    assert config.base_lr is not None
    return dataclasses.replace(
        config,
        epochs=epochs,
        base_lr=config.base_lr * RATE,
        lr_schedule="cosine",
        lr_drops="",
        warmup="0e",
        ema=0.0,
        # With 8 significant bits bfloat16 is as coarse as the levels that are to be learned.
        precision="float32",
        sparsity_schedule="constant" if config.sparsity else "none",
        prune_begin="0s",
        prune_end="0s",
        run_dir=str(folder.parent),
        name=folder.name,
    )


def fine_tune(path: Path, epochs: int, data_dir: str | None, request: StopRequest, presence: Presence) -> int:
    """Fine-tune the run in ``path``; returns the exit status."""
    # ---- Start the ranks; the first one reads the run, which the others need not have on their disks -------------
    launched, _ = distributed.launched()
    settings = distributed.prepare(launched, deterministic=False, verbose=False)
    world = distributed.start(verbose=False)
    distributed.meet(presence)
    outcome: trained.TrainedRun | str | None = None
    if world.first:
        try:
            outcome = trained.read(path)
            if RunFolder(outcome.fine_tuned(epochs)).result() is not None:
                outcome = None
        except UserError as error:
            outcome = str(error)
    outcome = distributed.broadcast_object(outcome)
    if outcome is None:
        return 0
    if isinstance(outcome, str):
        raise UserError(outcome)
    run, config = outcome, settings_of(outcome, epochs)
    config.check_ranks(world.size)
    folder = RunFolder.of(config)

    import numpy as np

    from cnnopt import callbacks, loop, monitoring, record, resume, training
    from cnnopt.console import Console
    from cnnopt.export import qat
    from cnnopt.precision import Precision
    from cnnopt.schedules import Timeline, parse_duration

    # ---- The fake-quantized network, with the weights and the masks of the run -----------------------------------
    console = Console(quiet=not world.first, highlight=False, soft_wrap=True)
    images = data.load(config.dataset, data_dir, seed=config.seed)
    timeline = Timeline(len(images.train_images), config.batch_size, epochs)
    compute = Precision("float32", widen=False, reason="fine-tuning")
    model = training.build(config, images, timeline, compute, ranks=world.size, parts=qat.PARTS)
    for variable in model.weights:
        if variable.name in run.weights:
            variable.assign(run.weights[variable.name])
    for mask in model.pruner.masks:
        layer = mask.name.removeprefix("mask/").split("/")[0]
        if layer in run.masks:
            mask.assign(run.masks[layer].astype(np.float32))
    if world.first:
        folder.path.parent.mkdir(exist_ok=True)
        folder.open(config, {**record.environment(settings), "ranks": world.size, "precision": "float32"})
    first_step = resume.restore(model, config, folder, world, say=console.print)
    console.print(f"fine-tuning: {folder.path}, epochs: {epochs}, ranks: {world.size}", markup=False)

    # ---- Train, without a callback that would renew the masks ----------------------------------------------------
    stop = callbacks.StopWhenTold(request)
    hooks = [
        *distributed.callbacks(),
        stop,
        callbacks.EndIfStalled(presence, world),
        callbacks.StopIfDiverged(folder.checkpoints),
        callbacks.Evaluate(images, world),
        monitoring.Measure(timeline),
    ]
    if world.first:
        hooks += [monitoring.Record(folder, config, first_step), monitoring.Show(timeline, console)]
    every = parse_duration(config.save_every, "esm")
    hooks += [callbacks.Save(every, timeline, config, folder.checkpoints, world, console)]
    steps = {"first_step": first_step, "last_step": timeline.total_steps}
    with loop.training_stream(config, images, world, **steps) as stream:
        loop.fit(model, stream, timeline, hooks)
    if stop.stopped:
        console.print(f"stopped as told and saved; the same command goes on from {folder.checkpoints}", markup=False)
        # A launcher ends all ranks once one has ended: none ends before the first has saved and said so.
        presence.stop_after_first(world.rank)
        distributed.shutdown()
        return STOPPED
    model.pruner.verify_final()
    if world.first:
        folder.finish(record.summarize(folder.metrics(), model.pruner.sparsities()))
    distributed.shutdown()
    return 0


def main() -> int:
    """Run a command line; every expected failure is one line and an exit status."""
    parser = argparse.ArgumentParser(prog="cnnopt.finetune", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("epochs", type=int)
    parser.add_argument("--data-dir", help="folder that holds the data set")
    parser.add_argument("--then", nargs=argparse.REMAINDER, help="what the first rank calls cnnopt.quantize with")
    given = parser.parse_args()
    status = program.run(
        "cnnopt.finetune",
        lambda request, presence: fine_tune(given.run, given.epochs, given.data_dir, request, presence),
    )
    if status == 0 and given.then and distributed.launched()[0].first:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "cnnopt.quantize", *given.then])
    return status


if __name__ == "__main__":
    program.leave(main())
