"""Reads a finished run as arrays: its last weights, checked to be complete. Needs no TensorFlow."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.config import completed
from cnnopt.errors import UserError
from cnnopt.model.topology import layer_names, weight_shapes
from cnnopt.run import atomic_files, checkpoint
from cnnopt.run.run_folder import RunFolder, result_as_today

#: The names of the activation ranges in a fine-tuned run. Like BatchNorm's statistics they are moving averages, and the
#: ranks average both together.
RANGE = ("moving_min:0", "moving_max:0")
#: The name of a clustered kernel's centroids in a fine-tuned run.
CENTROIDS = "centroids:0"

#: The fields of a run's identity that this module and the exporting code read, with their types.
NEEDED = {"dataset": str, "depth": int, "seed": int, "batch_size": int, "validation": int}


class TrainedError(UserError):
    """A run folder that cannot be exported. The message is one line that names the file and the remedy."""


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The last state of a finished run.

    ``weights``: float32 arrays by variable name ("stem/kernel:0"), the averaged ones if the run had ``--ema``. For a
    fine-tuned run they include the activation ranges and, with clustering, the centroids of the kernels.
    ``masks``: bool arrays by layer name, True where a weight is kept; empty for a dense run.
    """

    path: Path
    identity: dict[str, Any]
    result: dict[str, Any]
    checkpoint: Path
    step: int
    weights: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]

    @property
    def depth(self) -> int:
        """The number of layers of the ResNet."""
        return self.identity["depth"]

    @property
    def num_classes(self) -> int:
        """The number of logits of the network."""
        return len(self.weights["classifier/bias:0"])

    def kernels(self) -> dict[str, np.ndarray]:
        """The prunable kernels by layer name, in the order in which the network computes them."""
        return {layer: self.weights[f"{layer}/kernel:0"] for layer in layer_names(self.depth)}

    @property
    def sparsity(self) -> float:
        """Share of exact zeros in the prunable kernels."""
        kernels = self.kernels().values()
        return sum(int(np.sum(k == 0)) for k in kernels) / sum(k.size for k in kernels)

    def fine_tuned(self, epochs: int, clusters: int = 0) -> Path:
        """The folder for ``cnnopt.finetune`` of exactly these weights, for ``epochs`` and ``clusters`` (0: none)."""
        digest = hashlib.sha256(b"".join(self.weights[name].tobytes() for name in sorted(self.weights)))
        kind = f"{epochs}e-{clusters}c" if clusters else f"{epochs}e"
        return self.path / "qat" / f"{kind}-{digest.hexdigest()[:8]}"


def read(path: Path) -> TrainedRun:
    """The run in folder ``path``. Raises UserError, in well under a second, if the run cannot be exported."""
    folder = RunFolder(path)
    try:
        is_folder = path.is_dir()
    # The name is too long, or a folder on the way may not be entered.
    except OSError as error:
        raise TrainedError(f"{path}: {error.strerror}; name a run folder that this user may read") from None
    if not is_folder:
        raise TrainedError(f"{path}: no such run folder; name one that train_hvd.py made")
    identity = folder.identity("name a folder that train_hvd.py made")
    if any(type(identity.get(name)) is not kind for name, kind in NEEDED.items()):
        raise TrainedError(f"{folder.config_file} is damaged: restore it from a copy, or train again")
    if not folder.result_file.exists():
        raise TrainedError(
            f"{path}: this run never finished (no result.json); go on with the same train_hvd.py command"
        )
    result = result_as_today(atomic_files.read_json(folder.result_file, "restore it from a copy"))
    found, skipped = checkpoint.newest(folder.checkpoints)
    if found is None:
        why = f" ({skipped[0][1]})" if skipped else ""
        raise TrainedError(f"{folder.checkpoints}: no checkpoint to export{why}; restore one, or train again")
    if found.step != result.get("step"):
        raise TrainedError(
            f"{folder.checkpoints}: the newest good checkpoint is of step {found.step}, but the run ended at step "
            f"{result.get('step')}; restore the last checkpoint, or train again"
        )
    weights, masks = _select(found, identity)
    return TrainedRun(path, identity, result, found.path, found.step, weights, masks)


def read_baseline(path: Path, run: TrainedRun) -> TrainedRun:
    """The run to compare ``run`` with. Raises UserError unless it is a dense run of the same network and data."""
    baseline = read(path)
    for field in ("dataset", "depth"):
        if baseline.identity[field] != run.identity[field]:
            raise TrainedError(
                f"--baseline {path}: its {field} is {baseline.identity[field]}, that of {run.path} is "
                f"{run.identity[field]}; name a dense run of the same network and data"
            )
    if baseline.sparsity > 0.01:
        raise TrainedError(f"--baseline {path}: {baseline.sparsity:.0%} of its weights are zero; name a dense run")
    kernels = run.kernels()
    if all(np.array_equal(kernel, kernels[layer]) for layer, kernel in baseline.kernels().items()):
        raise TrainedError(f"--baseline {path}: its weights are those of {run.path}; name another run, or leave it out")
    return baseline


def _select(found: checkpoint.Checkpoint, identity: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights and masks of a checkpoint by plain name. Raises TrainedError if the checkpoint is of another model."""

    def group(name: str) -> list[tuple[str, np.ndarray]]:
        return [(key.split("/", 2)[2], found.arrays[key]) for key in sorted(found.arrays) if key.startswith(f"{name}/")]

    def refuse(difference: str) -> TrainedError:
        return TrainedError(f"{found.path} is a checkpoint of another model ({difference}); restore this run's own")

    stored = completed(found.state.get("identity", identity))
    for key in identity:
        if stored.get(key) != identity[key]:
            raise refuse(f"{key} {stored.get(key)}, but config.json says {identity[key]}")
    weights = dict(group("weights"))
    classes = len(np.atleast_1d(weights.get("classifier/bias:0", np.zeros(0))))
    shapes = weight_shapes(identity["depth"], classes)
    for name, shape in shapes.items():
        if name not in weights or weights[name].shape != shape:
            has = weights[name].shape if name in weights else "missing"
            raise refuse(f"{name} is {has}, a ResNet-{identity['depth']} has {shape}")
    known = {"mean:0", "std:0"}
    extra = {name for name in weights.keys() - shapes.keys() - known if not name.endswith((*RANGE, CENTROIDS))}
    if extra := extra or known - weights.keys():
        raise refuse(f"{min(extra)} does not belong, or is missing")
    if identity.get("ema"):
        averages = [value for _, value in group("ema")]
        if [a.shape for a in averages] != [w.shape for w in weights.values()]:
            raise refuse("its averaged weights are not those of --ema")
        weights = dict(zip(weights, averages, strict=True))
    if any(not np.all(np.isfinite(value)) for value in weights.values()):
        raise TrainedError(f"{found.path}: weights are not finite; the run has diverged, train again at a lower rate")
    masks = {name.removeprefix("mask/").split("/")[0]: value != 0 for name, value in group("masks")}
    return weights, masks if identity.get("sparsity") else {}
