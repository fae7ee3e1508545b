"""The float32 network of a run in other formats, each measured by its own runtime. Import after ``host.prepare``.

    saved_model/         loads with TensorFlow alone
    model.keras          loads with TensorFlow and tf_keras: the layers are Keras' own
    model.onnx           BatchNorm is folded into the convolutions
    model.safetensors    weights by name, and for each pruned kernel a mask, bool, True where a weight is kept

Model hubs look for these names. All take raw pixels 0..255, float32 [n, 32, 32, 3], and give logits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras as keras
from tf_keras import layers

from cnnopt.data.datasets import Dataset
from cnnopt.distributed import host
from cnnopt.export import convert, measure, tflite_file
from cnnopt.export.shipped import shipped
from cnnopt.export.trained import TrainedRun
from cnnopt.model.resnet import Parts
from cnnopt.run.atomic_files import WriteError

#: The largest difference to the logits of the network in TensorFlow, as a share of the largest of these logits.
TOLERANCE = 1e-4
BATCH = 200

#: Pixels float32 [n, 32, 32, 3] to logits.
Network = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """``save(run, path)`` writes ``file``. ``load(path, run, threads)`` reads it. ``packages`` make the runtime."""

    file: str
    save: Callable[[TrainedRun, Path], None]
    load: Callable[[Path, TrainedRun, int], Network]
    packages: tuple[str, ...]


@contextlib.contextmanager
def _in_ascii(folder: Path) -> Iterator[Path]:
    """A link to ``folder``. A folder may have any name, but TensorFlow, Keras and ONNX take all paths for UTF-8."""
    with tempfile.TemporaryDirectory() as place:
        link = Path(place, "folder")
        link.symlink_to(folder.absolute())
        yield link


def write(name: str, run: TrainedRun, folder: Path) -> Path:
    """Write format ``name`` into ``folder``, whole or not at all; returns its path. Raises WriteError."""
    target = folder / FORMATS[name].file
    try:
        with _in_ascii(folder) as link:
            # Keras chooses the format by the end of the name.
            temporary = link / f".{os.getpid()}.{target.name}"
            try:
                FORMATS[name].save(run, temporary)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
    except (OSError, tf.errors.OpError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())[:160]
        raise WriteError(f"{target}: cannot be written ({why}); free some space or check the folder") from None
    return target


def content_of(path: Path) -> bytes:
    """The bytes of a file, or of all files in a folder one after the other, in the order of their paths."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return b"".join(file.read_bytes() for file in files)


def measured(
    name: str,
    path: Path,
    run: TrainedRun,
    images: Dataset,
    expected: np.ndarray,
    reference: dict[str, int],
    threads: int,
) -> dict[str, Any]:
    """The entry of a written format in report.json (docs/quantize.md, "report.json").

    ``expected``: logits of the network in TensorFlow for the test images. ``reference``: sizes of the reference file.
    Raises ConversionError if the format gives other logits.
    """
    known = FORMATS[name]
    content = content_of(path)
    with _in_ascii(path.parent) as link:
        network = known.load(link / path.name, run, threads)
    pixels = images.test_images
    logits = np.concatenate([network(pixels[i : i + BATCH].astype(np.float32)) for i in range(0, len(pixels), BATCH)])
    difference = float(np.abs(logits - expected).max())
    if not difference <= TOLERANCE * max(1, np.abs(expected).max()):
        raise convert.ConversionError(f"{path}: its logits differ by {difference:.2g} from the network's; report this")
    size = measure.compressed(content)
    entry: dict[str, Any] = {
        "name": name,
        "file": f"export/{path.name}",
        "sha256": tflite_file.digest(content),
        "runtime": ", ".join(f"{package} {version}" for package, version in host.versions(known.packages).items()),
        "size": size,
        "times_smaller": measure.ratios(size, reference),
        "largest_difference": difference,
        "test": measure.accuracy(logits, images.test_labels, expected),
    }
    return {**entry, "shipped": dataclasses.asdict(shipped(entry))}


