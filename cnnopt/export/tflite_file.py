"""Read the bytes of a .tflite file: the kernels that it stores, their type and place, and which weights are zero."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnnopt.errors import UserError

IDENTIFIER = b"TFL3"
#: The operators that network.js knows, each with the schema's table of its options.
OPERATORS = {
    "CONV_2D": "Conv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "AVERAGE_POOL_2D": "Pool2DOptions",
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "MEAN": None,
    "PAD": None,
}


class TfliteError(UserError):
    """A file that is not a usable .tflite. The message is one line: the file's name, the damage and the remedy."""


@dataclass(frozen=True, eq=False)
class Kernel:
    """The constant filter of one convolution or dense layer.

    ``stored``: 1-D, the values in the file (only the kept ones if the kernel is sparse-encoded).
    ``dense``: all values, in the file's layout [out, h, w, in] or [out, in], without applying ``scale``.
    ``scale``: float32 [out] or [1] for int8, empty otherwise. ``offset``, ``nbytes``: the kernel's place in the file.
    """

    name: str
    operator: str
    stored: np.ndarray
    dense: np.ndarray
    scale: np.ndarray
    sparse: bool
    offset: int
    nbytes: int

    @property
    def weights(self) -> np.ndarray:
        """The values that the interpreter computes with: float32 [h, w, in, out] or [in, out], the layout of Keras."""
        values = self.dense.astype(np.float32)
        if self.scale.size:
            values = values * self.scale.reshape(-1, *[1] * (values.ndim - 1))
        return np.moveaxis(values, 0, -1)

    @property
    def nonzero(self) -> int:
        """The number of weights that are not zero."""
        return int(np.count_nonzero(self.dense))


