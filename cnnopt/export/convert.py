"""Converts the float network to the .tflite bytes of each variant. Import after ``host.prepare``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from cnnopt.distributed.host import quiet_stderr
from cnnopt.errors import RunError
from cnnopt.export import clustering, qat, tflite_file
from cnnopt.export.trained import CENTROIDS, TrainedError, TrainedRun
from cnnopt.model.resnet import FLOAT, Parts, resnet
from cnnopt.model.topology import layer_names

#: In dynamic-range files the converter leaves a kernel with fewer weights in float32.
DYNAMIC_MINIMUM = 1024


class ConversionError(RunError):
    """The converter failed, or the content of its file does not match the file's name."""


def float_model(run: TrainedRun) -> keras.Model:
    """The network of ``run`` in float32 with its last weights. Input: raw pixels [batch, 32, 32, 3]; output: logits."""
    return network(run, FLOAT)


def fine_tuned_model(run: TrainedRun) -> keras.Model:
    """The fake-quantized network of a run of ``cnnopt.finetune``, with its ranges and the weights that it used."""
    model = network(run, qat.parts())
    for layer in layer_names(run.depth):
        centroids = run.weights.get(f"{layer}/{CENTROIDS}")
        if centroids is not None:
            part = model.get_layer(layer)
            part.kernel.assign(clustering.assign(part.kernel.numpy(), centroids, per_channel=part.per_channel))
    return model


def network(run: TrainedRun, parts: Parts) -> keras.Model:
    """The network of ``run``, made of ``parts``, with its last weights. Raises TrainedError."""
    # The exported network must not depend on whether this machine has a GPU.
    tf.config.set_visible_devices([], "GPU")
    mean, std = run.weights["mean:0"], run.weights["std:0"]
    model = resnet(run.depth, run.num_classes, mean=mean, std=std, parts=parts)
    for variable in model.weights:
        if variable.name not in run.weights:
            raise TrainedError(f"{run.checkpoint} has no {variable.name}: restore it from a copy, or train again")
        variable.assign(run.weights[variable.name])
    return model


def clustered_model(run: TrainedRun, clusters: int) -> keras.Model:
    """``float_model`` with at most ``clusters`` distinct values a kernel (``cnnopt.export.clustering``)."""
    model = float_model(run)
    for layer in layer_names(run.depth):
        kernel = model.get_layer(layer).kernel
        kernel.assign(clustering.cluster(kernel.numpy(), clusters, qat.gain(model, layer)))
    return model


def kernels_of(model: keras.Model, depth: int) -> dict[str, np.ndarray]:
    """The prunable kernels by layer name, read from ``model`` itself."""
    return {layer: model.get_layer(layer).kernel.numpy() for layer in layer_names(depth)}


def convert(model: keras.Model, variant: str, calibration: np.ndarray) -> bytes:
    """The .tflite of ``variant``, a key of ``cnnopt.export.options.VARIANTS``: input [1, 32, 32, 3], output logits.

    ``calibration``, uint8 [n, 32, 32, 3], sets the activation ranges of the int8 variants. The input and the output
    are int8 for int8 files, and float32 for all others. Raises ConversionError.
    """
    encoding, _, numbers = variant.rpartition("-")
    optimizations = []
    if encoding == "sparse":
        optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    if numbers != "float32":
        optimizations.append(tf.lite.Optimize.DEFAULT)
    converter = _converter(model)
    converter.optimizations = optimizations
    if numbers == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if numbers == "int8":

        def representative() -> Iterator[list[np.ndarray]]:
            for i in range(len(calibration)):
                yield [calibration[i : i + 1].astype(np.float32)]

        converter.representative_dataset = representative
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if numbers in ("int8", "qat"):
        # A fake-quantized network already holds its ranges, and needs no calibration.
        converter.inference_input_type = converter.inference_output_type = tf.int8
    try:
        with quiet_stderr():
            return converter.convert()
    # The converter raises ConverterError, RuntimeError or ValueError, depending on the pass that fails.
    except Exception as error:
        detail = " ".join(str(error).split())[:200]
        raise ConversionError(f"{variant}: TensorFlow's converter failed: {detail}") from error


def _converter(model: keras.Model) -> tf.lite.TFLiteConverter:
    function = tf.function(
        lambda pixels: model(pixels, training=False), input_signature=[tf.TensorSpec([1, 32, 32, 3], tf.float32)]
    )
    return tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], model)


def file_kernels(
    data: bytes, path: Path, variant: str, layers: Mapping[str, np.ndarray]
) -> dict[str, tflite_file.Kernel]:
    """The kernels of an exported file by layer name. Raises ConversionError if the file does not match ``variant``.

    The original study measured a "quantized" file that was float32 inside. This check would have stopped that.
    """
    found = tflite_file.kernels(data, path)
    shapes = [kernel.weights.shape for kernel in found]
    if shapes != [kernel.shape for kernel in layers.values()]:
        raise ConversionError(f"{path}: holds kernels of shapes {shapes}, not those of the network; report this")
    encoding, _, numbers = variant.rpartition("-")
    for layer, kernel in zip(layers, found, strict=True):
        wanted = {"float32": "float32", "float16": "float16"}.get(numbers, "int8")
        if numbers == "dynamic" and kernel.dense.size < DYNAMIC_MINIMUM:
            wanted = "float32"
        if kernel.dense.dtype != np.dtype(wanted):
            raise ConversionError(f"{path}: {layer} is stored as {kernel.dense.dtype}, {variant} must be {wanted}")
    if encoding == "sparse" and not any(kernel.sparse for kernel in found):
        raise ConversionError(f"{path}: the converter has stored no kernel sparsely; leave out --variants {variant}")
    return dict(zip(layers, found, strict=True))
