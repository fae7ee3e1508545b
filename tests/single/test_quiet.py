"""TensorFlow's start-up lines stay off the terminal, seen in the real output of the commands."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT
from tests.helpers.exported_run import make_run

TINY = ["--dataset", "synthetic", "--depth", "8", "--batch-size", "16", "--epochs", "1"]


def run(*command: object, **variables: str) -> str:
    """Both streams of a command, in the environment of a user who has set ``variables`` only."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("TF_", "CUDA_", "HOROVOD_"))}
    environment |= variables
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def of_tensorflow(output: str) -> list[str]:
    """The lines that TensorFlow's C++ code has written, and absl's about them."""
    return [line for line in output.splitlines() if re.search(r"\w+\.cc:\d+\]|absl::InitializeLog|^To enable", line)]


def test_tensorflow_writes_such_lines_and_they_are_found():
    assert of_tensorflow(run("-c", "import tensorflow"))


def test_training_shows_none(tmp_path: Path):
    # Some programs leave a terminal of no width behind. The start table is still printed.
    output = run("train_hvd.py", *TINY, "--run-dir", tmp_path, "--name", "run", COLUMNS="0")
    assert "ResNet-8" in output
    assert "test accuracy" in output
    assert of_tensorflow(output) == []


def test_quantize_and_predict_show_none(tmp_path: Path):
    output = run("-m", "cnnopt.quantize", make_run(tmp_path / "run"), "--variants", "float32,int8")
    assert "int8" in output
    assert of_tensorflow(output) == []
    image = ROOT / "docs/images/terminal.png"
    answer = run("-m", "cnnopt.predict", tmp_path / "run", image, "--runtime", "tf")
    assert "terminal.png" in answer
    assert of_tensorflow(answer) == []
