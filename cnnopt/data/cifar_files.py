"""Read CIFAR-10 and CIFAR-100 from the files in which they are published.

Layouts: https://www.cs.toronto.edu/~kriz/cifar.html. The files come from disks and networks that we do not
control, so we trust nothing in them. Sizes are bounded before a byte is read. Archives are read in memory and
never extracted. Pickles go through cifar_pickle, which imports and calls nothing.
"""

from __future__ import annotations

import gzip
import os
import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.data import cifar_pickle
from cnnopt.errors import UserError

PIXELS = 3 * 32 * 32
REMEDY = "delete it and run again without --data-dir to download it, or point --data-dir at a complete copy"

# The margin allows other encodings: a protocol-2 pickle written by Python 3 is half as large again.
_SIZE_MARGIN = 4
_MAX_NAMES_BYTES = 1 << 16
# The published archives have under 10 members. The bound is needed because a small file can hold a million empty ones.
_MAX_MEMBERS = 64


class DataError(UserError):
    """The data cannot be used. The message is one line that names the file or flag, and the remedy."""


@dataclass(frozen=True)
class Layout:
    """One published form of a data set: a folder of files, or the archive of that folder."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    num_classes: int
    images_per_file: int
    #: Binary files: the number of label bytes before the pixels; the last of them is the label. Pickles: 0.
    label_bytes: int
    labels_key: str = ""
    names_key: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The names of all files that are read from the folder."""
        return (*self.train, self.test, self.names)

    @property
    def folders(self) -> tuple[str, ...]:
        """The possible paths of the folder below the data folder: as tar unpacks it, and as Keras 3 unpacks it."""
        return (self.folder, f"{self.folder}-target/{self.folder}")

    @property
    def record(self) -> int:
        """The size in bytes of one image with its labels in a binary file."""
        return self.label_bytes + PIXELS

    def max_bytes(self, file: str) -> int:
        """The largest size in bytes at which `file` can be the published one."""
        return _MAX_NAMES_BYTES if file == self.names else _SIZE_MARGIN * self.images_per_file * self.record


_TEN = tuple(f"data_batch_{i}" for i in range(1, 6))
LAYOUTS = {
    "cifar10": (
        Layout("cifar-10-batches-py", "cifar-10-python.tar.gz", _TEN, "test_batch", "batches.meta",
               10, 10_000, 0, "labels", "label_names"),
        Layout("cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"{f}.bin" for f in _TEN),
               "test_batch.bin", "batches.meta.txt", 10, 10_000, 1),
    ),
    "cifar100": (
        Layout("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", "meta",
               100, 50_000, 0, "fine_labels", "fine_label_names"),
        Layout("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), "test.bin",
               "fine_label_names.txt", 100, 50_000, 2),
    ),
}  # fmt: skip

#: Train images, train labels, test images, test labels, class names.
Splits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]


def find(name: str, directory: Path) -> tuple[Layout, Path] | None:
    """The first complete copy in `directory`: its layout, and its folder or archive. None if there is no copy.

    Folders come before archives, because they read faster. Raises DataError if there is nothing but a folder
    with missing files, or if the user may not look into a folder.
    """
    incomplete = None
    for layout in LAYOUTS[name]:
        for folder in (*(directory / name for name in layout.folders), directory):
            present = [file for file in layout.files if stat.S_ISREG(_mode(folder / file))]
            if len(present) == len(layout.files):
                return layout, folder
            # In `directory` itself, only a training file proves a copy: other data sets have a `test` or `meta` too.
            is_folder = stat.S_ISDIR(_mode(folder))
            begun = is_folder if folder != directory else any(file in layout.train for file in present)
            if begun and incomplete is None:
                missing = next(file for file in layout.files if file not in present)
                incomplete = (
                    f"{folder / missing}: file not found; complete or delete {folder}, "
                    "or point --data-dir at a complete copy"
                )
    for layout in LAYOUTS[name]:
        if _mode(directory / layout.archive):
            return layout, directory / layout.archive
    if incomplete:
        raise DataError(incomplete)
    return None


