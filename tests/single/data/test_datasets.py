"""The published layouts, and downloads from a real server."""

import hashlib
import http.server
import importlib.metadata
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cnnopt.data import datasets
from cnnopt.data.datasets import DataError
from tests.helpers import ROOT
from tests.helpers.cifar_copies import (
    BINARY_10,
    EVERY_LAYOUT,
    PYTHON_10,
    PYTHON_100,
    dataset_of,
    python2_pickle,
    small_copy,
)
from tests.helpers.permissions import stopped_by_permissions

# Read when the module is collected, before a fixture removes the variable.
REAL_DATA_DIR = os.environ.get("CNNOPT_DATA_DIR", "")
IDS = [layout.folder for layout in EVERY_LAYOUT]


@pytest.fixture(autouse=True)
def no_data_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("CNNOPT_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# Reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "archive", "folder itself"])
@pytest.mark.parametrize("layout", EVERY_LAYOUT, ids=IDS)
def test_published_layouts_are_read_exactly(layout, form, tmp_path):
    copy = small_copy(layout)
    data_dir = tmp_path
    if form == "archive":
        copy.archive(tmp_path)
    else:
        folder = copy.folder(tmp_path)
        data_dir = folder if form == "folder itself" else tmp_path
    datasets.check(dataset_of(layout), data_dir)
    loaded = datasets.load(dataset_of(layout), data_dir)
    np.testing.assert_array_equal(loaded.train_images, copy.images(*layout.train))
    np.testing.assert_array_equal(loaded.test_images, copy.images(layout.test))
    np.testing.assert_array_equal(loaded.train_labels, np.concatenate([copy.labels[f] for f in layout.train]))
    np.testing.assert_array_equal(loaded.test_labels, copy.labels[layout.test])
    assert loaded.train_images.dtype == np.uint8
    assert loaded.train_images.flags.c_contiguous
    assert loaded.train_labels.dtype == loaded.test_labels.dtype == np.int64
    assert loaded.class_names == copy.names
    assert loaded.num_classes == layout.num_classes
    assert loaded.name == dataset_of(layout)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_pickle_writer_of_these_tests_writes_what_python_reads(tmp_path):
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    found = pickle.loads(python2_pickle({"data": pixels, "labels": [3, 300]}), encoding="bytes")
    np.testing.assert_array_equal(found[b"data"], pixels)
    assert found[b"labels"] == [3, 300]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("keys", ["bytes", "str"])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_written_by_python_3_and_this_numpy(protocol, keys, order, tmp_path):
    copy = small_copy(PYTHON_10)

    def key(name: str) -> object:
        return name if keys == "str" else name.encode()

    for file, pixels in copy.pixels.items():
        batch = {key("data"): np.array(pixels, order=order), key("labels"): copy.labels[file].tolist()}
        copy.files[file] = pickle.dumps(batch, protocol=protocol)
    copy.files["batches.meta"] = pickle.dumps({key("label_names"): [key(n) for n in copy.names]}, protocol=protocol)
    copy.folder(tmp_path)
    loaded = datasets.load("cifar10", tmp_path)
    np.testing.assert_array_equal(loaded.train_images, copy.images(*PYTHON_10.train))
    assert loaded.class_names == copy.names


def test_the_two_layouts_of_the_real_cifar_10_are_equal():
    folders = [Path(REAL_DATA_DIR) / layout.folder for layout in (PYTHON_10, BINARY_10)]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("needs both CIFAR-10 layouts in $CNNOPT_DATA_DIR")
    pickled, binary = (datasets.load("cifar10", folder) for folder in folders)
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(pickled, part), getattr(binary, part))
    assert pickled.class_names == binary.class_names
    assert pickled.class_names[::9] == ("airplane", "truck")
    assert len(pickled.train_images) == 50_000
    np.testing.assert_array_equal(np.bincount(pickled.train_labels), [5000] * 10)
    np.testing.assert_array_equal(np.bincount(pickled.test_labels), [1000] * 10)


