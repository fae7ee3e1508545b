"""Damaged and hostile copies give a DataError of one line, and never another exception, a hang or a file."""

import contextlib
import gzip
import io
import os
import pickle
import random
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cnnopt.data import cifar_pickle, datasets
from cnnopt.data.cifar_files import LAYOUTS
from cnnopt.data.datasets import DataError
from tests.helpers.cifar_copies import (
    BINARY_10,
    BINARY_100,
    EVERY_LAYOUT,
    PYTHON_10,
    PYTHON_100,
    add_file,
    batch,
    binary,
    dataset_of,
    python2_pickle,
    small_copy,
)

# pickletools decodes the strings of protocol 0 before we see their opcode, and warns of odd escapes in them.
pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")

IDS = [layout.folder for layout in EVERY_LAYOUT]
BOUNDED = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tree(folder):
    return sorted(str(path) for path in folder.rglob("*"))


@contextlib.contextmanager
def cpu_time_below(seconds):
    """Of this process, which other work on the machine does not lengthen."""
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


def refused(name, data_dir, *, at_check=None) -> str:
    """Load `data_dir`; it must fail with one clean line, leave no file, and (where told) fail or pass `check`."""
    before = tree(data_dir)
    if at_check:
        with pytest.raises(DataError):
            datasets.check(name, data_dir)
    elif at_check is False:
        datasets.check(name, data_dir)
    with cpu_time_below(2), pytest.raises(DataError) as error:
        datasets.load(name, data_dir)
    message = str(error.value)
    assert "\n" not in message
    assert str(data_dir) in message
    assert "--data-dir" in message
    assert tree(data_dir) == before
    return message


def damaged(tmp_path, layout, file, contents):
    """A copy of which one file holds something else."""
    copy = small_copy(layout, images_per_file=2)
    copy.files[file] = contents
    return copy.folder(tmp_path)


def outcome(name, data_dir):
    """Load what may or may not be damaged enough to notice; anything but a DataError fails the test."""
    with contextlib.suppress(DataError):
        datasets.check(name, data_dir)
    with cpu_time_below(2), contextlib.suppress(DataError):
        return datasets.load(name, data_dir)
    return None


# Files cut short, too long, or wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BINARY_10, BINARY_100], ids=["cifar10", "cifar100"])
def test_a_binary_file_cut_anywhere_but_between_images_is_refused(layout, tmp_path):
    whole = small_copy(layout, images_per_file=2).files[layout.test]
    folder = damaged(tmp_path, layout, layout.test, whole)
    for length in [0, 1, layout.record - 1, layout.record + 1, len(whole) - 1, len(whole) + 1]:
        (folder / layout.test).write_bytes((whole + b"x")[:length])
        assert layout.test in refused(dataset_of(layout), folder, at_check=True)


