#!/usr/bin/env python
"""Train a pruned, mixed-precision CIFAR ResNet, synchronously over all ranks.

    laptop       horovodrun -np 2 python train_hvd.py --preset demo
    one node     horovodrun -np 4 python train_hvd.py --depth 44 --sparsity 0.6
    two nodes    horovodrun -np 8 -H a:4,b:4 python train_hvd.py --depth 44 --sparsity 0.6 --expect-ranks 8
    Kubernetes   kubectl apply -k k8s/overlays/gpu
    SLURM        sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8 slurm/super.sbatch

The run folder runs/<name>/ holds metrics.jsonl, TensorBoard's files in tb/, checkpoints/ and result.json. The same
command resumes a run that was stopped. Exit status: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal and
saved, 130 stopped by Ctrl-C and saved.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

# Python does not search this folder for modules if PYTHONSAFEPATH is set.
sys.path.insert(0, str(Path(__file__).parent.resolve()))
from cnnopt.config import TrainConfig, parse_args
from cnnopt.distributed import collectives, entrypoint, host
from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import launched
from cnnopt.run.run_folder import RunFolder
from cnnopt.schedules import Timeline


def train(config: TrainConfig, request: StopRequest, peers: PeerStatus) -> int:
    """Do one run, from its configuration to its result line. Returns the exit status."""
    # ---- Refuse settings that cannot work, before TensorFlow is loaded -------------------------------------------
    launch_info, _ = launched()
    config.check_ranks(launch_info.size)
    folder = RunFolder.of(config)
    folder.check(config)
    done = folder.result()
    if done is not None and launch_info.size == 1:
        return finish(config, folder, done)
    from cnnopt.data import datasets

    if done is None:
        datasets.check(config.dataset, config.data_dir, config.validation)
        published = Timeline(datasets.DATASETS[config.dataset] - config.validation, config.batch_size, config.epochs)
        config.check_timeline(published, launch_info.size)

    # ---- Start the ranks -----------------------------------------------------------------------------------------
    settings = collectives.prepare(launch_info, verbose=config.verbose, compiles=config.compiles(gpu=host.has_gpu()))
    world = collectives.start(verbose=config.verbose, share_gpus=config.share_gpus)
    config.check_ranks(world.size)
    collectives.exchange_addresses(peers)
    # Horovod: rank 0's answer counts for all ranks, because the ranks may not see the same disk.
    done = collectives.broadcast_object(done)
    if done is not None:
        collectives.shutdown()
        return finish(config, folder, done) if world.first else 0
    from cnnopt.model import precision
    from cnnopt.run import run_folder
    from cnnopt.training import callbacks, resume, session
    from cnnopt.training.build import build_model
    from cnnopt.training.console import make_console, start_table, tensorboard_command
    from cnnopt.training.xla import Compiler

    console = make_console(quiet=not world.first)

    # ---- Load the data, build the model, restore a checkpoint ----------------------------------------------------
    images = datasets.load(
        config.dataset, config.data_dir, seed=config.seed, validation=config.validation,
        show_progress=world.first, share=world.local_size > 1,
    )  # fmt: skip
    collectives.assert_same("--data-dir", images.fingerprint(), remedy="give all hosts the same copy of the data set")
    timeline = Timeline(len(images.train_images), config.batch_size, config.epochs)
    # A copy of a data set may hold fewer images than the published one.
    config.check_timeline(timeline, world.size)
    gpu = collectives.device() == "GPU"
    compute = precision.choose(config.precision, has_gpu=gpu)
    collectives.assert_same(f"--precision {config.precision}", compute.compute)
    compiler = Compiler(config.compiles(gpu=gpu), console.print)
    collectives.assert_same(f"--compile {config.compile}", "on" if compiler.enabled else "off")
    model = build_model(config, images, timeline, compute, ranks=world.size, compiler=compiler)
    if world.first:
        computed = {"ranks": world.size, "device": collectives.device(), "precision": compute.compute}
        done = folder.open(config, {**run_folder.environment(settings), **computed})
    # Another process may have completed the run while this one waited for its end.
    done = collectives.broadcast_object(done)
    if done is not None:
        collectives.shutdown()
        return finish(config, folder, done) if world.first else 0
    resume.restore(model, config, folder, world, say=console.print)
    start_table(console, config, folder, world, settings, compute, model, timeline)

    # ---- Train ---------------------------------------------------------------------------------------------------
    rank = session.Rank(world, console, request, peers)
    if session.train(rank, model, images, config, folder, masks=[callbacks.Prune(console.print)]):
        return request.status

    # ---- Check and write the result ------------------------------------------------------------------------------
    console.print(session.finish(rank, model, images, folder))
    console.print(tensorboard_command(folder))
    collectives.shutdown()
    if not (config.quantize and world.first):
        return 0
    if request.told:
        console.print("stopped by a signal after the last step; the same command quantizes the run")
        return request.status
    return quantize(config, folder)


def finish(config: TrainConfig, folder: RunFolder, result: Mapping[str, Any]) -> int:
    """Report that the run was already complete, and quantize it if ``--quantize`` is set."""
    print(f"{folder.path} is complete: {result['line']}", flush=True)
    return quantize(config, folder) if config.quantize else 0


def quantize(config: TrainConfig, folder: RunFolder) -> NoReturn:
    """Export and measure a complete run, in a new program without Horovod and without this run's precision."""
    data_dir = ["--data-dir", config.data_dir] if config.data_dir else []
    entrypoint.become("cnnopt.quantize", str(folder.path.resolve()), *data_dir)


def main() -> int:
    """Parse the command line and train."""
    return entrypoint.run("train_hvd.py", lambda request, peers: train(parse_args(), request, peers))


if __name__ == "__main__":
    entrypoint.start(main)
