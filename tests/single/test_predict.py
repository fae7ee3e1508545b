"""Images in, classes out: the same as the evaluation's, of any size and format; and what it refuses."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from cnnopt.data import datasets
from cnnopt.distributed import host
from cnnopt.export.measure import probabilities
from cnnopt.packages import RUNTIMES
from cnnopt.predict import main, read_image
from tests.helpers.exported_run import ENVIRONMENT, ROOT, make_run, quantize

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An exported run of digits, and ten test images in a folder."""
    path = make_run(tmp_path_factory.mktemp("runs") / "r", dataset="digits")
    done = quantize(path, "--variants", "float32,int8", "--calibration", 32)
    assert done.returncode == 0, done.stderr
    (path / "images").mkdir()
    for number, pixels in enumerate(datasets.load("digits").test_images[:10]):
        Image.fromarray(pixels).save(path / "images" / f"{number}.png")
    return path


def answers(capsys, *arguments):
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("runtime", ["tf", "litert"])
@pytest.mark.parametrize("file", ["int8", "float32"])
def test_the_answers_are_those_of_the_evaluation(run, capsys, file, runtime):
    if runtime == "litert":
        pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is optional")
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import interpret

    path = run / "export" / f"{file}.tflite"
    images = datasets.load("digits").test_images[:10]
    expected = probabilities(interpret.logits(path.read_bytes(), path, images, threads=2))
    found = answers(capsys, run, run / "images", "--file", file, "--runtime", runtime)
    assert [result["image"] for result in found] == [str(run / "images" / f"{number}.png") for number in range(10)]
    for row, result in zip(expected, found, strict=True):
        guesses = result["predictions"]
        assert [guess["class"] for guess in guesses] == [str(i) for i in np.argsort(-row, kind="stable")[:5]]
        shares = [guess["probability"] for guess in guesses]
        assert shares == pytest.approx(np.sort(row)[:-6:-1].tolist(), rel=1e-4)


def test_the_table_has_five_classes_and_fits(run, capsys):
    assert main([str(run), str(run / "images/0.png")]) == 0
    printed = capsys.readouterr().out
    (found,) = answers(capsys, run, run / "images/0.png")
    assert all(len(line) <= 80 for line in printed.splitlines())
    rows = [line.split()[-2:] for line in printed.splitlines() if "%" in line]
    assert rows == [[guess["class"], f"{100 * guess['probability']:.1f}%"] for guess in found["predictions"]]
    assert len(rows) == 5


def test_standard_input_is_an_image_and_litert_needs_no_tensorflow(run, capsys):
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is optional")
    (run / "nothing").mkdir(exist_ok=True)
    (run / "nothing/tensorflow.py").write_text("raise ImportError('no TensorFlow here')")
    done = subprocess.run(
        [sys.executable, "-m", "cnnopt.predict", str(run), "-", "--json", "--runtime", "litert"],
        input=(run / "images/3.png").read_bytes(),
        cwd=ROOT,
        capture_output=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(run / "nothing")},
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["image"] == "-"
    assert found["predictions"] == answers(capsys, run, run / "images/3.png", "--runtime", "litert")[0]["predictions"]


# ------------------------------------------------------------------------------------------------ images


PIXELS = datasets.load("synthetic").test_images[0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_an_image_of_the_right_size_comes_through_bit_for_bit(tmp_path, kind):
    Image.fromarray(PIXELS).save(tmp_path / "x", format=kind, lossless=True)
    np.testing.assert_array_equal(read_image(str(tmp_path / "x")), PIXELS)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("P", "GIF"), ("L", "JPEG"), ("CMYK", "JPEG"),
                                            ("1", "PNG"), ("LA", "PNG"), ("YCbCr", "JPEG"), ("F", "TIFF")])  # fmt: skip
def test_every_mode_and_size_becomes_32_by_32(tmp_path, mode, kind):
    big = Image.fromarray(PIXELS).resize((320, 200)).convert(mode)
    big.save(tmp_path / "x", format=kind)
    found = read_image(str(tmp_path / "x"))
    assert (found.shape, found.dtype) == ((32, 32, 3), np.uint8)
    grey = np.asarray(Image.fromarray(PIXELS).resize((320, 200)).crop((60, 0, 260, 200)).resize((32, 32)).convert("L"))
    assert abs(found.mean() - grey.mean()) < 12


