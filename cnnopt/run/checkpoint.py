"""Checkpoints that are complete or absent, and that are verified before use.

A checkpoint is a folder `step-00001234/` of three files:

    arrays.npz      the named arrays, uncompressed; `numpy.load` reads it too
    state.json      {"format": 1, "step": 1234, "state": {...}}
    manifest.json   byte size and SHA-256 of the other two

`save` writes to a hidden folder and renames it once its files have reached the disk. So a job killed at any moment
leaves no half-written checkpoint in sight. No model is known here: arrays and a JSON-able dict go in and come back.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.errors import RunError, UserError

FORMAT = 1
_FILES = ("arrays.npz", "state.json")
#: Errors that damaged files may raise before their checksums are compared.
_DAMAGE = (ValueError, TypeError, KeyError, OSError, OverflowError, RecursionError)
_STEP = re.compile(r"(?:\.old-)?step-([0-9]{8,})")


class CheckpointError(UserError):
    """A checkpoint cannot be trusted. The message is one line that names the folder, the damage and the remedy."""


class SaveError(RunError):
    """A save failed and left earlier checkpoints as they were. The message is one line that says why."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its folder, global step, writable arrays by name, and JSON state."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    state: dict[str, Any]


def save(
    folder: Path,
    step: int,
    arrays: Mapping[str, np.ndarray],
    state: Mapping[str, Any],
    *,
    keep: int = 3,
) -> Path:
    """Write `folder/step-<step>` atomically, then delete all but the newest `keep` and the best.

    The best is the checkpoint with the largest finite `state["metric"]`, among those that verify; of equals, the
    earliest. Checkpoints after `step` are neither counted nor deleted. A run that went back would otherwise lose its
    new checkpoint to the ones that it abandoned. Saving a step again replaces it. `folder` is created if its parent
    exists, and has one writer at a time. The keys of `state` are strings.
    Raises TypeError for an array that is not bool, integer or float and for a state that is not JSON; ValueError for
    a negative step, `keep` below 1 or an array name that no zip can hold; SaveError if the disk fails.
    """
    folder, step = Path(folder), int(step)
    if step < 0 or keep < 1:
        raise ValueError(f"step={step}, keep={keep}: step must be at least 0 and keep at least 1")
    document = json.dumps({"format": FORMAT, "step": step, "state": dict(state)})
    files = {"arrays.npz": _pack(arrays), "state.json": document.encode()}
    sums = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    # A dict keeps its order, so the manifest is written last.
    files["manifest.json"] = json.dumps({"format": FORMAT, "files": sums}).encode()
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)
        # Sweep first, because the disk may be full of files that a dead writer left.
        _sweep(folder)
        temporary.mkdir()
        for name, data in files.items():
            (temporary / name).write_bytes(data)
            _sync(temporary / name)
        _sync(temporary)
        # A folder cannot be renamed over a full one, so the old one is moved aside. `list_steps` sees it until its
        # successor has the name, so that a kill between the two renames loses neither.
        if os.path.lexists(final):
            final.rename(folder / f".old-{final.name}")
        temporary.rename(final)
        _sync(folder)
        _remove(folder / f".old-{final.name}")
    except OSError as error:
        remedy = "check that the folder exists, is writable and has space; earlier checkpoints were not touched"
        raise SaveError(f"cannot save {final}: {error.strerror or error}; {remedy}") from error
    finally:
        _remove(temporary)
    # The new checkpoint is safe by now. An old one that cannot be deleted costs only space.
    with contextlib.suppress(OSError, CheckpointError):
        _rotate(folder, step, keep)
    return final


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Runs no code, follows no link. Raises CheckpointError unless each byte is as saved."""
    try:
        packed, document = _read_verified(path, *_FILES)
        content = json.loads(document)
        if content["format"] != FORMAT or not isinstance(content["state"], dict):
            raise ValueError(f"state.json is not of format {FORMAT}")
        name = _STEP.fullmatch(path.name)
        if type(content["step"]) is not int or (name and int(name[1]) != content["step"]):
            raise ValueError(f"it holds step {content['step']}, not the step in its name")
        return Checkpoint(path, content["step"], _unpack(packed), content["state"])
    # If someone else chose the bytes, zipfile, json and numpy's parser can raise almost any exception.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".removeprefix("ValueError: ").split())
        raise CheckpointError(f"cannot use {path}: {detail}; resume from another checkpoint") from error


def newest(
    folder: Path, *, accept: Callable[[Checkpoint], str | None] | None = None
) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest checkpoint that verifies and that `accept` allows, or None, and a list of those skipped.

    `accept` returns None, or a reason to refuse. The list has (path, reason) of each one skipped, newest first.
    """
    skipped: list[tuple[Path, str]] = []
    for path in reversed(list_steps(folder)):
        try:
            checkpoint = load(path)
            refusal = accept(checkpoint) if accept else None
        except CheckpointError as error:
            refusal = str(error)
        if refusal is None:
            return checkpoint, skipped
        skipped.append((path, refusal))
    return None, skipped


