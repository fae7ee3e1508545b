"""The report of a run: every measurement of every exported file, in the form of report.json."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cnnopt.data.datasets import Dataset
from cnnopt.distributed import host
from cnnopt.errors import RunError
from cnnopt.export import explain, formats, interpret, latency, measure, qat, tflite_file
from cnnopt.export.render import SCHEMA
from cnnopt.export.trained import TrainedRun
from cnnopt.export.variants import Export, Kernels
from cnnopt.packages import RUNTIMES

#: CPU flags in /proc/cpuinfo for which XNNPACK has kernels that sum int8 products directly. The last two are ARM's.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")


def report(
    exports: Sequence[Export], in_formats: Mapping[str, Path], images: Dataset, *, clusters: int | None, runtime: str
) -> dict[str, Any]:
    """The content of report.json, except calibration and archives (docs/quantize.md, "report.json").

    ``exports``: the files of one run, including float32, and optionally the float32 file of a baseline. If there is a
    baseline, sizes are compared with it. ``in_formats``: the run's network in other formats. ``runtime``: the package
    of the interpreter, ``tf`` or ``litert``. Raises RunError if two files are equal, ConversionError, TfliteError,
    LatencyError.
    """
    _check_that_files_differ(exports)
    own = next(export for export in exports if export.variant.label == "float32")
    run, network = own.variant.run, own.variant.source
    others = [export for export in exports if export.variant.run is not run]
    reference = others[0] if others else own
    reference_size = measure.sizes(reference.content, list(reference.kernels.values()))
    expected = network.predict(images.test_images.astype(np.float32), batch_size=200, verbose=0)
    threads = host.cores()
    files: list[dict[str, Any]] = []
    columns = (TextColumn("  {task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not os.isatty(2), transient=True) as progress:
        for export in exports:
            variant = export.variant
            # Read from the disk, so that the measured file is the one that a user will find.
            data = tflite_file.read(export.path)
            size = measure.sizes(data, list(export.kernels.values()))
            files.append(
                {
                    "name": variant.label,
                    "file": f"export/{export.path.name}",
                    "sha256": tflite_file.digest(data),
                    "run": str(variant.run.path),
                    "size": size,
                    "times_smaller": measure.ratios(size, reference_size),
                    "weights": measure.weights(export.kernels, _quantized_from(export, exports)),
                    "fine_tuned": _fine_tuning(variant.tuned, run) if variant.tuned else None,
                    "ledger": measure.ledger(_stages(export, own), run.masks) if variant.run is run else None,
                    "test": _test(export, data, images, expected, threads, runtime, progress),
                    "validation": _validation(export, data, images, run, threads, runtime),
                    "packed": None,
                }
            )
    measured = functools.partial(
        formats.measured, run=run, images=images, expected=expected, reference=reference_size, threads=threads
    )
    print("  latency, one file after the other")
    # One thread comes first, because that is the usual comparison.
    counts = sorted({1, threads})
    timings_of_all = latency.measure([e.path for e in exports], counts, runtime=runtime)
    for entry, timings in zip(files, timings_of_all, strict=True):
        entry["latency"] = timings
    content = {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "runtime": runtime,
        "machine": machine(threads, RUNTIMES[runtime]),
        "run": {
            "path": str(run.path),
            "dataset": images.name,
            "classes": list(images.class_names),
            "depth": run.depth,
            "parameters": int(sum(np.prod(w.shape) for w in network.trainable_weights)),
            "step": run.step,
            "checkpoint": run.checkpoint.name,
            "averaged_weights": bool(run.identity.get("ema")),
            "sparsity": run.sparsity,
            "trained_accuracy": run.result.get("test_accuracy"),
            "float32_accuracy": float(np.mean(expected.argmax(axis=1) == images.test_labels)),
            "clusters": clusters,
        },
        "reference": {
            "kind": "self" if reference is own else "baseline",
            "run": str(reference.variant.run.path),
            "file": reference.variant.label,
            **reference_size,
        },
        "files": files,
        "formats": [measured(name, path) for name, path in in_formats.items()],
    }
    return {**content, "notes": explain.notes(content)}


def _check_that_files_differ(exports: Sequence[Export]) -> None:
    # The original study's table lists one file under two names. Two files with equal bytes are not two measurements.
    names: dict[str, str] = {}
    for export in exports:
        name = export.variant.label
        twin = names.setdefault(tflite_file.digest(export.content), name)
        if twin != name:
            raise RunError(f"{export.path} equals the {twin} file byte for byte; leave one of them out")


def _quantized_from(export: Export, exports: Sequence[Export]) -> Kernels:
    """The float kernels from which a file was quantized: those of its run's float32 file, or the fine-tuned ones."""
    variant = export.variant
    if variant.tuned:
        return {layer: kernel * qat.gain(variant.source, layer) for layer, kernel in variant.tuned.kernels().items()}
    return next(e for e in exports if e.variant.name == "float32" and e.variant.run is variant.run).weights


def _stages(export: Export, own: Export) -> Mapping[str, Kernels]:
    """The kernels at each stage on the way to a file. ``own`` is the float32 file of its run."""
    variant = export.variant
    stages = dict(variant.stages)
    if variant.source is own.variant.source:
        stages["converted"] = own.weights
    if export is not own:
        stages["encoded" if variant.name == "sparse-float32" else "quantized"] = export.weights
    return stages


def _test(
    export: Export,
    data: bytes,
    images: Dataset,
    expected: np.ndarray,
    threads: int,
    runtime: str,
    progress: Progress,
) -> dict[str, Any]:
    """Accuracy on the test images, and the seconds that the test took."""
    task = progress.add_task(export.variant.label, total=len(images.test_images))
    begin = time.perf_counter()
    advance = functools.partial(progress.advance, task)
    logits = interpret.logits(data, export.path, images.test_images, threads=threads, runtime=runtime, advance=advance)
    seconds = time.perf_counter() - begin
    return {**measure.accuracy(logits, images.test_labels, expected), "seconds": seconds}


def _validation(
    export: Export, data: bytes, images: Dataset, run: TrainedRun, threads: int, runtime: str
) -> dict[str, Any] | None:
    """Accuracy on the validation images of ``run``. None if there are none, or if the file's run may have learned them.

    The best file is chosen by them (``page.best``), so that the test images measure the choice and do not make it.
    """
    same = all(export.variant.run.identity[name] == run.identity[name] for name in ("seed", "validation"))
    if images.monitored != "val" or not same:
        return None
    seen, labels = images.split("val")
    logits = interpret.logits(data, export.path, seen, threads=threads, runtime=runtime)
    found = measure.accuracy(logits, labels, reference=logits)
    return {name: found[name] for name in ("images", "correct", "accuracy", "loss")}


def _fine_tuning(tuned: TrainedRun, run: TrainedRun) -> dict[str, Any]:
    known = {"accuracy": tuned.result.get("test_accuracy"), "minutes": tuned.result.get("minutes")}
    return {"epochs": tuned.identity["epochs"], "path": str(tuned.path.relative_to(run.path)), **known}


def machine(threads: int, *packages: str) -> dict[str, Any]:
    """The machine on which the latencies were measured. ``packages``: more whose versions matter."""
    flags = host.cpu_flags()
    return {
        "host": platform.node(),
        "cpu": host.cpu(),
        "cores": threads,
        "int8_instructions": [name for name in INT8_INSTRUCTIONS if name in flags] if flags else None,
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": host.versions(["tensorflow", "tf-keras", "numpy", *packages]),
    }
