"""Decides which files a run gives, from which network and through which stages. Import after ``host.prepare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tf_keras as keras

from cnnopt.export import convert, tflite_file
from cnnopt.export.trained import TrainedRun
from cnnopt.run import atomic_files

#: Float kernels by layer, in the order of computation.
Kernels = Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Variant:
    """A file to make.

    ``name``: a key of ``options.VARIANTS``, which says how ``source`` is converted. ``label``: name of the file.
    ``run``: the run whose weights the file holds. ``stages``: the kernels at each stage on the way to ``source``.
    ``tuned``: the fine-tuning of ``run`` that gave ``source``.
    """

    label: str
    name: str
    run: TrainedRun
    source: keras.Model
    stages: Mapping[str, Kernels]
    tuned: TrainedRun | None = None


@dataclass(frozen=True, eq=False)
class Export:
    """A variant that was written: its file, the bytes of the file, and the kernels by layer."""

    variant: Variant
    path: Path
    content: bytes
    kernels: Mapping[str, tflite_file.Kernel]

    @property
    def weights(self) -> Kernels:
        """The kernels with the values that the file computes with."""
        return {layer: kernel.weights for layer, kernel in self.kernels.items()}


def float32(run: TrainedRun, label: str = "float32") -> Variant:
    """The unchanged network of a run."""
    source = convert.float_model(run)
    stages = {"trained": run.kernels(), "loaded": convert.kernels_of(source, run.depth)}
    return Variant(label, "float32", run, source, stages)


def of_run(
    run: TrainedRun, names: Sequence[str], *, clusters: int | None, tuned: Mapping[str, TrainedRun]
) -> Iterator[Variant]:
    """The float32 variant, for comparison, and the variants ``names``. ``tuned``: the fine-tuned run of a variant."""
    exact = float32(run)
    yield exact
    for name in names:
        if name in tuned:
            source = convert.fine_tuned_model(tuned[name])
            last = "clustered" if name.startswith("clustered-") else "loaded"
            stages: dict[str, Kernels] = {
                "trained": run.kernels(),
                "fine-tuned": tuned[name].kernels(),
                last: convert.kernels_of(source, run.depth),
            }
            yield Variant(name, name, run, source, stages, tuned[name])
        elif name == "clustered-int8":
            assert clusters is not None
            source = convert.clustered_model(run, clusters)
            stages = {**exact.stages, "clustered": convert.kernels_of(source, run.depth)}
            yield Variant(name, name, run, source, stages)
        elif name != "float32":
            yield Variant(name, name, run, exact.source, exact.stages)


def write(variant: Variant, folder: Path, calibration: np.ndarray) -> Export:
    """Make the file in ``folder``. ``convert.convert`` explains ``calibration``. Raises ConversionError, WriteError."""
    file = folder / f"{variant.label}.tflite"
    content = convert.convert(variant.source, variant.name, calibration)
    kernels = convert.file_kernels(content, file, variant.name, variant.run.kernels())
    atomic_files.replace(file, content)
    return Export(variant, file, content, kernels)
