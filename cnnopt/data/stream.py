"""The training stream: which images a step trains, in which order, cropped and flipped how.

The stream depends on the seed only. The number of ranks, the steps at which a run was stopped and resumed, and the
device on which the images are cut do not change it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

AUGMENTATIONS = ("none", "standard", "shift")
#: Pixels by which an image may move each way, and how ``numpy.pad`` fills its edge.
_MARGINS: dict[str, tuple[int, Any]] = {"none": (0, "edge"), "standard": (4, "reflect"), "shift": (3, "edge")}
#: Each use of the seed has a separate generator, so that no use changes the numbers of another.
PERMUTATION, AUGMENTATION, ORIENTATION, SYNTHETIC, VALIDATION = range(5)


@functools.lru_cache(maxsize=4)
def _permutation(num_images: int, seed: int, epoch: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, PERMUTATION, epoch]).permutation(num_images)
    permutation.setflags(write=False)
    return permutation


@functools.lru_cache(maxsize=4)
def _orientation(num_images: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, ORIENTATION]).integers(2, size=num_images)


def indices(step: int, *, batch_size: int, num_images: int, seed: int) -> np.ndarray:
    """The indices of the images in the global batch of `step` (0-based): int64 [batch_size].

    The stream is one permutation of all images after another. The batch has its positions [step * batch_size,
    (step + 1) * batch_size). So every batch is full, and each image comes exactly once per epoch. A batch may hold
    the end of one epoch and the start of the next. The two permutations are independent, so such a batch may hold an
    image twice: on average a * b / num_images images, with a of one epoch and b of the next.
    """
    first, last = step * batch_size, (step + 1) * batch_size
    starts = range(first // num_images * num_images, last, num_images)
    parts = [_permutation(num_images, seed, s // num_images)[max(first - s, 0) : last - s] for s in starts]
    return np.concatenate(parts).astype(np.int64, copy=False)


class Draws:
    """What the seed draws for this rank's part of each global batch.

    `augment` is one of:

    - "none";
    - "standard": a random 32 x 32 crop of the image padded by 4 reflected pixels (He et al. 2016, section
      4.2, pads zeros), and alternating flip: a random bit per image chooses its orientation in even epochs,
      and odd epochs show the other orientation (Jordan 2024, arXiv:2404.00498, section 3.6);
    - "shift": a shift of up to 3 pixels (10%) each way with the edge replicated, and a random flip.

    Raises ValueError for another `augment`. `TrainConfig` has checked `batch_size`: it divides over the ranks, and
    there are as many images.
    """

    def __init__(
        self, num_images: int, *, batch_size: int, seed: int, augment: str, rank: int = 0, size: int = 1
    ) -> None:
        if augment not in AUGMENTATIONS:
            raise ValueError(f"--augment {augment}: choose one of {', '.join(AUGMENTATIONS)}")
        assert 0 < batch_size <= num_images, (batch_size, num_images)
        assert batch_size % size == 0, (batch_size, size)
        self.num_images, self.batch_size, self.seed, self.augment = num_images, batch_size, seed, augment
        #: The number of images of this rank's part.
        self.shard = batch_size // size
        self._part = slice(rank * self.shard, (rank + 1) * self.shard)
        margin, mode = _MARGINS[augment]
        padded = np.pad(np.arange(32), margin, mode)
        crops = [padded[offset : offset + 32] for offset in range(2 * margin + 1)]
        #: int64 [2 * offsets, 32]: the rows, or columns, of the image that a crop shows: at each offset, and mirrored.
        self.sources = np.array([line for crop in crops for line in (crop, crop[::-1])], np.int64)

    def __call__(self, step: int) -> np.ndarray:
        """int64 [3, shard]: the index of each image of `step`, and the lines of `sources` that are its rows, and its
        columns. They are drawn for the whole global batch, from seed and step, so all ranks draw the same.
        """
        chosen = indices(step, batch_size=self.batch_size, num_images=self.num_images, seed=self.seed)
        rng = np.random.default_rng([self.seed, AUGMENTATION, step])
        down, right = rng.integers(len(self.sources) // 2, size=(2, self.batch_size))
        if self.augment == "standard":
            epochs = np.arange(step * self.batch_size, (step + 1) * self.batch_size) // self.num_images
            flipped = (_orientation(self.num_images, self.seed)[chosen] + epochs) % 2
        else:
            flipped = rng.integers(2, size=self.batch_size) * (self.augment != "none")
        return np.stack([chosen, 2 * down, 2 * right + flipped])[:, self._part]


def cut(pixels: Any, sources: Any, draws: Any, take: Callable[..., Any] = np.take) -> Any:
    """The crops of images, uint8 [shard, 32, 32, 3], at the given `draws`. This is the definition on every device.

    `pixels` is uint8 [num_images * 32 * 32, 3]. `take` is `np.take`, or `tf.gather` for tensors.
    """
    rows, columns = (take(sources, draws[i], axis=0) for i in (1, 2))
    places = (32 * draws[0][:, None, None] + rows[:, :, None]) * 32 + columns[:, None, :]
    return take(pixels, places, axis=0)


def batches(
    images: np.ndarray, labels: np.ndarray, draws: Draws, *, first_step: int, last_step: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's part of the global batches of steps `first_step` to `last_step` - 1.

    Each part is images uint8 [shard, 32, 32, 3] and labels int64.
    """
    pixels = images.reshape(-1, 3)
    for step in range(first_step, last_step):
        drawn = draws(step)
        yield cut(pixels, draws.sources, drawn), labels[drawn[0]].astype(np.int64, copy=False)