@pytest.mark.parametrize("layout", [PYTHON_10, PYTHON_100], ids=["cifar10", "cifar100"])
def test_the_folder_that_keras_3_unpacks_is_found(layout, tmp_path):
    copy, default = small_copy(layout), tmp_path / "home/.keras/datasets"
    copy.folder(default / f"{layout.folder}-target")
    datasets.check(dataset_of(layout))
    loaded = datasets.load(dataset_of(layout))
    np.testing.assert_array_equal(loaded.train_images, copy.images(*layout.train))
    assert len(datasets.load(dataset_of(layout), default).test_images) == 4


def test_keras_3_still_names_its_folder_so():
    # Its files, because "keras" is tf_keras wherever TensorFlow has been started.
    keras = importlib.metadata.distribution("keras")
    assert keras.version.split(".")[0] == "3"
    source = Path(str(keras.locate_file("keras/src/datasets")))
    for layout, module in ((PYTHON_10, "cifar10"), (PYTHON_100, "cifar100")):
        assert f'"{layout.folder}-target"' in (source / f"{module}.py").read_text()


def test_a_complete_archive_wins_over_an_incomplete_folder(tmp_path):
    copy = small_copy(PYTHON_10)
    (copy.folder(tmp_path) / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: file not found; complete or delete"):
        datasets.check("cifar10", tmp_path)
    copy.archive(tmp_path)
    assert len(datasets.load("cifar10", tmp_path).train_images) == 20


def test_the_directory_is_the_flag_else_the_variable_else_that_of_keras(tmp_path, monkeypatch):
    for images, place in enumerate(["home/.keras/datasets", "variable", "flag"], start=1):
        small_copy(BINARY_10, images_per_file=images).folder(tmp_path / place)
    assert len(datasets.load("cifar10").test_images) == 1
    monkeypatch.setenv("CNNOPT_DATA_DIR", str(tmp_path / "variable"))
    assert len(datasets.load("cifar10").test_images) == 2
    assert len(datasets.load("cifar10", tmp_path / "flag").test_images) == 3


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_a_data_dir_that_does_not_exist_is_refused_at_once(name, tmp_path):
    for use in (datasets.check, datasets.load):
        with pytest.raises(DataError, match=r"^--data-dir .*absent: does not exist"):
            use(name, tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"^--data-dir .*file: is not a directory"):
        datasets.check(name, tmp_path / "file")


@pytest.mark.parametrize(
    ("closed", "said"),
    [
        ("data", "{flag} {data}: cannot be read (Permission denied)"),
        (
            "data/cifar-10-batches-bin",
            "{data}/cifar-10-batches-bin/data_batch_1.bin: cannot be read (Permission denied)",
        ),
        (".", "{flag} {data}: cannot be read (Permission denied)"),
    ],
)
@pytest.mark.parametrize("flag", ["--data-dir", "$CNNOPT_DATA_DIR"])
def test_a_folder_that_may_not_be_entered_is_not_said_to_be_missing(flag, closed, said, tmp_path):
    place = tmp_path / "place"
    data = place / "data"
    small_copy(BINARY_10).folder(data)
    code = "import sys; from cnnopt.data import datasets; datasets.check('cifar10', *sys.argv[1:])"
    given = [str(data)] if flag == "--data-dir" else []
    variables = {} if given else {"CNNOPT_DATA_DIR": str(data)}
    (place / closed).chmod(0)
    try:
        done = subprocess.run(
            stopped_by_permissions([sys.executable, "-c", code, *given]),
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
    finally:
        (place / closed).chmod(0o700)
    assert done.stderr.splitlines()[-1].startswith(
        f"cnnopt.data.cifar_files.DataError: {said.format(flag=flag, data=data)}; "
    )


def test_a_user_without_a_home_is_told_so_and_gets_no_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where /etc/passwd does not know the user
    with pytest.raises(DataError, match=r"^~/.keras/datasets: this user has no home folder; set HOME"):
        datasets.check("cifar10")
    assert not list(tmp_path.iterdir())


def test_an_empty_data_dir_is_refused_and_stays_empty(tmp_path):
    with pytest.raises(DataError) as refused:
        datasets.load("cifar100", tmp_path)
    for looked_for in ("cifar-100-python/", "cifar-100-binary/", "cifar-100-python.tar.gz", "--data-dir"):
        assert looked_for in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_an_unknown_data_set_names_the_choices():
    with pytest.raises(DataError, match="--dataset mnist: choose one of cifar10, cifar100, digits, synthetic"):
        datasets.load("mnist")


def test_nothing_to_check_where_load_would_download_or_make_the_data(tmp_path):
    for name in datasets.DATASETS:
        datasets.check(name, None)
    assert not (tmp_path / "home").exists()


def test_digits():
    digits = datasets.load("digits")
    assert digits.train_images.shape == (1437, 32, 32, 3)
    assert datasets.DATASETS["digits"] == 1437
    assert digits.test_images.shape == (360, 32, 32, 3)
    assert digits.num_classes == 10
    assert digits.train_images.dtype == np.uint8
    assert (digits.train_images.min(), digits.train_images.max()) == (0, 255)
    assert (digits.train_images[..., 0] == digits.train_images[..., 2]).all()
    assert np.ptp(np.bincount(digits.test_labels)) <= 3
    again = datasets.load("digits", seed=1)
    np.testing.assert_array_equal(digits.test_images, again.test_images)


def test_bilinear_resize_keeps_constants_and_interpolates():
    flat = np.full((1, 8, 8, 1), 7.0)
    np.testing.assert_allclose(datasets._resized(flat, 32), 7.0)
    ramp = np.broadcast_to(np.arange(8.0)[None, None, :, None], (1, 8, 8, 1))
    expected = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    np.testing.assert_allclose(datasets._resized(ramp, 32)[0, 5, :, 0], expected)


def test_synthetic_images_are_seeded_balanced_and_learnable():
    first = datasets.load("synthetic", seed=3, synthetic_sizes=(400, 100))
    again = datasets.load("synthetic", seed=3, synthetic_sizes=(400, 100))
    other = datasets.load("synthetic", seed=4, synthetic_sizes=(400, 100))
    np.testing.assert_array_equal(first.train_images, again.train_images)
    assert not np.array_equal(first.train_images, other.train_images)
    np.testing.assert_array_equal(np.bincount(first.train_labels), [40] * 10)
    # The nearest class mean, the weakest of learners, tells most of them apart.
    means = np.stack([first.train_images[first.train_labels == c].mean(0).ravel() for c in range(10)])
    test = first.test_images.reshape(100, -1).astype(float)
    nearest = np.argmin((means**2).sum(1) - 2 * test @ means.T, axis=1)
    assert (nearest == first.test_labels).mean() > 0.8


def test_import_is_light():
    slow = "('tensorflow', 'sklearn', 'rich', 'ssl')"
    code = f"import sys, cnnopt.data.datasets; print([m for m in {slow} if m in sys.modules])"
    root = Path(datasets.__file__).parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


# Downloads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: `answers` maps paths to bodies, `requests` lists what was asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            body = self.server.answers.get(self.path)
            if body is None:
                self.send_error(404)
                return
            time.sleep(self.server.delay)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + self.server.missing))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.answers, running.requests, running.delay, running.missing = {}, [], 0.0, 0
        running.url = f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """The server publishes a small CIFAR-10, and an empty $CNNOPT_DATA_DIR waits for it."""
    (tmp_path / "upstream").mkdir()
    body = small_copy(PYTHON_10).archive(tmp_path / "upstream").read_bytes()
    server.answers["/cifar.tar.gz"] = body
    download = datasets.Download(f"{server.url}/cifar.tar.gz", hashlib.md5(body).hexdigest())
    monkeypatch.setitem(datasets.DOWNLOADS, "cifar10", download)
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("CNNOPT_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def visible(folder: Path) -> list[str]:
    """What a download left, apart from the lock, which cannot be removed without a race."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_cifar_is_downloaded_once_and_read(server, published):
    datasets.check("cifar10")
    assert not server.requests
    for _ in range(2):
        assert len(datasets.load("cifar10").train_images) == 20
    assert server.requests == ["/cifar.tar.gz"]
    assert visible(published) == ["cifar-10-python.tar.gz"]


def test_a_wrong_checksum_is_refused_and_nothing_is_left(server, published, monkeypatch):
    monkeypatch.setitem(datasets.DOWNLOADS, "cifar10", datasets.Download(f"{server.url}/cifar.tar.gz", "0" * 32))
    with pytest.raises(DataError, match=r"cifar.tar.gz: the download has MD5 \w+, expected 0+; run again"):
        datasets.load("cifar10")
    assert visible(published) == []


@pytest.mark.parametrize("fault", ["not found", "cut short", "no server", "endless", "not http"])
def test_a_failed_download_names_the_address_and_the_remedy(fault, server, published, monkeypatch):
    if fault == "not found":
        server.answers.clear()
    elif fault == "cut short":
        server.missing = 1000
    elif fault == "endless":
        monkeypatch.setattr(datasets.cifar_files, "max_archive_bytes", lambda layout: 1000)
    else:
        scheme = "http" if fault == "no server" else "nonsense"
        monkeypatch.setitem(
            datasets.DOWNLOADS, "cifar10", datasets.Download(f"{scheme}://127.0.0.1:9/cifar.tar.gz", "")
        )
    with pytest.raises(DataError) as refused:
        datasets.load("cifar10")
    message = str(refused.value)
    assert datasets.DOWNLOADS["cifar10"].url in message
    for remedy in ("by hand", str(published / "cifar-10-python.tar.gz"), "--data-dir", "--dataset digits"):
        assert remedy in message
    assert "\n" not in message
    assert visible(published) == []


def test_the_default_directory_is_made_for_the_download(published, monkeypatch, tmp_path):
    monkeypatch.delenv("CNNOPT_DATA_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(datasets.load("cifar10").train_images) == 20
    assert visible(tmp_path / "home/.keras/datasets") == ["cifar-10-python.tar.gz"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/.keras/datasets"):
        datasets.load("cifar10")


def test_a_mistyped_variable_starts_no_download(server, published, monkeypatch, tmp_path):
    monkeypatch.setenv("CNNOPT_DATA_DIR", str(tmp_path / "dat"))
    for attempt in (datasets.check, datasets.load):
        with pytest.raises(DataError, match=r"^\$CNNOPT_DATA_DIR .*/dat: does not exist; name the directory"):
            attempt("cifar10")
    assert not server.requests
    assert not (tmp_path / "dat").exists()
    # Nor does it keep anybody from what needs no folder.
    datasets.check("digits")


def test_two_processes_download_once(server, published):
    server.delay = 0.5
    code = (
        "import sys; from cnnopt.data import datasets as d; d.DOWNLOADS['cifar10'] = d.Download(*sys.argv[1:]);"
        "print(len(d.load('cifar10').train_images))"
    )
    source = datasets.DOWNLOADS["cifar10"]
    root = Path(datasets.__file__).parents[2]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, source.url, source.md5], cwd=root, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == ["20", "20"]
    assert server.requests == ["/cifar.tar.gz"]


def test_progress_is_shown_on_a_terminal_only(published, monkeypatch, capsys):
    datasets.load("cifar10", show_progress=True)
    assert capsys.readouterr().err == ""
    (published / "cifar-10-python.tar.gz").unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    datasets.load("cifar10", show_progress=True)
    captured = capsys.readouterr()
    assert "cifar-10-python.tar.gz" in captured.err
    assert captured.out == ""
