"""Weight clustering that keeps the zeros: each kernel gets few distinct values, one of which is exactly zero.

Deep compression (Han et al. 2016, arXiv:1510.00149, section 3) shares one codebook per kernel. This module first
divides each output channel by its largest magnitude, because int8 .tflite files have a scale for each output channel.
The outermost pair of centroids is symmetric, so the int8 codes of every channel are the same few numbers. A codebook
of the undivided weights would turn into up to 255 codes, because every channel rounds the codebook by another scale.

tfmot's ``cluster_weights(preserve_sparsity=True)`` refuses this model: "Please initialize `Cluster` with a
supported layer ... You passed: <class 'cnnopt.model.resnet.Conv2D'>" (0.8.1).
"""

from __future__ import annotations

import numpy as np

#: The smallest number by which a channel is divided.
SMALLEST = 1e-6


def codebook(kernel: np.ndarray, clusters: int, gain: np.ndarray, *, per_channel: bool = True) -> np.ndarray:
    """The ``clusters`` - 1 centroids of the nonzero weights of ``kernel`` [..., out]: float32, ascending.

    The centroids are for the kernel divided by its largest magnitude, per output channel or in total. ``gain``, float
    [out], is BatchNorm's factor for each channel. With this factor the squared error is that of the network's output,
    and not that of a weight before its scale. Raises ValueError below 4 clusters.
    """
    if clusters < 4:
        raise ValueError(f"--clusters {clusters}: at least 4 (zero, one outermost pair, one between)")
    kept = kernel != 0
    scale = _largest(kernel, per_channel)
    importance = np.broadcast_to(np.square(scale.astype(np.float64) * gain), kernel.shape)
    values, weight = (kernel / scale)[kept].astype(np.float64), np.maximum(importance[kept], 1e-30)
    return _lloyd(values, weight, clusters - 1).astype(np.float32)


def assign(kernel: np.ndarray, centroids: np.ndarray, *, per_channel: bool = True) -> np.ndarray:
    """``kernel`` float32 [..., out] with each weight replaced by the nearest centroid of ``codebook``; zeros stay 0."""
    scale = _largest(kernel, per_channel)
    nearest = centroids[np.searchsorted(boundaries(centroids), kernel / scale)]
    return np.where(kernel == 0, np.float32(0), nearest * scale)


def cluster(kernel: np.ndarray, clusters: int, gain: np.ndarray) -> np.ndarray:
    """``kernel`` with at most ``clusters`` distinct values, zero included, apart from the scale of each channel."""
    return assign(kernel, codebook(kernel, clusters, gain))


def boundaries(centroids: np.ndarray) -> np.ndarray:
    """The midpoints between neighbouring centroids."""
    return (centroids[1:] + centroids[:-1]) / 2


def _largest(kernel: np.ndarray, per_channel: bool) -> np.ndarray:
    largest = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)) if per_channel else None)
    # A fully pruned channel has the largest magnitude 0, which cannot be a divisor.
    return np.maximum(largest, np.float32(SMALLEST))


def _lloyd(values: np.ndarray, weight: np.ndarray, count: int, iterations: int = 100) -> np.ndarray:
    """Weighted k-means in one dimension, ascending. The first and the last centroid stay opposite numbers."""
    centroids = np.linspace(-1, 1, count)
    for _ in range(iterations):
        nearest = np.searchsorted(boundaries(centroids), values)
        mass = np.bincount(nearest, weight, count)
        sums = np.bincount(nearest, weight * values, count)
        # An empty cluster keeps its centroid, because another iteration may fill the cluster.
        moved = np.where(mass > 0, sums / np.where(mass > 0, mass, 1), centroids)
        tails = mass[0] + mass[-1]
        outermost = (sums[-1] - sums[0]) / tails if tails else 1.0
        moved[0], moved[-1] = -outermost, outermost
        moved = np.clip(moved, -outermost, outermost)
        if np.allclose(moved, centroids, rtol=0, atol=1e-7):
            break
        centroids = np.sort(moved)
    return centroids
