"""A library with the three functions of NVIDIA's driver that tell GPUs apart, for two made-up GPUs."""

import shutil
import subprocess
from pathlib import Path

import pytest

#: The first byte of a GPU's UUID is its number on the host: CUDA_VISIBLE_DEVICES shows one of them, or both.
SOURCE = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) {
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (ordinal >= (visible ? 1 : 2)) return 101;  /* CUDA_ERROR_INVALID_DEVICE */
    *device = visible ? atoi(visible) : ordinal;
    return 0;
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    memset(uuid, 0, 16);
    uuid[0] = device;
    return 0;
}
"""


def driver(folder: Path) -> str:
    """Compile the library in ``folder``, with the compiler that builds Horovod."""
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=SOURCE, text=True, check=True)
    return str(library)
