"""One rank's view of its exchange, written to DEST/rank<r>.{json,npz} for test_exchange.py to compare.

Without a variant it writes the sums alone.

Usage: horovodrun -np N python exchange_worker.py DEST KIND/WIRE/OPTIMIZER[/HOW]...
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from cnnopt.config import TrainConfig
from cnnopt.distributed import collectives
from cnnopt.distributed.world import launched

collectives.prepare(launched()[0], verbose=False)
world = collectives.start(verbose=False)

import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402

from cnnopt.data import datasets  # noqa: E402
from cnnopt.data.stream import Draws  # noqa: E402
from cnnopt.model import precision  # noqa: E402
from cnnopt.schedules import Timeline  # noqa: E402
from cnnopt.training import callbacks, loop  # noqa: E402
from cnnopt.training.buckets import choose  # noqa: E402
from cnnopt.training.build import build_model  # noqa: E402
from cnnopt.training.step import SynchronousModel  # noqa: E402
from cnnopt.training.stream import training_stream  # noqa: E402
from cnnopt.training.xla import Compiler  # noqa: E402

CONFIG = TrainConfig(dataset="synthetic", depth=8, batch_size=64, epochs=2, base_lr=0.1, sparsity=0.9,
                     prune_begin="2s", prune_end="10s", prune_frequency="2s", deterministic=True)  # fmt: skip
IMAGES = datasets.load("synthetic", seed=0, synthetic_sizes=(512, 64))


class Count(keras.callbacks.Callback):
    """Bytes of each step, and what they must be; before ``Prune``, whose masks are those of the next step."""

    def __init__(self):
        super().__init__()
        self.losses, self.bytes, self.kept = [], [], []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.exchange.restart()
        self.kept.append(sum(int(np.sum(mask.numpy() != 0)) for mask in self.model.pruner.masks))

    def on_train_batch_end(self, batch, logs=None):
        self.bytes.append(int(self.model.exchange.bytes.numpy()))
        self.losses.append(float(logs["loss"]))


def collective_operations(model: SynchronousModel, stream) -> tuple[dict[str, int], list[int]]:
    """Horovod's operations in the graph of a step, by type; and how many gradients of kernels each one waits for."""
    graph = model.train_call.get_concrete_function(stream.given(0, 1), stream.item, None).graph.as_graph_def()
    bodies = [graph.node, *(function.node_def for function in graph.library.function)]
    (body,) = [nodes for nodes in bodies if any(node.op.startswith("Horovod") for node in nodes)]
    sent = [node for node in body if node.op.startswith("Horovod")]
    inputs = {node.name: {name.lstrip("^").split(":")[0] for name in node.input} for node in body}
    kernels = {node.name for node in body if node.op == "Conv2DBackpropFilter"}

    def waits_for(name: str) -> set[str]:
        found, new = set(), {name}
        while new:
            found |= new
            new = {before for one in new for before in inputs.get(one, ())} - found
        return found & kernels

    return Counter(node.op for node in sent), sorted(len(waits_for(node.name)) for node in sent)


def summed() -> dict[str, np.ndarray]:
    """Sums over the ranks of vectors of bfloat16 that their parts do not fit into, and what each rank gave to them."""
    found = {}
    for size in (1, 2, 7, 1001):
        given = tf.random.stateless_normal([size], [world.rank, size])
        if size == 7:
            # Bits that are no number in float16, as which they travel.
            given = tf.constant([np.inf, 6e4, 1e38, -2e-38, 0.0, -np.inf, 3e38])
        sent = tf.cast(given, tf.bfloat16)
        found[f"sum/{size}"] = tf.cast(collectives.allreduce_sum(sent, name="sum"), tf.float32).numpy()
        found[f"given/{size}"] = tf.cast(sent, tf.float32).numpy()
    return found


def train(kind: str, wire: str, optimizer: str, how: str = "") -> tuple[dict[str, np.ndarray], dict]:
    """``how``: "several" steps a call on images that stay on the device, "compiled" by XLA as well, or neither."""
    keras.backend.clear_session()
    config = dataclasses.replace(CONFIG, exchange=kind, wire_dtype=wire, optimizer=optimizer)
    timeline = Timeline(len(IMAGES.train_images), config.batch_size, config.epochs)
    compute = precision.choose("float32", has_gpu=False)
    compiler = Compiler(how == "compiled")
    model = build_model(config, IMAGES, timeline, compute, ranks=world.size, compiler=compiler)
    collectives.broadcast(list(model.named_state().values()))
    count = Count()
    draws = Draws(len(IMAGES.train_images), batch_size=config.batch_size, seed=config.seed, augment=config.augment,
                  rank=world.rank, size=world.size)  # fmt: skip
    steps = timeline.total_steps
    with training_stream(IMAGES, draws, first_step=0, last_step=steps, resident=bool(how)) as stream:
        loop.fit(model, stream, timeline, [count, callbacks.Prune()], steps_per_call=5 if how else 1)
    model.pruner.verify_final()
    model.agree()
    ops, waits = ({}, []) if how else collective_operations(model, stream)
    return {name: v.numpy() for name, v in model.named_state().items()}, {
        "losses": count.losses,
        "bytes": count.bytes,
        "kept": count.kept,
        "prunable": sum(mask.numpy().size for mask in model.pruner.masks),
        "size": model.exchange.size,
        "collectives": ops,
        "waits_for": waits,
        "traces": model.train_call.experimental_get_tracing_count(),
    }


def main(dest: Path, variants: list[str]) -> None:
    arrays, found = summed(), {}
    for variant in variants:
        state, found[variant] = train(*variant.split("/"))
        arrays |= {f"{variant}:{name}": value for name, value in state.items()}
    chosen = choose("auto", size=10**5, prunable=10**5, sparsity=0.9, ranks=world.size, wire="float32",
                    deterministic=False)  # fmt: skip
    found["auto"] = dataclasses.asdict(chosen)
    np.savez(dest / f"rank{world.rank}.npz", **arrays)
    (dest / f"rank{world.rank}.json").write_text(json.dumps(found))


main(Path(sys.argv[1]), sys.argv[2:])