def list_steps(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, unverified, by ascending step. Empty if there is no folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        # An unreadable folder must not pass for an empty one: the run would start again from step 0.
        raise CheckpointError(f"cannot list {folder}: {error.strerror}; check path and permissions") from error
    # Hidden names sort first, so a checkpoint moved aside is listed only if its successor has no name yet.
    found = {int(match[1]): Path(folder, match[0]) for match in map(_STEP.fullmatch, sorted(names)) if match}
    return [found[step] for step in sorted(found)]


def set_aside(folder: Path, *, after: int) -> None:
    """Rename checkpoints of steps after `after` to `abandoned-step-...`, which nothing here reads or counts.

    For a run that goes back on purpose: started again, it must not resume from those checkpoints. Checkpoints of the
    same steps that were set aside earlier are deleted.
    Raises CheckpointError if the disk fails.
    """
    for path in list_steps(folder):
        name = path.name.removeprefix(".old-")
        if int(name.removeprefix("step-")) > after:
            aside = folder / f"abandoned-{name}"
            try:
                _remove(aside)
                path.rename(aside)
                # A second save of this step, if killed, left this older copy. The renamed one hid it until now.
                _remove(folder / f".old-{name}")
            except OSError as error:
                raise CheckpointError(f"cannot set {path} aside: {error.strerror}; move it away by hand") from error


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    # As numpy.savez does, which itself cannot store an array named "file".
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, value in arrays.items():
            array, info = np.asarray(value), zipfile.ZipInfo(f"{name}.npy")
            # The kind alone would accept float8_e5m2 of ml_dtypes, which no npy header can name.
            if array.dtype.kind not in "biuf" or array.dtype.type.__module__ != "numpy":
                raise TypeError(f"array {name!r} is {array.dtype}: store it as bool, integer or numpy float")
            if info.filename != f"{name}.npy":
                raise ValueError(f"array name {name!r} holds a NUL character: rename it")
            with archive.open(info, "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    return buffer.getvalue()


def _unpack(data: bytes) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # Check the sum, because entries may overlap: each is smaller than the file, but together they are a zip bomb.
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise ValueError("arrays.npz declares more bytes than it holds")
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if entry.compress_type != zipfile.ZIP_STORED or name == entry.filename or name in arrays:
                raise ValueError(f"arrays.npz entry {entry.filename!r} is compressed, repeated or not .npy")
            # numpy touches no more memory than it reads, whatever shape the header claims.
            with archive.open(entry) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
            if arrays[name].dtype.kind not in "biuf":
                raise ValueError(f"array {name!r} has dtype {arrays[name].dtype}")
    return arrays


def _read_verified(path: Path, *names: str) -> list[bytes]:
    manifest = json.loads(_read(path / "manifest.json"))
    if manifest["format"] != FORMAT or type(manifest["format"]) is not int:
        raise ValueError(f"it has format {manifest['format']}, and this program reads format {FORMAT}")
    # Allow only these names: a manifest must not point at other files, inside or outside the folder.
    if set(manifest["files"]) != set(_FILES):
        raise ValueError(f"manifest.json must list {' and '.join(_FILES)}, nothing else")
    contents = [_read(path / name) for name in names]
    for name, data in zip(names, contents, strict=True):
        entry = manifest["files"][name]
        if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError(f"{name} is not what was saved ({len(data)} of {entry['bytes']} bytes; SHA-256)")
    return contents


def _read(path: Path) -> bytes:
    # A link could lead out of the folder, and opening a pipe would wait for ever.
    guard = os.O_NOFOLLOW | os.O_NONBLOCK
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | guard)) as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise ValueError(f"{path.name} is not a regular file")
        return stream.read()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rotate(folder: Path, step: int, keep: int) -> None:
    paths = [path for path in list_steps(folder) if int(path.name.rpartition("-")[2]) <= step]
    metrics = {}
    for path in paths:
        with contextlib.suppress(*_DAMAGE):
            state = json.loads(_read_verified(path, "state.json")[0])["state"]
            if math.isfinite(state["metric"]):
                metrics[path] = state["metric"]
    best = next((path for path in sorted(metrics, key=metrics.__getitem__, reverse=True) if _verifies(path)), None)
    for path in paths[:-keep]:
        if path != best:
            # Rename it first, so that a kill half-way through leaves no damaged checkpoint in sight.
            hidden = folder / f".tmp-{path.name.removeprefix('.old-')}-{os.getpid()}"
            _remove(path.rename(hidden))


def _remove(path: Path) -> None:
    """Delete a checkpoint, or what has its name, as far as possible. shutil.rmtree would open a pipe, and wait."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _verifies(path: Path) -> bool:
    with contextlib.suppress(*_DAMAGE):
        return bool(_read_verified(path, *_FILES))
    return False


def _sweep(folder: Path) -> None:
    for name in os.listdir(folder):
        superseded = name.startswith(".old-") and (folder / name.removeprefix(".old-")).exists()
        leftover = re.fullmatch(r"\.tmp-step-[0-9]+-([0-9]+)", name)
        # A restarted container gets the same pid, so a leftover with our own pid is from a dead predecessor.
        dead = leftover and (int(leftover[1]) == os.getpid() or not Path("/proc", leftover[1]).exists())
        if superseded or dead:
            _remove(folder / name)
