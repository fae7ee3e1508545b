"""Sizes, zeros, accuracy, reading and packing of .tflite files, on arrays and files with known answers."""

import gzip
import hashlib
import io
import json
import lzma
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnopt.distributed import host
from cnnopt.errors import RunError
from cnnopt.export import pack as pack_module
from cnnopt.export.clustering import assign, cluster, codebook
from cnnopt.export.explain import notes
from cnnopt.export.measure import accuracy, entropy, ledger, probabilities, ratios, sizes
from cnnopt.export.pack import PackError, pack, unpack
from cnnopt.export.shipped import Shipped, shipped
from cnnopt.export.tflite_file import Kernel, TfliteError, kernels, read


def kernel(values, *, offset=0, **changes):
    values = np.asarray(values)
    fields = {
        "name": "k", "operator": "CONV_2D", "stored": values.ravel(), "dense": values, "scale": np.zeros(0),
        "sparse": False, "offset": offset, "nbytes": values.nbytes,
    }  # fmt: skip
    return Kernel(**{**fields, **changes})


# ------------------------------------------------------------------------------------------------- size


def test_entropy_of_known_distributions():
    assert entropy(np.zeros(100, np.int8)) == 0
    assert entropy(np.arange(-128, 128).astype(np.int8)) == pytest.approx(8)
    assert entropy(np.array([0, 0, 0, 1], np.float32)) == pytest.approx(2 - 0.75 * np.log2(3))
    assert entropy(np.zeros(0, np.int8)) == 0


def test_sizes_count_each_byte_once():
    values = np.tile(np.arange(4, dtype=np.int8), 100)
    data = b"header" + values.tobytes() + b"tail"
    size = sizes(data, [kernel(values, offset=6)])
    assert size["raw"] == 410
    assert size["weights_entropy"] == 100
    assert size["entropy_bound"] == 110
    assert abs(size["gzip"] - len(gzip.compress(data, 9))) <= 1
    assert size["xz"] == len(lzma.compress(data, preset=9))


def test_kernels_that_share_their_bytes_are_subtracted_once():
    zeros = np.zeros(400, np.int8)
    data = b"header" + zeros.tobytes() + b"tail"
    assert sizes(data, 2 * [kernel(zeros, offset=6)])["entropy_bound"] == 10


def test_ratios_are_against_the_reference_as_it_is():
    size = {"raw": 50, "gzip": 25, "xz": 20, "entropy_bound": 10, "weights_entropy": 9}
    found = ratios(size, {"raw": 200, "gzip": 100})
    assert found == {"raw": 4, "gzip": 8, "xz": 10, "entropy_bound": 20, "gzip_to_gzip": 4}


def test_a_file_is_shipped_in_its_smaller_form():
    entry = {"size": {"gzip": 25}, "times_smaller": {"gzip": 8}, "packed": None}
    assert shipped(entry) == Shipped("gzip", 25, 8)
    assert shipped({**entry, "packed": {"bytes": 20, "times_smaller": 10}}) == Shipped("packed", 20, 10)
    assert shipped({**entry, "packed": {"bytes": 26, "times_smaller": 7.7}}) == Shipped("gzip", 25, 8)


# ------------------------------------------------------------------------------------------------ zeros


def test_the_ledger_names_the_first_stage_that_lost_zeros():
    before, mask = np.array([0.0, 0.0, 3.0, 4.0]), np.array([False, False, True, True])
    # Rounding has made one new zero and lost an old one: the count is as before, and something is lost.
    after = np.array([0.0, 0.5, 0.0, 4.0])
    stages = {"trained": {"a": before}, "converted": {"a": before * 2}, "quantized": {"a": after}}
    found = ledger(stages, {"a": mask})
    assert found["pruned"] == 2
    assert [(line["stage"], line["zeros"], line["lost"]) for line in found["stages"]] == [
        ("trained", 2, 0),
        ("converted", 2, 0),
        ("quantized", 2, 1),
    ]
    assert found["first_loss"] == "quantized"
    assert ledger({"trained": {"a": before + 1}}, {"a": mask})["first_loss"] == "trained"
    assert ledger({"trained": {"a": before}, "loaded": {"a": before}}, {})["first_loss"] is None


# --------------------------------------------------------------------------------------------- accuracy


