"""ONNX Runtime and OpenVINO for benchmarks/inference.py: quantizes the network and answers requests.

    python onnx_openvino.py FOLDER

FOLDER has float32.onnx and images.npz. Prints one line of JSON for each line of standard input.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import nncf
import numpy as np
import onnxruntime as ort
import openvino as ov
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static


def saturates() -> bool:
    """True on x86 without VNNI, where sums of two int8 products saturate at 16 bits.

    Both runtimes advise 7 bits for the weights there (reduce_range; overflow_fix), or accuracy falls.
    """
    words = set(Path("/proc/cpuinfo").read_text().split())
    return "avx2" in words and not words & {"avx512_vnni", "avx_vnni"}


class Images(CalibrationDataReader):
    """One calibration image after the other, for quantize_static."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = iter(images.astype(np.float32)[:, np.newaxis])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next one, or None."""
        image = next(self.images, None)
        return None if image is None else {"pixels": image}


def sizes(*files: Path) -> dict[str, int]:
    """Bytes of a model's files together, raw and by gzip -9."""
    content = b"".join(path.read_bytes() for path in files)
    return {"raw": len(content), "gzip": len(gzip.compress(content, 9, mtime=0))}


def build(folder: Path, calibration: np.ndarray) -> tuple[dict[str, Callable], dict[str, dict[str, int]]]:
    """For each runtime and type a function from float32 pixels [n, 32, 32, 3] to logits; and the sizes of the files."""
    calls: dict[str, Callable] = {}
    found: dict[str, dict[str, int]] = {}
    exact, prepared, int8 = (folder / f"{name}.onnx" for name in ("float32", "prepared", "int8"))
    quant_pre_process(str(exact), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared), str(int8), Images(calibration), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=saturates(),
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for kind, path in (("float32", exact), ("int8", int8)):
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        calls[f"ONNX Runtime {kind}"] = lambda pixels, s=session: s.run(None, {"pixels": pixels})[0]
        found[f"ONNX Runtime {kind}"] = sizes(path)

    core = ov.Core()
    dense = ov.convert_model(str(exact))
    dense.reshape([1, 32, 32, 3])
    # NNCF's default is the first layer alone.
    overflow = nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.FIRST_LAYER
    quantized = nncf.quantize(
        dense,
        nncf.Dataset(list(calibration.astype(np.float32)[:, np.newaxis])),
        subset_size=len(calibration),
        # For networks with activations that are not symmetric about zero, such as those of ReLU.
        preset=nncf.QuantizationPreset.MIXED,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
    )
    # float32 throughout: OpenVINO would use bfloat16 by itself on a CPU that has it.
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    for kind, model in (("float32", dense), ("int8", quantized)):
        path = folder / f"openvino-{kind}.xml"
        ov.save_model(model, path, compress_to_fp16=False)
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        calls[f"OpenVINO {kind}"] = lambda pixels, r=request: r.infer([pixels])[0]
        found[f"OpenVINO {kind}"] = sizes(path, path.with_suffix(".bin"))
    return calls, found


def logits(call: Callable, images: np.ndarray) -> np.ndarray:
    """Of all images, one after the other, as OpenVINO's network is for batch 1."""
    pixels = images.astype(np.float32)[:, np.newaxis]
    return np.concatenate([np.array(call(image)) for image in pixels])


def latency(call: Callable, seconds: float) -> list[float]:
    """Milliseconds of each call over ``seconds``, after 5 that do not count."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.float32)
    for _ in range(5):
        call(pixels)
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        begin = time.perf_counter()
        call(pixels)
        times.append(1000 * (time.perf_counter() - begin))
    return times


def main(folder: Path) -> None:
    """Build, say so, answer until the requests end."""
    images = np.load(folder / "images.npz")
    # Libraries print on standard output, which belongs to the answers.
    with contextlib.redirect_stdout(sys.stderr):
        calls, found = build(folder, images["calibration"])
    versions = {name: version(name) for name in ("onnxruntime", "openvino", "nncf")}
    print(json.dumps({"names": list(calls), "versions": versions, "sizes": found}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        call = calls[request["name"]]
        if request["do"] == "latency":
            answer: object = latency(call, request["seconds"])
        else:
            np.save(folder / "logits.npy", logits(call, images["test"]))
            answer = str(folder / "logits.npy")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
