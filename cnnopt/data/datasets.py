"""CIFAR-10, CIFAR-100, digits and synthetic images: fetched and verified.

Images stay in memory as uint8 [N, 32, 32, 3]. ``cnnopt.data.stream`` cuts them into augmented batches.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cnnopt.data import cifar_files, shared_images, stream
from cnnopt.data import validation as validation_images
from cnnopt.data.cifar_files import DataError, Splits

__all__ = ["DATASETS", "DOWNLOADS", "DataError", "Dataset", "Download", "check", "load"]

#: The data sets, and the number of training images of each.
DATASETS = {"cifar10": 50_000, "cifar100": 50_000, "digits": 1_437, "synthetic": 512}
CONNECT_SECONDS = 15


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] of the training and the test split.

    The validation images are held out of the training split: they are not among ``train_images``. N may be 0.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    validation_images: np.ndarray = field(default_factory=lambda: np.empty([0, 32, 32, 3], np.uint8))
    validation_labels: np.ndarray = field(default_factory=lambda: np.empty([0], np.int64))

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """The number of images, and a digest of all labels and of each 64th image. Ranks compare it.

        The labels show another order, or other validation images. Hashing all images would take 0.3 s.
        """
        digest = hashlib.sha256()
        splits = (
            (self.train_images, self.train_labels),
            (self.validation_images, self.validation_labels),
            (self.test_images, self.test_labels),
        )
        for images, labels in splits:
            digest.update(images[::64].tobytes())
            digest.update(labels.tobytes())
        counts = f"{len(self.train_images):,} training and {len(self.test_images):,} test images"
        return f"{counts}, digest {digest.hexdigest()[:8]}"

    @property
    def monitored(self) -> Literal["val", "test"]:
        """The split that is evaluated after each epoch: the validation images, or the test images if there are none."""
        return "val" if len(self.validation_images) else "test"

    def split(self, name: Literal["val", "test"]) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels of a split that is evaluated."""
        if name == "val":
            return self.validation_images, self.validation_labels
        return self.test_images, self.test_labels


@dataclass(frozen=True)
class Download:
    """The address of a published archive, and its MD5 checksum."""

    url: str
    md5: str


#: The archives and checksums of https://www.cs.toronto.edu/~kriz/cifar.html.
DOWNLOADS = {
    "cifar10": Download("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"),
    "cifar100": Download(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
    ),
}


# Loading -------------------------------------------------------------------------------------------------------


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    validation: int = 0,
    show_progress: bool = False,
    share: bool = False,
    synthetic_sizes: tuple[int, int] = (DATASETS["synthetic"], 128),
) -> Dataset:
    """Load a data set. Downloads CIFAR if no `data_dir` is given and there is no copy yet.

    `validation` images are held out of the training split, drawn from `seed` (`cnnopt.data.validation`).

    `share` keeps one copy of CIFAR for all processes of this host that ask for it, see `shared_images`.

    `data_dir` defaults to $CNNOPT_DATA_DIR, and that to ~/.keras/datasets. `synthetic_sizes` (train and test images)
    and `seed` shape the synthetic data set. Raises DataError if the data cannot be loaded.
    """
    copy = _locate(name, data_dir)
    files: list[Path] = []
    if name == "digits":
        read_all = _digits
    elif name == "synthetic":
        read_all = functools.partial(_synthetic, seed, *synthetic_sizes)
    else:
        layout, place = copy or _download(name, _directory(None), show_progress)
        read_all = functools.partial(cifar_files.read, layout, place)
        files = [place / file for file in layout.files] if place.is_dir() else [place]

    def read() -> Splits:
        splits = read_all()
        rng = np.random.default_rng([seed, stream.VALIDATION])
        return validation_images.moved_last(splits, validation, rng) if validation else splits

    order = f"validation {validation} seed {seed}" if validation else ""
    splits = shared_images.shared(files, read, order) if share and files else read()
    images, labels, test_images, test_labels, class_names = splits
    count = len(images) - validation
    return Dataset(
        name, images[:count], labels[:count], test_images, test_labels, class_names, images[count:], labels[count:]
    )


def check(name: str, data_dir: str | os.PathLike[str] | None = None, validation: int = 0) -> None:
    """Raise DataError, within milliseconds, if the data is clearly missing or cut short.

    Also raises it if `validation` images are too few for the classes. Returns without an error if `load` would
    download the data.
    """
    copy = _locate(name, data_dir)
    if copy is not None:
        cifar_files.check(*copy)
    classes = cifar_files.LAYOUTS[name][0].num_classes if name in cifar_files.LAYOUTS else 10
    validation_images.check(name, classes, validation)