def test_accuracy_loss_confusion_and_agreement():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.2, 0.2, 0.6]], np.float32))
    labels = np.array([0, 1, 1, 2])
    reference = np.eye(3)[[0, 1, 1, 0]]
    found = accuracy(logits, labels, reference)
    assert (found["correct"], found["images"], found["accuracy"]) == (3, 4, 0.75)
    assert found["loss"] == pytest.approx(-np.mean(np.log([0.5, 0.8, 0.2, 0.6])), rel=1e-6)
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found["agreement"] == 0.5
    (wrong,) = found["mistakes"]
    assert (wrong["image"], wrong["label"], wrong["predicted"]) == (2, 1, 0)
    assert wrong["probability"] == pytest.approx(0.6)


def test_the_loss_of_large_logits_is_finite():
    found = accuracy(np.array([[1e4, -1e4]], np.float32), np.array([1]), np.eye(2)[:1])
    assert found["loss"] == pytest.approx(2e4)


def test_probabilities_are_those_of_scipy():
    logits = np.random.default_rng(0).normal(0, 20, (50, 10)).astype(np.float32)
    np.testing.assert_allclose(probabilities(logits), scipy.special.softmax(logits.astype("f8"), axis=1), rtol=1e-12)


# ------------------------------------------------------------------------------------------- clustering


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), clusters=st.sampled_from([4, 8, 16]), sparsity=st.sampled_from([0.0, 0.6, 0.95]))
def test_clustering_holds_zeros_and_gives_int8_few_codes(seed, clusters, sparsity):
    rng = np.random.default_rng(seed)
    kernel = rng.normal(0, 1, (3, 3, 8, 6)).astype(np.float32) * rng.uniform(0.01, 10, 6).astype(np.float32)
    kernel[rng.random(kernel.shape) < sparsity] = 0
    kernel[..., 0] = 0
    result = cluster(kernel, clusters, rng.uniform(0.1, 3, 6))
    np.testing.assert_array_equal(result[kernel == 0], 0)
    assert result.dtype == np.float32
    # What the converter does to a kernel: a scale for each channel.
    largest = np.abs(result).reshape(-1, 6).max(axis=0)
    codes = np.rint(127 * result / np.where(largest, largest, 1))
    assert len(np.unique(codes)) <= clusters


