"""The one definition of "smaller" in every table, page and report. Standard library only.

The bytes that a user ships are those of the packed archive, or of the file through gzip -9 if that is smaller or there
is no archive. They are compared with the raw bytes of the reference: the float32 .tflite file of the baseline, or else
of the run. Han et al. 2016 (arXiv:1510.00149) count in the same way. The reference is not compressed, because a pruned
float32 file compresses well: beside it, pruning would seem to save nothing. A dense one loses 8% by gzip
(docs/results).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: The text for a table that has a column "smaller".
MEANING = "bytes of the float32 reference / bytes to ship (packed or gzip -9, whichever is smaller)"


@dataclass(frozen=True)
class Shipped:
    """A file as it is shipped. ``form`` is ``packed`` or ``gzip``."""

    form: str
    bytes: int
    times_smaller: float


def shipped(entry: Mapping[str, Any]) -> Shipped:
    """The smallest form of a file of a report.json, which may be of an earlier version."""
    forms = [Shipped("gzip", entry["size"]["gzip"], entry["times_smaller"]["gzip"])]
    if packed := entry.get("packed"):
        forms.append(Shipped("packed", packed["bytes"], packed["times_smaller"]))
    return min(forms, key=lambda form: form.bytes)
