"""Read facts about the host, set variables before TensorFlow is imported, and keep TensorFlow quiet."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import math
import os
import platform
import resource
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cnnopt.errors import ThreadLimitError, UserError

#: Variables that TensorFlow reads when it starts, and that decide what it computes. The user's values do not count.
FIXED = {
    # Keras 3, the default since TensorFlow 2.16, works with neither tfmot nor Horovod's callbacks.
    "TF_USE_LEGACY_KERAS": "1",
    # /dev/null is no folder, so Keras finds no keras.json. A user's file may change layout and type of all tensors.
    "KERAS_HOME": os.devnull,
    # With 1, an inference setting, oneDNN computes with the weights of the first step for ever, and nothing is learned.
    "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "0",
    # --deterministic decides. With 1 and without the flag, TensorFlow refuses to read the clock, as each step does.
    "TF_DETERMINISTIC_OPS": "0",
}
#: Variables that it also reads then, unless the user has set them.
TENSORFLOW = {
    # TensorFlow enables oneDNN by itself only on AVX512. On AVX2 (Zen 3), oneDNN doubled the training speed.
    "TF_ENABLE_ONEDNN_OPTS": "1",
}
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3"}
CPUINFO = Path("/proc/cpuinfo")
#: The least that this process must be allowed: open files, and address space and stack in KiB. At a ResNet-8,
#: TensorFlow took 2.5 GiB and then aborted, and trained with 3. Its threads, which have the stack of the main thread,
#: ended in a segmentation fault at 64 KiB, and trained with 128.
LEAST = {
    "-n": (resource.RLIMIT_NOFILE, 1, 128),
    "-v": (resource.RLIMIT_AS, 1024, 3 * 2**20),
    "-s": (resource.RLIMIT_STACK, 1024, 512),
}
#: TensorFlow aborts in the middle of a run if one of these is neither 0, false, 1 nor true.
SWITCHES = (
    "TF_DETERMINISTIC_ORDER",
    "TF_ENABLE_ASYNC_WAIT_FOR_REMOTE_FUNCTION",
    "TF_MKL_OPTIMIZE_PRIMITIVE_MEMUSE",
    "TF_ONEDNN_THREADPOOL_USE_CALLER_THREAD",
    "TF_ONEDNN_USE_SYSTEM_ALLOCATOR",
)
#: Threads that TensorFlow, Horovod and the input pipeline start.
THREADS = 64
#: The cores that this process was started with. It may have bound itself to some of them since.
ALLOWED = frozenset(os.sched_getaffinity(0))


def cores(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """The number of cores that this process may use: those of its affinity, up to its CPU limit.

    A container's limit (cgroup v2, cpu.max) hides no core. One thread for each visible core would be throttled.
    """
    allowed = len(ALLOWED)
    with contextlib.suppress(OSError, ValueError):
        (own,) = [line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::")]
        quota, period = (cgroup / own.strip("/") / "cpu.max").read_text().split()
        return max(1, min(allowed, math.ceil(int(quota) / int(period))))
    return allowed


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of packages, by name. None if a package is not installed or has another name (tensorflow-cpu)."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for name in found:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def has_gpu(environ: Mapping[str, str] = os.environ, driver: Path = Path("/dev/nvidiactl")) -> bool:
    """Whether this process may use an NVIDIA GPU: the driver is there, and the user has not hidden all GPUs."""
    return driver.exists() and environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")


def cpu(cpuinfo: Path = CPUINFO) -> str:
    """The name of this machine's processor, or of its architecture."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def cpu_flags() -> set[str]:
    """The instruction sets of this machine's processor, as /proc/cpuinfo names them. Empty if it names none."""
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text().splitlines()
        # The line is named Features on ARM.
        return {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return set()


def check_limits() -> None:
    """Raise UserError where a limit of this process is so low that TensorFlow or Horovod would abort.

    Raises UserError also for a umask that keeps the user from the files that a run writes.
    Raises ThreadLimitError if its user has so many threads that the limit leaves too few.
    """
    for option, (limit, unit, least) in LEAST.items():
        allowed, _ = resource.getrlimit(limit)
        if allowed != resource.RLIM_INFINITY and allowed // unit < least:
            raise UserError(
                f"ulimit {option} {allowed // unit}: a run needs {least}; raise the limit, or ask your administrator"
            )
    os.umask(mask := os.umask(0o777))
    # The kernel lets root read what nobody may.
    if mask & 0o700 and os.getuid():
        raise UserError(f"umask {mask:04o}: this user could not read the files of the run; give umask 022")
    allowed, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    # The kernel does not limit root.
    if allowed != resource.RLIM_INFINITY and os.getuid() and allowed - (taken := threads_of_user()) < THREADS:
        raise ThreadLimitError(
            f"ulimit -u {allowed}: this user has {taken} threads already, and a run needs {THREADS} more; raise it, or "
            "end other programs"
        )


def threads_of_user(proc: Path = Path("/proc")) -> int:
    """The number of threads of all processes of this process's user, which RLIMIT_NPROC counts."""
    count = 0
    for status in proc.glob("[0-9]*/status"):
        # Processes end meanwhile.
        with contextlib.suppress(OSError):
            found = dict(line.split(":", 1) for line in status.read_text(errors="replace").splitlines())
            if int(found["Uid"].split()[0]) == os.getuid():
                count += int(found["Threads"])
    return count


def prepare(defaults: Mapping[str, str]) -> dict[str, str]:
    """Set the variables of FIXED, and those of ``defaults`` that the user has not set. Returns the latter in force.

    Raises UserError if TensorFlow, which is imported next, could not be, or would abort.
    """
    check_temporary_folder()
    for name in SWITCHES:
        if (value := os.environ.get(name, "0")).lower() not in ("0", "false", "1", "true"):
            raise UserError(f"{name}={value[:20]}: give 0 or 1, or unset it")
    os.environ.update(FIXED)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return {name: os.environ[name] for name in defaults}


def check_temporary_folder() -> None:
    """Raise UserError if there is no folder for temporary files. TensorFlow asks for it while it is imported."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("no folder for temporary files can be written; set TMPDIR to one that can be") from None


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep objects that are made inside out of garbage collection: a library's modules (400,000 objects) stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Hold back what C++ code writes to standard error, which no log level silences. Show it if the block fails."""
    # Held in memory, because not every host has a folder for temporary files.
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
