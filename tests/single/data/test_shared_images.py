"""The shared images of a host: decoded once, mapped by all ranks, and never wrong."""

import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from cnnopt.data.shared_images import shared

SPLITS = (np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array([1, 2]), np.zeros([1, 3, 4], np.uint8),
          np.array([3]), ("cat", "dog"))  # fmt: skip


class Reader:
    """Counts how often it decodes, in all processes: a byte a time in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self):
        with self.file.open("ab") as file:
            file.write(b".")
        return SPLITS

    @property
    def count(self) -> int:
        return self.file.stat().st_size if self.file.exists() else 0


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "archive").write_bytes(b"images")
    return tmp_path / "archive"


@pytest.fixture
def reader(tmp_path) -> Reader:
    return Reader(tmp_path / "count")


def same(found) -> bool:
    arrays = all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found[:4], SPLITS[:4], strict=True))
    return arrays and found[4] == SPLITS[4]


def test_it_is_decoded_once_and_mapped_from_then_on(place, reader):
    assert same(shared([place], reader))
    again = shared([place], reader)
    assert same(again)
    assert reader.count == 1
    assert all(isinstance(array, np.memmap) for array in again[:4])
    with pytest.raises(ValueError, match="read-only"):
        again[0][0] = 0


def copies(place: Path) -> list[Path]:
    """The folders of shared images. On Python 3.10 a pattern that ends with a slash matches files too."""
    return [path for path in (place.parent / "tmp").glob("*/*") if path.is_dir()]


def _ask(place: Path, reader: Reader) -> bool:
    return same(shared([place], reader))


def test_ranks_that_start_together_decode_it_once(place, reader, monkeypatch):
    # Not by a fork of this process, in which TensorFlow has threads.
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert pool.starmap(_ask, [(place, reader)] * 4) == [True] * 4
    assert reader.count == 1


def test_another_order_of_the_images_is_decoded_anew(place, reader):
    for count, order in ((1, "first"), (1, "first"), (2, "second"), (3, "first"), (4, "")):
        assert same(shared([place], reader, order))
        assert reader.count == count
        assert len(copies(place)) == 1


def test_other_bytes_at_the_same_place_are_decoded_anew(place, reader):
    shared([place], reader)
    (before,) = copies(place)
    place.write_bytes(b"other images")
    assert same(shared([place], reader))
    assert reader.count == 2
    # The memory that the old ones took is given back.
    assert not before.exists()
    assert len(copies(place)) == 1


def test_other_bytes_of_one_size_and_time_are_decoded_anew(place, reader):
    # What `cp -p` and `rsync --times` leave.
    shared([place], reader)
    times = place.stat()
    place.write_bytes(b"IMAGES")
    os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert place.stat().st_mtime_ns == times.st_mtime_ns
    shared([place], reader)
    assert reader.count == 2


def test_one_of_several_files_counts_and_so_does_their_order(place, reader):
    other = place.with_name("other")
    other.write_bytes(b"more")
    shared([place, other], reader)
    shared([place, other], reader)
    assert reader.count == 1
    place.write_bytes(b"more")
    other.write_bytes(b"images")
    shared([place, other], reader)
    assert reader.count == 2


def test_the_same_bytes_under_another_time_are_not_decoded_again(place, reader):
    shared([place], reader)
    os.utime(place, (1, 1))
    shared([place], reader)
    assert reader.count == 1


def test_images_of_a_file_that_is_replaced_while_it_is_read_are_not_shared(place, reader):
    def replaced():
        place.write_bytes(b"IMAGES")
        return reader()

    shared([place], replaced)
    place.write_bytes(b"images")
    assert same(shared([place], reader))
    assert reader.count == 2


def test_what_a_killed_process_left_is_cleared_away(place, reader):
    shared([place], reader)
    (folder,) = copies(place)
    partial = folder.with_name(f"{folder.name.partition('-')[0]}-partial")
    folder.rename(partial)
    assert same(shared([place], reader))
    assert folder.exists()
    assert not partial.exists()


def test_other_files_beside_them_change_nothing(place, reader):
    shared([place], reader)
    (place.parent / "notes.txt").write_text("mine")
    shared([place], reader)
    assert reader.count == 1


@pytest.mark.parametrize("size", ["one byte less", "empty", "gone"])
@pytest.mark.parametrize("name", ["train_images.npy", "class_names.json"])
def test_a_damaged_copy_is_decoded_once_more(place, reader, name, size):
    # A power failure leaves empty files. A cleaner of the temporary folder removes old ones.
    shared([place], reader)
    (file,) = (place.parent / "tmp").rglob(name)
    if size == "gone":
        file.unlink()
    else:
        os.truncate(file, 0 if size == "empty" else file.stat().st_size - 1)
    for _ in range(2):
        found = shared([place], reader)
        assert same(found)
        assert isinstance(found[0], np.memmap)
    assert reader.count == 2


@pytest.mark.parametrize("version", ["cnnopt.data.shared_images.__version__", "numpy.__version__"])
def test_a_copy_of_another_version_is_decoded_anew(place, reader, monkeypatch, version):
    # Another version may draw other validation images.
    shared([place], reader, "validation 5000 seed 0")
    monkeypatch.setattr(version, "another")
    shared([place], reader, "validation 5000 seed 0")
    assert reader.count == 2


def test_without_a_place_to_write_each_process_has_its_own(place, reader, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    for _ in range(2):
        found = shared([place], reader)
        assert same(found)
        assert not isinstance(found[0], np.memmap)
    assert reader.count == 2


def test_nothing_is_left_half_made_where_reading_fails(place):
    def fail():
        raise RuntimeError("damaged")

    with pytest.raises(RuntimeError, match="damaged"):
        shared([place], fail)
    assert [path.suffix for path in (place.parent / "tmp").glob("*/*")] == [".lock"]
