"""What a rank asks of its host, what must be set before TensorFlow is imported, and how to keep it quiet."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

#: What TensorFlow reads when it starts.
TENSORFLOW = {
    # Keras 3, the default since TensorFlow 2.16, has neither tfmot nor Horovod's callbacks.
    "TF_USE_LEGACY_KERAS": "1",
    # No folder: Keras finds no keras.json, by which the user may have changed the layout and the type of all tensors.
    "KERAS_HOME": os.devnull,
    # TensorFlow switches oneDNN on by itself only where AVX512 is; on AVX2 it doubles the training speed
    # (docs/how-it-works.md, "Threads and kernels").
    "TF_ENABLE_ONEDNN_OPTS": "1",
}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
CPUINFO = Path("/proc/cpuinfo")
#: The cores that this process was started with, whichever of them it has bound itself to since.
ALLOWED = frozenset(os.sched_getaffinity(0))


def cores(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process was given: those of its affinity, but no more than its CPU limit pays for.

    A container's limit (cgroup v2, cpu.max) hides no core, and a thread for each would be throttled.
    """
    allowed = len(ALLOWED)
    with contextlib.suppress(OSError, ValueError):
        (own,) = [line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::")]
        quota, period = (cgroup / own.strip("/") / "cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of packages by their names; None where one is not installed, or under another name, as tensorflow-cpu is."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def has_gpu(environ: Mapping[str, str] = os.environ, driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Whether this process may use an NVIDIA GPU: the driver is there, and the user has not hidden all of them."""
    return driver.exists() and environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def cpu(cpuinfo: Path = CPUINFO) -> str:
    """The name of this machine's processor, or of its architecture."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def cpu_flags() -> set[str]:
    """The instructions that this machine's processor has, by the names of /proc/cpuinfo; empty where it has none."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text().splitlines()
        # The latter on ARM.
        return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return set()


def prepare(defaults: Mapping[str, str]) -> dict[str, str]:
    """Set variables, but leave alone what the user has set. Returns the values in force."""
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in defaults}


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """What is made within is never searched for garbage: a library's modules, which stay, 400,000 objects."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to standard error, which no log level silences; shown if an error ends it."""
    # In memory: not every host has a folder for temporary files.
    with open(os.memfd_create("stderr"), "w+b") as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            with contextlib.suppress(OSError):
                os.write(stderr, held.read())
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