def read(path: Path) -> bytes:
    """The bytes of a .tflite file. Raises TfliteError if it cannot be opened or does not begin as a .tflite file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TfliteError(f"{path}: {error.strerror}; name a .tflite file") from None
    if data[4:8] != IDENTIFIER:
        raise TfliteError(f"{path} is not a .tflite file (no {IDENTIFIER.decode()} mark); export it again")
    return data


def digest(data: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def kernels(data: bytes, path: Path) -> list[Kernel]:
    """The filters of all CONV_2D and FULLY_CONNECTED operators, in the order of computation.

    If an operator unpacks or widens a filter at run time (DENSIFY, DEQUANTIZE), the filter is the stored one.
    Raises TfliteError, which names ``path``, if the file is damaged.
    """
    with _damage(path):
        return _kernels(data)


def network(data: bytes, path: Path) -> tuple[dict[str, Any], bytes]:
    """An int8 file in the form that ``network.js`` runs: a description for JSON, and the bytes of its constants.

    The description has ``input`` and ``output`` (tensor numbers), ``tensors`` (each ``shape``, ``type``, ``scale``,
    ``zero`` and, for a constant, ``at``: offset and length) and ``operators`` in the order of computation (each
    ``name``, ``inputs``, ``output``, ``relu``, and for a window ``stride`` and ``same``). Raises TfliteError, which
    names ``path``, if the file is damaged or has an operator or a type that ``network.js`` does not know.
    """
    with _damage(path):
        return _network(data)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    # Bytes from someone else can make the generated flatbuffer code raise almost any exception.
    except Exception as error:
        detail = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise TfliteError(f"{path} is a damaged .tflite file ({detail}); export it again") from error


def _kernels(data: bytes) -> list[Kernel]:
    from tensorflow.lite.python import schema_py_generated as schema

    operators = {
        schema.BuiltinOperator.CONV_2D: "CONV_2D",
        schema.BuiltinOperator.FULLY_CONNECTED: "FULLY_CONNECTED",
    }
    unpacking = {schema.BuiltinOperator.DENSIFY, schema.BuiltinOperator.DEQUANTIZE}
    model = schema.Model.GetRootAs(data)
    graph = model.Subgraphs(0)
    found: list[tuple[str, int]] = []
    made_from: dict[int, int] = {}
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        # Files before schema version 3a keep the code in the old one-byte field.
        builtin = max(code.BuiltinCode(), code.DeprecatedBuiltinCode())
        if builtin in unpacking:
            made_from[operator.Outputs(0)] = operator.Inputs(0)
        elif builtin in operators:
            found.append((operators[builtin], operator.Inputs(1)))
    result = []
    for operator, index in found:
        while index in made_from:
            index = made_from[index]
        result.append(_kernel(operator, graph.Tensors(index), model, data, schema))
    return result


def _network(data: bytes) -> tuple[dict[str, Any], bytes]:
    from tensorflow.lite.python import schema_py_generated as schema

    names = {getattr(schema.BuiltinOperator, name): name for name in OPERATORS}
    types = {schema.TensorType.INT8: "int8", schema.TensorType.INT32: "int32"}
    activations = {schema.ActivationFunctionType.NONE: False, schema.ActivationFunctionType.RELU: True}
    model = schema.Model.GetRootAs(data)
    graph = model.Subgraphs(0)
    constants = bytearray()
    tensors, operators = [], []
    for i in range(graph.TensorsLength()):
        tensor, quantization = graph.Tensors(i), graph.Tensors(i).Quantization()
        scaled = quantization is not None and quantization.ScaleLength()
        entry: dict[str, Any] = {
            "shape": tensor.ShapeAsNumpy().tolist() if tensor.ShapeLength() else [],
            "type": types[tensor.Type()],
            "scale": quantization.ScaleAsNumpy().tolist() if scaled else [],
            "zero": int(quantization.ZeroPoint(0)) if scaled and quantization.ZeroPointLength() else 0,
        }
        if model.Buffers(tensor.Buffer()).DataLength():
            if tensor.Sparsity() is not None:
                raise ValueError(f"{tensor.Name()} is sparse-encoded")
            content = model.Buffers(tensor.Buffer()).DataAsNumpy().tobytes()
            entry["at"] = [len(constants), len(content)]
            constants += content
        tensors.append(entry)
    for i in range(graph.OperatorsLength()):
        operator = graph.Operators(i)
        code = model.OperatorCodes(operator.OpcodeIndex())
        name = names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        entry = {"name": name, "inputs": operator.InputsAsNumpy().tolist(), "output": int(operator.Outputs(0))}
        if kind := OPERATORS[name]:
            options = getattr(schema, kind)()
            options.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
            entry["relu"] = activations[options.FusedActivationFunction()]
            if name in ("CONV_2D", "AVERAGE_POOL_2D"):
                entry["stride"] = [options.StrideH(), options.StrideW()]
                entry["same"] = options.Padding() == schema.Padding.SAME
            if name == "AVERAGE_POOL_2D" and (options.FilterHeight(), options.FilterWidth()) != (1, 1):
                raise ValueError("a window of more than one pixel is averaged")
        operators.append(entry)
    known = {"input": int(graph.Inputs(0)), "output": int(graph.Outputs(0)), "tensors": tensors, "operators": operators}
    return known, bytes(constants)


def _kernel(operator: str, tensor: Any, model: Any, data: bytes, schema: Any) -> Kernel:
    types: dict[int, np.dtype[Any]] = {
        schema.TensorType.FLOAT32: np.dtype("<f4"),
        schema.TensorType.FLOAT16: np.dtype("<f2"),
        schema.TensorType.INT8: np.dtype("i1"),
    }
    if tensor.Type() not in types:
        raise ValueError(f"{tensor.Name()} has type {tensor.Type()}, not float32, float16 or int8")
    content = model.Buffers(tensor.Buffer()).DataAsNumpy()
    stored = np.frombuffer(content, types[tensor.Type()])
    shape = tensor.ShapeAsNumpy()
    quantization = tensor.Quantization()
    scale = np.zeros(0, np.float32)
    if quantization is not None and quantization.ScaleLength():
        scale = quantization.ScaleAsNumpy()
        if quantization.ZeroPointLength() and np.any(quantization.ZeroPointAsNumpy()):
            raise ValueError(f"{tensor.Name()} has a zero point other than 0")
        if scale.size > 1 and quantization.QuantizedDimension() != 0:
            raise ValueError(f"{tensor.Name()} is not quantized along its output channels")
    sparsity = tensor.Sparsity()
    dense = stored.reshape(shape) if sparsity is None else _densify(stored, shape, sparsity, schema)
    offset = content.ctypes.data - np.frombuffer(data, np.uint8).ctypes.data
    name = tensor.Name().decode()
    return Kernel(name, operator, stored, dense, scale, sparsity is not None, offset, content.nbytes)


def _densify(stored: np.ndarray, shape: np.ndarray, sparsity: Any, schema: Any) -> np.ndarray:
    """Undo TFLite's sparse encoding. Source: FormatConverter::Populate in tensorflow/lite/kernels/internal/utils."""
    rank = len(shape)
    order = sparsity.TraversalOrderAsNumpy()
    blocks = sparsity.BlockMapAsNumpy() if sparsity.BlockMapLength() else np.zeros(0, int)
    # `paths` has one row for each path through the levels so far. `position` is the place of a path within the level.
    paths: np.ndarray = np.zeros((1, 0), np.int64)
    position: np.ndarray = np.zeros(1, np.int64)
    sizes = []
    for level in range(sparsity.DimMetadataLength()):
        meta = sparsity.DimMetadata(level)
        if meta.Format() == schema.DimensionType.DENSE:
            size = meta.DenseSize()
            repeats = np.full(len(paths), size)
            index = np.tile(np.arange(size), len(paths))
            position = np.repeat(position, size) * size + index
        else:
            size = 0
            segments = _vector(meta.ArraySegments(), meta.ArraySegmentsType(), schema)
            indices = _vector(meta.ArrayIndices(), meta.ArrayIndicesType(), schema)
            repeats = segments[position + 1] - segments[position]
            starts = np.repeat(segments[position] - np.cumsum(repeats) + repeats, repeats)
            position = starts + np.arange(repeats.sum())
            index = indices[position]
        sizes.append(size)
        paths = np.column_stack([np.repeat(paths, repeats, axis=0), index])
    coordinates = np.zeros((len(paths), rank), np.int64)
    for level, dimension in enumerate(order):
        if dimension < rank:
            coordinates[:, dimension] += paths[:, level]
        else:
            blocked = blocks[dimension - rank]
            coordinates[:, blocked] = coordinates[:, blocked] * sizes[level] + paths[:, level]
    dense = np.zeros(shape, stored.dtype)
    if len(coordinates) != len(stored):
        raise ValueError(f"sparse index of {len(coordinates)} entries for {len(stored)} values")
    dense[tuple(coordinates.T)] = stored
    return dense


def _vector(table: Any, kind: int, schema: Any) -> np.ndarray:
    names = {
        schema.SparseIndexVector.Int32Vector: "Int32Vector",
        schema.SparseIndexVector.Uint16Vector: "Uint16Vector",
        schema.SparseIndexVector.Uint8Vector: "Uint8Vector",
    }
    vector = getattr(schema, names[kind])()
    vector.Init(table.Bytes, table.Pos)
    return vector.ValuesAsNumpy().astype(np.int64)