def test_clustering_keeps_a_kernel_that_has_few_values_already():
    codes = np.random.default_rng(0).choice([-2.0, 0.0, 1.0, 2.0], (3, 3, 16, 4))
    codes[0, 0, 0] = 2.0
    kernel = codes.astype(np.float32)
    np.testing.assert_allclose(cluster(kernel, 16, np.ones(4)), kernel, rtol=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
def test_fine_tuning_computes_with_the_clusters_that_are_exported(per_channel):
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    import tensorflow as tf

    from cnnopt.export import qat

    rng = np.random.default_rng(2)
    kernel = rng.normal(0, 1, (3, 3, 16, 8)).astype(np.float32)
    kernel[rng.random(kernel.shape) < 0.6] = 0
    kernel[..., 0] = 0
    kernel[..., 1] *= 1e-7
    centroids = codebook(kernel, 16, np.ones(8), per_channel=per_channel)
    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        result = qat.clustered(variable, tf.constant(centroids), per_channel=per_channel)
        loss = tf.reduce_sum(result * 3)
    np.testing.assert_array_equal(result, assign(kernel, centroids, per_channel=per_channel))
    assert 0 < np.abs(result - kernel).max() < 0.5
    np.testing.assert_array_equal(tape.gradient(loss, variable), np.full_like(kernel, 3))
    rounded = qat.fake_quantized(result, per_channel=per_channel).numpy()
    # But for the channel whose weights are all next to nothing.
    alive = np.delete(rounded, 1, axis=-1)
    limit = np.maximum(np.abs(alive).max(axis=(0, 1, 2) if per_channel else None), 1e-6)
    assert 12 < len(np.unique(np.rint(127 * alive / limit))) <= 16


def test_more_clusters_err_less():
    kernel = np.random.default_rng(1).normal(0, 1, (3, 3, 16, 16)).astype(np.float32)
    errors = [float(np.linalg.norm(cluster(kernel, n, np.ones(16)) - kernel)) for n in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    # A uniform quantizer of 15 levels over the same range errs by step / sqrt(12) a weight.
    step = 2 * np.abs(kernel).reshape(-1, 16).max(axis=0) / 14
    assert errors[2] < np.sqrt(np.sum(step**2 / 12) * kernel.size / 16)


# ------------------------------------------------------------------------------------------------ notes


MACHINE = {"load": 0.5, "cores": 2, "int8_instructions": []}


def card(**changes):
    timing = {"median_ms": 1.0, "delegate": "XNNPACK"}
    entry = {
        "name": "int8", "size": {"raw": 1000, "gzip": 500, "entropy_bound": 450, "weights_entropy": 430},
        "weights": {"weights": 900},
        "latency": [timing], "fine_tuned": None,
        "ledger": {"pruned": 540, "first_loss": None, "stages": [{"stage": "quantized", "zeros": 540, "lost": 0}]},
    }  # fmt: skip
    content = {
        "run": {"sparsity": 0.6}, "reference": {"kind": "self"}, "machine": MACHINE,
        "files": [entry, {**entry, "name": "float32"}],
    }  # fmt: skip
    return {**content, **changes}


def test_notes_say_what_the_figures_show_and_nothing_else():
    text = "\n".join(notes(card()))
    assert "does not depend on sparsity" in text
    assert "buy no speed" in text
    assert "All 540 pruned weights are zero" in text
    assert "No --baseline" in text
    dense = "\n".join(notes(card(run={"sparsity": 0.0}, reference={"kind": "baseline"})))
    assert "sparsity" not in dense
    assert "baseline" not in dense
    assert "busy" in "\n".join(notes(card(machine={**MACHINE, "load": 9.0})))


@pytest.mark.parametrize(
    ("int8_ms", "instructions", "said", "unsaid"),
    [
        (1.0, [], "This CPU has none", "This CPU has avx"),
        (1.3, ["avx_vnni"], "This CPU has avx_vnni", "This CPU has none"),
        (1.0, None, "hardly faster than float32", "This CPU has"),
        (0.3, [], "buy no speed", "hardly faster"),
    ],
)
def test_notes_say_why_int8_is_not_faster_only_where_it_is_not(int8_ms, instructions, said, unsaid):
    content = card(machine={**MACHINE, "int8_instructions": instructions})
    content["files"][0]["latency"] = [{"median_ms": int8_ms, "delegate": "XNNPACK"}]
    text = "\n".join(notes(content))
    assert said in text
    assert unsaid not in text


def test_notes_name_the_stage_that_lost_zeros():
    content = card()
    lines = [{"stage": "converted", "zeros": 540, "lost": 0}, {"stage": "quantized", "zeros": 538, "lost": 2}]
    content["files"][0]["ledger"] = {"pruned": 540, "first_loss": "quantized", "stages": lines}
    text = "\n".join(notes(content))
    assert "int8: 2 of 540" in text
    assert "'quantized'" in text
    assert "All 540" not in text


# ------------------------------------------------------------------------------- files, and their archives


@pytest.fixture(scope="module")
def small_file():
    """An int8 .tflite of one 3x3 convolution and a dense layer, 60% of the weights zero, and its weights."""
    host.prepare({**host.TENSORFLOW, **host.QUIET})
    import tensorflow as tf

    rng = np.random.default_rng(0)
    conv = rng.normal(0, 1, (3, 3, 16, 64)).astype(np.float32)
    conv[np.abs(conv) < np.quantile(np.abs(conv), 0.6)] = 0
    dense = rng.normal(0, 1, (64, 10)).astype(np.float32)

    @tf.function(input_signature=[tf.TensorSpec([1, 8, 8, 16], tf.float32)])
    def network(x):
        return tf.matmul(tf.reduce_mean(tf.nn.conv2d(x, conv, 1, "SAME"), [1, 2]), dense)

    converter = tf.lite.TFLiteConverter.from_concrete_functions([network.get_concrete_function()])
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([rng.normal(0, 1, (1, 8, 8, 16)).astype("f4")] for _ in range(8))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter.convert(), conv, dense


def test_kernels_are_read_in_order_and_where_they_lie(small_file):
    data, conv, dense = small_file
    found = kernels(data, Path("small.tflite"))
    assert [k.operator for k in found] == ["CONV_2D", "FULLY_CONNECTED"]
    for k, exact in zip(found, (conv, dense), strict=True):
        assert data[k.offset : k.offset + k.nbytes] == k.stored.tobytes()
        assert k.stored.dtype == np.int8
        assert np.abs(k.weights - exact).max() <= np.abs(exact).max() / 127 / 2 * 1.001
        np.testing.assert_array_equal(k.weights[exact == 0], 0)
    assert found[0].nonzero <= np.count_nonzero(conv)


def test_packing_is_lossless_and_near_the_entropy(small_file):
    data, *_ = small_file
    archive = pack(data, Path("small.tflite"))
    assert unpack(archive, Path("a.zip")) == ("small.tflite", data)
    assert archive == pack(data, Path("small.tflite"))
    size = sizes(data, kernels(data, Path("small.tflite")))
    assert len(archive) <= 1.1 * size["entropy_bound"]
    with zipfile.ZipFile(io.BytesIO(archive)) as entries:
        assert entries.testzip() is None
        streams = sum(len(entries.read(name)) for name in ("mask.xz", "palette.xz", "values.xz"))
    assert streams <= 1.1 * size["weights_entropy"]


def test_a_damaged_archive_is_refused_in_one_line(small_file):
    archive = pack(small_file[0], Path("small.tflite"))
    choose = random.Random(0)
    damaged = [b"", b"garbage", archive[:-30], archive[: len(archive) // 2], small_file[0]]
    for _ in range(60):
        flipped = bytearray(archive)
        flipped[choose.randrange(len(flipped))] ^= 1 << choose.randrange(8)
        damaged.append(bytes(flipped))
    lines = []
    for content in damaged:
        try:
            _, restored = unpack(content, Path("a.zip"))
        except PackError as error:
            lines.append(str(error))
        else:  # the flip hit a date or the like, which changes nothing
            assert restored == small_file[0]
    assert len(lines) > 30
    assert all(line.startswith("a.zip is not an archive") and "\n" not in line for line in lines)


def rebuilt(archive, **changes):
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "manifest.json":
                content = json.dumps({**json.loads(content), **changes}).encode()
            new.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "changes",
    [
        {"bytes": 1 << 40},
        {"bytes": -1},
        {"bytes": 10},
        {"sha256": hashlib.sha256(b"").hexdigest()},
        {"format": "other"},
        {"kernels": [[-5, 10]]},
        {"kernels": [[0, 1 << 40]]},
        {"kernels": "all"},
    ],
    ids=str,
)
def test_a_forged_manifest_is_refused(small_file, changes):
    archive = pack(small_file[0], Path("small.tflite"))
    with pytest.raises(PackError):
        unpack(rebuilt(archive, **changes), Path("a.zip"))


def test_a_name_in_an_archive_leads_nowhere(small_file):
    archive = rebuilt(pack(small_file[0], Path("small.tflite")), name="../../etc/passwd")
    assert unpack(archive, Path("a.zip"))[0] == "passwd"
    for name in ("..", "", "a\0b", "\ud800", "x" * 300, "\x1b[2J"):
        with pytest.raises(PackError):
            unpack(rebuilt(archive, name=name), Path("a.zip"))


def test_a_damaged_tflite_file_is_refused_or_read_but_never_crashes(small_file, tmp_path):
    data, *_ = small_file
    path = tmp_path / "damaged.tflite"
    for content in (b"", b"garbage, and more of it", data[:4] + b"TFL4" + data[8:]):
        path.write_bytes(content)
        with pytest.raises(TfliteError, match=r"damaged\.tflite is not a \.tflite file"):
            read(path)
    with pytest.raises(TfliteError, match="No such file"):
        read(tmp_path / "none.tflite")
    lines = []
    for length in range(8, len(data), len(data) // 40):
        try:
            kernels(data[:length], path)
        except TfliteError as error:
            lines.append(str(error))
    assert len(lines) > 30
    assert not any("\n" in line for line in lines)


def test_an_archive_that_would_not_give_the_file_back_is_never_written(small_file, monkeypatch):
    data, *_ = small_file
    compress = pack_module._compress
    # A coder that loses a bit.
    monkeypatch.setattr(pack_module, "_compress", lambda stream: compress(stream[:-1] + bytes([stream[-1] ^ 1])))
    with pytest.raises(RunError, match=r"small\.tflite: its archive does not restore it"):
        pack(data, Path("small.tflite"))


def test_a_worker_that_ends_leaves_no_hole(small_file, tmp_path):
    from cnnopt.export import interpret

    data, *_ = small_file
    images = np.zeros((8, 8, 8, 16), np.uint8)

    def advance(count: int) -> None:
        raise OSError("nobody reads the progress")

    with pytest.raises(OSError, match="nobody reads"):
        interpret.logits(data, tmp_path, images, threads=2, batch=1, advance=advance)
    assert len(interpret.logits(data, tmp_path, images, threads=2, batch=1)) == 8


def test_the_interpreter_refuses_a_file_cut_short(small_file, tmp_path):
    from cnnopt.export import interpret

    data, *_ = small_file
    assert interpret.start(data, tmp_path, threads=1).delegate == "XNNPACK"
    with pytest.raises(TfliteError, match="cannot be run"):
        interpret.start(data[: len(data) // 2], tmp_path / "cut.tflite", threads=1)
