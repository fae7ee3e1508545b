"""Checkpoints are complete or absent, exact, verified, and harmless whoever wrote them."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cnnopt.run.checkpoint import CheckpointError, SaveError, list_steps, load, newest, save
from tests.helpers import ROOT

pytestmark = pytest.mark.filterwarnings("error")
FILES = ("arrays.npz", "state.json", "manifest.json")
ARRAYS = {"conv/kernel:0": np.arange(24, dtype=np.float32).reshape(2, 3, 4), "step": np.int64(7)}

DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?"),
)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def names(folder):
    return sorted(os.listdir(folder))


def steps(folder):
    return [int(path.name[5:]) for path in list_steps(folder)]


def save_steps(folder, *numbers, **options):
    return [save(folder, number, ARRAYS, {"epoch": number}, keep=99, **options) for number in numbers]


def forge(path, **contents):
    """Replace files of a checkpoint and give it a manifest that vouches for them, as an attacker would."""
    for name, data in contents.items():
        (path / name.replace("_", ".")).write_bytes(data)
    entries = {}
    for name in FILES[:2]:
        data = (path / name).read_bytes()
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": entries}))
    return path


def assert_same(left, right):
    assert list(left) == list(right)
    for name in left:
        a, b = np.asarray(left[name]), right[name]
        assert (a.dtype, a.dtype.byteorder, a.shape) == (b.dtype, b.dtype.byteorder, b.shape)
        assert a.tobytes() == b.tobytes()


def assert_one_line(message, *words):
    assert "\n" not in str(message)
    for word in words:
        assert str(word) in str(message)


# ---------------------------------------------------------------------------------------------- round trip


@settings(max_examples=30, deadline=None)
@given(
    arrays=st.dictionaries(
        NAMES, hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)), max_size=4
    ),
    state=st.dictionaries(st.text(), JSON, max_size=4),
    step=st.integers(0, 10**12),
)
def test_what_comes_back_is_what_was_saved(arrays, state, step):
    with tempfile.TemporaryDirectory() as folder:
        path = save(folder, step, arrays, state)
        checkpoint = load(path)
        assert (checkpoint.path, checkpoint.step, checkpoint.state) == (path, step, state)
        assert_same(arrays, checkpoint.arrays)
        assert all(array.flags.writeable for array in checkpoint.arrays.values())
        assert list_steps(folder) == [path]
        assert newest(folder)[0].step == step


def test_names_that_trouble_savez_and_layouts_that_are_not_c(tmp_path):
    arrays = {
        "file": np.ones(2),
        "a": np.zeros(3, np.float16),
        "a.npy": np.ones(3, np.float16),
        "../up": np.eye(2),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "strided": np.arange(12)[::-2],
    }
    assert_same(arrays, load(save(tmp_path, 1, arrays, {})).arrays)


def test_files_are_what_the_docstring_says(tmp_path):
    path = save(tmp_path, 1234, ARRAYS, {"epoch": 3})
    assert path == tmp_path / "step-00001234"
    assert names(path) == sorted(FILES)
    with np.load(path / "arrays.npz", allow_pickle=False) as npz:
        assert_same(ARRAYS, dict(npz))
    assert json.loads((path / "state.json").read_text()) == {"format": 1, "step": 1234, "state": {"epoch": 3}}


@pytest.mark.parametrize(
    "array", [np.array([{}], dtype=object), np.array(["a"]), np.ones(1, complex), np.zeros(1, "f4,i4")]
)
def test_other_kinds_of_array_are_refused_before_the_disk_is_touched(tmp_path, array):
    with pytest.raises(TypeError, match="odd"):
        save(tmp_path, 1, {"odd": array}, {})
    assert names(tmp_path) == []


def test_float8_has_the_kind_of_a_float_and_is_refused(tmp_path):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype in (ml_dtypes.float8_e5m2, ml_dtypes.bfloat16):
        with pytest.raises(TypeError):
            save(tmp_path, 1, {"a": np.zeros(2, dtype)}, {})


def test_wrong_arguments(tmp_path):
    for step, keep in ((-1, 3), (1, 0)):
        with pytest.raises(ValueError):
            save(tmp_path, step, ARRAYS, {}, keep=keep)
    with pytest.raises(ValueError, match="NUL"):
        save(tmp_path, 1, {"a\0b": np.ones(1)}, {})
    with pytest.raises(TypeError):
        save(tmp_path, 1, ARRAYS, {"model": object()})
    assert names(tmp_path) == []


# ------------------------------------------------------------------------------------------- interruption

WRITER = """
import sys, numpy as np
from cnnopt.run.checkpoint import save
step = 0
while True:
    step += 1
    # Odd steps are saved twice, so that replacement is interrupted too.
    for value in range(1 + step % 2):
        save(sys.argv[1], step, {str(i): np.full(100_000, step, np.float32) for i in range(4)}, {"n": step}, keep=2)
        print(step, flush=True)