def check(layout: Layout, place: Path) -> None:
    """Raise DataError if sizes, or first or last bytes, show that a copy is damaged. Reads no whole file."""
    if not place.is_dir():
        _check_size(place, max_archive_bytes(layout))
        with _opened(place) as file:
            head, tail = file.read(2), _last_bytes(file, 4)
        if head != b"\x1f\x8b":
            raise DataError(f"{place}: not a gzip archive; {REMEDY}")
        # gzip ends with the length of the uncompressed data, and a tar file consists of 512-byte blocks.
        if len(tail) < 4 or struct.unpack("<I", tail)[0] % 512:
            raise DataError(f"{place}: {_fault_at_end(place, max_archive_bytes(layout))}; {REMEDY}")
        return
    for name in layout.files:
        path = place / name
        size = _check_size(path, layout.max_bytes(name))
        if layout.label_bytes and name != layout.names:
            _check_records(layout, path, size)
        elif not layout.label_bytes:
            with _opened(path) as file:
                if _last_bytes(file, 1) != b".":
                    raise DataError(f"{path}: the pickle is cut short; {REMEDY}")


def read(layout: Layout, place: Path) -> Splits:
    """Read and validate a folder or archive.

    Returns train images uint8 [N, 32, 32, 3], train labels int64 [N], test images, test labels, class names.
    Raises DataError if anything but the number of images differs from the published form.
    """
    class_names: tuple[str, ...] = ()
    batches: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for file, path, data in _folder_files(layout, place) if place.is_dir() else _members(layout, place):
        if file == layout.names:
            class_names = _class_names(layout, path, data)
        else:
            batches[file] = (_binary_batch if layout.label_bytes else _pickled_batch)(layout, path, data)
    for file in layout.files:
        if not (class_names if file == layout.names else file in batches):
            raise DataError(f"{place}: does not hold the file {layout.folder}/{file}; {REMEDY}")
    train_images, train_labels = _joined([batches[file] for file in layout.train])
    test_images, test_labels = _joined([batches[layout.test]])
    return train_images, train_labels, test_images, test_labels, class_names


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((sum(len(labels) for _, labels in parts), 32, 32, 3), np.uint8)
    start = 0
    for pixels, labels in parts:
        images[start : start + len(labels)] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        start += len(labels)
    return images, np.concatenate([labels for _, labels in parts])


# Bytes ---------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error


def _mode(path: Path) -> int:
    """The file type and permissions of ``path``. 0 if it does not exist. Raises DataError if it cannot be read."""
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        remedy = "let this user read it, or point --data-dir at another copy"
        raise DataError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None


def _fault_at_end(path: Path, most: int) -> str:
    """Describe the fault of an archive that ends with the wrong bytes."""
    unpacking, unpacked = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16), 0
    with _opened(path) as file:
        while unpacked <= most and (chunk := file.read(1 << 20)):
            try:
                unpacked += len(unpacking.decompress(chunk))
            except zlib.error as error:
                return f"damaged archive ({error})"
            if unpacking.eof:
                return f"{len(unpacking.unused_data) + len(file.read()):,} bytes after the end of the archive"
    return "the archive is cut short"


def _last_bytes(file: Any, count: int) -> bytes:
    file.seek(max(0, file.seek(0, os.SEEK_END) - count))
    return file.read(count)


def _check_size(path: Path, most: int) -> int:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    # Opening a FIFO would wait for ever. Reading a device would never end.
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file; {REMEDY}")
    if not 0 < status.st_size <= most:
        raise DataError(f"{path}: {status.st_size:,} bytes, expected 1 to {most:,}; {REMEDY}")
    return status.st_size


def _check_records(layout: Layout, path: Path | str, size: int) -> None:
    if size % layout.record or not size:
        raise DataError(
            f"{path}: {size:,} bytes, expected a multiple of {layout.record:,} "
            f"({layout.label_bytes} label bytes and {PIXELS:,} pixels an image); {REMEDY}"
        )


