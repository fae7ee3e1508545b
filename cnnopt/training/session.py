"""One session of training: from the step that a run has reached, to its end or to a requested stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.data.stream import Draws
from cnnopt.distributed import collectives
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.run.run_folder import RunFolder, summarize
from cnnopt.schedules import Timeline, parse_duration
from cnnopt.training import callbacks, loop, metrics
from cnnopt.training.console import final_line
from cnnopt.training.progress import Show
from cnnopt.training.step import SynchronousModel
from cnnopt.training.stream import training_stream


@dataclass(frozen=True)
class Rank:
    """This process as one rank of its job: its place, its console, its stop request, and its answers to other ranks."""

    world: World
    console: Console
    request: StopRequest
    peers: PeerStatus


def train(
    rank: Rank,
    model: SynchronousModel,
    images: Dataset,
    config: TrainConfig,
    folder: RunFolder,
    *,
    masks: Sequence[Callback] = (),
) -> bool:
    """Train ``model`` from its global step on. Returns True if a signal stopped it; the run is then saved, and
    Horovod is shut down.

    ``masks`` are the hooks that renew the masks. Raises RunError if the run cannot continue (docs/reliability.md).
    """
    world, console, peers = rank.world, rank.console, rank.peers
    timeline = Timeline(len(images.train_images), config.batch_size, config.epochs)
    first_step = int(model.run.global_step.numpy())
    stop = callbacks.StopWhenTold(rank.request)
    hooks = [
        *collectives.callbacks(),
        stop,
        callbacks.EndIfStalled(peers, world),
        callbacks.StopIfDiverged(folder.checkpoints),
        *masks,
        # Measure comes before Evaluate, because an epoch's speed does not include the evaluation.
        metrics.Measure(timeline),
        callbacks.Evaluate(images, world),
    ]
    show = Show(timeline, console)
    recorded: list[dict] = []
    if world.first:
        record = metrics.Record(
            folder, timeline, first_step, console, split=images.monitored, hyperparameters=config.identity()
        )
        hooks += [record]
        recorded = record.recorded
    # Save comes after Record. A resumed run repeats epochs that were recorded after its checkpoint. But it would not
    # record an epoch that ended before the checkpoint.
    save = callbacks.Save(
        parse_duration(config.save_every, "esm"), timeline, folder.checkpoints, world, console,
        settings={"identity": config.identity(), "resume": config.resume}, recorded=recorded,
        keep=config.keep, strict=config.strict_save,
    )  # fmt: skip
    hooks += [save]
    if world.first:
        # Show comes last: an epoch is printed only after it is recorded and saved.
        hooks += [show]
    draws = Draws(
        len(images.train_images), batch_size=config.batch_size, seed=config.seed, augment=config.augment,
        rank=world.rank, size=world.size,
    )  # fmt: skip
    gpu = collectives.device() == "GPU"
    with training_stream(
        images, draws, first_step=first_step, last_step=timeline.total_steps, resident=config.resident(gpu=gpu)
    ) as stream:
        try:
            # Ranks on unlike devices would choose differently, and only some would wait for the others.
            length = collectives.broadcast_object(config.call_length(gpu=gpu))
            loop.fit(model, stream, timeline, hooks, steps_per_call=length)
        finally:
            show.clear()

    if stop.stopped:
        console.print(f"stopped by a signal, and saved; the same command goes on from {folder.checkpoints}")
        # A launcher kills all ranks as soon as one exits. So no rank exits before rank 0 has saved and printed this.
        peers.stop_after_first(world.rank)
        collectives.shutdown()
    return stop.stopped


def finish(rank: Rank, model: SynchronousModel, images: Dataset, folder: RunFolder) -> str:
    """Check the masks of a run that is done, and write its result.json. Returns the result line; "" on other ranks.

    This is a collective: test images that were not evaluated after each epoch are evaluated here, for the first time.
    """
    model.pruner.verify_final()
    tested: dict[str, float] = {}
    if images.monitored != "test":
        found = loop.evaluate(model, *images.split("test"), rank.world)
        tested = {f"test_{name}": float(f"{found[name]:.7g}") for name in ("accuracy", "loss")}
    if not rank.world.first:
        return ""
    result = summarize(folder.metrics(), model.pruner.sparsities(), tested)
    line = final_line(result, folder)
    folder.finish({**result, "line": line})
    return line
