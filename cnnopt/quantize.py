"""Quantize a finished run, and measure every exported file.

    python -m cnnopt.quantize runs/NAME --clusters 16 --baseline runs/DENSE
    horovodrun -np 2 python -m cnnopt.quantize runs/NAME --qat 2 --clusters 16
    python -m cnnopt.quantize runs/NAME --variants int8,keras,onnx,safetensors
    python -m cnnopt.quantize pack FILE.tflite... [--output-dir DIR]
    python -m cnnopt.quantize unpack FILE.packed.zip... [--output-dir DIR]

``--qat`` runs ``cnnopt.finetune`` first, as a child process of each rank, unless its result is there already.
Files go to runs/NAME/export/. The report goes to runs/NAME/report.json, .md, .png and .html, and to TensorBoard
(docs/quantize.md). Exit status: 0 done, 1 failed, 2 wrong input, 75 saved and stopped by a signal while fine-tuning,
130 stopped by Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnopt import interrupt
from cnnopt.command_line import Parser, one_line, python_m
from cnnopt.distributed import child
from cnnopt.distributed.world import is_first, launched
from cnnopt.export.options import PACKED, OptionError, Options, choose, parse_args
from cnnopt.export.shipped import shipped
from cnnopt.output import outlive_readers
from cnnopt.run import atomic_files, locks

if TYPE_CHECKING:
    from filelock import FileLock

    from cnnopt.data.datasets import Dataset
    from cnnopt.export.trained import TrainedRun


def writable(folder: Path, remedy: str) -> Path:
    """Make ``folder`` if needed. Raises OptionError, with ``remedy``, if nothing can be written in the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OptionError(f"{folder}: cannot write there ({error.strerror}); {remedy}") from None
    return folder


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that passed the checks: ``variants`` of ``run``, and the float32 file of ``baseline``.

    ``folder`` is that of the exported files. ``lock`` keeps other processes out of it.
    """

    options: Options
    run: TrainedRun
    variants: tuple[str, ...]
    baseline: TrainedRun | None
    folder: Path
    lock: FileLock

    def fine_tuned(self) -> dict[str, Path]:
        """The run folder of each fine-tuned variant. The folder may not exist yet."""
        clusters = self.options.fine_tunings()
        return {variant: self.run.fine_tuned(self.options.qat or 0, n) for variant, n in clusters.items()}


def check(options: Options) -> Plan:
    """Refuse an impossible request at once, before TensorFlow is loaded. Raises UserError."""
    from cnnopt.data import datasets
    from cnnopt.export import trained

    options.check_packages()
    run = trained.read(options.run)
    variants = choose(options, run.sparsity)
    baseline = trained.read_baseline(options.baseline, run) if options.baseline else None
    folder = writable(options.run / "export", "copy the run to a writable folder")
    name = run.identity["dataset"]
    datasets.check(name, options.data_dir)
    options.calibration_of(name, datasets.DATASETS[name] - run.identity["validation"])
    lock = locks.hold(options.run / ".quantize.lock")
    if lock is None:
        raise OptionError(f"{options.run}: another cnnopt.quantize works on this run; wait for its end")
    return Plan(options, run, variants, baseline, folder, lock)


def fine_tune(options: Options, plan: Plan | None) -> int:
    """Fine-tune if that is not done yet; returns the exit status. Only the first rank has a ``plan``.

    Fine-tuning runs in a child process, so that the measurements afterwards know no Horovod and have all cores.
    """
    from cnnopt.run.run_folder import RunFolder

    done = plan is not None and all(RunFolder(folder).result() is not None for folder in plan.fine_tuned().values())
    # Other ranks do not know that fine-tuning is done. They wait in cnnopt.finetune until the first rank tells them.
    if done and launched()[0].size == 1:
        return 0
    data_dir = ["--data-dir", options.data_dir] if options.data_dir else []
    clusters = ["--clusters", *map(str, options.fine_tunings().values())]
    command = [*python_m("cnnopt.finetune"), str(options.run), str(options.qat), *clusters, *data_dir]
    return child.run(command)


def quantize(plan: Plan, folder: Path) -> tuple[dict[str, Any], Dataset]:
    """Export the variants of a run to ``folder`` and measure them. Returns the content of report.json, and the images.

    What is printed and reported names the files as they are called in ``plan.folder``.
    """
    # ---- Load: after fine-tuning, because the other ranks would not wait for a download -----------------------------
    from cnnopt.data import datasets
    from cnnopt.distributed import host
    from cnnopt.export import trained

    options, run = plan.options, plan.run
    tuned = {variant: trained.read(folder) for variant, folder in plan.fine_tuned().items()}
    name = run.identity["dataset"]
    # The images of training: without those that the run held out for validation.
    held_out = {"seed": run.identity["seed"], "validation": run.identity["validation"]}
    images = datasets.load(name, options.data_dir, **held_out, show_progress=True)
    if images.num_classes != run.num_classes:
        raise OptionError(f"{run.checkpoint}: {run.num_classes} classes, but {name} has {images.num_classes}")
    count = options.calibration_of(name, len(images.train_images))

    import numpy as np

    # Calibrate on training images: a file that has seen the images that measure it would look too good.
    chosen = np.random.default_rng(options.seed).choice(len(images.train_images), count, replace=False)
    chosen.sort()

    # ---- Convert -------------------------------------------------------------------------------------------------
    print(f"{run.path}: ResNet-{run.depth}, {run.sparsity:.2%} of the weights zero, step {run.step}")
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    with interrupt.importing(), host.quiet_stderr():
        from cnnopt.export import formats, report, variants

    exports = []
    baseline = [variants.float32(plan.baseline, "dense-float32")] if plan.baseline else []
    for variant in (*baseline, *variants.of_run(run, plan.variants, clusters=options.clusters, tuned=tuned)):
        exports.append(variants.write(variant, folder, images.train_images[chosen]))
        print(f"  {plan.folder / exports[-1].path.name}  {len(exports[-1].content):,} bytes")
    others = {name: formats.write(name, run, folder) for name in options.formats}
    for path in others.values():
        print(f"  {plan.folder / path.name}  {len(formats.content_of(path)):,} bytes")

    # ---- Measure these very files --------------------------------------------------------------------------------
    content = report.report(exports, others, images, clusters=options.clusters, runtime=options.runtime)
    content["calibration"] = {
        "split": "train",
        "seed": options.seed,
        "count": count,
        "indices": chosen.tolist(),
    }
    if options.pack:
        for entry, export in zip(content["files"], exports, strict=True):
            if entry["name"] in PACKED:
                entry["packed"] = packed(export.path, export.content, entry["size"], content["reference"]["raw"])
    for entry in content["files"]:
        entry["shipped"] = dataclasses.asdict(shipped(entry))
    return content, images


def packed(path: Path, content: bytes, size: dict[str, int], reference: int) -> dict[str, Any]:
    """Write the archive of an exported file beside it, and return how good the archive is."""
    from cnnopt.export import measure, pack, tflite_file

    archive = pack.pack(content, path)
    target = path.with_name(path.name + pack.SUFFIX)
    atomic_files.replace(target, archive)
    coded = pack.stream_sizes(archive)
    weights = sum(coded[name] for name in ("mask.xz", "palette.xz", "values.xz"))
    # A dynamic-range file also has float32 kernels. The archive stores those with the structure, not as kernels.
    ideal = measure.weights_entropy([k for k in tflite_file.kernels(content, path) if k.stored.dtype == "int8"])
    return {
        "file": f"export/{target.name}",
        "bytes": len(archive),
        "weights_bytes": weights,
        "over_entropy_bound": len(archive) / size["entropy_bound"] - 1,
        # Kernels that are entirely zero have entropy 0, which cannot be a divisor.
        "over_weights_entropy": weights / ideal - 1 if ideal else None,
        "times_smaller": reference / len(archive),
    }


def remove_earlier(plan: Plan, new: Path) -> None:
    """Remove what describes or packs the earlier versions of the files in ``new``, which will replace them."""
    from cnnopt.export import pack

    stale = [plan.options.run / f"report.{ending}" for ending in ("json", "md", "png", "html")]
    stale += [plan.folder / "README.md", *(plan.folder / f"{file.name}{pack.SUFFIX}" for file in new.glob("*.tflite"))]
    for path in stale:
        path.unlink(missing_ok=True)


def archive_command(command: str, argv: Sequence[str]) -> None:
    """``pack`` and ``unpack``: write one file beside each named file. Raises UserError."""
    from cnnopt.distributed import host
    from cnnopt.export import pack, tflite_file

    does = {
        "pack": "Write FILE.packed.zip beside each FILE.",
        "unpack": "Write the file that an archive holds beside it.",
    }
    parser = Parser(prog=f"python -m cnnopt.quantize {command}", description=does[command])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--output-dir", type=Path, help="where the files go [beside the files named]")
    given = parser.parse_args(argv)

    names = [path.name for path in given.files]
    twice = sorted({name for name in names if names.count(name) > 1})
    if command == "pack" and given.output_dir and twice:
        raise OptionError(
            f"--output-dir {given.output_dir}: {twice[0]} is named twice; leave it out, or pack one by one"
        )

    def folder_for(path: Path) -> Path:
        return writable(given.output_dir or path.parent, "give another --output-dir")

    for path in given.files:
        if command == "pack":
            content = tflite_file.read(path)
            host.prepare({**host.TENSORFLOW, **host.QUIET})
            with host.quiet_stderr():
                archive = pack.pack(content, path)
            target = folder_for(path) / (path.name + pack.SUFFIX)
            atomic_files.replace(target, archive)
            print(f"{target}  {len(content):,} -> {len(archive):,} bytes")
        else:
            try:
                archive = path.read_bytes()
            except OSError as error:
                raise OptionError(f"{path}: {error.strerror}; name an archive that pack wrote") from None
            name, content = pack.unpack(archive, path)
            target = folder_for(path) / name
            if target.exists() and (not target.is_file() or target.read_bytes() != content):
                raise OptionError(f"{target} exists and differs; move it away, or give --output-dir")
            atomic_files.replace(target, content)
            print(f"{target}  {len(content):,} bytes, SHA-256 {tflite_file.digest(content)}")


@one_line("cnnopt.quantize", speaks=is_first)
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""
    argv = sys.argv[1:] if argv is None else argv
    first = is_first()
    if argv and argv[0] in ("pack", "unpack"):
        if first:
            archive_command(argv[0], argv[1:])
        return 0
    options = parse_args(argv, __doc__)
    plan = check(options) if first else None
    if options.qat and (status := fine_tune(options, plan)):
        return status
    if plan is None:
        print("cnnopt.quantize: rank 0 of this job writes the report")
        return 0
    with atomic_files.replace_together(plan.folder) as new:
        content, images = quantize(plan, new)
        remove_earlier(plan, new)
    from cnnopt.export import model_card, page, render, tensorboard

    render.save(content, options.run)
    page.save(content, options.run, images)
    model_card.save(content, options.run)
    tensorboard.save(content, options.run, images)
    render.show(content)
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
