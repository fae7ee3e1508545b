"""Quantize a finished run and measure every file that comes out: python -m cnnopt.quantize runs/NAME

    python -m cnnopt.quantize runs/NAME --variants int8,clustered-int8 --clusters 16 --baseline runs/DENSE --pack
    horovodrun -np 2 python -m cnnopt.quantize runs/NAME --qat 2 --clusters 16
    python -m cnnopt.quantize pack FILE.tflite... [--output-dir DIR]
    python -m cnnopt.quantize unpack FILE.packed.zip... [--output-dir DIR]

Files go to runs/NAME/export/, the report to runs/NAME/report.json, .md, .png and .html, and to TensorBoard
(docs/quantize.md). Exit status: 0 done, 1 failed, 2 wrong input, 75 stopped by a signal while fine-tuning, and saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cnnopt.command_line import Parser
from cnnopt.distributed.world import launched
from cnnopt.errors import CnnoptError
from cnnopt.export.options import PACKED, OptionError, Options, choose, parse_args
from cnnopt.run import atomic_files

if TYPE_CHECKING:
    from cnnopt.data.datasets import Dataset


def writable(folder: Path, remedy: str) -> Path:
    """Make ``folder`` if need be. Raises OptionError, with ``remedy``, where nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OptionError(f"{folder}: cannot write there ({error.strerror}); {remedy}") from None
    return folder


def fine_tune(options: Options) -> NoReturn:
    """Become this rank's part of ``cnnopt.finetune``, whose first rank becomes this program again when it is done.

    One process after the other, and not one in the other: what is measured knows no Horovod, and a signal meets the
    process that it is for.
    """
    data_dir = ["--data-dir", options.data_dir] if options.data_dir else []
    clusters = ["--clusters", *map(str, options.fine_tunings().values())]
    command = [sys.executable, "-m", "cnnopt.finetune", str(options.run), str(options.qat), *clusters, *data_dir]
    os.execv(sys.executable, [*command, "--then", *options.argv, "--tuned"])


def quantize(options: Options, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Dataset]:
    """Export and measure the variants of a run; returns the content of report.json and the images."""
    # ---- Refuse at once what cannot work; TensorFlow is not loaded yet ----------------------------------------
    from cnnopt.data import datasets
    from cnnopt.distributed import host
    from cnnopt.export import trained
    from cnnopt.run.run_folder import RunFolder

    run = trained.read(options.run)
    variants = choose(options, run.sparsity)
    baseline = trained.read_baseline(options.baseline, run) if options.baseline else None
    folder = writable(options.run / "export", "copy the run to a writable folder")
    name, seed = run.identity["dataset"], run.identity["seed"]
    datasets.check(name, options.data_dir)
    options.check_calibration(name, datasets.DATASETS[name])

    # ---- Fine-tune, where asked ------------------------------------------------------------------------------------
    folders = {variant: run.fine_tuned(options.qat or 0, n) for variant, n in options.fine_tunings().items()}
    done = all(RunFolder(folder).result() is not None for folder in folders.values())
    # Other ranks cannot know that it is done, and wait to be told.
    if folders and not options.tuned and (not done or launched()[0].size > 1):
        fine_tune(options)
    tuned = {variant: trained.read(folder) for variant, folder in folders.items()}

    # ---- Load: after the ranks have met, as others would not wait for a download ----------------------------------
    images = datasets.load(name, options.data_dir, seed=seed, show_progress=True)
    if images.num_classes != run.num_classes:
        raise OptionError(f"{run.checkpoint}: {run.num_classes} classes, but {name} has {images.num_classes}")
    options.check_calibration(name, len(images.train_images))

    import numpy as np

    # Of the training split: a file calibrated on the test images has seen what it is measured with.
    chosen = np.random.default_rng(options.seed).choice(len(images.train_images), options.calibration, replace=False)
    chosen.sort()

    # ---- Convert -------------------------------------------------------------------------------------------------
    say(f"{run.path}: ResNet-{run.depth}, {run.sparsity:.2%} of the weights zero, step {run.step}")
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    with host.quiet_stderr():
        from cnnopt.export import convert, pack, qat, report

    def make(model: Any, variant: str, label: str) -> report.Export:
        file = folder / f"{label}.tflite"
        content = convert.convert(model, variant, images.train_images[chosen])
        kernels = convert.file_kernels(content, file, variant, run.kernels())
        atomic_files.replace(file, content)
        # Of what was here before; --pack makes it anew.
        file.with_name(file.name + pack.SUFFIX).unlink(missing_ok=True)
        say(f"  {file}  {len(content):,} bytes")
        return report.Export(label, file, content, kernels)

    model = convert.float_model(run)
    exact = make(model, "float32", "float32")
    exports = [exact]
    stages = {"trained": run.kernels(), "loaded": convert.kernels_of(model, run.depth)}
    converted = {"converted": {layer: kernel.weights for layer, kernel in exact.kernels.items()}}
    ways = {"float32": {**stages, **converted}}
    for variant in variants:
        if variant == "float32":
            continue
        source, way = model, {**stages, **converted}
        if variant == "clustered-int8":
            assert options.clusters is not None
            source = convert.clustered_model(run, options.clusters)
            way = {**stages, "clustered": convert.kernels_of(source, run.depth)}
        if variant in tuned:
            source = convert.fine_tuned_model(tuned[variant])
            now = "clustered" if options.fine_tunings()[variant] else "loaded"
            way = {"trained": run.kernels(), "fine-tuned": tuned[variant].kernels()}
            way[now] = convert.kernels_of(source, run.depth)
        export = make(source, variant, variant)
        if variant in tuned:
            folded = {layer: kernel * qat.gain(source, layer) for layer, kernel in way["fine-tuned"].items()}
            export = replace(export, exact=folded)
        last = "encoded" if variant == "sparse-float32" else "quantized"
        ways[variant] = {**way, last: {layer: kernel.weights for layer, kernel in export.kernels.items()}}
        exports.append(export)
    reference = exact
    if baseline:
        reference = make(convert.float_model(baseline), "float32", "dense-float32")
        exports.insert(0, reference)

    # ---- Measure these very files --------------------------------------------------------------------------------
    content = report.report(
        run, exports, ways, model, images, baseline=baseline, reference=reference, clusters=options.clusters,
        tuned=tuned, say=say,
    )  # fmt: skip
    content["calibration"] = {
        "split": "train",
        "seed": options.seed,
        "count": options.calibration,
        "indices": chosen.tolist(),
    }
    if options.pack:
        for entry, export in zip(content["files"], exports, strict=True):
            if export.name in PACKED:
                entry["packed"] = packed(export.path, export.content, entry["size"], content["reference"]["raw"])
    return content, images


