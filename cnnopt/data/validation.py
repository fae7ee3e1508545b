"""Validation images: a part of the training split, drawn class by class, that training and calibration never see."""

from __future__ import annotations

import numpy as np

from cnnopt.data.cifar_files import DataError, Splits


def check(dataset: str, classes: int, count: int) -> None:
    """Raise DataError if ``count`` validation images cannot hold one image of each class. 0 means none at all."""
    if 0 < count < classes:
        raise DataError(
            f"--validation {count}: {dataset} has {classes} classes, and each needs an image; use at least {classes}"
        )


def held_out(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The indices of ``count`` images to hold out, ascending: int64 [count]. ``labels`` is int64 [n], n > ``count``.

    Each class has the same share of these images as of all, to within one image (largest remainder method).
    """
    sizes = np.bincount(labels)
    quotas, remainders = np.divmod(count * sizes, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:quota] for label, quota in enumerate(quotas)]
    return np.sort(np.concatenate(drawn))


def moved_last(splits: Splits, count: int, rng: np.random.Generator) -> Splits:
    """The splits with the ``count`` images to hold out at the end of the training images. The others keep their order.

    So both parts are slices of one array, which the ranks of a host can share. Raises DataError if a class would have
    no image in one of the parts: a copy of a data set may hold fewer images than the published one.
    """
    images, labels, test_images, test_labels, names = splits
    if count >= len(labels):
        raise DataError(f"--validation {count}: there are {len(labels):,} training images; use fewer")
    chosen = held_out(labels, count, rng)
    kept = np.delete(np.arange(len(labels)), chosen)
    for part, where in (("validation", chosen), ("training", kept)):
        images_of = np.bincount(labels[where], minlength=len(names))
        if not images_of.all():
            raise DataError(
                f"--validation {count}: no {part} image of class {names[images_of.argmin()]} among "
                f"{len(labels):,} training images; use another number, or a copy of the data with more images"
            )
    order = np.concatenate([kept, chosen])
    return images[order], labels[order], test_images, test_labels, names