def _folder_files(layout: Layout, folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for name in layout.files:
        path = folder / name
        size = _check_size(path, layout.max_bytes(name))
        with _opened(path) as file:
            try:
                data = file.read(size)
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
        yield name, str(path), data


def max_archive_bytes(layout: Layout) -> int:
    """The largest size in bytes, packed or unpacked, at which an archive can be the published one."""
    return sum(layout.max_bytes(file) for file in layout.files)


class _Bounded:
    """The decompressed bytes of an archive, up to a bound: a small file could unpack without end."""

    def __init__(self, file: gzip.GzipFile, path: Path, most: int) -> None:
        self.file, self.path, self.left = file, path, most

    def read(self, count: int) -> bytes:
        data = self.file.read(count)
        self.left -= len(data)
        if self.left < 0:
            raise DataError(f"{self.path}: unpacks to more than the published files; {REMEDY}")
        return data


def _members(layout: Layout, path: Path) -> Iterator[tuple[str, str, bytes]]:
    """The expected files of an archive, picked by exact name. Other members are skipped."""
    most = max_archive_bytes(layout)
    _check_size(path, most)
    wanted = {f"{layout.folder}/{file}": file for file in layout.files}
    with _opened(path) as raw:
        try:
            bounded = _Bounded(gzip.GzipFile(fileobj=raw), path, most)
            # A stream only goes forward, so no header can send the reader into a loop (CVE-2025-8194).
            with tarfile.open(fileobj=bounded, mode="r|") as archive:  # type: ignore[call-overload]
                for count, member in enumerate(archive):
                    if count == _MAX_MEMBERS:
                        raise DataError(f"{path}: more than {_MAX_MEMBERS} members; {REMEDY}")
                    file = wanted.get(member.name.removeprefix("./"))
                    if file is None or not member.isreg():
                        continue
                    if not 0 < member.size <= layout.max_bytes(file):
                        raise DataError(f"{path}: {member.size:,} bytes in {member.name}; {REMEDY}")
                    contents = archive.extractfile(member)
                    assert contents is not None
                    yield file, f"{path}: {member.name}", contents.read()
            # gzip compares its checksum only when the archive is read to the end.
            while bounded.read(1 << 20):
                pass
        except DataError:
            raise
        # tarfile and gzip raise many kinds of exceptions for a damaged header.
        except Exception as error:
            raise DataError(f"{path}: damaged archive ({error or type(error).__name__}); {REMEDY}") from error


# Contents ------------------------------------------------------------------------------------------------------


def _check_labels(layout: Layout, path: str, lowest: int, highest: int) -> None:
    if lowest < 0 or highest >= layout.num_classes:
        raise DataError(f"{path}: a label is outside 0 to {layout.num_classes - 1}; {REMEDY}")


def _binary_batch(layout: Layout, path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    _check_records(layout, path, len(data))
    records = np.frombuffer(data, np.uint8).reshape(-1, layout.record)
    labels = records[:, layout.label_bytes - 1].astype(np.int64)
    _check_labels(layout, path, int(labels.min()), int(labels.max()))
    return records[:, layout.label_bytes :], labels


def _pickled_batch(layout: Layout, path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickled(path, data)
    pixels, labels = batch.get("data"), batch.get(layout.labels_key)
    if not isinstance(labels, list) or not labels or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: no list of integers '{layout.labels_key}'; {REMEDY}")
    _check_labels(layout, path, min(labels), max(labels))
    found = pixels.read() if isinstance(pixels, cifar_pickle.Array) else None
    if found is None or found.shape != (len(labels), PIXELS):
        shape = "nothing usable" if found is None else f"uint8 {list(found.shape)}"
        raise DataError(f"{path}: 'data' is {shape}, expected uint8 [{len(labels)}, {PIXELS}]; {REMEDY}")
    return found, np.array(labels, np.int64)


def _unpickled(path: str, data: bytes) -> dict[str, Any]:
    try:
        return cifar_pickle.loads(data)
    except ValueError as error:
        raise DataError(f"{path}: {error}; {REMEDY}") from error


def _class_names(layout: Layout, path: str, data: bytes) -> tuple[str, ...]:
    if layout.label_bytes:
        names: Any = [name.strip() for name in data.splitlines() if name.strip()]
    else:
        names = _unpickled(path, data).get(layout.names_key)
    if isinstance(names, list):
        names = [name.decode("latin-1") if isinstance(name, bytes) else name for name in names]
        if len(names) == layout.num_classes and all(isinstance(n, str) and n and n.isprintable() for n in names):
            return tuple(names)
    raise DataError(f"{path}: expected the names of {layout.num_classes} classes; {REMEDY}")
