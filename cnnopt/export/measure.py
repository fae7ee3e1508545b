"""Size, zeros, accuracy and agreement of a file as exported. Latency is in ``cnnopt.export.latency``. NumPy only."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnopt.export.tflite_file import Kernel


def sizes(data: bytes, kernels: Sequence[Kernel]) -> dict[str, int]:
    """Bytes of a file: ``raw``, as ``gzip -9`` and ``xz -9`` leave it, ``entropy_bound`` and ``weights_entropy``.

    ``entropy_bound`` is what an ideal coder with one static model for each kernel would need for the kernels'
    stored values, plus every other byte of the file (structure, biases, scales, sparse indices) as it is stored:
    sum over kernels of n H / 8 with H the Shannon entropy in bits of the empirical distribution of the n values.
    The models themselves are not counted, as is usual. ``weights_entropy`` is the sum alone: a coder that also
    compresses the rest of the file can be below ``entropy_bound``, but not below this by much.
    """
    coded = weights_entropy(kernels)
    other = len(data) - sum(kernel.nbytes for kernel in kernels)
    return {
        "raw": len(data),
        # No time stamp and no name, so that the size is a property of the content.
        "gzip": len(gzip.compress(data, 9, mtime=0)),
        "xz": len(lzma.compress(data, preset=9)),
        "entropy_bound": other + coded,
        "weights_entropy": coded,
    }


def weights_entropy(kernels: Sequence[Kernel]) -> int:
    """Bytes that an ideal coder needs for the stored values of kernels, with one static model for each."""
    return int(np.ceil(sum(entropy(kernel.stored) * kernel.stored.size for kernel in kernels) / 8))


def entropy(values: np.ndarray) -> float:
    """Shannon entropy in bits per value of the empirical distribution of ``values``, compared bit by bit."""
    if not values.size:
        return 0.0
    counts = np.unique(values.view(f"u{values.itemsize}"), return_counts=True)[1]
    share = counts / values.size
    return float(-(share * np.log2(share)).sum())


def weights(kernels: Mapping[str, Kernel], exact: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Count, zeros and stored type of the weights of a file, as a whole and by layer.

    ``exact``: float32 kernels by layer that the file was quantized from, in the same layout. ``error`` is the
    root of the mean squared difference over that of the weights.
    """
    layers = {}
    for layer, kernel in kernels.items():
        reference = exact[layer]
        norm = float(np.linalg.norm(reference))
        layers[layer] = {
            "weights": kernel.dense.size,
            "nonzero": kernel.nonzero,
            "stored_as": str(kernel.dense.dtype),
            "sparse_encoded": kernel.sparse,
            "distinct": len(np.unique(kernel.dense)),
            "entropy_bits": entropy(kernel.stored),
            "error": float(np.linalg.norm(kernel.weights - reference)) / norm if norm else 0.0,
        }
    total, nonzero = sum(k.dense.size for k in kernels.values()), sum(k.nonzero for k in kernels.values())
    return {"weights": total, "nonzero": nonzero, "sparsity": 1 - nonzero / total, "layers": layers}


def ledger(stages: Mapping[str, Mapping[str, np.ndarray]], masks: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Where zeros were lost on the way to a file.

    ``stages``: kernels by layer for each stage, in order; ``masks``: True where a weight is kept. A pruned
    weight that is not zero at a stage is lost there; counting zeros alone would let those that rounding adds
    hide those that were lost. Without masks (a dense run) the zeros of the first stage are those to hold.
    """
    held = {
        layer: ~masks[layer] if layer in masks else kernel == 0 for layer, kernel in next(iter(stages.values())).items()
    }
    lines = [
        {
            "stage": stage,
            "zeros": sum(int(np.sum(k == 0)) for k in kernels.values()),
            "lost": sum(int(np.sum((kernel != 0) & held[layer])) for layer, kernel in kernels.items()),
        }
        for stage, kernels in stages.items()
    ]
    return {
        "pruned": sum(int(np.sum(zero)) for zero in held.values()),
        "stages": lines,
        "first_loss": next((line["stage"] for line in lines if line["lost"]), None),
    }


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of logits [n, classes], in float64."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def mistakes(logits: np.ndarray, labels: np.ndarray, count: int = 20) -> list[dict[str, Any]]:
    """The images that were given a wrong class with the highest probability: their index, both classes, and that."""
    predicted, shares = logits.argmax(axis=1), probabilities(logits).max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    return [
        {"image": int(i), "label": int(labels[i]), "predicted": int(predicted[i]), "probability": float(shares[i])}
        for i in wrong[np.argsort(-shares[wrong], kind="stable")[:count]]
    ]


def accuracy(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Top-1 accuracy, cross-entropy, confusion matrix [true][predicted], mistakes, agreement with ``reference``.

    ``logits`` and ``reference`` float32 [n, classes], ``labels`` int64 [n]; ``reference`` are the logits of the
    float32 network in TensorFlow, and ``agreement`` is the share of images on which both name the same class.
    """
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    predicted, classes = logits.argmax(axis=1), logits.shape[1]
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    return {
        "images": len(labels),
        "correct": int(np.sum(predicted == labels)),
        "accuracy": float(np.mean(predicted == labels)),
        "loss": float(losses.mean()),
        "agreement": float(np.mean(predicted == reference.argmax(axis=1))),
        "confusion": confusion.tolist(),
        "mistakes": mistakes(logits, labels),
    }


def ratios(size: Mapping[str, int], reference: Mapping[str, int]) -> dict[str, float]:
    """How many times smaller each size is than the dense float32 file as it is, and gzip against gzip."""
    times = {name: reference["raw"] / value for name, value in size.items() if name != "weights_entropy"}
    return {**times, "gzip_to_gzip": reference["gzip"] / size["gzip"]}
