"""One session of training: from the step that a run has come to, to its end or to where it is told to stop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt.config import TrainConfig
from cnnopt.data.datasets import Dataset
from cnnopt.distributed import collectives
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline, parse_duration
from cnnopt.training import callbacks, loop, metrics
from cnnopt.training.step import SynchronousModel


@dataclass(frozen=True)
class Rank:
    """This process among those of its job: its place, where it prints, what it is told, and how it answers others."""

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
    """Train ``model`` on from its global step; True where a signal stopped it, all ranks having saved and parted.

    ``masks``: the hooks that renew them. Raises RunError where the run cannot go on (docs/reliability.md).
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
        # Before the evaluation, which is no part of an epoch's speed.
        metrics.Measure(timeline),
        callbacks.Evaluate(images, world),
    ]
    show = metrics.Show(timeline, console)
    recorded: list[dict] = []
    if world.first:
        record = metrics.Record(folder, config, timeline, first_step, console)
        hooks += [record]
        recorded = record.recorded
    # After it: a resumed run does again what was recorded after its checkpoint, but not what was never recorded.
    every = parse_duration(config.save_every, "esm")
    hooks += [callbacks.Save(every, timeline, config, folder.checkpoints, world, console, recorded)]
    if world.first:
        # What is printed waits until all is kept.
        hooks += [show]
    steps = {"first_step": first_step, "last_step": timeline.total_steps}
    with loop.training_stream(config, images, world, **steps) as stream:
        try:
            loop.fit(model, stream, timeline, hooks)
        finally:
            show.clear()

    if stop.stopped:
        console.print(f"stopped as told and saved; the same command goes on from {folder.checkpoints}")
        # A launcher ends all ranks once one has ended: none ends before the first has saved and said so.
        peers.stop_after_first(world.rank)
        collectives.shutdown()
    return stop.stopped
