"""The parts of benchmarks/ that a GPU would need, on made-up traces and without a GPU."""

import importlib
import subprocess
import sys

import pytest
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from tests.helpers import ROOT


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("kernels")


def trace(streams: dict[str, list[tuple[int, int, str]]], *, starts: dict[str, int] | None = None) -> xplane_pb2.XSpace:
    """A trace of one GPU as CUPTI's collector in XLA writes it: (begin, end, kind) in nanoseconds, by line."""
    space = xplane_pb2.XSpace()
    space.planes.add(name="/host:CPU").lines.add(name="Stream #1").events.add(duration_ps=10**12)
    plane = space.planes.add(name="/device:GPU:0")
    for number, name in enumerate(("kernel_details", "memcpy_details"), start=1):
        plane.stat_metadata[number].name = name
    for name, events in streams.items():
        start = (starts or {}).get(name, 0)
        line = plane.lines.add(name=name, timestamp_ns=start)
        for begin, end, kind in events:
            event = line.events.add(offset_ps=1000 * (begin - start), duration_ps=1000 * (end - begin))
            event.stats.add(metadata_id=1 if kind == "kernel" else 2)
    return space


def test_a_step_is_kernels_copies_and_gaps(kernels):
    found = kernels.spent(
        trace(
            {
                "Stream #13(Compute)": [(1000, 1400, "kernel"), (1500, 1900, "kernel"), (1900, 2000, "copy")],
                # At the same time as the second kernel, and 100 ns longer.
                "Stream #14(Compute)": [(1700, 2100, "kernel")],
                "XLA Ops": [(0, 9000, "kernel")],
            },
            starts={"Stream #14(Compute)": 1700},
        ),
        steps=2,
    )
    assert found == pytest.approx({"launches": 1.5, "copies": 0.5, "kernels": 500e-9, "gaps": 50e-9})


def test_a_trace_without_a_kernel_says_nothing(kernels):
    assert kernels.spent(trace({"Stream #13": [(0, 5, "copy")]}), steps=1) is None
    assert kernels.spent(xplane_pb2.XSpace(), steps=1) is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--device", "gpu"], "--device cpu --quick needs none"),
        (["--device", "cpu"], "add --quick"),
    ],
)
def test_without_a_gpu_one_line_says_how_to_try_it(flags, said, shell):
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *flags], cwd=ROOT, env={**shell, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