def packed(path: Path, content: bytes, size: dict[str, int], reference: int) -> dict[str, Any]:
    """Write the archive of an exported file beside it, and say how good it is."""
    from cnnopt.export import measure, pack, tflite_file

    archive = pack.pack(content, path)
    target = path.with_name(path.name + pack.SUFFIX)
    atomic_files.replace(target, archive)
    assert pack.unpack(archive, target)[1] == content
    coded = pack.stream_sizes(archive)
    weights = sum(coded[name] for name in ("mask.xz", "palette.xz", "values.xz"))
    # A dynamic-range file has kernels in float32 too, which its archive holds among all else.
    ideal = measure.weights_entropy([k for k in tflite_file.kernels(content, path) if k.stored.dtype == "int8"])
    return {
        "file": f"export/{target.name}",
        "bytes": len(archive),
        "weights_bytes": weights,
        "over_entropy_bound": len(archive) / size["entropy_bound"] - 1,
        "over_weights_entropy": weights / ideal - 1,
        "times_smaller": reference / len(archive),
    }


def archive_command(command: str, argv: Sequence[str]) -> None:
    """``pack`` and ``unpack``: one file for each file named, beside it. Raises UserError."""
    from cnnopt.distributed import host
    from cnnopt.export import pack, tflite_file

    parser = Parser(prog=f"cnnopt.quantize {command}")
    parser.add_argument("files", nargs="+", type=Path)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; every expected failure is one line and an exit status."""
    argv = sys.argv[1:] if argv is None else argv
    first = launched()[0].first
    try:
        if argv and argv[0] in ("pack", "unpack"):
            if first:
                archive_command(argv[0], argv[1:])
            return 0
        options = parse_args(argv, __doc__)
        if not first:
            if options.qat:
                fine_tune(options)
            return 0
        content, images = quantize(options)
        from cnnopt.export import model_card, page, render, tensorboard

        render.save(content, options.run)
        page.save(content, options.run, images)
        model_card.save(content, options.run)
        tensorboard.save(content, options.run)
        render.show(content)
    except KeyboardInterrupt:
        return 130
    except CnnoptError as error:
        if first:
            print(f"cnnopt.quantize: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
