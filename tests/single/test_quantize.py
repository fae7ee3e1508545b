"""cnnopt.quantize as a user runs it: from a trained run to measured files and a report; and refused input."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
import pytest

from cnnopt.config import TrainConfig
from cnnopt.data import datasets
from cnnopt.distributed import host
from cnnopt.distributed.rendezvous import Rendezvous
from cnnopt.export import render, tflite_file
from cnnopt.export.options import NEEDS, VARIANTS, OptionError, choose, parse_args
from cnnopt.export.trained import TrainedError, read
from cnnopt.finetune import settings_of
from cnnopt.launch import rank_variables
from cnnopt.quantize import main
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder
from tests.helpers import ROOT
from tests.helpers.cifar_copies import BINARY_10, small_copy
from tests.helpers.exported_run import ENVIRONMENT, STEP, forge, make_run, quantize

# The fixture trains and converts: 40 s on two free cores, many times that where other jobs fill them.
pytestmark = pytest.mark.timeout(1200)

HELD_OUT = 248
TUNED = {"int8-qat": 0, "clustered-int8-qat": 16}
MADE = ("float32", "dynamic", "int8", "sparse-float32", "sparse-dynamic", "clustered-int8", *TUNED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that train_hvd.py has really trained, with averaged weights, and its report."""
    folder = tmp_path_factory.mktemp("runs")
    flags = "--dataset synthetic --depth 8 --epochs 2 --warmup 0e --batch-size 16 --ema 0.9 --precision float32"
    flags += f" --validation {HELD_OUT}"
    # Uniform, as TensorFlow Lite encodes no kernel with few zeros.
    flags += " --sparsity-scope uniform --name t"
    command = [sys.executable, "train_hvd.py", *flags.split(), "--run-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=ENVIRONMENT)
    dense = make_run(folder / "dense", sparsity=0.0)
    # The same weights are fine-tuned first, and measured where Horovod cannot be imported.
    tuned = subprocess.run(
        [sys.executable, "-m", "cnnopt.finetune", str(folder / "t"), "1", "--clusters", "0", "16"],
        cwd=ROOT,
        capture_output=True,
        env=ENVIRONMENT,
    )
    assert tuned.returncode == 0, tuned.stderr
    (folder / "horovod.py").write_text("raise ImportError('no Horovod here')")
    (folder / "t/export").mkdir()
    (folder / "t/export/float32.tflite.packed.zip").write_text("of an earlier file")
    flags = f"--variants {','.join(MADE)} --clusters 16 --qat 1 --calibration 64 --pack --baseline {dense}"
    done = quantize(folder / "t", *flags.split(), PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return folder / "t", json.loads((folder / "t" / "report.json").read_text()), done.stdout


def entries(content):
    return {entry["name"]: entry for entry in content["files"]}


def test_the_float32_file_is_as_accurate_as_training_said(trained):
    path, content, _ = trained
    result = json.loads((path / "result.json").read_text())
    # Other kernels add in another order: at most one image of 128 may fall to the other side.
    assert abs(entries(content)["float32"]["test"]["correct"] - 128 * result["test_accuracy"]) <= 1.01
    assert entries(content)["float32"]["test"]["loss"] == pytest.approx(result["test_loss"], rel=1e-3)
    assert entries(content)["float32"]["test"]["agreement"] > 0.99
    assert content["run"]["averaged_weights"] is True


def test_the_report_is_of_the_files_that_are_there(trained):
    path, content, _ = trained
    assert [entry["name"] for entry in content["files"]] == ["dense-float32", *MADE]
    for entry in content["files"]:
        file = path / entry["file"]
        stored = file.read_bytes()
        assert (len(stored), tflite_file.digest(stored)) == (entry["size"]["raw"], entry["sha256"])
        host.prepare({**host.TENSORFLOW, **host.QUIET})
        nonzero = sum(kernel.nonzero for kernel in tflite_file.kernels(stored, file))
        assert nonzero == entry["weights"]["nonzero"] == sum(e["nonzero"] for e in entry["weights"]["layers"].values())
        assert np.trace(entry["test"]["confusion"]) == entry["test"]["correct"]
        assert np.sum(entry["test"]["confusion"]) == entry["test"]["images"] == 128
        assert entry["latency"][0]["threads"] == 1
        for timing in entry["latency"]:
            assert 0 < timing["median_ms"] <= timing["p90_ms"] <= timing["p99_ms"]
            assert timing["peak_rss"] > timing["added_rss"] >= 0
    assert len({entry["sha256"] for entry in content["files"]}) == len(content["files"])


def test_each_variant_is_what_its_name_says(trained):
    made = entries(trained[1])
    layers = {name: made[name]["weights"]["layers"] for name in MADE}
    assert {layer["stored_as"] for name in ("int8", "int8-qat") for layer in layers[name].values()} == {"int8"}
    assert {layer["stored_as"] for layer in layers["float32"].values()} == {"float32"}
    assert all(layer["sparse_encoded"] for layer in layers["sparse-float32"].values())
    assert layers["sparse-dynamic"]["stage3_block1_conv2"]["stored_as"] == "int8"
    for name in ("clustered-int8", "clustered-int8-qat"):
        assert all(2 < layer["distinct"] <= 16 for layer in layers[name].values())
    assert max(layer["distinct"] for layer in layers["int8"].values()) > 100
    sizes = {name: made[name]["size"] for name in made}
    assert sizes["int8"]["raw"] < sizes["float32"]["raw"] / 3
    assert sizes["sparse-float32"]["raw"] < 0.6 * sizes["float32"]["raw"]
    assert sizes["clustered-int8"]["raw"] == sizes["int8"]["raw"]
    assert sizes["clustered-int8"]["gzip"] < 0.9 * sizes["int8"]["gzip"]
    errors = {name: layers[name]["stage3_block1_conv1"]["error"] for name in MADE}
    assert errors["float32"] == errors["sparse-float32"] == 0 < errors["int8"] < 0.02 < errors["clustered-int8"] < 0.2
    # Of the weights that fine-tuning ended with, which differ from those of the float32 file by more.
    assert 0 < errors["int8-qat"] < 0.02 < errors["clustered-int8-qat"] < 0.2


def test_zeros_survive_in_every_file_and_the_ledger_has_all_stages(trained):
    path, content, _ = trained
    run = read(path)
    pruned = sum(int(np.sum(~mask)) for mask in run.masks.values())
    assert pruned == sum(int(np.sum(k == 0)) for k in run.kernels().values()) > 40_000
    made = entries(content)
    stages = {name: [line["stage"] for line in made[name]["ledger"]["stages"]] for name in MADE}
    assert stages["int8"] == ["trained", "loaded", "converted", "quantized"]
    assert stages["clustered-int8"] == ["trained", "loaded", "clustered", "quantized"]
    assert stages["sparse-float32"][-1] == "encoded"
    assert stages["int8-qat"] == ["trained", "fine-tuned", "loaded", "quantized"]
    assert stages["clustered-int8-qat"] == ["trained", "fine-tuned", "clustered", "quantized"]
    for name in MADE:
        assert made[name]["ledger"]["pruned"] == pruned
        assert made[name]["ledger"]["first_loss"] is None
        assert all(line["zeros"] >= pruned for line in made[name]["ledger"]["stages"])
        assert made[name]["weights"]["weights"] - made[name]["weights"]["nonzero"] >= pruned
    assert made["dense-float32"]["ledger"] is None


def test_the_files_are_measured_on_the_images_that_the_run_held_out_and_chosen_by_them(trained):
    path, content, printed = trained
    identity, result = (json.loads((path / name).read_text()) for name in ("config.json", "result.json"))
    assert identity["identity"]["validation"] == HELD_OUT
    made = entries(content)
    assert {made[name]["validation"]["images"] for name in MADE} == {HELD_OUT}
    assert made["dense-float32"]["validation"] is None, "it was trained on them"
    assert abs(made["float32"]["validation"]["correct"] - HELD_OUT * result["val_accuracy"]) <= 1.01
    assert made["float32"]["validation"]["loss"] == pytest.approx(result["val_loss"], rel=1e-3)
    assert max(content["calibration"]["indices"]) < 512 - HELD_OUT
    (note,) = [note for note in content["notes"] if "validation" in note]
    assert f"{HELD_OUT} validation images" in note
    assert f"int8 {made['int8']['validation']['accuracy']:.2%}" in note
    assert note in printed
    for name, clusters in TUNED.items():
        lines = RunFolder(read(path).fine_tuned(1, clusters)).metrics()
        assert all("val_accuracy" in line and "test_accuracy" not in line for line in lines), name


@pytest.mark.parametrize("variant", TUNED)
def test_fine_tuning_goes_on_from_the_run_and_computes_as_the_file_does(trained, variant):
    path, content, printed = trained
    run = read(path)
    tuned = read(run.fine_tuned(1, TUNED[variant]))
    for layer, kernel in run.kernels().items():
        np.testing.assert_array_equal(tuned.masks[layer], run.masks[layer])
        assert np.all(tuned.kernels()[layer][~run.masks[layer]] == 0)
        moved = np.linalg.norm(tuned.kernels()[layer] - kernel) / np.linalg.norm(kernel)
        assert 0 < moved < 0.2, layer
    assert entries(content)[variant]["fine_tuned"]["path"] == str(tuned.path.relative_to(path))
    # What training measured of the fake-quantized network is what the interpreter measures of the file, except for a
    # few of the 128 images that lie between two classes.
    found = entries(content)[variant]["test"]
    assert found["accuracy"] == pytest.approx(tuned.result["test_accuracy"], abs=3 / 128)
    assert found["loss"] == pytest.approx(tuned.result["test_loss"], rel=0.05)
    assert "int8-qat and clustered-int8-qat have each been trained for 1 more epoch" in printed


def test_the_codes_of_a_kernel_are_those_of_the_kernel_with_batchnorm_folded_in(trained):
    """So fake quantization may round the unfolded kernel, and BatchNorm may go on learning from its batches."""
    path, *_ = trained
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import qat

    tuned = read(read(path).fine_tuned(1))
    stored = tflite_file.kernels((path / "export/int8-qat.tflite").read_bytes(), path)
    for (layer, kernel), found in zip(tuned.kernels().items(), stored, strict=True):
        rounded = qat.fake_quantized(kernel, per_channel=layer != "classifier").numpy()
        limit = np.abs(kernel).max(axis=tuple(range(kernel.ndim - 1)) if layer != "classifier" else None)
        codes = np.rint(rounded / np.where(limit > 0, limit, 1) * 127)
        norm = tuned.weights.get(f"{layer}_bn/gamma:0", np.ones(kernel.shape[-1]))
        expected = np.moveaxis(codes * np.sign(norm), -1, 0)
        # A weight half-way between two codes may fall to either.
        assert np.mean(expected != found.dense) < 1e-3, layer
        assert np.abs(expected - found.dense).max() <= 1, layer


def test_tensorboard_holds_the_report(trained):
    path, content, _ = trained
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.data import datasets
    from cnnopt.export import page
    from cnnopt.export import tensorboard as written
    from tests.helpers import event_files

    for _ in range(2):  # the second time must replace the first
        written.save(content, path, datasets.load("synthetic", seed=0))
    assert {entry.name for entry in (path / "tb").iterdir()} == {"train", "validation", "quantize"}
    events = event_files.curves(path / "tb/quantize")
    tags = events.Tags()["tensors"]
    assert all(tag.startswith("quantize/") for tag in tags)
    assert all([event.step for event in events.Tensors(tag)] == [content["run"]["step"]] for tag in tags)
    found = {tag: event_files.points(events, tag) for tag in tags if tag.count("/") == 2}
    for name, entry in entries(content).items():
        (accuracy,), (size,), (latency,) = (
            found[f"quantize/{quantity}/{name}"].values() for quantity in ("accuracy", "bytes", "latency_ms")
        )
        assert accuracy == pytest.approx(entry["test"]["accuracy"])
        assert size == entry["shipped"]["bytes"]
        assert latency == pytest.approx(entry["latency"][0]["median_ms"])
    for tag in ("figure", "confusion", "answers"):
        assert event_files.image(events, f"quantize/{tag}").std() > 10
    assert event_files.image(events, "quantize/figure").shape == (990, 1430, 3)
    (size,) = event_files.points(event_files.curves(path / "tb/validation"), "quantize/bytes_to_ship").values()
    assert size == page.best(content)["shipped"]["bytes"]


def test_the_text_in_tensorboard_is_a_table(trained):
    _, content, _ = trained
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from tensorboard.plugin_util import markdown_to_safe_html

    from cnnopt.export import page, tensorboard

    shown = markdown_to_safe_html(tensorboard.text(content))
    assert f"<strong>{page.headline(content)}</strong>" in shown
    assert shown.count("<tr>") == 1 + len(content["files"])
    assert shown.count("<li>") == len(content["notes"])
    for name, entry in entries(content).items():
        (row,) = (row for row in shown.split("<tr>") if f">{name}</td>" in row)
        assert f"{100 * entry['test']['accuracy']:.2f}</td>" in row


def test_sample_images_have_the_answers_of_the_evaluation(trained):
    path, content, _ = trained
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.data import datasets
    from cnnopt.export import page, tensorboard

    images, entry = datasets.load("synthetic", seed=0), page.best(content)
    found = tensorboard.samples(path / entry["file"], images)
    assert len(found) == tensorboard.SAMPLES
    assert {each.label for each in found} == set(images.class_names)
    wrong = {images.test_images[w["image"]].tobytes(): w for w in entry["test"]["mistakes"]}
    for each in found:
        if (known := wrong.get(each.image.tobytes())) is not None:
            assert each.answer == images.class_names[known["predicted"]]
            assert each.probability == pytest.approx(known["probability"], abs=1e-3)


def test_batches_threads_and_sparse_encoding_change_no_result(trained):
    path, _, _ = trained
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    from cnnopt.export import interpret

    images = datasets.load("synthetic").test_images[:70]
    results = {}
    for name in MADE:
        file = path / "export" / f"{name}.tflite"
        results[name] = interpret.logits(file.read_bytes(), file, images, threads=2, batch=32)
        one = interpret.logits(file.read_bytes(), file, images[-7:], threads=1, batch=1)
        np.testing.assert_allclose(results[name][-7:], one, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(results["float32"], results["sparse-float32"], rtol=1e-4, atol=1e-4)


def test_calibration_is_a_stored_seeded_choice_of_training_images(trained):
    stored = trained[1]["calibration"]
    expected = np.sort(np.random.default_rng(0).choice(512 - HELD_OUT, 64, replace=False))
    assert (stored["split"], stored["seed"], stored["count"]) == ("train", 0, 64)
    assert stored["indices"] == expected.tolist()


def test_ratios_are_against_the_dense_baseline(trained):
    _, content, _ = trained
    dense = entries(content)["dense-float32"]
    assert content["reference"]["kind"] == "baseline"
    assert content["reference"]["raw"] == dense["size"]["raw"]
    for entry in content["files"]:
        assert entry["times_smaller"]["gzip"] == pytest.approx(dense["size"]["raw"] / entry["size"]["gzip"])


def test_packed_files_come_back_bit_for_bit_near_the_entropy(trained, tmp_path):
    path, content, _ = trained
    for name in ("int8", "clustered-int8", *TUNED):
        entry = entries(content)[name]
        packed = entry["packed"]
        assert packed["bytes"] == (path / packed["file"]).stat().st_size <= 1.1 * entry["size"]["entropy_bound"]
        assert packed["over_weights_entropy"] <= 0.1
        assert main(["unpack", str(path / packed["file"]), "--output-dir", str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.tflite").read_bytes() == (path / entry["file"]).read_bytes()
    assert not (path / "export/float32.tflite.packed.zip").exists(), "the archive of an earlier file was left"


def test_pack_and_unpack_on_the_command_line(trained, tmp_path):
    path, *_ = trained
    file = shutil.copy(path / "export" / "int8.tflite", tmp_path)
    done = quantize("pack", file)
    assert done.returncode == 0, done.stderr
    whole = (tmp_path / "int8.tflite").read_bytes()
    (tmp_path / "int8.tflite").unlink()
    assert main(["unpack", f"{file}.packed.zip"]) == 0
    assert (tmp_path / "int8.tflite").read_bytes() == whole
    (tmp_path / "taken/int8.tflite").mkdir(parents=True)
    assert main(["unpack", f"{file}.packed.zip", "--output-dir", str(tmp_path / "taken")]) == 2


def test_terminal_and_markdown_hold_the_figures(trained):
    path, content, printed = trained
    text = (path / "report.md").read_text()
    assert text == render.markdown(content)
    rows = {line.split()[0]: line.split() for line in printed.split("sizes in KiB")[1].splitlines() if "x " in line}
    html = (path / "report.html").read_text()
    for entry in content["files"]:
        forms = [entry["size"]["gzip"], *([entry["packed"]["bytes"]] if entry["packed"] else [])]
        ratio = content["reference"]["raw"] / min(forms)
        # One figure, whoever says it.
        assert entry["shipped"]["times_smaller"] == pytest.approx(ratio)
        assert f"{ratio:.2f}x" in rows[entry["name"]]
        assert f"| {ratio:.2f}x |" in text
        assert f">{ratio:.2f}x</td>" in html
        assert f"{100 * entry['test']['accuracy']:.2f}" in text
    for note in content["notes"]:
        assert note in text
        assert note in printed
    assert "XNNPACK does not run sparse-dynamic" in text
    assert all(len(line) <= 80 for line in printed.splitlines() if "\u2500" in line)
    assert (path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_report_has_the_keys_of_its_schema_in_their_order(trained):
    """As in ``report_keys.txt``, "*" is a layer or a package."""
    seen = {}

    def note(value, path=""):
        if isinstance(value, dict):
            for key, inner in value.items():
                place = f"{path}/{'*' if path.endswith(('/layers', '/packages')) else key}"
                seen.setdefault(place)
                note(inner, place)
        elif isinstance(value, list):
            for item in value:
                note(item, path)

    note(trained[1])
    assert list(seen) == Path(__file__).with_name("report_keys.txt").read_text().split()


def test_documented_keys_are_those_of_the_report(trained):
    text = (ROOT / "docs" / "quantize.md").read_text()

    def keys(value):
        if isinstance(value, dict):
            for key, inner in value.items():
                # Layers and packages are named by their own names, not by the schema.
                yield from [key, *(keys(inner) if key not in ("layers", "packages") else [])]
        elif isinstance(value, list):
            for item in value:
                yield from keys(item)

    assert not {key for key in keys(trained[1]) if f"`{key}`" not in text}


# -------------------------------------------------------------------------------------------- what it refuses


@pytest.fixture
def no_tensorflow(monkeypatch):
    """Any import of TensorFlow fails: a mistake of the user must be answered before it."""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setitem(sys.modules, "tf_keras", None)


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("cnnopt.quantize: ")
    return captured.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--variants", "int7"], ["--variants int7", "clustered-int8"]),
        (["--variants", "clustered-int8"], ["--clusters"]),
        (["--variants", "int8", "--clusters", "16"], ["--clusters 16 is for clustered-int8", "leave --clusters out"]),
        (["--clusters", "1"], ["--clusters 1", "4 to 256"]),
        (["--calibration", "3"], ["--calibration 3", "at least 32"]),
        (["--calibration", "4000", "--qat", "1"], ["--calibration 4000", "512"]),  # before it fine-tunes
        (["--calibration", "many"], ["--calibration", "many"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--data-dir", "/nowhere"], ["--data-dir /nowhere"]),
        (["--baseline", "/nowhere"], ["/nowhere", "no such run"]),
        (["--qat", "0"], ["--qat 0", "1 epoch"]),
        (["--qat", "2", "--variants", "int8"], ["--qat 2 is for int8-qat and", "leave --qat out"]),
        (["--variants", "int8-qat"], ["--variants int8-qat: give --qat N too"]),
        (["--variants", "clustered-int8-qat", "--qat", "2"], ["--variants clustered-int8-qat: give --clusters N too"]),
        (["--clusterz", "16"], ["unrecognized argument --clusterz: did you mean --clusters?"]),
    ],
    ids=str,
)
def test_wrong_flags(no_tensorflow, tmp_path, capsys, flags, words):
    line = refused(capsys, make_run(tmp_path / "r"), *flags)
    assert all(word in line for word in words)


def test_a_copy_with_fewer_images_than_are_asked_for(no_tensorflow, tmp_path, capsys):
    small_copy(BINARY_10).folder(tmp_path)
    line = refused(capsys, make_run(tmp_path / "r", dataset="cifar10"), "--data-dir", tmp_path, "--calibration", "32")
    assert "--calibration 32: cifar10 has 20 training images" in line


def test_a_run_of_an_earlier_version_is_read_and_fine_tuned(tmp_path):
    path = make_run(tmp_path / "t")
    stored = json.loads((path / "config.json").read_text())
    whole = dict(stored["identity"])
    del stored["identity"]["wire_dtype"]
    (path / "config.json").write_text(json.dumps(stored))
    assert read(path).identity == whole  # config.json is of an earlier version, the checkpoint of this one
    found = checkpoint.load(path / "checkpoints" / f"step-{STEP:08d}")
    checkpoint.save(path / "checkpoints", STEP, found.arrays, {"identity": stored["identity"]})
    assert read(path).identity == whole  # both are
    (path / "config.json").write_text(json.dumps({"identity": whole}))
    assert read(path).identity == whole  # the checkpoint alone is
    assert settings_of(read(path), 1, 0).wire_dtype == "float32"


def test_a_run_of_a_later_version_is_not_fine_tuned(tmp_path):
    path = make_run(tmp_path / "t")
    stored = json.loads((path / "config.json").read_text())
    stored["identity"]["later"] = 3
    (path / "config.json").write_text(json.dumps(stored))
    found = checkpoint.load(path / "checkpoints" / f"step-{STEP:08d}")
    checkpoint.save(path / "checkpoints", STEP, found.arrays, {"identity": stored["identity"]})
    with pytest.raises(TrainedError, match=r"config\.json is of another version of cnnopt .*later"):
        settings_of(read(path), 1, 0)


def test_kernels_that_are_zero_as_a_whole_are_measured_and_packed(tmp_path):
    path = make_run(tmp_path / "t", sparsity=0.999999)
    assert read(path).sparsity == 1
    # Clustered, they would be to the byte the int8 file.
    done = quantize(path, "--variants", "dynamic,int8", "--calibration", 32, "--pack")
    assert done.returncode == 0, done.stderr
    for entry in json.loads((path / "report.json").read_text())["files"]:
        assert entry["weights"]["nonzero"] == 0
        if entry["name"] != "float32":
            assert entry["packed"]["over_weights_entropy"] is None
            assert entry["packed"]["bytes"] < entry["size"]["raw"]


def test_fine_tuning_sends_float32_whatever_the_run_sent(tmp_path):
    run = read(make_run(tmp_path / "r", wire_dtype="bfloat16"))
    assert (run.identity["wire_dtype"], settings_of(run, 1, 0).wire_dtype) == ("bfloat16", "float32")


def test_no_run_and_no_arguments(no_tensorflow, tmp_path, capsys):
    assert "no such run folder" in refused(capsys, tmp_path / "none")
    assert "config.json" in refused(capsys, tmp_path)
    assert "File name too long; name a run folder" in refused(capsys, "x" * 300)
    assert "RUN" in refused(capsys)


def test_a_run_that_never_finished(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r")
    (run / "result.json").unlink()
    assert "never finished" in refused(capsys, run)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "[" * 100_000, '{"identity": {"depth": 20}}'], ids=repr)
def test_damaged_config_and_result(no_tensorflow, tmp_path, capsys, content):
    for name in ("config.json", "result.json"):
        run = make_run(tmp_path / name)
        (run / name).write_text(content)
        assert str(run) in refused(capsys, run)


def test_no_checkpoint_or_a_damaged_one(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r")
    arrays = run / "checkpoints" / f"step-{STEP:08d}" / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-100])
    line = refused(capsys, run)
    assert "no checkpoint to export" in line
    assert "SHA-256" in line
    shutil.rmtree(run / "checkpoints")
    assert "checkpoints: no checkpoint to export; restore one" in refused(capsys, run)


def test_an_earlier_checkpoint_is_not_taken_for_the_last(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r")
    (run / "result.json").write_text(json.dumps({"step": STEP + 1}))
    line = refused(capsys, run)
    assert f"step {STEP}," in line
    assert f"step {STEP + 1}" in line


def test_a_checkpoint_of_another_model(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "a")
    other = make_run(tmp_path / "b", seed=1)
    shutil.copytree(other / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    assert "another model (seed 1" in refused(capsys, run)
    for name, value in (
        ("stem/kernel:0", np.ones((1, 1))),
        ("classifier/bias:0", None),
        ("stem_bn/gamma:0", np.ones(3)),
    ):
        run = forge(make_run(tmp_path / name.replace("/", "-")), **{name: value})
        assert "another model" in refused(capsys, run)
    run = forge(make_run(tmp_path / "nan"), **{"classifier/bias:0": np.full(10, np.nan, np.float32)})
    assert "not finite" in refused(capsys, run)


def test_a_baseline_that_cannot_be_compared(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r")
    assert "name a dense run" in refused(capsys, run, "--baseline", make_run(tmp_path / "sparse"))
    config = json.loads((run / "config.json").read_text())
    config["identity"]["dataset"] = "digits"
    other = make_run(tmp_path / "other")
    found = checkpoint.load(other / "checkpoints" / f"step-{STEP:08d}")
    (other / "config.json").write_text(json.dumps(config))
    checkpoint.save(other / "checkpoints", STEP, found.arrays, {"identity": config["identity"]})
    assert "dataset is digits" in refused(capsys, run, "--baseline", other)
    dense = make_run(tmp_path / "dense", sparsity=0.0)
    assert "its weights are those of" in refused(capsys, dense, "--baseline", dense)


def test_nowhere_to_write(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r")
    (run / "export").write_text("a file")
    assert "cannot write there" in refused(capsys, run)


def test_sparse_variants_of_a_dense_run(no_tensorflow, tmp_path, capsys):
    run = make_run(tmp_path / "r", sparsity=0.0)
    assert "0% of the weights" in refused(capsys, run, "--variants", "sparse-float32")
    options = parse_args([str(run)])
    assert choose(options, 0.0) == ("float32", "float16", "dynamic", "int8")
    assert choose(options, 0.6) == tuple(name for name in VARIANTS if name not in NEEDS)
    both = parse_args([str(run), "--clusters", "16", "--qat", "2"])
    assert choose(both, 0.6) == tuple(VARIANTS)
    assert both.fine_tunings() == TUNED
    assert parse_args([str(run), "--qat", "2"]).fine_tunings() == {"int8-qat": 0}
    with pytest.raises(OptionError):
        choose(parse_args([str(run), "--variants", "sparse-int8"]), 0.1)


def test_without_the_flag_few_images_are_all_for_calibration(tmp_path):
    options = parse_args([str(tmp_path)])
    assert [options.calibration_of("cifar10", images) for images in (50_000, 500, 412)] == [500, 500, 412]


def test_two_at_once_are_refused_for_one_run(tmp_path, capsys):
    run = make_run(tmp_path / "r")
    with filelock.FileLock(run / ".quantize.lock"):
        line = refused(capsys, run)
    assert "another cnnopt.quantize works on this run; wait for its end" in line


def test_an_interrupted_second_time_leaves_the_files_and_the_report_of_the_first(tmp_path):
    run = make_run(tmp_path / "r")
    done = quantize(run, "--variants", "int8", "--pack")
    assert done.returncode == 0, done.stderr
    kept = {path: path.read_bytes() for path in [*run.glob("export/*"), *run.glob("report.*")]}
    assert len(kept) == 8
    command = [sys.executable, "-m", "cnnopt.quantize", str(run), "--variants", "int8", "--calibration", "64"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert any("latency" in line for line in job.stdout)
            job.send_signal(signal.SIGINT)
            assert job.wait(300) == 130
        finally:
            job.kill()
    assert {path: path.read_bytes() for path in [*run.glob("export/*"), *run.glob("report.*")]} == kept
    assert not (run / "export/.new").exists()


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_signal_reaches_the_fine_tuning_and_its_status_is_handed_on(number, status, tmp_path):
    path = make_run(tmp_path / "r")
    command = [sys.executable, "-m", "cnnopt.quantize", str(path), "--qat", "50", "--variants", "int8-qat"]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as job:
        try:
            assert any("epoch " in line for line in job.stdout)
            job.send_signal(number)
            output = job.stdout.read()
            assert job.wait(300) == status, output
        finally:
            job.kill()
    assert not (path / "report.json").exists()
    assert checkpoint.list_steps(read(path).fine_tuned(50) / "checkpoints")
    assert "stopped by a signal, and saved" in output


@pytest.fixture
def second_rank(monkeypatch) -> Iterator[None]:
    """Of a launcher that is there."""
    with Rendezvous("127.0.0.1") as server:
        for name, value in {**server.variables(), **rank_variables(1, 2)}.items():
            monkeypatch.setenv(name, value)
        yield
        server.shutdown()


def test_only_the_first_rank_quantizes(no_tensorflow, tmp_path, second_rank, capsys):
    run = make_run(tmp_path / "r")
    assert main([str(run)]) == 0
    assert not (run / "export").exists()
    # Not in silence: the first may be none of those that someone looks at.
    assert "rank 0 of this job writes the report" in capsys.readouterr().out


@pytest.mark.parametrize("variables", [{"HOROVOD_RANK": "", "HOROVOD_SIZE": ""},
                                       {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2"},
                                       rank_variables(1, 2), {"RANK": "1", "WORLD_SIZE": "2"},
                                       {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}])  # fmt: skip
def test_what_another_job_has_left_does_not_keep_it_from_quantizing(
    no_tensorflow, tmp_path, monkeypatch, capsys, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "runs/none" in refused(capsys, tmp_path / "runs/none")


def test_pack_and_unpack_refuse_other_files(tmp_path, capsys):
    file = tmp_path / "x.tflite"
    file.write_bytes(b"garbage garbage")
    assert "not a .tflite file" in refused(capsys, "pack", file)
    assert "not an archive" in refused(capsys, "unpack", file)
    assert "No such file" in refused(capsys, "unpack", tmp_path / "none")
    assert "No such file" in refused(capsys, "pack", tmp_path / "none" / "x.tflite")
    assert not (tmp_path / "none").exists()
    file.write_bytes(b"\x1c\0\0\0TFL3" + bytes(range(200)))
    assert "damaged .tflite file" in refused(capsys, "pack", file)
    other = tmp_path / "other" / file.name
    assert "x.tflite is named twice" in refused(capsys, "pack", file, other, "--output-dir", tmp_path)


def test_a_mistake_is_said_by_one_rank(second_rank, monkeypatch, capsys):
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("HOROVOD_RANK", rank)
        assert main(["runs/none", "--wrong"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_zeros_lost_in_training_are_named(tmp_path):
    """A checkpoint whose masks and weights disagree: the ledger must say 'trained', not blame the converter."""
    from cnnopt.export import measure

    run = read(make_run(tmp_path / "r"))
    kernels = run.kernels()
    kernels["stem"] = np.where(kernels["stem"] == 0, np.float32(1e-9), kernels["stem"])
    found = measure.ledger({"trained": kernels, "loaded": kernels}, run.masks)
    assert found["first_loss"] == "trained"
    assert found["stages"][0]["lost"] == int(np.sum(~run.masks["stem"]))


@pytest.mark.parametrize(("batch", "optimizer"), [(64, "muon"), (512, "muon"), (512, "sgd"), (512, "adam")])
def test_fine_tuning_starts_at_one_percent_of_the_rate_of_training(tmp_path, batch, optimizer):
    run = read(make_run(tmp_path / "r", batch_size=batch, optimizer=optimizer))
    tuned = settings_of(run, 1, 0)
    assert tuned.optimizer == optimizer.replace("muon", "sgd")
    assert tuned.peak_rate() == pytest.approx(0.01 * TrainConfig(**run.identity).peak_rate())
