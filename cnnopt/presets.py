"""The named settings of ``train_hvd.py --preset``, and one line about each. Standard library only."""

from __future__ import annotations

from typing import Any

_STUDY: dict[str, Any] = {
    "dataset": "cifar100",
    "epochs": 300,
    "optimizer": "adam",
    "base_lr": 1e-3,
    "lr_schedule": "step",
    "lr_drops": "80e:0.1,120e:0.01,160e:0.001,180e:0.0005",
    "warmup": "0e",
    # Keras' L2(1e-4) adds 1e-4 x w^2 to the loss. The gradient of this term is 2e-4 x w.
    "weight_decay": 2e-4,
    "augment": "none",
    "normalize": "pixel-mean",
    "precision": "float32",
    "prune_begin": "0s",
    "prune_end": "100%",
    "prune_frequency": "100s",
    "initial_sparsity": 0.5,
    "sparsity_scope": "uniform",
}
_DENSE: dict[str, Any] = {"sparsity": 0.0, "sparsity_schedule": "none"}
_STUDY_SUPER = {**_STUDY, "augment": "shift", "precision": "float16"}

PRESETS: dict[str, dict[str, Any]] = {
    "baseline": {**_DENSE, "precision": "float32"},
    "constant": {"sparsity": 0.6, "sparsity_schedule": "constant", "precision": "float32"},
    "polynomial": {"sparsity": 0.6, "sparsity_schedule": "polynomial", "precision": "float32"},
    "mixed": {**_DENSE, "precision": "auto"},
    "super": {"depth": 44, "sparsity": 0.6, "sparsity_schedule": "polynomial", "precision": "auto"},
    "demo": {
        "dataset": "digits",
        "depth": 14,
        "epochs": 8,
        "batch_size": 64,
        "precision": "bfloat16",
    },
    "study-baseline": {**_STUDY, **_DENSE},
    "study-constant": {**_STUDY, "sparsity": 0.6, "sparsity_schedule": "constant"},
    "study-polynomial": {**_STUDY, "sparsity": 0.6},
    "study-polynomial-90": {**_STUDY, "sparsity": 0.9},
    "study-mixed": {**_STUDY, **_DENSE, "precision": "float16"},
    "study-super-60": {**_STUDY_SUPER, "sparsity": 0.6},
    "study-super-70": {**_STUDY_SUPER, "sparsity": 0.7},
}
#: The presets of the original study.
STUDY = [name for name in PRESETS if name.startswith("study-")]

#: A line about each preset, for ``--help``. Flags beside --preset win, and where a preset says nothing, defaults hold.
SUMMARIES = {
    "baseline": "dense, float32",
    "mixed": "dense, --precision auto",
    "constant": "60% zeros at once, after 30% of the run; float32",
    "polynomial": "60% zeros by a ramp from 30 to 80% of the run; float32",
    "super": "ResNet-44, 60% zeros by a ramp, --precision auto",
    "demo": "ResNet-14 on scikit-learn's digits, one minute",
    "study-baseline": "the original study: CIFAR-100, 300 epochs of Adam; dense",
    "study-constant": "the same with 60% zeros from the first step",
    "study-polynomial": "the same with 60% zeros by a ramp from 50%",
    "study-polynomial-90": "the same with 90% zeros by that ramp",
    "study-mixed": "study-baseline in float16",
    "study-super-60": "study-polynomial in float16 and with shifted images",
    "study-super-70": "the same with 70% zeros",
}
