"""Our .tflite files against ONNX Runtime and OpenVINO: one run, one machine, the same weights, batch 1, 1 thread.

    make env EXTRAS=1
    .venv/bin/python -m cnnopt.quantize runs/NAME --variants float32,int8
    .venv/bin/python benchmarks/inference.py runs/NAME

The other runtimes have a separate process. They get the last weights of the run (BatchNorm folded in, float32) and
the calibration images of our int8 file. They quantize with their own tools (quantize_static; NNCF). All files are
measured alike: accuracy over the test images, then latency in rounds, one second for each file in turn, so that other
load affects all of them. The table has medians over all calls. --output writes inference.json and inference.md.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import command

from cnnopt import packages
from cnnopt.data import datasets
from cnnopt.distributed import host
from cnnopt.errors import CnnoptError, UserError
from cnnopt.export import measure, trained
from cnnopt.run import run_folder

PACKAGES = ("nncf", "onnx", "onnxruntime", "openvino")
WORKER = Path(__file__).with_name("workers") / "onnx_openvino.py"


class Ours:
    """The .tflite files of a run, in this process; ``Peers`` answers the same questions."""

    def __init__(self, files: dict[str, Path]) -> None:
        from cnnopt.export import interpret

        self.interpret, self.files, self.calls = interpret, files, {}
        self.pixels = np.random.default_rng(0).integers(0, 256, [1, 32, 32, 3], dtype=np.uint8)
        self.versions = host.versions(["tensorflow"])
        for name, path in files.items():
            interpreter = interpret.start(path.read_bytes(), path, threads=1).interpreter
            self.calls[name] = functools.partial(self._call, interpreter, *interpreter.get_input_details(),
                                                 *interpreter.get_output_details())  # fmt: skip

    def _call(self, interpreter: Any, source: dict[str, Any], target: dict[str, Any]) -> np.ndarray:
        """One call from pixels to logits, like a call of the other runtimes."""
        interpreter.set_tensor(source["index"], self.interpret.quantized(self.pixels, source))
        interpreter.invoke()
        return interpreter.get_tensor(target["index"])

    def size(self, name: str) -> dict[str, int]:
        """Bytes of the file, raw and by gzip -9."""
        content = self.files[name].read_bytes()
        return {"raw": len(content), "gzip": len(gzip.compress(content, 9, mtime=0))}

    def logits(self, name: str, images: np.ndarray) -> np.ndarray:
        """Logits float32 [n, classes] of the test images uint8 [n, 32, 32, 3]."""
        return self.interpret.logits(self.files[name].read_bytes(), self.files[name], images, threads=1)

    def latency(self, name: str, seconds: float) -> list[float]:
        """Milliseconds of each call over ``seconds``."""
        times, call, end = [], self.calls[name], time.perf_counter() + seconds
        for _ in range(5):
            call()
        while time.perf_counter() < end or len(times) < 5:
            begin = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - begin))
        return times


class Peers:
    """The other runtimes, in a process of their own that answers requests line by line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environ = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
        )
        ready = self.read()
        self.names, self.versions, self.sizes = ready["names"], ready["versions"], ready["sizes"]

    def read(self) -> Any:
        """The next answer. Raises UserError if the process has ended."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise UserError(f"the peers' process ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        """The answer to a request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def size(self, name: str) -> dict[str, int]:
        """Bytes of the file, raw and by gzip -9."""
        return self.sizes[name]

    def logits(self, name: str, images: np.ndarray) -> np.ndarray:
        """Logits float32 [n, classes] of the test images uint8 [n, 32, 32, 3]."""
        return np.load(self.ask(do="logits", name=name))

    def latency(self, name: str, seconds: float) -> list[float]:
        """Milliseconds of each call over ``seconds``."""
        return self.ask(do="latency", name=name, seconds=seconds)

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """Every figure of the comparison."""
    import onnx

    from cnnopt.export import onnx_graph

    run = trained.read(given.run)
    files = {name: given.run / "export" / f"{name}.tflite" for name in ("float32", "int8")}
    card = given.run / "report.json"
    if not all(path.exists() for path in (*files.values(), card)):
        raise UserError(f"{given.run}: not quantized yet; run python -m cnnopt.quantize {given.run} first")
    held_out = {"seed": run.identity["seed"], "validation": run.identity["validation"]}
    images = datasets.load(run.identity["dataset"], given.data_dir, **held_out)
    test, labels = images.test_images[: given.images], images.test_labels[: given.images]
    chosen = json.loads(card.read_text())["calibration"]["indices"]
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(onnx_graph.graph(run.weights, run.depth), Path(folder) / "float32.onnx")
        np.savez(Path(folder) / "images.npz", test=test, calibration=images.train_images[chosen])
        peers = Peers(Path(folder))
        ours = Ours(files)
        makers = {f"TFLite {name}": (ours, name) for name in files} | {name: (peers, name) for name in peers.names}
        results: dict[str, dict[str, Any]] = {}
        reference = ours.logits("float32", test)
        for label, (maker, name) in makers.items():
            logits = maker.logits(name, test)
            scores = measure.accuracy(logits, labels, reference)
            results[label] = {"size": maker.size(name), **{k: scores[k] for k in ("accuracy", "loss", "agreement")}}
            # Without equal weights the comparison means nothing.
            if "float32" in label and scores["agreement"] < 0.99:
                raise UserError(f"{label} and TFLite float32 name the same class on {scores['agreement']:.1%} only")
        times: dict[str, list[float]] = {label: [] for label in makers}
        for _ in range(given.rounds):
            for label, (maker, name) in makers.items():
                times[label] += maker.latency(name, given.seconds)
        peers.end()
    for label, entry in results.items():
        median, p90, p99 = np.percentile(times[label], [50, 90, 99])
        entry |= {"median_ms": median, "p90_ms": p90, "p99_ms": p99, "calls": len(times[label])}
    from cnnopt.export import report as machine_of

    machine = machine_of.machine(len(os.sched_getaffinity(0)))
    machine["packages"] |= peers.versions
    settings = {"rounds": given.rounds, "seconds": given.seconds, "images": len(test)}
    created = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    machine["commit"] = run_folder.environment({})["commit"]
    return {
        "run": str(given.run),
        "command": command(),
        "created": created,
        "machine": machine,
        **settings,
        "results": results,
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, and under it the machine and the versions."""
    lines = ["| | raw KiB | gzip KiB | top-1 % | agrees % | ms, median | p90 | p99 |", "|---|" + "---|" * 7]
    for label, entry in found["results"].items():
        sizes = [f"{entry['size'][kind] / 1024:.1f}" for kind in ("raw", "gzip")]
        shares = [f"{100 * entry[kind]:.2f}" for kind in ("accuracy", "agreement")]
        lines.append("| " + " | ".join([label, *sizes, *shares, *(f"{entry[k]:.3f}" for k in MS)]) + " |")
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    lines += [
        "",
        f"{found['run']}, {found['images']:,} test images; batch 1, 1 thread, {found['rounds']} rounds of "
        f"{found['seconds']:g} s each; `agrees`: with TFLite float32. {machine['cpu']}, {machine['cores']} cores, int8 "
        f"instructions: {', '.join(machine['int8_instructions'] or []) or 'none'}, load {machine['load']:.1f} at the "
        f"end; {packages}; commit {machine['commit']}; `{found['command']}`, {found['created']}.",
    ]
    return "\n".join(lines) + "\n"


MS = ("median_ms", "p90_ms", "p99_ms")


def main() -> int:
    """Compare, print, and write to ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that cnnopt.quantize has exported")
    parser.add_argument("--data-dir", help="folder that holds the data set")
    parser.add_argument("--images", type=int, default=10_000, help="test images for the accuracy [10000]")
    parser.add_argument("--rounds", type=int, default=10, help="of latency [10]")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each file in each round [1]")
    parser.add_argument("--output", type=Path, help="folder for inference.json and inference.md")
    given = parser.parse_args()
    try:
        packages.require("other runtimes", PACKAGES)
        host.prepare({**host.TENSORFLOW, **host.QUIET})
        found = compare(given)
    except CnnoptError as error:
        print(f"inference.py: {error}", file=sys.stderr)
        return error.exit_status
    print(markdown(found))
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "inference.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.output / "inference.md").write_text(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
