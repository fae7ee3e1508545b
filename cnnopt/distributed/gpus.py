"""GPUs: those that are too new for TensorFlow, those that two ranks share, and what XLA needs to compile for them.

Standard library only, because XLA's variables are set before TensorFlow is imported.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

#: The two files of CUDA that XLA needs, below the folder of a CUDA toolkit.
LIBDEVICE, PTXAS = "nvvm/libdevice/libdevice.10.bc", "bin/ptxas"
#: The folders of NVIDIA's wheels for CUDA 12 and 13, below site-packages.
WHEELS = ("nvidia/cuda_nvcc", "nvidia/cu13")
#: Variables that name the folder of a toolkit: of a cluster's module, or of conda.
NAMED_BY = ("CUDA_HOME", "CUDA_PATH", "CUDA_DIR", "CONDA_PREFIX")
DEFAULT_TOOLKIT = Path("/usr/local/cuda")


def too_new(capability: tuple[int, int] | None, compiled_for: Sequence[str]) -> str | None:
    """One line of warning if the GPU is newer than all GPUs that TensorFlow was compiled for, else None.

    ``compiled_for`` is ``cuda_compute_capabilities`` of ``tf.sysconfig.get_build_info()``. Examples are sm_89 (machine
    code) and compute_90 (PTX, which a driver can compile for newer GPUs). ``capability`` is None if it is not known.
    The line names the errors of tensorflow issues 99592 and 101746.
    """
    known = [(int(match[1]), int(match[2])) for name in compiled_for if (match := re.search(r"_(\d+)(\d)", name))]
    if capability is None or not known or capability[0] <= max(known)[0]:
        return None
    gpu, newest = (".".join(map(str, version)) for version in (capability, max(known)))
    return (
        f"this GPU has compute capability {gpu}, and TensorFlow was compiled for {newest} at most: its driver must "
        "compile every kernel, for up to half an hour, and training then often fails with CUDA_ERROR_INVALID_PTX; use "
        "a TensorFlow compiled for this GPU, such as NVIDIA's container (docs/install.md, \"An environment of your "
        'own"), or an older GPU'
    )


def identity(ordinal: int, library: str = "libcuda.so.1") -> str | None:
    """The UUID of the GPU, or of the MIG instance, that is number ``ordinal`` of those that this process sees.

    The driver itself is asked. It follows CUDA_VISIBLE_DEVICES, which may hold numbers, UUIDs or MIG instances, and
    CUDA_DEVICE_ORDER. None if it does not answer.
    """
    device, found = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL(library)
        # Only the second version of the function tells the MIG instances of one GPU apart.
        if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), ordinal):
            return None
        if driver.cuDeviceGetUuid_v2(ctypes.byref(found), device):
            return None
    except (OSError, AttributeError):
        return None
    return str(uuid.UUID(bytes=bytes(found)))


def shared(everyone: Sequence[tuple[str, str | None]]) -> str | None:
    """One line if some ranks compute on one GPU, else None. ``everyone``: each rank's host and ``identity``, by rank.

    Such ranks take turns and do not train faster than one of them.
    """
    ranks: dict[str, list[int]] = {}
    for rank, (_, gpu) in enumerate(everyone):
        if gpu is not None:
            ranks.setdefault(gpu, []).append(rank)
    for gpu, found in ranks.items():
        if len(found) > 1:
            names = ", ".join(map(str, found))
            return (
                f"ranks {names} (host {everyone[found[0]][0]}) compute on one GPU, {gpu}: start one rank for each GPU "
                "of a host (-np; on SLURM --ntasks-per-node as large as --gpus-per-node), or allow it with --share-gpus"
            )
    return None


def toolkit(environ: Mapping[str, str], search: Sequence[str]) -> Path | None:
    """The folder of a CUDA toolkit with libdevice: of NVIDIA's wheel in one of the folders ``search``, else another.

    The wheel comes first, because its version is that of TensorFlow's other CUDA libraries.
    """
    wheels = [Path(entry) / wheel for entry in search for wheel in WHEELS]
    named = [Path(environ[name]) for name in NAMED_BY if environ.get(name)]
    return next((folder for folder in [*wheels, *named, DEFAULT_TOOLKIT] if (folder / LIBDEVICE).is_file()), None)


def for_xla(
    threads: int, environ: Mapping[str, str] = os.environ, search: Sequence[str] | None = None, *, ranks: int = 1
) -> tuple[dict[str, str], str | None]:
    """The variables with which XLA compiles for a GPU, on ``threads`` threads, and one line if it cannot.

    They lead XLA to libdevice and ptxas. TensorFlow looks for NVIDIA's wheel by itself, but takes a file for a folder
    on the way (conda-forge's tensorflow-feedstock 420). XLA's GPU compiler uses one thread unless it is told otherwise.
    With several ``ranks``, XLA takes default kernels. It would measure kernels in each process, and take others in
    another (openxla issues 7716 and 37902); then the last bits of the ranks' weights would differ.
    Flags that the user has set stay. ``search``: the folders in which packages lie, by default sys.path.
    """
    given, path = environ.get("XLA_FLAGS", "").strip(), environ.get("PATH", "")
    if given and not given.startswith("-"):
        # The name of a file that holds the flags.
        return {"XLA_FLAGS": given}, None
    flags, found, missing = {"--xla_gpu_force_compilation_parallelism": str(threads)}, {}, []
    if ranks > 1:
        flags["--xla_gpu_autotune_level"] = "0"
    if "--xla_gpu_cuda_data_dir" not in given:
        cuda = toolkit(environ, sys.path if search is None else search)
        if cuda is None:
            missing.append(LIBDEVICE)
        else:
            # Quoted, because a space ends a flag.
            flags["--xla_gpu_cuda_data_dir"] = f'"{cuda}"' if re.search(r"\s", str(cuda)) else str(cuda)
        if cuda is not None and (cuda / PTXAS).is_file():
            found["PATH"] = os.pathsep.join(filter(None, [str((cuda / PTXAS).parent), path]))
        elif not shutil.which("ptxas", path=path):
            missing.append(PTXAS)
    added = [f"{name}={value}" for name, value in flags.items() if name not in given]
    line = (
        f"XLA needs {' and '.join(missing)} of CUDA to compile for a GPU, and they are not here: install the packages "
        "of docker/requirements-gpu.txt, or set CUDA_HOME to the folder of a CUDA toolkit"
    )
    return {**found, "XLA_FLAGS": " ".join(filter(None, [given, *added]))}, line if missing else None
