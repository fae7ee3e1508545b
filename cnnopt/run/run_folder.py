"""The run folder: configuration, environment and results of a run. Standard library only, except for the lock."""

from __future__ import annotations

import errno
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnnopt.config import ConfigError, TrainConfig, completed
from cnnopt.distributed.host import cores, cpu, versions
from cnnopt.run import atomic_files, locks

#: Seconds to wait for a folder that another process has locked. NFS 4 keeps the lock of a lost host for 90 s.
PATIENCE = 120.0
PACKAGES = ("horovod", "tensorflow", "tf-keras", "tensorflow-model-optimization", "numpy", "tensorboard")


class RunFolder:
    """``runs/<name>/``. Every file in it is replaced whole, or grows by whole lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.result_file = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tb"

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        """The folder that ``config`` names. Creates nothing."""
        assert config.name is not None
        try:
            return cls(Path(config.run_dir).expanduser() / config.name)
        except RuntimeError:
            raise ConfigError(f"--run-dir {config.run_dir}: no such home folder; give a path without ~") from None

    def identity(self, remedy: str) -> dict[str, Any]:
        """The ``TrainConfig.identity`` in config.json, completed. Raises ReadError, with ``remedy``."""
        identity = atomic_files.read_json(self.config_file, remedy).get("identity")
        if not isinstance(identity, dict):
            raise atomic_files.ReadError(f"{self.config_file} is damaged: {remedy}")
        return completed(identity)

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run. False also for a folder that may not be entered, for which Path raises."""
        return os.path.isfile(self.config_file)

    def check(self, config: TrainConfig) -> None:
        """Raise UserError, within milliseconds, if this run cannot be written or continued here."""
        try:
            self._check(config)
        except OSError as error:
            # Path.exists raises it too, if a folder on the way may not be entered (before Python 3.14).
            raise ConfigError(f"--run-dir {self.path.parent}: {error.strerror}; choose another folder") from None

    def _check(self, config: TrainConfig) -> None:
        if self.config_file.exists():
            difference = config.difference(self.identity("give another --name, or move it away"))
            if difference:
                raise ConfigError(
                    f"{self.path} holds a run of another configuration ({difference}): use its flags, or give another "
                    "--name"
                )
            if config.resume == "never" and self.checkpoints.exists() and any(self.checkpoints.iterdir()):
                raise ConfigError(
                    f"--resume never: {self.path} holds this run already; give another --name, or delete it"
                )
        for place in (self.path, self.checkpoints, self.tensorboard):
            while not place.exists() and place != place.parent:
                place = place.parent
            if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
                raise ConfigError(f"--run-dir {self.path.parent}: cannot write in {place}; choose another folder")
        from cnnopt.run import checkpoint  # here, because NumPy takes a tenth of a second to import

        # What the run reads once TensorFlow is loaded.
        self.metrics()
        checkpoint.list_steps(self.checkpoints)
        # A run may be requeued with the same flags after the checkpoint that it began from is gone.
        begun = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        if config.resume not in ("auto", "never") and not begun:
            try:
                fault = None if Path(config.resume).is_dir() else "no such checkpoint folder"
            except OSError as error:
                fault = error.strerror
            if fault:
                raise ConfigError(f"--resume {config.resume}: {fault}; give auto, never or a folder")

    def open(self, config: TrainConfig, environment: Mapping[str, Any]) -> dict[str, Any] | None:
        """Make the folder, lock it until this process ends, and write config.json and env.json.

        Raises UserError. ``check`` runs again under the lock, because another process may have used the folder. If that
        process has completed the run meanwhile, nothing is written. Returns its result then, else None.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._keep_others_out()
            self.check(config)
            if (result := self.result()) is not None:
                return result
            content = {"identity": config.identity(), "name": config.name}
            atomic_files.replace(self.config_file, json.dumps(content, indent=2) + "\n")
            atomic_files.replace(self.path / "env.json", json.dumps(dict(environment), indent=2) + "\n")
        except (OSError, atomic_files.WriteError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"--run-dir {self.path.parent}: {why}; choose another") from None
        return None

    def forget(self) -> None:
        """Remove config.json and env.json of a run that has not begun, so that other settings may use its name."""
        for file in (self.config_file, self.path / "env.json"):
            file.unlink(missing_ok=True)

    def _keep_others_out(self) -> None:
        file = self.path / ".lock"
        trains = f"{self.path}: another process trains in it"
        self._held = locks.hold(file)
        if self._held is None:
            print(f"{trains}; waiting {PATIENCE:.0f} s for its end", flush=True)
            self._held = locks.hold(file, patience=PATIENCE)
        if self._held is None:
            raise ConfigError(f"{trains}; stop it, give another --name, or delete {file} if there is none")

    def rewind(self, step: int, recorded: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Remove metrics of steps after ``step``, so that a resumed run draws one curve. Raises WriteError.

        ``recorded``: the lines up to ``step`` as a checkpoint has them. They replace the lines of the file.
        """
        if recorded is not None or self.metrics_file.exists():
            kept = [line for line in (self.metrics() if recorded is None else recorded) if line["step"] <= step]
            atomic_files.replace(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl. Raises OSError, and then no part of the line is left."""
        line = json.dumps(dict(metrics)).encode() + b"\n"
        with self.metrics_file.open("ab", buffering=0) as file:
            size = file.tell()
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to a line that a crash has cut off. Empty if there is no such file.

        They have today's names (``named_as_today``). Raises ReadError.
        """
        lines: list[dict[str, Any]] = []
        try:
            texts = atomic_files.read_text(self.metrics_file).splitlines()
        except FileNotFoundError:
            return lines
        except OSError as error:
            raise atomic_files.ReadError(f"{self.metrics_file}: {error.strerror}; restore it from a copy") from None
        for text in texts:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not is_line(line):
                break
            lines.append(line)
        return named_as_today(lines, validation=self._validation()) if lines else []

    def _validation(self) -> int:
        """The number of validation images. 0 if there is no config.json."""
        if not self.config_file.exists():
            return 0
        return self.identity("restore it from a copy")["validation"]

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as complete. Raises WriteError."""
        atomic_files.replace(self.result_file, json.dumps(dict(result), indent=2) + "\n")

    def result(self) -> dict[str, Any] | None:
        """The result that ``finish`` wrote, under today's names. None if the run is not complete, or has lost lines of
        metrics.jsonl since.

        The last checkpoint holds the lost lines, and the same command restores them. Raises ReadError if earlier
        checkpoints are there but not the last one, or if lines are lost and there is no checkpoint. A run without
        checkpoints is no error by itself: they are large, and users delete them.
        """
        if not self.result_file.exists():
            return None
        remedy = "delete it, and the same command writes it anew"
        result = result_as_today(atomic_files.read_json(self.result_file, remedy))
        if not (is_line(result) and isinstance(result.get("line"), str)):
            raise atomic_files.ReadError(f"{self.result_file} is damaged: {remedy}")
        from cnnopt.run import checkpoint  # here, because NumPy takes a tenth of a second to import

        last, damaged = checkpoint.newest(self.checkpoints)
        if (last or damaged) and (last is None or last.step != result["step"]):
            holds = f"the newest good checkpoint is of step {last.step}" if last else "no checkpoint is good"
            raise atomic_files.ReadError(
                f"{self.result_file} is of step {result['step']}, but {holds}: restore the last checkpoint, or delete "
                "this file, and the same command trains what is missing"
            )
        recorded = max((line["step"] for line in self.metrics()), default=0)
        if recorded == result["step"]:
            return result
        if last is None:
            raise atomic_files.ReadError(
                f"{self.metrics_file} ends with step {recorded}, but {self.result_file.name} is of step "
                f"{result['step']}, and there is no checkpoint: restore what is missing, or give another --name"
            )
        return None


def is_line(content: Any) -> bool:
    """Whether ``content``, read from a file, can be the record of a step."""
    return isinstance(content, dict) and type(content.get("step")) is int


def named_as_today(lines: Sequence[Mapping[str, Any]], *, validation: int) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a run with so many validation images, with the names that lines have today.

    Earlier versions had no validation images, and called the test images ``val_``.
    """
    names = {} if validation else {"val_accuracy": "test_accuracy", "val_loss": "test_loss"}
    return [{names.get(name, name): value for name, value in line.items()} for line in lines]


def result_as_today(result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a result.json with the names that it has today. Earlier versions left out ``test_``."""
    names = {"accuracy": "test_accuracy", "loss": "test_loss"}
    return {names.get(name, name): value for name, value in result.items()}


def monitored(line: Mapping[str, Any]) -> str:
    """The split that was evaluated for a line of metrics.jsonl: ``val`` or ``test``."""
    return "val" if "val_accuracy" in line else "test"


def minutes(metrics: Sequence[Mapping[str, Any]]) -> float:
    """Minutes of all steps, at their epoch's speed.

    ``seconds`` of a resumed epoch covers only its last part. If that is less than half of the epoch, it may be little
    more than the first step, which compiles. Such an epoch counts at the median speed of the others.
    """
    starts = [0, *(line["step"] for line in metrics)]
    steps = [line["step"] - start for line, start in zip(metrics, starts, strict=False)]
    speeds = [line["step_seconds"] for line in metrics]
    measured = [2 * line["seconds"] >= n * speed for line, n, speed in zip(metrics, steps, speeds, strict=True)]
    well = [speed for speed, enough in zip(speeds, measured, strict=True) if enough]
    typical = statistics.median(well or speeds or [0])
    return sum(n * (s if enough else typical) for n, s, enough in zip(steps, speeds, measured, strict=True)) / 60


def summarize(
    metrics: list[dict[str, Any]], sparsities: Mapping[str, float], tested: Mapping[str, float]
) -> dict[str, Any]:
    """The result of a run: its last epoch (never its best), median speed, and the sparsity of each kernel.

    ``tested``: ``test_accuracy`` and ``test_loss``, if the epochs were evaluated on validation images. Else empty.
    """
    last = metrics[-1]
    split = monitored(last)
    return {
        **tested,
        f"{split}_accuracy": last[f"{split}_accuracy"],
        f"{split}_loss": last[f"{split}_loss"],
        "epoch": last["epoch"],
        "step": last["step"],
        "sparsity": sparsities["total"],
        "images_per_second": statistics.median(line["images_per_second"] for line in metrics),
        "minutes": minutes(metrics),
        "kernels": {name: value for name, value in sparsities.items() if name != "total"},
    }


def environment(settings: Mapping[str, str]) -> dict[str, Any]:
    """The host, the versions and the settings of this process."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu(),
        "cores": cores(),
        "commit": _commit(),
        "packages": versions(PACKAGES),
        "settings": dict(settings),
    }


def _commit() -> str | None:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
        )
    except OSError:  # no git on this machine
        return None
    return described.stdout.strip() or None
