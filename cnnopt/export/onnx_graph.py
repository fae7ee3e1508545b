"""The network of a run as ONNX. Needs ``onnx``, which is optional, and no TensorFlow.

The graph is written node by node from ``cnnopt.model.resnet``, with BatchNorm folded into the convolutions. So no
converter can change the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cnnopt.model import topology

#: BatchNorm's epsilon in ``cnnopt.model.resnet``.
EPSILON = 1e-5
#: Versions that ONNX Runtime reads since 1.17 (2024).
OPSET, IR_VERSION = 17, 9


def folded(weights: Mapping[str, np.ndarray], layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Kernel float32 [out, in, h, w] and bias float32 [out] of a convolution with its BatchNorm."""
    # Rounded once, at the end.
    kernel = weights[f"{layer}/kernel:0"].astype(np.float64)
    gamma, beta, mean, variance = (
        weights[f"{layer}_bn/{name}:0"].astype(np.float64)
        for name in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    gain = gamma / np.sqrt(variance + EPSILON)
    return (kernel * gain).transpose(3, 2, 0, 1).astype(np.float32), (beta - mean * gain).astype(np.float32)


def graph(weights: Mapping[str, np.ndarray], depth: int) -> onnx.ModelProto:
    """The network from ``pixels`` float32 [n, 32, 32, 3], 0 to 255, to ``logits`` float32 [n, classes].

    ``weights``: arrays by variable name, as in ``cnnopt.export.trained.TrainedRun``.
    """
    nodes, constants = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def add(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def convolution(x: str, layer: str, stride: int) -> str:
        kernel, bias = folded(weights, layer)
        inputs = [x, constant(f"{layer}/weight", kernel), constant(f"{layer}/bias", bias)]
        # TensorFlow's "same" pads the end only where the stride is 2 and the size is even.
        pads = [1, 1, 1, 1] if stride == 1 else [0, 0, 1, 1]
        return add("Conv", inputs, layer, kernel_shape=[3, 3], strides=[stride] * 2, pads=pads)

    def shortcut(x: str, block: topology.Block) -> str:
        name = f"{block.name}_shortcut"
        slices = {"starts": [0, 0], "ends": [32, 32], "axes": [2, 3], "steps": [2, 2]}
        inputs = [constant(f"{name}/{part}", np.array(value, np.int64)) for part, value in slices.items()]
        quarter = block.filters // 4
        pads = constant(f"{name}/pads", np.array([0, quarter, 0, 0, 0, quarter, 0, 0], np.int64))
        return add("Pad", [add("Slice", [x, *inputs], f"{name}/half"), pads], name)

    def statistic(name: str) -> str:
        # One value for all pixels [1] or for each channel [3], or a mean image [32, 32, 3].
        value = weights[f"{name}:0"]
        return constant(name, np.moveaxis(value.reshape(1, *(1,) * (3 - value.ndim), *value.shape), -1, 1))

    x = add("Transpose", ["pixels"], "nchw", perm=[0, 3, 1, 2])
    x = add("Div", [add("Sub", [x, statistic("mean")], "centred"), statistic("std")], "standardized")
    x = add("Relu", [convolution(x, "stem", 1)], "stem_relu")
    for block in topology.blocks(depth):
        y = add("Relu", [convolution(x, f"{block.name}_conv1", 2 if block.downsamples else 1)], f"{block.name}_relu1")
        y = convolution(y, f"{block.name}_conv2", 1)
        x = shortcut(x, block) if block.downsamples else x
        x = add("Relu", [add("Add", [x, y], f"{block.name}_add")], f"{block.name}_relu2")
    x = add("Flatten", [add("GlobalAveragePool", [x], "pool")], "features")
    dense = [constant(f"classifier/{part}", weights[f"classifier/{part}:0"]) for part in ("kernel", "bias")]
    add("Gemm", [x, *dense], "logits")
    ends = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 32, 32, 3]),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", len(weights["classifier/bias:0"])]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, f"resnet{depth}", ends[:1], ends[1:], constants),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="cnnopt",
    )
    onnx.checker.check_model(model, full_check=True)
    return model
