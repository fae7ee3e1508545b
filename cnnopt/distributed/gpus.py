"""Compare a GPU with those that TensorFlow was compiled for."""

from __future__ import annotations

import re
from collections.abc import Sequence


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