@pytest.mark.parametrize("layout", [PYTHON_10, PYTHON_100], ids=["cifar10", "cifar100"])
@pytest.mark.parametrize("writer", ["Python 2", "Python 3"])
def test_a_pickle_cut_anywhere_is_refused(layout, writer, tmp_path):
    copy = small_copy(layout, images_per_file=1)
    whole = copy.files[layout.test]
    if writer == "Python 3":
        labels = copy.labels[layout.test].tolist()
        whole = pickle.dumps({b"data": copy.pixels[layout.test], layout.labels_key.encode(): labels}, protocol=2)
    folder = damaged(tmp_path, layout, layout.test, whole)
    lengths = {*range(0, 400, 7), *range(len(whole) - 60, len(whole)), *random.Random(0).sample(range(len(whole)), 20)}
    for length in sorted(lengths):
        (folder / layout.test).write_bytes(whole[:length])
        assert layout.test in refused(dataset_of(layout), folder)
    (folder / layout.test).write_bytes(whole + b".")
    refused(dataset_of(layout), folder)


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=IDS)
def test_an_archive_cut_anywhere_is_refused(layout, tmp_path):
    path = small_copy(layout, images_per_file=2).archive(tmp_path)
    whole = path.read_bytes()
    lengths = {0, 1, 2, 10, len(whole) - 1, len(whole) - 4, len(whole) - 8, len(whole) - 12}
    for length in sorted(lengths | set(random.Random(1).sample(range(len(whole)), 12))):
        path.write_bytes(whole[:length])
        assert layout.archive in refused(dataset_of(layout), tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cut short"):
        datasets.check(dataset_of(layout), tmp_path)


@pytest.mark.parametrize("after", [b"x", b"more than an archive", bytes(5) + b"abcd"])
def test_bytes_after_the_end_of_an_archive_are_said_to_be_that(after, tmp_path):
    path = small_copy(BINARY_10, images_per_file=2).archive(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole + after)
    with pytest.raises(DataError, match=f"{path.name}: {len(after)} bytes after the end of the archive; "):
        datasets.check("cifar10", tmp_path)
    # Padding, as of a copy by blocks, is harmless to gzip too.
    path.write_bytes(whole + bytes(512))
    datasets.check("cifar10", tmp_path)
    assert len(datasets.load("cifar10", tmp_path).test_images) == 2


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=IDS)
def test_an_oversize_file_is_refused_before_it_is_read(layout, tmp_path):
    folder = small_copy(layout, images_per_file=1).folder(tmp_path)
    size = layout.record * 4 * layout.images_per_file + layout.record
    os.truncate(folder / layout.test, size)  # sparse: takes no space
    tracemalloc.start()
    message = refused(dataset_of(layout), tmp_path, at_check=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert f"{size:,} bytes" in message
    assert peak < 10_000_000


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=IDS)
@pytest.mark.parametrize("label", [-1, 10**2, 255])
def test_labels_out_of_range_are_refused(layout, label, tmp_path):
    if layout.label_bytes and label < 0:
        pytest.skip("a byte has no sign")
    write = binary if layout.label_bytes else batch
    contents = write(layout, np.zeros((2, 3072), np.uint8), np.array([0, label]))
    folder = damaged(tmp_path, layout, layout.test, contents)
    assert f"outside 0 to {layout.num_classes - 1}" in refused(dataset_of(layout), folder, at_check=False)


def published_array(rows: int = 1, columns: int = 3072) -> np.ndarray:
    return np.zeros((rows, columns), np.uint8)


@pytest.mark.parametrize(
    "value",
    [
        {"labels": [1, 2], "data": published_array(1)},
        {"labels": [1], "data": published_array(1, 3071)},
        {"labels": [1], "data": published_array(3072, 1)},
        {"labels": [], "data": published_array(1)},
        {"labels": ["1"], "data": published_array(1)},
        {"labels": published_array(1), "data": published_array(1)},
        {"labels": [1], "data": "pixels"},
        {"labels": [1]},
        {"data": published_array(1)},
        {"fine_labels": [1], "data": published_array(1)},
        {},
    ],
    ids=str,
)
def test_contents_that_do_not_fit_together_are_refused(value, tmp_path):
    refused("cifar10", damaged(tmp_path, PYTHON_10, "test_batch", python2_pickle(value)), at_check=False)


@pytest.mark.parametrize(
    "value",
    [
        {b"labels": [1], b"data": np.zeros((1, 3072), np.float32)},
        {b"labels": [1], b"data": np.zeros((1, 3072), np.int8)},
        {b"labels": [1], b"data": np.zeros((1, 3072), object)},
        {b"labels": [1.0], b"data": published_array()},
        {b"labels": [10**30], b"data": published_array()},
        {b"labels": np.array([1]), b"data": published_array()},
        {b"labels": (1,), b"data": published_array()},
        [b"labels", b"data"],
        None,
        "text",
        {1: 2},
        {(1, 2): 3},
    ],
    ids=lambda value: repr(value)[:50],
)
@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_other_pickles_of_python_3_are_refused(value, protocol, tmp_path):
    contents = pickle.dumps(value, protocol=protocol)
    refused("cifar10", damaged(tmp_path, PYTHON_10, "test_batch", contents), at_check=False)


@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=IDS)
@pytest.mark.parametrize("names", [0, 1, 9, 11, 101])
def test_a_wrong_number_of_class_names_is_refused(layout, names, tmp_path):
    listed = [f"n{i}" for i in range(names)]
    contents = "\n".join(listed).encode() if layout.label_bytes else python2_pickle({layout.names_key: listed})
    refused(dataset_of(layout), damaged(tmp_path, layout, layout.names, contents))


