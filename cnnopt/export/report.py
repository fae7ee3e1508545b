"""The card of a run: every measurement of every exported file, as report.json holds it."""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tf_keras as keras
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cnnopt.data.datasets import Dataset
from cnnopt.distributed import host
from cnnopt.errors import RunError
from cnnopt.export import explain, interpret, latency, measure, tflite_file
from cnnopt.export.render import SCHEMA
from cnnopt.export.trained import TrainedRun

#: Flags of /proc/cpuinfo (the last two: ARM) for which XNNPACK has kernels that sum int8 products as they are.
INT8_INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "asimddp", "i8mm")


@dataclass(frozen=True, eq=False)
class Export:
    """A file that was written, its bytes, and its kernels by layer.

    ``exact``: the float kernels that it was quantized from, where they are not those of the float32 file.
    """

    name: str
    path: Path
    content: bytes
    kernels: Mapping[str, tflite_file.Kernel]
    exact: Mapping[str, np.ndarray] | None = None


def report(
    run: TrainedRun,
    exports: Sequence[Export],
    ways: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]],
    model: keras.Model,
    images: Dataset,
    *,
    baseline: TrainedRun | None,
    reference: Export,
    clusters: int | None,
    tuned: Mapping[str, TrainedRun],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The content of report.json but for calibration and archives (docs/quantize.md, "report.json").

    ``ways``: for each file of this run the kernels at each stage on the way to it. ``model``: the float32 network
    of the run. ``tuned``: for each file that was fine-tuned, the run folder of that. Raises RunError where two variants
    are the same bytes, TfliteError, LatencyError.
    """
    digests: dict[str, str] = {}
    for export in exports:
        # The original study's table holds one file under two names; equal bytes cannot be two measurements.
        twin = digests.setdefault(tflite_file.digest(export.content), export.name)
        if twin != export.name:
            raise RunError(f"{export.path} is to the byte the {twin} file; leave one of them out")
    threads = host.cores()
    expected = model.predict(images.test_images.astype(np.float32), batch_size=200, verbose=0)
    own = {layer: kernel.weights for layer, kernel in next(e for e in exports if e.name == "float32").kernels.items()}
    reference_size = measure.sizes(reference.content, list(reference.kernels.values()))
    files: list[dict[str, Any]] = []
    columns = (TextColumn("  {task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not os.isatty(2), transient=True) as progress:
        for export in exports:
            # From the disk, so that what is measured is what is there.
            data = tflite_file.read(export.path)
            task = progress.add_task(export.name, total=len(images.test_images))
            begin = time.perf_counter()
            logits = interpret.logits(
                data,
                export.path,
                images.test_images,
                threads=threads,
                advance=functools.partial(progress.advance, task),
            )
            seconds = time.perf_counter() - begin
            mine = export.name in ways
            size = measure.sizes(data, list(export.kernels.values()))
            files.append(
                {
                    "name": export.name,
                    "file": f"export/{export.path.name}",
                    "sha256": tflite_file.digest(data),
                    "run": str(run.path if mine or baseline is None else baseline.path),
                    "size": size,
                    "times_smaller": measure.ratios(size, reference_size),
                    "weights": measure.weights(
                        export.kernels,
                        (export.exact or own) if mine else {layer: k.weights for layer, k in export.kernels.items()},
                    ),
                    "fine_tuned": _fine_tuning(tuned[export.name], run) if export.name in tuned else None,
                    "ledger": measure.ledger(ways[export.name], run.masks) if mine else None,
                    "test": {**measure.accuracy(logits, images.test_labels, expected), "seconds": seconds},
                    "packed": None,
                }
            )
    say("  latency, one file after the other")
    # One thread first, as everybody compares that.
    counts = sorted({1, threads})
    for entry, timings in zip(files, latency.measure([e.path for e in exports], counts), strict=True):
        entry["latency"] = timings
    correct = float(np.mean(expected.argmax(axis=1) == images.test_labels))
    content = {
        "schema": SCHEMA,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(threads),
        "run": {
            "path": str(run.path),
            "dataset": images.name,
            "classes": list(images.class_names),
            "depth": run.depth,
            "parameters": int(sum(np.prod(w.shape) for w in model.trainable_weights)),
            "step": run.step,
            "checkpoint": run.checkpoint.name,
            "averaged_weights": bool(run.identity.get("ema")),
            "sparsity": run.sparsity,
            "trained_accuracy": run.result.get("accuracy"),
            "float32_accuracy": correct,
            "clusters": clusters,
        },
        "reference": {
            "kind": "baseline" if baseline else "self",
            "run": str(baseline.path if baseline else run.path),
            "file": reference.name,
            **reference_size,
        },
        "files": files,
    }
    return {**content, "notes": explain.notes(content)}


def _fine_tuning(tuned: TrainedRun, run: TrainedRun) -> dict[str, Any]:
    known = {key: tuned.result.get(key) for key in ("accuracy", "minutes")}
    return {"epochs": tuned.identity["epochs"], "path": str(tuned.path.relative_to(run.path)), **known}


def machine(threads: int) -> dict[str, Any]:
    """What the latencies were measured on."""
    flags = host.cpu_flags()
    return {
        "host": platform.node(),
        "cpu": host.cpu(),
        "cores": threads,
        "int8_instructions": [name for name in INT8_INSTRUCTIONS if name in flags] if flags else None,
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": host.versions(["tensorflow", "tf-keras", "numpy"]),
    }