# SavedModel and Keras ---------------------------------------------------------------------------------------------


def standard_parts() -> Parts:
    """Parts for ``cnnopt.model.resnet.resnet`` that are layers of Keras itself and compute the same."""

    def standardize(mean: np.ndarray, std: np.ndarray, name: str) -> layers.Layer:
        # Keras takes the root of the variance, and the root of a rounded square is exact in IEEE 754.
        every_axis = tuple(range(1, 4)) if mean.ndim == 3 else -1
        return layers.Normalization(every_axis, mean=mean.tolist(), variance=np.square(std).tolist(), name=name)

    def convolution(*args: Any, widen: bool, **kwargs: Any) -> layers.Layer:
        return layers.Conv2D(*args, **kwargs)

    def shortcut(name: str) -> Callable[[tf.Tensor], tf.Tensor]:
        def call(x: tf.Tensor) -> tf.Tensor:
            half = x.shape[-1] // 2
            every_other = layers.AveragePooling2D(1, 2, name=f"{name}_half")(x)
            # "channels_first" makes this layer pad the last axis, which holds the channels here.
            return layers.ZeroPadding2D(((0, 0), (half, half)), "channels_first", name=name)(every_other)

        return call

    return Parts(standardize=standardize, convolution=convolution, shortcut=shortcut)


def _save_keras(run: TrainedRun, path: Path) -> None:
    convert.network(run, standard_parts()).save(path)


def _load_keras(path: Path, run: TrainedRun, threads: int) -> Network:
    return keras.models.load_model(path, compile=False).predict_on_batch


def _save_saved_model(run: TrainedRun, path: Path) -> None:
    model = convert.network(run, standard_parts())
    module = tf.Module()
    module.variables_of_network = model.weights
    signature = [tf.TensorSpec([None, 32, 32, 3], tf.float32, name="pixels")]
    module.serve = tf.function(lambda pixels: {"logits": model(pixels, training=False)}, input_signature=signature)
    tf.saved_model.save(module, os.fspath(path), signatures=module.serve)


def _load_saved_model(path: Path, run: TrainedRun, threads: int) -> Network:
    loaded = tf.saved_model.load(os.fspath(path))
    return lambda pixels: loaded.signatures["serving_default"](pixels=tf.constant(pixels))["logits"].numpy()


# ONNX and safetensors ---------------------------------------------------------------------------------------------


def _save_onnx(run: TrainedRun, path: Path) -> None:
    from cnnopt.export import onnx_graph

    path.write_bytes(onnx_graph.graph(run.weights, run.depth).SerializeToString())


def _load_onnx(path: Path, run: TrainedRun, threads: int) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run(None, {"pixels": pixels})[0]


def _save_safetensors(run: TrainedRun, path: Path) -> None:
    import safetensors.numpy

    arrays = {name.removesuffix(":0"): value for name, value in run.weights.items()}
    arrays |= {f"{layer}/mask": mask for layer, mask in run.masks.items()}
    about = {"depth": run.depth, "dataset": run.identity["dataset"], "layout": "Keras: [h, w, in, out]"}
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    contiguous = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    path.write_bytes(safetensors.numpy.save(contiguous, metadata))


def _load_safetensors(path: Path, run: TrainedRun, threads: int) -> Network:
    import safetensors.numpy

    arrays = safetensors.numpy.load(path.read_bytes())
    weights = {f"{name}:0": value for name, value in arrays.items() if not name.endswith("/mask")}
    return convert.float_model(dataclasses.replace(run, weights=weights)).predict_on_batch


FORMATS = {
    "saved-model": Format("saved_model", _save_saved_model, _load_saved_model, ("tensorflow",)),
    "keras": Format("model.keras", _save_keras, _load_keras, ("tf-keras",)),
    "onnx": Format("model.onnx", _save_onnx, _load_onnx, ("onnxruntime",)),
    "safetensors": Format("model.safetensors", _save_safetensors, _load_safetensors, ("safetensors", "tensorflow")),
}
