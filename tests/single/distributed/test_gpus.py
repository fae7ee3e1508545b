"""Lines about a GPU that is too new, about what XLA lacks, and about two ranks on one GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from cnnopt.distributed import collectives, gpus
from cnnopt.distributed.world import World
from tests.helpers import cuda_driver

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


# NVIDIA's wheel and XLA ---------------------------------------------------------------------------------------------


def make_toolkit(folder: Path, *, ptxas: bool = True) -> Path:
    for name in (gpus.LIBDEVICE, *([gpus.PTXAS] if ptxas else [])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch(mode=0o755)
    return folder


@pytest.fixture
def bare(monkeypatch, tmp_path) -> Path:
    """A machine without CUDA."""
    monkeypatch.setattr(gpus, "DEFAULT_TOOLKIT", tmp_path / "usr/local/cuda")
    return tmp_path


@pytest.mark.parametrize("wheel", ["nvidia/cuda_nvcc", "nvidia/cu13"])
def test_the_wheel_of_site_packages_is_given_to_xla(wheel, bare):
    cuda = make_toolkit(bare / "site-packages" / wheel)
    make_toolkit(gpus.DEFAULT_TOOLKIT)
    given = {"PATH": "/usr/bin", "CUDA_HOME": str(make_toolkit(bare / "module"))}
    assert gpus.for_xla(4, given, ["", "/nowhere", str(bare / "site-packages")]) == (
        {
            "PATH": f"{cuda}/bin:/usr/bin",
            "XLA_FLAGS": f"--xla_gpu_force_compilation_parallelism=4 --xla_gpu_cuda_data_dir={cuda}",
        },
        None,
    )


@pytest.mark.parametrize("name", gpus.NAMED_BY)
def test_without_the_wheel_the_toolkit_of_a_module_or_of_conda_is(name, bare):
    cuda = make_toolkit(bare / "with space")
    make_toolkit(gpus.DEFAULT_TOOLKIT)
    variables, line = gpus.for_xla(1, {name: str(cuda)}, [str(bare)])
    assert variables["XLA_FLAGS"].endswith(f' --xla_gpu_cuda_data_dir="{cuda}"')
    assert variables["PATH"] == f"{cuda}/bin"
    assert line is None


def test_else_the_default_folder_is(bare):
    cuda = make_toolkit(gpus.DEFAULT_TOOLKIT)
    variables, line = gpus.for_xla(1, {"CUDA_HOME": "/nowhere"}, [])
    assert f"--xla_gpu_cuda_data_dir={cuda}" in variables["XLA_FLAGS"]
    assert line is None


def test_the_users_own_flags_stay(bare):
    make_toolkit(gpus.DEFAULT_TOOLKIT)
    mine = "--xla_gpu_cuda_data_dir=/opt/cuda --xla_gpu_force_compilation_parallelism=2 --xla_dump_to=/tmp"
    assert gpus.for_xla(8, {"XLA_FLAGS": mine, "PATH": "/usr/bin"}, []) == ({"XLA_FLAGS": mine}, None)


def test_the_users_file_of_flags_stays(bare):
    make_toolkit(gpus.DEFAULT_TOOLKIT)
    assert gpus.for_xla(8, {"XLA_FLAGS": "/etc/flags"}, []) == ({"XLA_FLAGS": "/etc/flags"}, None)


@pytest.mark.parametrize("has_libdevice", [False, True])
def test_what_is_missing_is_one_line_with_a_remedy(has_libdevice, bare):
    if has_libdevice:
        make_toolkit(gpus.DEFAULT_TOOLKIT, ptxas=False)
    variables, line = gpus.for_xla(2, {"PATH": str(bare)}, [str(bare)])
    assert ("cuda_data_dir" in variables["XLA_FLAGS"]) is has_libdevice
    assert "PATH" not in variables
    assert line is not None
    assert (gpus.LIBDEVICE in line, gpus.PTXAS in line) == (not has_libdevice, True)
    assert "docker/requirements-gpu.txt" in line
    assert "\n" not in line


def test_ptxas_of_the_path_will_do(bare):
    make_toolkit(gpus.DEFAULT_TOOLKIT, ptxas=False)
    make_toolkit(bare / "other")
    assert gpus.for_xla(2, {"PATH": str(bare / "other/bin")}, [])[1] is None


def test_several_ranks_take_the_same_kernels(bare):
    flags = [gpus.for_xla(1, given, [], ranks=ranks)[0]["XLA_FLAGS"] for given, ranks in (({}, 1), ({}, 2))]
    assert ["--xla_gpu_autotune_level=0" in words.split() for words in flags] == [False, True]
    mine = {"XLA_FLAGS": "--xla_gpu_autotune_level=4"}
    assert gpus.for_xla(1, mine, [], ranks=2)[0]["XLA_FLAGS"].split().count("--xla_gpu_autotune_level=4") == 1
    assert "--xla_gpu_autotune_level=0" not in gpus.for_xla(1, mine, [], ranks=2)[0]["XLA_FLAGS"]


def test_tensorflow_takes_the_flags(bare):
    # XLA ends the process at a flag that it does not know.
    cuda = make_toolkit(bare / "with space/nvidia/cuda_nvcc")
    variables, _ = gpus.for_xla(2, {}, [str(cuda.parents[1])], ranks=2)
    code = "import tensorflow as tf; print(float(tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1.0))))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout == "2.0\n", done.stderr


# Two ranks on one GPU -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("everyone", "ranks"),
    [
        ([("a", "u0"), ("a", "u1"), ("b", "u2"), ("b", "u3")], None),
        ([("a", "u0"), ("a", "u0")], "ranks 0, 1 (host a) compute on one GPU, u0"),
        ([("a", "u0"), ("b", "u1"), ("b", "u2"), ("b", "u1")], "ranks 1, 3 (host b) compute on one GPU, u1"),
        ([("a", "u0"), ("a", "u0"), ("a", "u0"), ("a", "u1")], "ranks 0, 1, 2 (host a) compute on one GPU, u0"),
        ([("a", None), ("a", None)], None),
        ([("a", "u0")], None),
    ],
    ids=["one each", "two ranks", "on the second host", "three ranks", "CPUs", "one rank"],
)
def test_ranks_on_one_gpu_are_one_line(everyone, ranks):
    line = gpus.shared(everyone)
    if ranks is None:
        assert line is None
    else:
        assert line.startswith(f"{ranks}: ")
        assert "--share-gpus" in line
        assert "\n" not in line


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> str:
    return cuda_driver.driver(tmp_path_factory.mktemp("driver"))


def test_a_gpu_has_the_identity_that_the_driver_gives(driver, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.identity(0, driver) == "00000000-0000-0000-0000-000000000000"
    assert gpus.identity(1, driver) == "01000000-0000-0000-0000-000000000000"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert gpus.identity(0, driver) == "07000000-0000-0000-0000-000000000000"


def test_a_driver_that_does_not_answer_is_none(driver, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.identity(2, driver) is None
    assert gpus.identity(0, "libnone.so.1") is None
    # This library has none of the functions.
    assert gpus.identity(0, "libm.so.6") is None