"""


def run_writer(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        **options,
    )


def test_a_writer_killed_at_any_moment_leaves_the_newest_complete_one(tmp_path):
    choose = random.Random(0)
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        with run_writer(WRITER, folder) as writer:
            said = [writer.stdout.readline() for _ in range(choose.randint(1, 4))]
            with pytest.raises(subprocess.TimeoutExpired):
                writer.wait(choose.random() * 0.03)
            writer.send_signal(signal.SIGKILL)
            said = int((said + writer.stdout.readlines())[-1])
        checkpoint, skipped = newest(folder)
        assert skipped == []
        # One more than it said: the kill may fall between the rename and the print.
        assert checkpoint.step in (said, said + 1)
        assert checkpoint.state == {"n": checkpoint.step}
        assert all((array == checkpoint.step).all() for array in checkpoint.arrays.values())
        save(folder, said + 5, ARRAYS, {}, keep=1)
        assert names(folder) == [f"step-{said + 5:08d}"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    with subprocess.Popen(["true"]) as dead:
        pass
    with subprocess.Popen(["sleep", "60"]) as alive:
        for pid in (dead.pid, alive.pid, os.getpid()):
            (tmp_path / f".tmp-step-00000009-{pid}").mkdir()
            (tmp_path / f".tmp-step-00000009-{pid}" / "arrays.npz").write_bytes(b"half")
        save(tmp_path, 9, ARRAYS, {})
        alive.kill()
    assert names(tmp_path) == [f".tmp-step-00000009-{alive.pid}", "step-00000009"]


def test_saving_a_step_again_replaces_it_whatever_its_state(tmp_path):
    for damage in (lambda path: None, lambda path: (path / "arrays.npz").unlink(), shutil.rmtree):
        path = save(tmp_path, 5, {"a": np.zeros(3)}, {"try": 1})
        damage(path)
        assert save(tmp_path, 5, {"a": np.ones(3)}, {"try": 2}) == path
        assert load(path).state == {"try": 2}
        assert names(tmp_path) == [path.name]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    _, path = save_steps(tmp_path, 4, 5)
    aside = path.rename(tmp_path / f".old-{path.name}")
    assert newest(tmp_path)[0].path == aside
    assert newest(tmp_path)[0].step == 5
    save(tmp_path, 5, ARRAYS, {"again": True})
    assert names(tmp_path) == ["step-00000004", "step-00000005"]
    (tmp_path / f".old-{path.name}").mkdir()
    assert newest(tmp_path)[0].path == path
    save_steps(tmp_path, 6)
    assert names(tmp_path) == ["step-00000004", "step-00000005", "step-00000006"]


# --------------------------------------------------------------------------------------------- bad disks


@pytest.fixture
def mount(tmp_path):
    """Mount tmpfs at a folder; the function returned remounts it."""
    target = tmp_path / "disk"
    target.mkdir()

    def call(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", target], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"no mount here: {done.stderr.strip()}")
        return target

    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("mounting needs root and mount(8)")
    try:
        yield call
    finally:
        if target.is_mount():
            subprocess.run(["umount", target], check=True)


def test_full_disk(mount):
    folder = mount("size=1m") / "checkpoints"
    save(folder, 1, ARRAYS, {})
    for _ in range(2):
        with pytest.raises(SaveError) as caught:
            save(folder, 2, {"large": np.ones(1 << 18)}, {})
        assert_one_line(caught.value, folder, "No space left", "not touched")
        assert caught.value.__cause__.errno == errno.ENOSPC
    assert names(folder) == ["step-00000001"]
    assert_same(ARRAYS, newest(folder)[0].arrays)
    save(folder, 2, ARRAYS, {})
    assert newest(folder)[0].step == 2


def test_read_only_disk(mount):
    folder = mount("size=1m")
    save(folder, 1, ARRAYS, {})
    mount("remount,ro")
    with pytest.raises(SaveError) as caught:
        save(folder, 2, ARRAYS, {})
    assert_one_line(caught.value, "Read-only")
    assert newest(folder)[0].step == 1


def test_file_size_limit(tmp_path):
    save_steps(tmp_path, 1)
    code = """
