"""Makes a small finished run, as train_hvd.py writes it, and exports it with cnnopt.quantize."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from cnnopt.config import TrainConfig
from cnnopt.model.topology import layer_names, weight_shapes
from cnnopt.run import checkpoint
from tests.helpers import ROOT

STEP = 7
# Keep the variables, because matplotlib may be outside .venv. Without a search for GPUs TensorFlow imports faster.
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}


def make_run(
    path: Path, *, sparsity: float = 0.6, seed: int = 0, dataset: str = "synthetic", **settings: object
) -> Path:
    """A complete run folder of an untrained ResNet-8 for ``dataset``, with kernels pruned to ``sparsity``."""
    config = TrainConfig(dataset=dataset, depth=8, sparsity=sparsity, seed=seed, **settings)
    rng = np.random.default_rng(seed)
    arrays = {"mean:0": np.full(3, 128, np.float32), "std:0": np.full(3, 50, np.float32)}
    for name, shape in weight_shapes(8, 10).items():
        kind = name.split("/")[1]
        if kind == "kernel:0":
            kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
            flat = kernel.ravel()
            flat[np.argsort(abs(flat))[: round(sparsity * flat.size)]] = 0
            arrays[name] = kernel.astype(np.float32)
        elif kind in ("gamma:0", "moving_variance:0"):
            arrays[name] = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            arrays[name] = rng.normal(0, 0.1, shape).astype(np.float32)
    stored = {f"weights/{i:03d}/{name}": value for i, (name, value) in enumerate(arrays.items())}
    if config.ema:
        stored |= {f"ema/{i:03d}/ema/{name}:0": value * 0.5 for i, (name, value) in enumerate(arrays.items())}
    for i, layer in enumerate(layer_names(8)):
        mask = (arrays[f"{layer}/kernel:0"] != 0).astype(np.float32)
        stored[f"masks/{i:03d}/mask/{layer}/kernel:0:0"] = mask
    path.mkdir(parents=True)
    checkpoint.save(path / "checkpoints", STEP, stored, {"identity": config.identity()})
    (path / "config.json").write_text(json.dumps({"identity": config.identity(), "name": path.name}))
    (path / "result.json").write_text(json.dumps({"step": STEP, "test_accuracy": 0.1}))
    return path


def quantize(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "cnnopt.quantize", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**ENVIRONMENT, **environment})


def forge(run: Path, **changes: object) -> Path:
    """Save the run's checkpoint again with some arrays replaced. The value None leaves an array out."""
    found = checkpoint.load(run / "checkpoints" / f"step-{STEP:08d}")
    arrays = {name: changes.get(name.split("/", 2)[-1], value) for name, value in found.arrays.items()}
    arrays = {name: value for name, value in arrays.items() if value is not None}
    checkpoint.save(run / "checkpoints", STEP, arrays, found.state)
    return run
