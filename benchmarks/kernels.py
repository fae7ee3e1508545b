"""How a GPU spent the steps that TensorFlow's profiler has recorded: launches, seconds in kernels, gaps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tensorflow.tsl.profiler.protobuf import xplane_pb2


def read(folder: Path) -> xplane_pb2.XSpace:
    """The trace that the profiler has written to ``folder``."""
    space = xplane_pb2.XSpace()
    space.ParseFromString(next(folder.rglob("*.xplane.pb")).read_bytes())
    return space


def busy(spans: Iterable[tuple[int, int]]) -> int:
    """The time that the union of (begin, end) spans covers. Kernels of two streams may overlap."""
    covered, reached = 0, None
    for begin, end in sorted(spans):
        if reached is None or begin > reached:
            covered, reached = covered + end - begin, end
        elif end > reached:
            covered, reached = covered + end - reached, end
    return covered


def spent(space: xplane_pb2.XSpace, steps: int) -> dict[str, float] | None:
    """What each of ``steps`` steps spent on the first GPU. None if the trace has no kernel.

    ``launches`` and ``copies`` are numbers of kernels and of copies (or memsets); ``kernels`` and ``gaps`` are seconds
    in which at least one kernel ran, and in which the GPU did nothing.
    """
    kernels: list[tuple[int, int]] = []
    copies: list[tuple[int, int]] = []
    planes = sorted((p for p in space.planes if p.name.startswith("/device:GPU:")), key=lambda plane: plane.name)
    for plane in planes[:1]:
        # The profiler gives kernels this statistic, and copies another.
        of_kernels = {i for i, statistic in plane.stat_metadata.items() if statistic.name == "kernel_details"}
        # Other lines group the same events by operation, module or step.
        for line in (line for line in plane.lines if line.name.startswith("Stream #")):
            for event in line.events:
                begin = line.timestamp_ns * 1000 + event.offset_ps
                found = kernels if any(s.metadata_id in of_kernels for s in event.stats) else copies
                found.append((begin, begin + event.duration_ps))
    if not kernels:
        return None
    everything = kernels + copies
    whole = max(end for _, end in everything) - min(begin for begin, _ in everything)
    return {
        "launches": len(kernels) / steps,
        "copies": len(copies) / steps,
        "kernels": busy(kernels) * 1e-12 / steps,
        "gaps": (whole - busy(everything)) * 1e-12 / steps,
    }