def _directory(data_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of the data. Raises DataError if a flag or a variable names a folder that does not exist."""
    origin, named = "--data-dir", data_dir
    if named is None:
        origin, named = "$CNNOPT_DATA_DIR", os.environ.get("CNNOPT_DATA_DIR") or None
    # os.path.expanduser keeps the ~ of an unknown user. Path.expanduser does not.
    directory = Path(os.path.expanduser(named or "~/.keras/datasets"))
    if named is None:
        if str(directory).startswith("~"):
            raise DataError(f"{directory}: this user has no home folder; set HOME, or name a folder with --data-dir")
        return directory
    try:
        fault = None if stat.S_ISDIR(os.stat(directory).st_mode) else "is not a directory"
    # ValueError: the name holds a NUL character, which no file name can.
    except (FileNotFoundError, ValueError):
        fault = "does not exist"
    except OSError as error:
        fault = f"cannot be read ({error.strerror})"
    if fault is None and not os.access(directory, os.X_OK):
        fault = f"cannot be read ({os.strerror(errno.EACCES)})"
    if fault:
        raise DataError(f"{origin} {directory}: {fault}; name the directory that holds the data set")
    return directory


def _locate(name: str, data_dir: str | os.PathLike[str] | None) -> tuple[cifar_files.Layout, Path] | None:
    """The copy of CIFAR on disk. None if it must be downloaded, and for the other data sets."""
    if name not in DATASETS:
        raise DataError(f"--dataset {name}: choose one of {', '.join(DATASETS)}")
    if name not in DOWNLOADS and data_dir is None:
        return None
    directory = _directory(data_dir)
    if name not in DOWNLOADS:
        return None
    copy = cifar_files.find(name, directory)
    if copy is None and data_dir is not None:
        layouts = cifar_files.LAYOUTS[name]
        looked_for = ", ".join([f"{layout.folder}/" for layout in layouts] + [layout.archive for layout in layouts])
        raise DataError(
            f"--data-dir {directory}: holds no {name}; looked for {looked_for}; "
            "put one of them there, or leave --data-dir out to download it"
        )
    return copy


def _download(name: str, directory: Path, show_progress: bool) -> tuple[cifar_files.Layout, Path]:
    """Download a published archive into `directory`, once for all processes that share the directory."""
    import filelock

    source = DOWNLOADS[name]
    layout = cifar_files.LAYOUTS[name][0]
    archive = directory / layout.archive
    by_hand = f"download it by hand to {archive}, name its folder with --data-dir, or try --dataset digits"
    partial = archive.with_name(f".{archive.name}.part")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(archive.with_name(f".{archive.name}.lock")):
            copy = cifar_files.find(name, directory)
            if copy is not None:
                return copy
            try:
                with partial.open("wb") as file:
                    digest = _fetch(source.url, file, cifar_files.max_archive_bytes(layout), show_progress)
                if digest != source.md5:
                    raise DataError(
                        f"{source.url}: the download has MD5 {digest}, expected {source.md5}; run again, or {by_hand}"
                    )
                os.replace(partial, archive)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{source.url} cannot be downloaded to {directory} ({error}); {by_hand}") from error
    return layout, archive


def _fetch(url: str, file: IO[bytes], most: int, show_progress: bool) -> str:
    """Write the answer of `url` to `file`, and return its MD5. Raises OSError."""
    import http.client
    import urllib.error
    import urllib.request

    digest = hashlib.md5(usedforsecurity=False)
    received = 0
    try:
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(urllib.request.urlopen(url, timeout=CONNECT_SECONDS))
            total = int(response.headers.get("Content-Length") or 0) or None
            advance = stack.enter_context(_progress_bar(file.name, total, show_progress))
            while chunk := response.read(1 << 18):
                received += len(chunk)
                if received > most:
                    raise OSError(f"the server sent more than {most:,} bytes")
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    if total is not None and received != total:
        raise OSError(f"the connection closed after {received:,} of {total:,} bytes")
    return digest.hexdigest()


@contextlib.contextmanager
def _progress_bar(title: str, total: int | None, show: bool) -> Iterator[Any]:
    if not (show and sys.stderr.isatty()):
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"Downloading {Path(title).name.strip('.').removesuffix('.part')}", total=total)
        yield functools.partial(progress.advance, task)


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of [N, H, H, C] to [N, size, size, C], with aligned pixel centres."""
    height = images.shape[1]
    centres = np.clip((np.arange(size) + 0.5) * height / size - 0.5, 0, height - 1)
    weights = np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(height)))
    return np.einsum("yh,xw,nhwc->nyxc", weights, weights, images, optimize=True)


def _digits() -> Splits:
    """1,797 scanned digits of 8 x 8 pixels. They come with scikit-learn, so no download is needed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scaled = _resized(digits.images[..., None] * (255 / 16), 32)
    images = np.repeat(np.rint(scaled).astype(np.uint8), 3, axis=3)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, digits.target.astype(np.int64), test_size=360, stratify=digits.target, random_state=0
    )
    names = tuple(str(name) for name in digits.target_names)
    return train_images, train_labels, test_images, test_labels, names


def _synthetic(seed: int, num_train: int, num_test: int) -> Splits:
    """Shifted and noisy views of ten smooth templates. A small network learns them at once."""
    rng = np.random.default_rng([seed, stream.SYNTHETIC])
    templates = 128 + 50 * _resized(rng.standard_normal((10, 5, 5, 3)), 40)
    views = sliding_window_view(templates, (32, 32, 3), axis=(1, 2, 3))  # type: ignore[call-overload]

    def split(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(count, dtype=np.int64) % 10)
        images = views[labels, rng.integers(9, size=count), rng.integers(9, size=count), 0]
        images = images + rng.normal(0, 25, images.shape)
        return np.rint(np.clip(images, 0, 255)).astype(np.uint8), labels

    return *split(num_train), *split(num_test), tuple(f"template {i}" for i in range(10))
