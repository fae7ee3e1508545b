"""One rank's weights and measurements, written to DEST/rank<r>.{json,npz} for test_ranks.py to compare.

Usage: horovodrun -np N python ranks_worker.py DEST [WEIGHTS_OF_ONE_RANK]
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

from cnnopt.config import TrainConfig
from cnnopt.distributed import collectives, cpu_tuning
from cnnopt.distributed.world import launched

collectives.prepare(launched()[0], verbose=False)
world = collectives.start(verbose=False)

import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

from cnnopt.data import datasets  # noqa: E402
from cnnopt.data.stream import Draws, batches  # noqa: E402
from cnnopt.model import precision  # noqa: E402
from cnnopt.schedules import Timeline  # noqa: E402
from cnnopt.training import callbacks, loop  # noqa: E402
from cnnopt.training.build import build_model  # noqa: E402
from cnnopt.training.step import SynchronousModel  # noqa: E402
from cnnopt.training.stream import training_stream  # noqa: E402

CONFIG = TrainConfig(
    dataset="synthetic",
    depth=8,
    batch_size=64,
    epochs=2,
    base_lr=0.1,
    warmup="2e",
    sparsity_scope="uniform",
    prune_begin="2s",
    prune_end="10s",
    prune_frequency="2s",
    deterministic=True,
)
IMAGES = datasets.load("synthetic", seed=0, synthetic_sizes=(500, 301))


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def build(compute: str, optimizer: str = "sgd") -> tuple[SynchronousModel, Timeline]:
    keras.backend.clear_session()
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    timeline = Timeline(len(IMAGES.train_images), CONFIG.batch_size, CONFIG.epochs)
    chosen = precision.choose(compute, has_gpu=False)
    return build_model(config, IMAGES, timeline, chosen, ranks=world.size), timeline


def draws(config: TrainConfig) -> Draws:
    return Draws(
        len(IMAGES.train_images),
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.augment,
        rank=world.rank,
        size=world.size,
    )


def train(compute: str, optimizer: str = "sgd") -> tuple[SynchronousModel, list[float]]:
    model, timeline = build(compute, optimizer)
    collectives.broadcast(list(model.named_state().values()))
    losses = Losses()
    with training_stream(IMAGES, draws(CONFIG), first_step=0, last_step=timeline.total_steps) as stream:
        loop.fit(model, stream, timeline, [*collectives.callbacks(), callbacks.Prune(), losses])
    return model, losses.losses


def images_of_an_epoch() -> list[int]:
    """The training images that this rank meets in the first epoch, by an index written into their pixels."""
    numbered = np.zeros_like(IMAGES.train_images)
    numbered[:, 0, 0, 0], numbered[:, 0, 0, 1] = np.divmod(np.arange(len(numbered)), 256)
    config = TrainConfig(dataset="synthetic", depth=8, batch_size=50 * world.size, augment="none", epochs=1)
    steps = Timeline(len(numbered), config.batch_size, 1).total_steps
    shards = batches(numbered, IMAGES.train_labels, draws(config), first_step=0, last_step=steps)
    return [int(i[0, 0, 0]) * 256 + int(i[0, 0, 1]) for images, _ in shards for i in images]


def wrong_mask_is_named(model: SynchronousModel) -> str:
    """The error on every rank when the last rank holds another mask."""
    mask = model.pruner.masks[3]
    kept = mask.numpy()
    if world.rank == world.size - 1:
        mask.assign(1 - kept)
    try:
        model.agree()
    except collectives.DisagreementError as error:
        return str(error)
    finally:
        mask.assign(kept)
    return ""


def overflow_on_one_rank(optimizer: str) -> dict[str, bool]:
    """A loss scale that overflows on the last rank alone must skip the step on all."""
    model, _ = build("float16", optimizer)
    collectives.broadcast(list(model.named_state().values()))
    shard = CONFIG.batch_size // world.size
    batch = (tf.constant(IMAGES.train_images[:shard]), tf.constant(IMAGES.train_labels[:shard]))
    before = [w.numpy() for w in model.weights]
    if world.rank == world.size - 1:
        model.loss_scale.value.assign(2.0**100)
    logs = model.train_step(batch)
    after = [w.numpy() for w in model.weights]
    unchanged = all(np.array_equal(b, a) for b, a in zip(before, after, strict=True))
    skipped = int(model.loss_scale.skipped.numpy())
    model.loss_scale.value.assign(1024.0)
    model.train_step(batch)
    moved = any(not np.array_equal(b, w.numpy()) for b, w in zip(before, model.weights, strict=True))
    return {"finite": bool(logs["finite"]), "unchanged": unchanged, "skipped": skipped, "moved_after": moved}


def scheduling(thread: int) -> tuple[int, int] | None:
    """The kernel's policy and nice value of ``thread``; None of one that has ended by now."""
    try:
        return os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)
    except ProcessLookupError:
        return None


def cores_of(thread: int) -> list[int] | None:
    """The cores that ``thread`` may run on; None of one that has ended by now."""
    try:
        return sorted(os.sched_getaffinity(thread))
    except ProcessLookupError:
        return None


def main(dest: Path, weights: Path | None) -> None:
    model, losses = train("float32")
    found = {"rank": world.rank, "size": world.size, "losses": losses, "epoch": images_of_an_epoch()}
    found["threads"] = [how for how in map(scheduling, cpu_tuning.threads()) if how is not None]
    found["main thread"] = scheduling(os.getpid())
    found["cores"] = [cores_of(thread) for thread in cpu_tuning.threads()]
    arrays = {name: v.numpy() for name, v in model.named_state().items()}
    if world.size > 1:
        found["wrong_mask"] = wrong_mask_is_named(model)
    others = [("float32", "muon")]
    if world.size == 2:
        found["overflow"] = [overflow_on_one_rank(optimizer) for optimizer in ("sgd", "muon")]
        others += [("bfloat16", "sgd"), ("float16", "sgd"), ("float16", "muon")]
    for name in others:
        other, found["/".join(name)] = train(*name)
        other.agree()
        other.pruner.verify_final()
        arrays |= {"/".join((*name, variable)): v.numpy() for variable, v in other.named_state().items()}
    if weights is not None:
        with np.load(weights) as stored:
            for name, variable in model.named_state().items():
                variable.assign(stored[name])
    found["evaluation"] = loop.evaluate(model, IMAGES.test_images, IMAGES.test_labels, world, batch_size=64)
    np.savez(dest / f"rank{world.rank}.npz", **arrays)
    (dest / f"rank{world.rank}.json").write_text(json.dumps(found))


main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