def test_sixteen_bits_are_cut_to_eight_and_what_is_transparent_is_white(tmp_path):
    grey = PIXELS[..., 0].astype(np.uint16) * 256 + 7
    Image.fromarray(grey).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "deep.png")), np.repeat(PIXELS[..., :1], 3, axis=2))
    Image.new("RGBA", (50, 40), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.all(read_image(str(tmp_path / "clear.png")) == 255)


def test_the_middle_is_taken_and_the_orientation_of_the_camera_is_undone(tmp_path):
    sides = np.zeros((32, 96, 3), np.uint8)
    sides[:, 32:64] = PIXELS
    Image.fromarray(sides).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "wide.png")), PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: to be shown a quarter turn clockwise
    Image.fromarray(np.rot90(PIXELS)).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(read_image(str(tmp_path / "turned.png")), PIXELS)


# ------------------------------------------------------------------------------------------ what it refuses


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line of a mistake, which is answered without TensorFlow."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)

    def line(*arguments):
        assert main([*map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("cnnopt.predict: ")
        return captured.err

    return line


@pytest.fixture
def light(tmp_path):
    """As much of an exported run as is looked at before TensorFlow is loaded."""
    run = tmp_path / "light"
    (run / "export").mkdir(parents=True)
    (run / "export/int8.tflite").write_bytes(b"\x1c\0\0\0TFL3")
    (run / "report.json").write_text(json.dumps({"run": {"classes": ["a", "b"]}}))
    return run


def test_wrong_runs_and_files(refused, light, tmp_path):
    assert "no such run folder" in refused(tmp_path / "none", "x.png")
    assert "no such run folder" in refused("x" * 300, "x.png")
    assert "choose --file int8" in refused(light, "x.png", "--file", "int7")
    (tmp_path / "bare").mkdir()
    assert "run python -m cnnopt.quantize" in refused(tmp_path / "bare", "x.png")
    for content in ("", "[]", "{}", '{"run": 3}', '{"run": {"classes": []}}'):
        (light / "report.json").write_text(content)
        assert "report.json" in refused(light, "x.png")
    (light / "report.json").unlink()
    assert "No such file" in refused(light, "x.png")


def test_wrong_flags_and_images(refused, light, tmp_path, monkeypatch):
    assert "IMAGE" in refused(light)
    assert "--threads 0" in refused(light, "x.png", "--threads", "0")
    assert "invalid choice: 'onnx'" in refused(light, "x.png", "--runtime", "onnx")
    assert "did you mean --threads?" in refused(light, "x.png", "--thread", "1")
    assert "- is named twice" in refused(light, "-", "-")
    assert f"{tmp_path}/none.png: No such file" in refused(light, tmp_path / "none.png")
    assert "null byte" in refused(light, "a\0b")
    (tmp_path / "empty").mkdir()
    assert "no image in this folder" in refused(light, tmp_path / "empty")
    (tmp_path / "empty/config.json").write_text("{}")
    assert "empty: a run, not a folder of images" in refused(light, tmp_path / "empty")
    (tmp_path / "text.png").write_text("not an image")
    assert "text.png: not an image that Pillow reads; give" in refused(light, tmp_path / "text.png")
    whole = io.BytesIO()
    Image.fromarray(PIXELS).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:200])
    assert "cut.png: not an image" in refused(light, tmp_path / "cut.png")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"no image")))
    assert "standard input: not an image" in refused(light, "-")
    (light / "export/int8.tflite").write_text("not a file of this kind")
    assert "not a .tflite file" in refused(light, tmp_path / "cut.png")


def test_a_runtime_that_is_not_installed(refused, light, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    for runtime, package in RUNTIMES.items():
        assert f"pip install {package}" in refused(light, tmp_path / "x.png", "--runtime", runtime)
    assert "pip install ai-edge-litert" in refused(light, tmp_path / "x.png")
