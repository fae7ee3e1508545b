"""Names, shapes and stages of weights, against the network that is built."""

import numpy as np
import pytest

from cnnopt.model import topology
from cnnopt.model.resnet import resnet


@pytest.mark.parametrize(("depth", "classes"), [(8, 10), (20, 100)])
def test_names_and_shapes_are_those_of_the_network(depth, classes):
    model = resnet(depth, classes, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32))
    shapes = {w.name: tuple(w.shape) for w in model.weights}
    assert {**topology.weight_shapes(depth, classes), "mean:0": (3,), "std:0": (3,)} == shapes
    assert [layer.name for layer in model.layers if hasattr(layer, "kernel")] == topology.layer_names(depth)


def test_the_stage_of_a_weight_is_that_of_its_feature_map():
    model = resnet(14, 10, mean=np.zeros(3, np.float32), std=np.ones(3, np.float32))
    for layer in model.layers:
        if layer.weights and layer.name not in ("standardize", "classifier"):
            # 32, 16 and 8 pixels a side.
            stage = {32: 1, 16: 2, 8: 3}[layer.output.shape[1]]
            assert {topology.stage_of(weight.name) for weight in layer.weights} == {stage}, layer.name
    assert topology.stage_of("classifier/bias:0") == 3


@pytest.mark.parametrize("depth", [2, 7, 19, -4])
def test_another_depth_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth {depth} is not 6n\\+2"):
        topology.layer_names(depth)
