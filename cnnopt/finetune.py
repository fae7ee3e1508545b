"""Quantization-aware fine-tuning of a finished run, on all ranks of the launcher.

    horovodrun -np 2 python -m cnnopt.finetune runs/NAME 2 --clusters 0 16
    python -m cnnopt.quantize runs/NAME --qat 2 --clusters 16

The second command exports the result of the first, and runs the first command itself if needed. The network comes from
``cnnopt.export.qat``. The step, the exchange and the comparison of ranks come from ``cnnopt.training``. The masks are
the last ones of the run. Each fine-tuning is a run folder in runs/NAME/qat/, and continues at the point where it was
stopped. The exit status is that of train_hvd.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cnnopt.command_line import Parser
from cnnopt.config import TrainConfig
from cnnopt.data import datasets
from cnnopt.distributed import collectives, entrypoint, host
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import launched
from cnnopt.errors import UserError
from cnnopt.export import trained
from cnnopt.export.options import CLUSTERS
from cnnopt.run.run_folder import RunFolder

if TYPE_CHECKING:
    from cnnopt.schedules import Timeline
    from cnnopt.training.step import SynchronousModel
    from cnnopt.training.xla import Compiler

#: The peak rate as a share of the run's, annealed by a cosine. NVIDIA's pytorch-quantization recommends this.
RATE = 0.01


def settings_of(run: trained.TrainedRun, epochs: int, clusters: int) -> TrainConfig:
    """The configuration of ``run``, with the changes that fine-tuning needs. Raises TrainedError."""
    folder = run.fine_tuned(epochs, clusters)
    try:
        config = TrainConfig(**run.identity)
    except TypeError as error:
        raise trained.TrainedError(f"{run.path}: config.json is of another version of cnnopt ({error})") from None
    # Muon's steps do not shrink with the gradient, so SGD takes its place. The two scale the rate with the batch
    # differently.
    optimizer: Literal["sgd", "adam"] = "adam" if config.optimizer == "adam" else "sgd"
    scale = dataclasses.replace(config, optimizer=optimizer, base_lr=1.0).peak_rate()
    return dataclasses.replace(
        config,
        epochs=epochs,
        optimizer=optimizer,
        base_lr=config.peak_rate() * RATE / scale,
        lr_schedule="cosine",
        lr_drops="",
        warmup="0e",
        ema=0.0,
        # TensorFlow's fake quantization has no deterministic gradient on GPUs, and would raise an error.
        deterministic=False,
        # bfloat16 has 8 significant bits, so it is as coarse as the levels that are to be learned.
        precision="float32",
        wire_dtype="float32",
        sparsity_schedule="constant" if config.sparsity else "none",
        prune_begin="0s",
        prune_end="0s",
        run_dir=str(folder.parent),
        name=folder.name,
    )


def fine_tune(
    path: Path, epochs: int, codebooks: Sequence[int], data_dir: str | None, request: StopRequest, peers: PeerStatus
) -> int:
    """Fine-tune the run in ``path`` for each number of clusters in ``codebooks`` (0: none); returns the exit status."""
    # ---- Start the ranks. Only the first one reads the run: other hosts may not have the run on their disks ------
    launch_info, _ = launched()
    settings = collectives.prepare(launch_info, verbose=False, compiles=host.has_gpu())
    # Training has refused ranks that share a GPU, unless the user allowed it.
    world = collectives.start(verbose=False, share_gpus=True)
    collectives.exchange_addresses(peers)
    outcome: tuple[trained.TrainedRun, list[int]] | str | None = None
    if world.first:
        try:
            run = trained.read(path)
            outcome = run, [n for n in codebooks if RunFolder(run.fine_tuned(epochs, n)).result() is None]
        except UserError as error:
            outcome = str(error)
    outcome = collectives.broadcast_object(outcome)
    if isinstance(outcome, str):
        raise UserError(outcome)
    assert outcome is not None
    run, remaining = outcome
    if not remaining:
        collectives.shutdown()
        return 0

    from cnnopt.run import run_folder
    from cnnopt.schedules import Timeline
    from cnnopt.training import resume, session
    from cnnopt.training.console import make_console
    from cnnopt.training.xla import Compiler

    console = make_console(quiet=not world.first)
    rank = session.Rank(world, console, request, peers)
    identity = run.identity
    if identity["batch_size"] % world.size:
        raise UserError(f"{world.size} ranks cannot share the run's batch of {identity['batch_size']}: start fewer")
    images = datasets.load(
        identity["dataset"], data_dir, seed=identity["seed"], validation=identity["validation"],
        share=world.local_size > 1,
    )  # fmt: skip
    collectives.assert_same("--data-dir", images.fingerprint(), remedy="give all hosts the same copy of the data set")
    for clusters in remaining:
        config = settings_of(run, epochs, clusters)
        timeline = Timeline(len(images.train_images), config.batch_size, epochs)
        config.check_timeline(timeline, world.size)
        compiler = Compiler(config.compiles(gpu=collectives.device() == "GPU"), console.print)
        model = _network(run, config, images, timeline, clusters, ranks=world.size, compiler=compiler)
        folder, done = RunFolder.of(config), None
        if world.first:
            made = {**run_folder.environment(settings), "ranks": world.size, "precision": "float32"}
            done = folder.open(config, made)
        # Another process may have completed it while this one waited for its end.
        if collectives.broadcast_object(done) is not None:
            continue
        resume.restore(model, config, folder, world, say=console.print)
        console.print(f"fine-tuning: {folder.path}, epochs: {epochs}, ranks: {world.size}")

        # ---- Train, without a hook that would renew the masks ----------------------------------------------------
        if session.train(rank, model, images, config, folder):
            return request.status
        session.finish(rank, model, images, folder)
    collectives.shutdown()
    return 0


def _network(
    run: trained.TrainedRun,
    config: TrainConfig,
    images: datasets.Dataset,
    timeline: Timeline,
    clusters: int,
    *,
    ranks: int,
    compiler: Compiler,
) -> SynchronousModel:
    """The fake-quantized network with the weights and the masks of the run, and with the centroids of these weights."""
    import numpy as np

    from cnnopt.export import clustering, qat
    from cnnopt.model.precision import Precision
    from cnnopt.training.build import build_model

    compute = Precision("float32", widen=False, reason="fine-tuning")
    model = build_model(config, images, timeline, compute, ranks=ranks, parts=qat.parts(clusters), compiler=compiler)
    for variable in model.weights:
        if variable.name in run.weights:
            variable.assign(run.weights[variable.name])
    for mask in model.pruner.masks:
        layer = mask.name.removeprefix("mask/").split("/")[0]
        if layer in run.masks:
            mask.assign(run.masks[layer].astype(np.float32))
    for name, kernel in run.kernels().items() if clusters else ():
        layer = model.get_layer(name)
        gain = qat.gain(model, name)
        layer.centroids.assign(clustering.codebook(kernel, clusters, gain, per_channel=layer.per_channel))
    return model


def parser() -> Parser:
    """The parser of this command."""
    made = Parser(prog="python -m cnnopt.finetune", description=__doc__)
    made.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    made.add_argument("epochs", type=int, metavar="EPOCHS", help="of each fine-tuning")
    made.add_argument(
        "--clusters", type=int, nargs="+", default=[0], metavar="N",
        help="fine-tune once for each N: for at most N values a kernel; 0: without clusters [0]",
    )  # fmt: skip
    made.add_argument("--data-dir", metavar="DIR", help="folder that holds the data set")
    return made


def main() -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""

    def body(request: StopRequest, peers: PeerStatus) -> int:
        given = parser().parse_args()
        if given.epochs < 1:
            raise UserError(f"EPOCHS {given.epochs}: give 1 or more")
        for clusters in given.clusters:
            if clusters and clusters not in CLUSTERS:
                raise UserError(f"--clusters {clusters}: give 0, or {CLUSTERS[0]} to {CLUSTERS[-1]}")
        return fine_tune(given.run, given.epochs, given.clusters, given.data_dir, request, peers)

    return entrypoint.run("cnnopt.finetune", body)


if __name__ == "__main__":
    entrypoint.start(main)
