"""What a cell has recorded, as one small JSON object: settings, accuracy, bytes, minutes, versions, machine.

The records of a study are made from its run folders. docs/results/study holds those of the repository's own runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cnnopt.config import completed
from cnnopt.grid.cells import NAME
from cnnopt.run import atomic_files
from cnnopt.run.run_folder import RunFolder

#: The version of a record. It rises when a key changes its meaning or is removed.
SCHEMA = 1
KEPT = ("accuracy", "loss", "epoch", "step", "sparsity", "minutes", "images_per_second")

Record = Mapping[str, Any]


def of_run(path: Path) -> dict[str, Any] | None:
    """The record of a run folder. None if the folder is no cell of a study, or its run is not complete.

    Raises UserError if a file of the run is damaged.
    """
    folder = RunFolder(path)
    named = NAME.fullmatch(path.name)
    if named is None or not folder.is_run or (result := folder.result()) is None:
        return None
    environment = atomic_files.read_json(path / "env.json", "restore it from a copy")
    return {
        "schema": SCHEMA,
        "name": path.name,
        "recipe": named["recipe"],
        "cell": named["label"],
        "identity": folder.identity("restore it from a copy"),
        "ranks": environment.get("ranks"),
        "precision": environment.get("precision"),
        "device": environment.get("device"),
        "result": {key: result.get(f"test_{key}", result.get(key)) for key in KEPT},
        "files": _files(path, result["step"]),
        "machine": {key: environment.get(key) for key in ("cpu", "cores", "system")},
        "versions": {"python": environment.get("python"), **environment.get("packages", {})},
        "commit": environment.get("commit"),
        "started": environment.get("started"),
    }


def _files(path: Path, step: int) -> list[dict[str, Any]]:
    """The files that ``cnnopt.quantize`` has measured. Empty if it has not, or has measured another step."""
    if not (path / "report.json").exists():
        return []
    card = atomic_files.read_json(path / "report.json", "quantize the run again")
    if card.get("run", {}).get("step") != step:
        return []
    return [
        {
            "name": entry["name"],
            "sha256": entry["sha256"],
            "raw": entry["size"]["raw"],
            "gzip": entry["size"]["gzip"],
            "packed": entry["packed"]["bytes"] if entry["packed"] else None,
            "accuracy": entry["test"]["accuracy"],
            "latency_ms": entry["latency"][0]["median_ms"],
        }
        for entry in card["files"]
        if entry["run"] == card["run"]["path"]
    ]


def of_study(run_dir: Path) -> list[dict[str, Any]]:
    """The records of all complete cells in a folder of runs. Raises UserError."""
    try:
        paths = sorted(path for path in run_dir.iterdir() if NAME.fullmatch(path.name))
    except OSError as error:
        raise atomic_files.ReadError(f"{run_dir}: {error.strerror}; name the --run-dir of a study") from None
    return [record for path in paths if (record := of_run(path)) is not None]


def load(folder: Path) -> list[dict[str, Any]]:
    """The stored records of a folder. Raises UserError."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = atomic_files.read_json(path, "restore it from a copy")
        if record.get("schema") != SCHEMA or record.get("name") != path.stem:
            raise atomic_files.ReadError(f"{path} is no record of this version of cnnopt: make it anew")
        records.append({**record, "identity": completed(record["identity"])})
    return records


def save(records: Iterable[Record], folder: Path) -> None:
    """Write one file for each record. Raises WriteError."""
    for record in records:
        atomic_files.replace(folder / f"{record['name']}.json", json.dumps(record, indent=1) + "\n")