def test_class_names_that_would_steer_a_terminal_are_refused(tmp_path):
    contents = b"\n".join([b"\x1b[2Jcat"] * 10)
    refused("cifar10", damaged(tmp_path, BINARY_10, BINARY_10.names, contents))


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "broken link", "loop"])
@pytest.mark.parametrize("place", ["file", "archive"])
def test_what_is_no_regular_file_is_refused_without_waiting(kind, place, tmp_path):
    if place == "file":
        path = small_copy(BINARY_10, images_per_file=1).folder(tmp_path) / "data_batch_2.bin"
        path.unlink()
    else:
        path = tmp_path / "cifar-10-python.tar.gz"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "broken link": "nowhere", "loop": path.name}[kind])
    refused("cifar10", tmp_path, at_check=True)


def test_a_data_dir_with_strange_characters_gives_one_clean_line(tmp_path):
    for name in ("a\nb", "a\0b", "x" * 5000, "~nobody-of-that-name/data"):
        with pytest.raises(DataError) as error:
            datasets.check("cifar10", f"{tmp_path}/{name}" if name[0] != "~" else name)
        assert "\n" not in str(error.value)


# Archives ------------------------------------------------------------------------------------------------------


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


SPECIALS = {
    "symbolic link": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "cifar-10-batches-bin/data_batch_1.bin"),
    "character device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""),
    "fifo": (tarfile.FIFOTYPE, ""),
    "directory": (tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("kind", SPECIALS)
def test_members_that_are_no_regular_files_count_as_missing(kind, tmp_path):
    copy = small_copy(BINARY_10, images_per_file=1)
    del copy.files["test_batch.bin"]
    with tarfile.open(tmp_path / BINARY_10.archive, "w:gz") as tar:
        for name, contents in copy.files.items():
            add_file(tar, f"{BINARY_10.folder}/{name}", contents)
        tar.addfile(special(f"{BINARY_10.folder}/test_batch.bin", *SPECIALS[kind]))
    assert "does not hold the file cifar-10-batches-bin/test_batch.bin" in refused("cifar10", tmp_path)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/cnnopt-escaped", "cifar-10-batches-bin/../../escaped"])
def test_members_with_other_names_are_ignored_and_written_nowhere(name, tmp_path):
    (tmp_path / "data").mkdir()
    copy = small_copy(BINARY_10, images_per_file=1)
    with tarfile.open(tmp_path / "data" / BINARY_10.archive, "w:gz") as tar:
        add_file(tar, name, b"x")
        tar.addfile(special(f"{BINARY_10.folder}/link", tarfile.SYMTYPE, ".."))
        add_file(tar, f"{BINARY_10.folder}/link/escaped", b"x")
        for file, contents in copy.files.items():
            add_file(tar, f"{BINARY_10.folder}/{file}", contents)
    before = tree(tmp_path)
    assert len(datasets.load("cifar10", tmp_path / "data").train_images) == 5
    assert tree(tmp_path) == before
    assert not os.path.exists("/tmp/cnnopt-escaped")


def test_an_archive_that_unpacks_for_ever_is_stopped(tmp_path, monkeypatch):
    layout = BINARY_10
    monkeypatch.setattr(datasets.cifar_files, "_MAX_NAMES_BYTES", 0)
    monkeypatch.setattr(datasets.cifar_files, "_SIZE_MARGIN", 0.01)  # 18 MB, to keep the test fast
    with tarfile.open(tmp_path / layout.archive, "w:gz") as tar:
        add_file(tar, "padding", bytes(40_000_000))
    assert "unpacks to more" in refused("cifar10", tmp_path)


def test_an_archive_of_many_members_is_stopped(tmp_path):
    with tarfile.open(tmp_path / BINARY_10.archive, "w:gz") as tar:
        for i in range(2000):
            add_file(tar, f"{i}", b"")
    assert "more than 64 members" in refused("cifar10", tmp_path)


def test_an_oversize_member_is_refused_by_its_header(tmp_path):
    member = tarfile.TarInfo(f"{BINARY_10.folder}/test_batch.bin")
    member.size = 1 << 40
    (tmp_path / BINARY_10.archive).write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)))
    assert "1,099,511,627,776 bytes" in refused("cifar10", tmp_path)


