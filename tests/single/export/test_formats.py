"""The network in other formats: each loads where cnnopt is not installed, and gives the logits of TensorFlow."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnnopt.data import datasets
from cnnopt.distributed import host
from cnnopt.export import render
from cnnopt.export.options import FORMAT_PACKAGES, FORMATS
from cnnopt.export.trained import read
from cnnopt.packages import installed
from tests.helpers import ROOT
from tests.helpers.exported_run import ENVIRONMENT, forge, make_run, quantize

pytestmark = pytest.mark.timeout(600)

#: The optional ones are not published for Python 3.10.
MADE = [name for name in FORMATS if all(map(installed, FORMAT_PACKAGES.get(name, ())))]
#: How a user reads a format, without cnnopt: pixels to logits. Also in docs/use.md and in the model card.
READERS = {
    "saved-model": "import tensorflow as tf\n"
    "logits = tf.saved_model.load('saved_model').signatures['serving_default'](pixels=images)['logits'].numpy()",
    "keras": "import tf_keras\nlogits = tf_keras.models.load_model('model.keras').predict(images, verbose=0)",
    "onnx": "import onnxruntime\nlogits = onnxruntime.InferenceSession('model.onnx').run(None, {'pixels': images})[0]",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with the mean image of the original study, exported in every format."""
    path = make_run(tmp_path_factory.mktemp("runs") / "r", normalize="pixel-mean")
    mean = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype(np.float32)
    forge(path, **{"mean:0": mean, "std:0": np.full(1, 255, np.float32)})
    done = quantize(path, "--variants", ",".join(["float32", *MADE]), "--calibration", 32)
    assert done.returncode == 0, done.stderr
    return path, json.loads((path / "report.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def expected(run):
    """The logits of 64 test images, by the network of cnnopt in TensorFlow."""
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import convert

    pixels = datasets.load("synthetic").test_images[:64].astype(np.float32)
    return pixels, convert.float_model(read(run[0])).predict(pixels, verbose=0)


@pytest.mark.parametrize("name", READERS)
def test_a_format_loads_without_cnnopt_and_gives_the_logits_of_tensorflow(run, expected, tmp_path, name):
    if name not in MADE:
        pytest.skip(f"{name} needs optional packages")
    pixels, logits = expected
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"import sys, numpy as np\nimages = np.load({str(tmp_path / 'pixels.npy')!r})\n{READERS[name]}\n"
    code += f"np.save({str(tmp_path / 'logits.npy')!r}, logits)\n"
    # No folder of cnnopt is on the path, and none of its modules was loaded.
    code += "try:\n    import cnnopt\nexcept ImportError:\n    print('without cnnopt')"
    environment = {**ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code]
    done = subprocess.run(command, cwd=run[0] / "export", capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "without cnnopt\n"), done.stderr
    found = np.load(tmp_path / "logits.npy")
    assert found.shape == logits.shape
    # The first two have the same operators and weights; threads may add in another order.
    assert np.abs(found - logits).max() <= (1e-4 if name == "onnx" else 1e-5)


@pytest.mark.skipif("safetensors" not in MADE, reason="safetensors is optional")
def test_safetensors_holds_the_weights_and_the_masks_bit_for_bit(run):
    from safetensors import safe_open

    trained = read(run[0])
    with safe_open(run[0] / "export/model.safetensors", "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["depth"] == "8"
    wanted = {name.removesuffix(":0"): value for name, value in trained.weights.items()}
    wanted |= {f"{layer}/mask": mask for layer, mask in trained.masks.items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    for layer in trained.masks:
        assert not np.any(found[f"{layer}/kernel"][~found[f"{layer}/mask"]])


def test_the_report_measures_each_format_as_it_is_on_the_disk(run):
    path, content, printed = run
    assert [entry["name"] for entry in content["formats"]] == MADE
    (float32,) = content["files"]
    for entry in content["formats"]:
        place = path / entry["file"]
        files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
        stored = b"".join(file.read_bytes() for file in files)
        assert (len(stored), hashlib.sha256(stored).hexdigest()) == (entry["size"]["raw"], entry["sha256"])
        assert entry["shipped"]["times_smaller"] == pytest.approx(content["reference"]["raw"] / entry["size"]["gzip"])
        assert entry["largest_difference"] < 1e-4
        assert entry["test"]["agreement"] == 1
        assert entry["test"]["images"] == 128
        assert abs(entry["test"]["correct"] - float32["test"]["correct"]) <= 1
    assert not [file for file in (path / "export").iterdir() if file.name.startswith(".")]
    for row in render.format_rows(content):
        assert f"| {' | '.join(row)} |" in (path / "report.md").read_text()
        assert "".join(f"<td>{cell}</td>" for cell in row) in (path / "report.html").read_text()
        (line,) = [line for line in printed.splitlines() if f" {row[0]} " in line]
        assert [cell for cell in row[:6] if cell not in line.split()] == []
    assert all(len(line) <= 80 for line in printed.splitlines() if "\u2500" in line)
    card = (path / "export/README.md").read_text()
    for entry in content["formats"]:
        assert f"| `{Path(entry['file']).name}` | {entry['size']['raw']:,} |" in card
        assert f'"name": "{entry["name"]}"' in card


def test_documents_name_the_keys_and_show_how_to_read_each_format(run):
    text = (ROOT / "docs/quantize.md").read_text()
    for entry in run[1]["formats"]:
        assert [key for key in entry if f"`{key}`" not in text] == []
    use = (ROOT / "docs/use.md").read_text()
    for name in FORMATS:
        assert f"`{name}`" in use


@pytest.mark.parametrize(("flags", "package"), [(["--variants", "onnx"], "onnx and onnxruntime are"),
                                                (["--variants", "float32,safetensors"], "safetensors is"),
                                                (["--runtime", "litert"], "ai-edge-litert is")])  # fmt: skip
def test_a_package_that_is_not_installed_is_named_before_anything_is_made(
    tmp_path, capsys, monkeypatch, flags, package
):
    from cnnopt.quantize import main

    for name in ("tensorflow", "onnx", "onnxruntime", "safetensors", "ai_edge_litert"):
        monkeypatch.setitem(sys.modules, name, None)
    path = make_run(tmp_path / "r")
    assert main([str(path), *flags]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert f"{' '.join(flags).replace('float32,', '')}: {package} not installed; run EXTRAS=1 make env" in said.err
    assert f"uv pip install {package.split()[0]}" in said.err
    assert not (path / "export").exists()


def test_files_are_measured_by_the_runtime_that_is_asked_for(run, tmp_path):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is optional")
    content = run[1]
    other = make_run(tmp_path / "r")
    done = quantize(other, "--variants", "float32,keras", "--calibration", 32, "--runtime", "litert")
    assert done.returncode == 0, done.stderr
    found = json.loads((other / "report.json").read_text())
    assert (content["runtime"], found["runtime"]) == ("tf", "litert")
    assert found["machine"]["packages"]["ai-edge-litert"]
    assert "LiteRT" in (other / "report.md").read_text()
    # The process that measures has no TensorFlow in its memory.
    assert found["files"][0]["latency"][0]["peak_rss"] < 0.7 * content["files"][0]["latency"][0]["peak_rss"]
    # The same network in TensorFlow: with statistics of channels here, and of pixels there.
    tf, litert = found["formats"][0]["test"], found["files"][0]["test"]
    assert litert["loss"] == pytest.approx(tf["loss"], rel=1e-4)
    assert found["formats"][0]["largest_difference"] < 1e-5


def test_a_format_that_cannot_be_written_is_one_line(run, tmp_path):
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import formats
    from cnnopt.run.atomic_files import WriteError

    trained = read(run[0])
    (tmp_path / "file").write_text("no folder")
    for name in MADE:
        with pytest.raises(WriteError, match=r"file/.*: cannot be written \(.*\); free some space") as error:
            formats.write(name, trained, tmp_path / "file")
        assert "\n" not in str(error.value)
    # A folder where the file should be.
    os.makedirs(tmp_path / formats.FORMATS["keras"].file / "deeper")
    formats.write("keras", trained, tmp_path)
    assert (tmp_path / "model.keras").is_file()
