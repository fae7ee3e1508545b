"""A lossless archive of a .tflite file, near the entropy of its weights. The file is restored bit for bit.

The container is a ZIP and the coder is LZMA2 in .xz. Python's standard library has both; `unzip` and `xz` read them.
LZMA alone is 3% to 18% above the entropy of sparse int8 kernels, because it spends bits on short runs of zeros. So each
int8 kernel is split into one bit per weight (zero or not) and the nonzero values. A value is stored as its rank among
the values that the kernel uses, so that clustered kernels share one small alphabet. With this split the streams are
within 4% of the entropy (docs/quantize.md, "Packed").

    manifest.json   format, name, bytes and SHA-256 of the file, [offset, length] of each int8 kernel in it
    structure.xz    the file without these ranges
    mask.xz         numpy.packbits(kernel != 0) of each kernel
    palette.xz      for each kernel 256 bits: which of -128..127 it uses, zero left out
    values.xz       for all kernels: the rank of each nonzero weight in the kernel's palette
"""

from __future__ import annotations

import io
import json
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.errors import RunError, UserError
from cnnopt.export import tflite_file

FORMAT = "cnnopt-packed-1"
SUFFIX = ".packed.zip"
#: The files of these networks are much smaller. An archive that claims more is damaged, or an attack.
MAX_BYTES = 1 << 30
_STREAMS = ("structure.xz", "mask.xz", "palette.xz", "values.xz")
_INT8 = np.arange(-128, 128, dtype=np.int8)


class PackError(UserError):
    """An archive that cannot be restored. The message is one line: the archive's name, the damage and the remedy."""


def pack(data: bytes, path: Path) -> bytes:
    """The archive of a .tflite file's bytes. ``path`` is the file's name in messages and in the archive.

    Raises tflite_file.TfliteError if the file is damaged, RunError if the archive would not restore the file.
    """
    found = {
        (kernel.offset, kernel.nbytes)
        for kernel in tflite_file.kernels(data, path)
        if kernel.stored.dtype == np.int8 and kernel.nbytes
    }
    ranges = sorted(found)
    whole = np.frombuffer(data, np.uint8)
    outside = np.ones(len(data), bool)
    masks, palettes, values = [], [], []
    for offset, length in ranges:
        outside[offset : offset + length] = False
        kernel = whole[offset : offset + length].view(np.int8)
        used, ranks = np.unique(kernel[kernel != 0], return_inverse=True)
        masks.append(np.packbits(kernel != 0))
        palettes.append(np.packbits(np.isin(_INT8, used)))
        values.append(ranks.astype(np.uint8))
    streams = (whole[outside], *(np.concatenate([whole[:0], *parts]) for parts in (masks, palettes, values)))
    manifest = {
        "format": FORMAT,
        "name": path.name,
        "bytes": len(data),
        "sha256": tflite_file.digest(data),
        "kernels": ranges,
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as entries:
        contents = [json.dumps(manifest).encode(), *(_compress(stream.tobytes()) for stream in streams)]
        for name, content in zip(("manifest.json", *_STREAMS), contents, strict=True):
            # ZipInfo sets a fixed date, so that equal files have equal archives.
            entries.writestr(zipfile.ZipInfo(name), content)
    archive = buffer.getvalue()
    # This check is no assert statement, because python -O removes those.
    try:
        lossless = unpack(archive, path) == (path.name, data)
    except PackError:
        lossless = False
    if not lossless:
        raise RunError(f"{path}: its archive does not restore it; keep the file, and report this")
    return archive


def unpack(archive: bytes, path: Path) -> tuple[str, bytes]:
    """Name and bytes of the .tflite file in an archive, checked by SHA-256. ``path`` is for messages.

    Raises PackError.
    """
    try:
        return _unpack(archive)
    # Bytes from someone else can make zipfile, lzma and json raise almost any exception.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())[:160]
        raise PackError(
            f"{path} is not an archive of `cnnopt.quantize pack`, or is damaged ({detail}); pack again"
        ) from error


def stream_sizes(archive: bytes) -> dict[str, int]:
    """Bytes of each entry of an archive, by the entry's name."""
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        return {entry.filename: entry.file_size for entry in entries.infolist()}


def _compress(data: bytes) -> bytes:
    # lc, lp, pb are 0: the byte before a weight and its place do not predict the weight, and fewer models learn faster.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=filters)


def _decompress(archive: zipfile.ZipFile, name: str, most: int) -> np.ndarray:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 28)
    data = decoder.decompress(archive.read(name), max_length=most + 1)
    if len(data) > most or not decoder.eof:
        raise ValueError(f"{name} is cut short, or longer than the file it is part of")
    return np.frombuffer(data, np.uint8)


def _unpack(packed: bytes) -> tuple[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its entries are compressed twice")
        manifest: dict[str, Any] = json.loads(archive.read("manifest.json"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}, this program reads {FORMAT!r}")
        size, name = manifest["bytes"], manifest["name"]
        if type(size) is not int or not 0 <= size <= MAX_BYTES:
            raise ValueError(f"a file of {size} bytes")
        kernels = manifest["kernels"]
        # The size of the file bounds the size of every stream except the palettes.
        most = max(size, 32 * len(kernels))
        structure, mask, palette, values = (_decompress(archive, stream, most) for stream in _STREAMS)
    data = np.zeros(size, np.uint8)
    outside = np.ones(size, bool)
    used = np.unpackbits(palette.reshape(len(kernels), 32), axis=1).astype(bool)
    masks = values_done = 0
    for (offset, length), row in zip(kernels, used, strict=True):
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"a kernel at {offset}, beyond the file")
        outside[offset : offset + length] = False
        kept = np.unpackbits(mask[masks : masks - (-length // 8)], count=length).astype(bool)
        masks -= -length // 8
        count = int(kept.sum())
        data[offset : offset + length][kept] = _INT8[row][values[values_done : values_done + count]].view(np.uint8)
        values_done += count
    data[outside] = structure
    restored = data.tobytes()
    if tflite_file.digest(restored) != manifest["sha256"]:
        raise ValueError("SHA-256 differs from the packed file's")
    # Keep only the last part of the name, because it must not lead out of the folder that the user has chosen.
    name = Path(str(name)).name
    if not name.isprintable() or name in ("", "..") or len(os.fsencode(name)) > 255:
        raise ValueError(f"{name!r} is not a file name")
    return name, restored