def test_headers_that_point_backwards_or_nest_deeply_end(tmp_path):
    negative = bytearray(special("x", tarfile.REGTYPE).tobuf(tarfile.GNU_FORMAT))
    negative[124:136] = b"\xff" * 10 + b"\xfe\x00"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2
    nested = (long_name.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)) * 3000
    for body in (bytes(negative) * 4, nested):
        (tmp_path / BINARY_10.archive).write_bytes(gzip.compress(body + bytes(1024)))
        refused("cifar10", tmp_path)


def test_a_changed_byte_in_an_archive_is_noticed(tmp_path):
    path = small_copy(BINARY_10, images_per_file=1).archive(tmp_path)
    whole = bytearray(path.read_bytes())
    # From the first compressed byte to the checksum; the header holds a time and a name that mean nothing.
    for place in random.Random(2).sample(range(60, len(whole)), 25):
        changed = bytearray(whole)
        changed[place] ^= 0x10
        path.write_bytes(changed)
        refused("cifar10", tmp_path)


@given(body=st.binary(max_size=3000), compressed=st.booleans())
@example(body=b"", compressed=True)
@BOUNDED
def test_archives_of_random_bytes(body, compressed, tmp_path):
    (tmp_path / PYTHON_10.archive).write_bytes(gzip.compress(body) if compressed else body)
    refused("cifar10", tmp_path)


@given(place=st.integers(0, 511), value=st.integers(0, 255), fix=st.booleans())
@BOUNDED
def test_tar_headers_with_one_byte_changed(place, value, fix, tmp_path):
    copy = small_copy(BINARY_10, images_per_file=1)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for file, contents in copy.files.items():
            add_file(tar, f"{BINARY_10.folder}/{file}", contents)
    body = bytearray(plain.getvalue())
    body[place] = value
    if fix:
        body[148:156] = b" " * 8
        body[148:156] = b"%06o\0 " % sum(body[:512])
    (tmp_path / BINARY_10.archive).write_bytes(gzip.compress(bytes(body), 0))
    outcome("cifar10", tmp_path)


# Pickles -------------------------------------------------------------------------------------------------------


