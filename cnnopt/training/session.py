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
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline, parse_duration
from cnnopt.training import callbacks, loop, metrics
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
        record = metrics.Record(folder, config, timeline, first_step, console)
        hooks += [record]
        recorded = record.recorded
    # Save comes after Record. A resumed run repeats epochs that were recorded after its checkpoint. But it would not
    # record an epoch that ended before the checkpoint.
    every = parse_duration(config.save_every, "esm")
    hooks += [callbacks.Save(every, timeline, config, folder.checkpoints, world, console, recorded)]
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
            loop.fit(model, stream, timeline, hooks, steps_per_call=config.call_length(gpu=gpu))
        finally:
            show.clear()

    if stop.stopped:
        console.print(f"stopped as told and saved; the same command goes on from {folder.checkpoints}")
        # A launcher kills all ranks as soon as one exits. So no rank exits before rank 0 has saved and printed this.
        peers.stop_after_first(world.rank)
        collectives.shutdown()
    return stop.stopped