import resource, sys, numpy as np
from cnnopt.run.checkpoint import SaveError, save
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    save(sys.argv[1], 2, {"large": np.ones(1 << 16)}, {})
except SaveError as error:
    print(error)
"""
    with run_writer(code, tmp_path) as writer:
        assert "File too large" in writer.stdout.read()
    assert writer.returncode == 0
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; test_read_only_disk covers it")
def test_folder_without_permission(tmp_path):
    save_steps(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(SaveError, match="Permission"):
            save_steps(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)
    assert newest(tmp_path)[0].step == 1


def test_vanished_run_folder(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    save(folder, 1, ARRAYS, {})
    shutil.rmtree(folder.parent)
    with pytest.raises(SaveError) as caught:
        save(folder, 2, ARRAYS, {})
    assert_one_line(caught.value, folder, "No such file", "folder exists")
    assert not folder.parent.exists()
    assert newest(folder) == (None, [])


def test_file_in_place_of_the_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.write_text("mine")
    with pytest.raises(SaveError) as caught:
        save(folder, 1, ARRAYS, {})
    assert_one_line(caught.value, folder, "File exists")
    with pytest.raises(CheckpointError) as caught:
        newest(folder)
    assert_one_line(caught.value, folder, "Not a directory")
    assert folder.read_text() == "mine"


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere_falls_back_to_the_earlier_one(tmp_path, name):
    first, second = save_steps(tmp_path, 1, 2)
    whole = (second / name).read_bytes()
    choose = random.Random(name)
    for length in (0, len(whole) - 1, *(choose.randrange(len(whole)) for _ in range(8))):
        (second / name).write_bytes(whole[:length])
        with pytest.raises(CheckpointError) as caught:
            load(second)
        assert_one_line(caught.value, second, "resume from another")
        checkpoint, skipped = newest(tmp_path)
        assert checkpoint.path == first
        assert skipped == [(second, str(caught.value))]
    (second / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load(second)
    assert newest(tmp_path)[0].path == first


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    [path] = save_steps(tmp_path_factory.mktemp("victim"), 3)
    return path, {name: (path / name).read_bytes() for name in FILES}


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(FILES), place=st.integers(0, 2**32), bit=st.integers(0, 7))
def test_no_flipped_bit_passes_as_other_content(victim, name, place, bit):
    path, whole = victim
    data = bytearray(whole[name])
    data[place % len(data)] ^= 1 << bit
    (path / name).write_bytes(data)
    try:
        checkpoint = load(path)
    except CheckpointError as error:
        assert_one_line(error, path)
    else:
        assert name == "manifest.json"
        assert (checkpoint.step, checkpoint.state) == (3, {"epoch": 3})
        assert_same(ARRAYS, checkpoint.arrays)
    finally:
        (path / name).write_bytes(whole[name])


def test_accept_decides_and_its_reason_is_kept(tmp_path):
    paths = save_steps(tmp_path, 1, 2, 3)
    checkpoint, skipped = newest(tmp_path, accept=lambda c: None if c.state["epoch"] < 3 else "other model")
    assert checkpoint.step == 2
    assert skipped == [(paths[2], "other model")]
    assert newest(tmp_path, accept=lambda c: "no")[1] == [(path, "no") for path in reversed(paths)]
    assert newest(tmp_path / "none") == (None, [])


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path):
    [path] = save_steps(tmp_path, 1)
    shutil.copytree(path, tmp_path / "step-00000009")
    assert newest(tmp_path)[0].step == 1
    assert load(shutil.copytree(path, tmp_path / "favourite")).step == 1
    assert steps(tmp_path) == [1, 9]


# --------------------------------------------------------------------------------------------- hostility


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def zipped(entries, method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array))
    return buffer.getvalue()


def test_pickles_are_never_executed(tmp_path):
    [path] = save_steps(tmp_path / "c", 1)
    target = tmp_path / "executed"
    objects = np.array([Bomb(target)], dtype=object)
    for data in (zipped([("a.npy", npy(objects))]), npy(objects), pickle.dumps(Bomb(target))):
        forge(path, arrays_npz=data)
        with pytest.raises(CheckpointError):
            load(path)
        assert newest(tmp_path / "c")[0] is None
    assert names(tmp_path) == ["c"]


def header(descr, shape):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def overlapping():
    data = bytearray(zipped([(f"{letter}.npy", npy(np.zeros(500))) for letter in "abcdefgh"]))
    first = data.index(b"PK\x01\x02")
    # All central entries point at the first local header: eight arrays from the bytes of one.
    start = first
    while data[start : start + 4] == b"PK\x01\x02":
        data[start + 42 : start + 46] = bytes(4)
        start += 46 + len("a.npy")
    body = zipped([("a.npy", npy(np.zeros(500)))])
    local = body[: body.index(b"PK\x01\x02")]
    tail = bytearray(data[first:])
    end = tail.rindex(b"PK\x05\x06")
    tail[end + 16 : end + 20] = len(local).to_bytes(4, "little")
    return local + bytes(tail)


HOSTILE = {
    "bomb": ("more bytes than", zipped([("a.npy", npy(np.zeros(10**6)))], zipfile.ZIP_DEFLATED)),
    "overlapping entries": ("more bytes than", overlapping()),
    "compressed": ("compressed", zipped([("a.npy", npy(np.zeros(0)))], zipfile.ZIP_DEFLATED)),
    "a terabyte claimed": ("", zipped([("a.npy", header("<f4", (1 << 38,)) + b"1234")])),
    "an exabyte claimed": ("", zipped([("a.npy", header("<f8", (1 << 57,)) + b"1234")])),
    "negative shape": ("", zipped([("a.npy", header("<f4", (-1, -1)) + b"1234")])),
    "structured array": ("dtype", zipped([("a.npy", npy(np.zeros(1, "f4,i4")))])),
    "text array": ("dtype", zipped([("a.npy", npy(np.array(["a"])))])),
    "not npy inside": ("", zipped([("a.npy", b"garbage")])),
    "not named npy": ("not .npy", zipped([("a.txt", npy(np.ones(1)))])),
    "not a zip": ("not a zip", b"garbage"),
    "empty": ("not a zip", b""),
}


@pytest.mark.parametrize(("word", "data"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_arrays_with_a_valid_manifest(tmp_path, word, data):
    [path] = save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        load(forge(path, arrays_npz=data))
    assert_one_line(caught.value, path, word)


@settings(max_examples=100, deadline=None)
@given(place=st.integers(0, 2**32), garbage=st.binary(min_size=1, max_size=8))
def test_garbled_arrays_with_a_valid_manifest_raise_nothing_else(victim, place, garbage):
    path, whole = victim
    data = bytearray(whole["arrays.npz"])
    place %= len(data)
    data[place : place + len(garbage)] = garbage
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(path, Path(folder, path.name))
        with contextlib.suppress(CheckpointError):
            load(forge(copy, arrays_npz=bytes(data)))


@pytest.mark.parametrize(
    "text",
    [
        *("", "garbage", "[]", "null", "{}", "[" * 100_000, "9" * 5000, "\xff"),
        '{"format": 1, "step": 1, "state": []}',
        '{"format": 2, "step": 1, "state": {}}',
        '{"format": 1, "step": true, "state": {}}',
    ],
)
def test_hostile_json(tmp_path, text):
    for name in ("state.json", "manifest.json"):
        [path] = save_steps(tmp_path, 1)
        (path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError) as caught:
            load(forge(path) if name == "state.json" else path)
        assert_one_line(caught.value, path)
        save_steps(tmp_path, 2)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/arrays.npz", "extra"])
def test_manifest_may_name_no_other_file(tmp_path, name):
    [path] = save_steps(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    for kept in itertools.chain([manifest["files"]], ({"state.json": manifest["files"]["state.json"]},)):
        files = {**kept, name: manifest["files"]["arrays.npz"]}
        (path / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(CheckpointError, match="must list"):
            load(path)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5])
def test_unknown_format(tmp_path, version):
    [path] = save_steps(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": version}))
    with pytest.raises(CheckpointError, match="format"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_links_and_pipes_are_refused(tmp_path, name):
    [path] = save_steps(tmp_path, 1)
    outside = (path / name).rename(tmp_path / "outside")
    (path / name).symlink_to(outside)
    with pytest.raises(CheckpointError):
        load(path)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(CheckpointError, match="regular"):
        load(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(CheckpointError):
        load(path)


def test_loading_writes_nothing(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "state.json").write_text("damaged")
    (tmp_path / ".tmp-step-00000003-1").mkdir()
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))}
    newest(tmp_path)
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))} == before


# ---------------------------------------------------------------------------------------------- rotation


@settings(max_examples=15, deadline=None)
@given(
    keep=st.integers(1, 4),
    metrics=st.lists(st.sampled_from([None, 0.1, 0.2, 0.2, 0.9, float("nan")]), min_size=1, max_size=8),
)
def test_rotation_keeps_the_newest_and_the_best(keep, metrics):
    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for step, metric in enumerate(metrics):
            save(folder, step, {}, {} if metric is None else {"metric": metric}, keep=keep)
            known = [(metrics[s], -s) for s in range(step + 1) if metrics[s] is not None and metrics[s] < 1]
            best = {-max(known)[1]} if known else set()
            expected = sorted(best | set(range(max(0, step + 1 - keep), step + 1)))
            assert steps(folder) == expected
        assert all(load(path) for path in list_steps(folder))


def test_rotation_never_deletes_what_was_just_saved_nor_an_abandoned_future(tmp_path):
    save_steps(tmp_path, 10, 20, 90, 100)
    save(tmp_path, 30, ARRAYS, {}, keep=1)
    assert steps(tmp_path) == [30, 90, 100]
    (tmp_path / "step-00000030" / "state.json").write_text("damaged")
    save(tmp_path, 40, ARRAYS, {}, keep=2)
    assert steps(tmp_path) == [30, 40, 90, 100]


def test_rotation_keeps_the_best_that_verifies(tmp_path):
    for step, metric in [(8, 0.5), (16, 0.9), (90, 1.0)]:
        save(tmp_path, step, ARRAYS, {"metric": metric}, keep=9)
    with (tmp_path / "step-00000016" / "arrays.npz").open("r+b") as file:
        file.truncate(10)
    save(tmp_path, 24, ARRAYS, {"metric": 0.1}, keep=1)
    assert steps(tmp_path) == [8, 24, 90]


@pytest.mark.parametrize("metric", ["high", [], None, 10**400, float("inf"), {}])
def test_a_metric_that_is_no_finite_number_protects_nothing(tmp_path, metric):
    save(tmp_path, 1, {}, {"metric": metric}, keep=1)
    save(tmp_path, 2, {}, {"metric": 0.5}, keep=1)
    save(tmp_path, 3, {}, {}, keep=1)
    assert steps(tmp_path) == [2, 3]


def test_steps_sort_as_numbers_and_strangers_are_left_alone(tmp_path):
    for stranger in ("notes", "step-1", "step-0000000x", "step-00000001.bak", "latest"):
        (tmp_path / stranger).mkdir()
    save_steps(tmp_path, 99_999_999, 100_000_000, 5)
    assert steps(tmp_path) == [5, 99_999_999, 100_000_000]
    assert len(names(tmp_path)) == 8
