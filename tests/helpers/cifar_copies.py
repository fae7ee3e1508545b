"""Writes small CIFAR copies, byte for byte in the published layouts."""

import io
import struct
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cnnopt.data.cifar_files import LAYOUTS, Layout

PYTHON_10, BINARY_10 = LAYOUTS["cifar10"]
PYTHON_100, BINARY_100 = LAYOUTS["cifar100"]
EVERY_LAYOUT = (PYTHON_10, BINARY_10, PYTHON_100, BINARY_100)


def dataset_of(layout: Layout) -> str:
    return "cifar10" if layout.num_classes == 10 else "cifar100"


@dataclass
class Copy:
    """The content of a copy: pixels [N, 3072] and labels of each image file, and the bytes of every file."""

    layout: Layout
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"class_{i}" for i in range(self.layout.num_classes))

    def images(self, *files: str) -> np.ndarray:
        pixels = np.concatenate([self.pixels[file] for file in files])
        return np.stack([pixels[:, c * 1024 : (c + 1) * 1024].reshape(-1, 32, 32) for c in range(3)], axis=-1)

    def folder(self, parent: Path) -> Path:
        folder = parent / self.layout.folder
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder

    def archive(self, parent: Path) -> Path:
        path = parent / self.layout.archive
        with tarfile.open(path, "w:gz") as tar:
            add_directory(tar, self.layout.folder)
            add_file(tar, f"{self.layout.folder}/readme.html", b"<html>")
            for name, data in self.files.items():
                add_file(tar, f"{self.layout.folder}/{name}", data)
        return path


def small_copy(layout: Layout, images_per_file: int = 4, seed: int = 0) -> Copy:
    rng = np.random.default_rng(seed)
    copy = Copy(layout)
    for file in (*layout.train, layout.test):
        pixels = rng.integers(256, size=(images_per_file, 3072), dtype=np.uint8)
        labels = rng.integers(layout.num_classes, size=images_per_file)
        copy.pixels[file], copy.labels[file] = pixels, labels
        copy.files[file] = binary(layout, pixels, labels) if layout.label_bytes else batch(layout, pixels, labels)
    if layout.label_bytes:
        copy.files[layout.names] = "".join(f"{name}\n" for name in copy.names).encode() + b"\n"
    else:
        copy.files[layout.names] = python2_pickle({layout.names_key: list(copy.names)})
    return copy


def binary(layout: Layout, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    coarse = np.zeros((len(labels), layout.label_bytes - 1), np.uint8)
    return np.hstack([coarse, labels[:, None].astype(np.uint8), pixels]).tobytes()


def batch(layout: Layout, pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return python2_pickle(
        {
            "batch_label": "training batch 1 of 5",
            layout.labels_key: [int(label) for label in labels],
            "data": pixels,
            "filenames": [f"image_{i}.png" for i in range(len(labels))],
        }
    )


def python2_pickle(value: dict) -> bytes:
    """Protocol 2 as Python 2's cPickle and numpy 1 wrote it: strings are bytes, the dtype's flags are integers."""
    count = 0

    def put() -> bytes:
        nonlocal count
        count += 1
        return b"q" + bytes([count]) if count < 256 else b"r" + struct.pack("<I", count)

    def dump(item: object) -> bytes:
        if isinstance(item, str):
            return b"U" + bytes([len(item)]) + item.encode() + put()
        if isinstance(item, int):
            if 0 <= item < 256:
                return b"K" + bytes([item])
            return b"M" + struct.pack("<H", item) if 0 <= item < 65536 else b"J" + struct.pack("<i", item)
        if isinstance(item, list):
            return b"]" + put() + b"(" + b"".join(dump(entry) for entry in item) + b"e"
        if isinstance(item, dict):
            return b"}" + put() + b"(" + b"".join(dump(part) for pair in item.items() for part in pair) + b"u"
        assert isinstance(item, np.ndarray)
        rows, columns = item.shape
        return (
            b"cnumpy.core.multiarray\n_reconstruct\n" + put() + b"cnumpy\nndarray\n" + put()
            + b"K\x00\x85U\x01b" + put() + b"\x87R" + put() + b"(K\x01" + dump(rows) + dump(columns) + b"\x86"
            + b"cnumpy\ndtype\n" + put() + b"U\x02u1K\x00K\x01\x87R" + put()
            + b"(K\x03U\x01|" + put() + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            + (b"\x88T" if np.isfortran(item) else b"\x89T") + struct.pack("<i", item.size) + item.tobytes("A")
            + put() + b"tb"
        )  # fmt: skip

    return b"\x80\x02" + dump(value) + b"."


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def add_directory(tar: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    tar.addfile(member)
