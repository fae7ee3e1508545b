"""The line about a GPU that is newer than TensorFlow's machine code."""

import pytest
import tensorflow as tf

from cnnopt.distributed import collectives, gpus
from cnnopt.distributed.world import World

# What the wheel of TensorFlow 2.21 says of itself.
WHEEL = ["sm_60", "sm_70", "sm_80", "sm_89", "compute_90"]


@pytest.mark.parametrize("capability", [(6, 0), (7, 5), (8, 6), (8, 9), (9, 0)])
def test_a_gpu_that_the_wheel_knows_is_no_line(capability):
    assert gpus.too_new(capability, WHEEL) is None


@pytest.mark.parametrize(("capability", "said"), [((10, 0), "10.0"), ((10, 3), "10.3"), ((12, 0), "12.0")])
def test_a_newer_gpu_is_one_line_with_a_remedy(capability, said):
    line = gpus.too_new(capability, WHEEL)
    assert line is not None
    assert f"compute capability {said}, and TensorFlow was compiled for 9.0 at most" in line
    assert "CUDA_ERROR_INVALID_PTX" in line
    assert "NVIDIA's container" in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("capability", "compiled_for"),
    [((12, 0), ["sm_90", "sm_100", "compute_120"]), ((10, 3), ["sm_90a", "sm_100a"]), ((12, 0), []), (None, WHEEL)],
    ids=["a wheel with PTX of 12.0", "another of the same major version", "not said", "a GPU that does not say"],
)
def test_a_tensorflow_that_knows_it_or_does_not_say_is_no_line(capability, compiled_for):
    assert gpus.too_new(capability, compiled_for) is None


@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_one_rank_of_a_host_says_it(local_rank, lines, monkeypatch, capfd):
    # TensorFlow's answers are made up here; what is said of them is ours.
    device = tf.config.PhysicalDevice("/physical_device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [device])
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda device, kind: None)
    monkeypatch.setattr(tf.config.experimental, "set_memory_growth", lambda device, on: None)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda device: {"compute_capability": (99, 0)})
    collectives._pin(World(rank=local_rank, size=2, local_rank=local_rank, local_size=2))
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if "compute capability 99.0" in line]) == lines