class Command:
    """Unpickled by pickle, it runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_runs_no_command(protocol, wrapped, tmp_path):
    marker = tmp_path / "ran"
    value = {b"labels": [1], b"data": Command(marker)} if wrapped else Command(marker)
    contents = pickle.dumps(value, protocol=protocol)
    refused("cifar10", damaged(tmp_path, PYTHON_10, "test_batch", contents))
    assert not marker.exists()
    pickle.loads(contents)
    assert marker.exists(), "the pickle of this test is not the attack that it claims to be"


def long_binput(index: int) -> bytes:
    return b"\x80\x02}r" + index.to_bytes(4, "little") + b"."


# A tuple of itself twice, 60 levels deep: 2**60 leaves for whoever hashes or prints it.
DEEP_TUPLE = b"K\x01" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))


@pytest.mark.parametrize(
    "contents",
    [
        b".",
        b"\x80\x02.",
        b"\x80\xff}.",
        long_binput(0x7FFFFFFF),
        b"\x80\x02}(" + DEEP_TUPLE + b"K\x01u.",
        b"\x80\x04U\x01a" + DEEP_TUPLE + b"\x93.",
        b"\x80\x04" + DEEP_TUPLE + b")R.",
        b"\x80\x04" + b"\x95" + b"\xff" * 8 + b"}.",  # a frame of 2**64 - 1 bytes
        b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f" + b"x.",  # a string of 2**63 - 1 bytes
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f" + b"x.",
        b"\x80\x02(" + b"(" * 10_000 + b".",
        b"\x80\x02]" + b"]a" * 10 + b".",
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02N" + b"\x85" * 100_000 + b".",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}K\x01K\x02s.",
        b"\x80\x02}}K\x02s.",
        b"\x80\x02]K\x01K\x02s.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy\nndarray\n(K\x00K\x00tb.",
        b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00O8tR.",
        b"\x80\x02ccnnopt.data\nload\n.",
        b"\x80\x02P1\n.",
        b"\x80\x02}Q.",
        b"\x80\x02\x82\x01.",
        b"I" + b"9" * 100_000 + b"\n.",
    ],
    ids=range(28),
)
def test_pickles_that_would_exhaust_or_confuse_pickle(contents, tmp_path):
    refused("cifar10", damaged(tmp_path, PYTHON_10, "test_batch", contents))


def test_the_time_a_pickle_takes_is_bounded():
    text = b"X" + (500_000).to_bytes(4, "little") + b"x" * 500_000
    encode_again = b"c_codecs\nencode\nh\x00h\x01\x86R"
    encode_bomb = b"\x80\x02" + text + b"q\x00X\x06\x00\x00\x00latin1q\x01" + encode_again * 100_000 + b"."
    many_opcodes = b"\x80\x02" + b"N" * 3_000_000 + b"."
    for contents in (encode_bomb, many_opcodes):
        with cpu_time_below(10), pytest.raises(ValueError):
            cifar_pickle.loads(contents)


@given(place=st.integers(min_value=0), value=st.integers(0, 255), python3=st.booleans())
@settings(max_examples=150)
def test_pickles_with_one_byte_changed(place, value, python3):
    copy = small_copy(PYTHON_10, images_per_file=1)
    contents = copy.files["test_batch"]
    if python3:
        contents = pickle.dumps({b"labels": [1], b"data": copy.pixels["test_batch"]}, protocol=2)
    # Pixels are most of the file and may be anything, so the change goes to its ends.
    ends = [*range(min(300, len(contents))), *range(len(contents) - 60, len(contents))]
    changed = bytearray(contents)
    changed[ends[place % len(ends)]] = value
    evaluate_safely(bytes(changed))


@given(body=st.binary(max_size=200))
@settings(max_examples=150)
def test_pickles_of_random_bytes(body):
    for contents in (body, b"\x80\x02" + body + b"."):
        evaluate_safely(contents)


OPCODES = [
    b"}", b"]", b")", b"(", b"N", b"K\x01", b"U\x01a", b"X\x06\x00\x00\x00latin1", b"X\x02\x00\x00\x00u1", b"q\x00",
    b"h\x00", b"\x94", b"t", b"\x85", b"\x86", b"\x87", b"R", b"b", b"a", b"e", b"s", b"u", b"\x93", b"0", b"\x88",
    b"c_codecs\nencode\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
]  # fmt: skip


@given(program=st.lists(st.sampled_from(OPCODES), max_size=40))
@settings(max_examples=200)
def test_pickles_of_random_opcodes(program):
    evaluate_safely(b"\x80\x02" + b"".join(program) + b".")


def evaluate_safely(contents: bytes) -> None:
    with cpu_time_below(2):
        try:
            value = cifar_pickle.loads(contents)
        except ValueError:
            return
        assert isinstance(value, dict)
        for item in value.values():
            if isinstance(item, cifar_pickle.Array):
                item.read()


@given(raw=st.binary(max_size=2 * 3074 + 2))
@BOUNDED
def test_binary_files_of_random_bytes(raw, tmp_path):
    for layout in (BINARY_10, BINARY_100):
        folder = tmp_path / layout.folder
        if not folder.exists():
            small_copy(layout, images_per_file=1).folder(tmp_path)
        (folder / layout.test).write_bytes(raw)
        loaded = outcome(dataset_of(layout), tmp_path)
        assert loaded is None or loaded.test_images.shape == (len(raw) // layout.record, 32, 32, 3)


def test_the_layout_tables_agree_with_the_published_sizes():
    assert [layout.record for layout in LAYOUTS["cifar10"]][1] * 10_000 == 30_730_000
    assert [layout.record for layout in LAYOUTS["cifar100"]][1] * 50_000 == 153_700_000
    for name, layouts in LAYOUTS.items():
        assert {len(layout.train) * layout.images_per_file for layout in layouts} == {datasets.DATASETS[name]}
