"""Size, zeros, accuracy and agreement of an exported file. NumPy only. Latency is in ``cnnopt.export.latency``."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cnnopt.export.tflite_file import Kernel


def sizes(data: bytes, kernels: Sequence[Kernel]) -> dict[str, int]:
    """Bytes of a file: ``raw``, ``gzip`` (``gzip -9``), ``xz`` (``xz -9``), ``entropy_bound`` and ``weights_entropy``.

    An ideal coder with one static model for each kernel needs ``weights_entropy`` for the kernels' stored values: the
    sum over kernels of n H / 8. H is the Shannon entropy in bits of the empirical distribution of the n values. The
    models themselves are not counted, as is usual. ``entropy_bound`` adds every other byte of the file (structure,
    biases, scales, sparse indices) as it is stored. A coder that also compresses these other bytes can get below
    ``entropy_bound``, but not far below ``weights_entropy``.
    """
    coded = weights_entropy(kernels)
    # The converter stores equal kernels, such as two of zeros alone, once.
    other = len(data) - sum(nbytes for _, nbytes in {(kernel.offset, kernel.nbytes) for kernel in kernels})
    return {**compressed(data), "entropy_bound": other + coded, "weights_entropy": coded}


def compressed(data: bytes) -> dict[str, int]:
    """Bytes of any file: ``raw``, ``gzip`` (``gzip -9``) and ``xz`` (``xz -9``)."""
    return {
        "raw": len(data),
        # Without a time stamp and a name, the size depends on the content alone.
        "gzip": len(gzip.compress(data, 9, mtime=0)),
        "xz": len(lzma.compress(data, preset=9)),
    }


def weights_entropy(kernels: Sequence[Kernel]) -> int:
    """Bytes that an ideal coder needs for the stored values of ``kernels``, with one static model for each kernel."""
    return int(np.ceil(sum(entropy(kernel.stored) * kernel.stored.size for kernel in kernels) / 8))


def entropy(values: np.ndarray) -> float:
    """Shannon entropy, in bits per value, of the empirical distribution of ``values``. Compares values bit by bit."""
    if not values.size:
        return 0.0
    counts = np.unique(values.view(f"u{values.itemsize}"), return_counts=True)[1]
    share = counts / values.size
    return float(-(share * np.log2(share)).sum())


def weights(kernels: Mapping[str, Kernel], exact: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Count, zeros and stored type of the weights of a file, in total and by layer.

    ``exact``: the float32 kernels from which the file was quantized, by layer, in the same layout. ``error`` is the
    root mean square of the difference, divided by the root mean square of the ``exact`` weights.
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
    """Find the stages at which zeros were lost on the way to a file.

    ``stages``: kernels by layer for each stage, in order; ``masks``: True where a weight is kept. A pruned weight that
    is not zero at a stage is lost there. A mere count of zeros is not enough: zeros that rounding adds would hide lost
    ones. A dense run has no masks, so the zeros of the first stage must stay zero.
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


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """The logarithm of the softmax of logits [n, classes], in float64. Finite for logits of any size."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def probabilities(logits: np.ndarray) -> np.ndarray:
    """The softmax of logits [n, classes], in float64."""
    return np.exp(log_probabilities(logits))


def mistakes(logits: np.ndarray, labels: np.ndarray, count: int = 20) -> list[dict[str, Any]]:
    """The images with the most probable wrong answers: index, true class, predicted class, probability."""
    predicted, shares = logits.argmax(axis=1), probabilities(logits).max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    return [
        {"image": int(i), "label": int(labels[i]), "predicted": int(predicted[i]), "probability": float(shares[i])}
        for i in wrong[np.argsort(-shares[wrong], kind="stable")[:count]]
    ]


def accuracy(logits: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Top-1 accuracy, cross-entropy, confusion matrix [true][predicted], mistakes, agreement with ``reference``.

    ``logits`` and ``reference`` are float32 [n, classes], ``labels`` int64 [n]. ``reference`` holds the logits of the
    float32 network in TensorFlow. ``agreement`` is the share of images for which both predict the same class.
    """
    losses = -log_probabilities(logits)[np.arange(len(labels)), labels]
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
    """How many times smaller each size is than the raw dense float32 file; ``gzip_to_gzip`` compares gzip with gzip."""
    times = {name: reference["raw"] / value for name, value in size.items() if name != "weights_entropy"}
    return {**times, "gzip_to_gzip": reference["gzip"] / size["gzip"]}
