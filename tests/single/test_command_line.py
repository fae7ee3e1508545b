"""The program as a user starts it: mistakes are answered at once, and whole runs go from flags to files."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cnnopt.config import parse_args
from cnnopt.distributed.rendezvous import Rendezvous
from cnnopt.distributed.world import World, is_first, launched
from cnnopt.launch import rank_variables
from cnnopt.model.pruning import num_pruned
from cnnopt.run import checkpoint
from cnnopt.run.run_folder import RunFolder
from tests.helpers import ROOT, event_files
from tests.helpers.cifar_copies import BINARY_10, small_copy

PROGRAM = ROOT / "train_hvd.py"


def start(arguments: list[str], shell: dict[str, str], *python_flags: str) -> subprocess.Popen:
    command = [sys.executable, *python_flags, str(PROGRAM), *arguments]
    # Another folder than the repository: nothing may depend on where it is started.
    return subprocess.Popen(command, env=shell, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/")


def program(arguments: list[str], shell: dict[str, str], *python_flags: str) -> subprocess.CompletedProcess:
    process = start(arguments, shell, *python_flags)
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def refusal(arguments: list[str], shell: dict[str, str]) -> str:
    done = program(arguments, shell)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("train_hvd.py: ")
    return done.stderr


# Wrong input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--depth 43", "--depth 43: the depth of a CIFAR ResNet is 6n+2; the nearest is 44"),
        ("--sparcity 0.6", "unrecognized argument --sparcity: did you mean --sparsity?"),
        ("--expect-ranks 2", "--expect-ranks 2: 1 started"),
        ("--data-dir /no/such/folder", "--data-dir /no/such/folder: does not exist"),
        ("--dataset synthetic --resume /no/such", "--resume /no/such: no such checkpoint folder"),
        ("--dataset digits --epochs 1 --warmup 2e", "--warmup 2e: 22 steps, but the run has 12; give a shorter one"),
        ("--dataset digits --batch-size 100000", "--batch-size 100000: digits has 1,437 training images; use at most"),
        ("--dataset digits --batch-size 2000", "--batch-size 2000: digits has 1,437 training images; use at most 1437"),
        ("--dataset digits --validation 1400", "--validation 1400: leaves 37 of 1,437 training images, fewer than a"),
        ("--dataset digits --validation 5", "--validation 5: digits has 10 classes, and each needs an image; use at l"),
        ("--dataset synthetic --depth 1202", "--depth 1202: Keras cannot build a network of so many layers; use at m"),
        ("--preset study-baseline --epochs 30", "--lr-drops 80e:0.1,"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(arguments, expected, shell, tmp_path):
    assert expected in refusal([*arguments.split(), "--run-dir", str(tmp_path / "runs")], shell)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("arguments", ["--depth 43", "--dataset synthetic --expect-ranks 2",
                                       "--dataset digits --epochs 1 --prune-end 15s", "--depth 1202",
                                       "--dataset digits --validation 5", "--preset study-baseline --epochs 30",
                                       "--name " + 300 * "n", "--help"])  # fmt: skip
def test_tensorflow_is_not_loaded_to_say_so(arguments, shell):
    done = program(arguments.split(), shell, "-X", "importtime")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "cnnopt" in imported
    assert imported.isdisjoint({"tensorflow", "tf_keras", "horovod", "sklearn", "tensorflow_model_optimization"})


def test_help_is_on_stdout_with_status_0(shell):
    done = program(["--help"], shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--sparsity" in done.stdout


def test_a_batch_that_does_not_divide_over_the_launched_ranks(shell):
    ranks = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "3", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "3"}
    message = refusal(["--dataset", "synthetic"], {**shell, **ranks})
    assert "--batch-size 128: cannot be split evenly over 3 ranks; use 126 or 129" in message


@pytest.mark.parametrize("name", ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "TF_NUM_INTEROP_THREADS"])
def test_a_setting_of_the_environment_that_is_no_number(name, shell, tmp_path):
    said = refusal(["--dataset", "synthetic", "--run-dir", str(tmp_path)], {**shell, name: "5 min"})
    assert f"{name}=5 min: must be a whole number" in said


def test_only_the_first_rank_speaks(shell):
    ranks = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "3", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "3"}
    done = program(["--depth", "43"], {**shell, **ranks})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_truncated_data_file_is_named(shell, tmp_path):
    folder = small_copy(BINARY_10).folder(tmp_path)
    victim = folder / BINARY_10.train[2]
    victim.write_bytes(victim.read_bytes()[:-100])
    message = refusal(["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "runs")], shell)
    assert str(victim) in message
    assert not (tmp_path / "runs").exists()


def test_a_window_beyond_the_end_of_a_copy_with_fewer_images(shell, tmp_path):
    small_copy(BINARY_10).folder(tmp_path)
    flags = ["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "runs"), "--batch-size", "4", "--epochs", "1"]
    message = refusal([*flags, "--prune-begin", "1s", "--prune-end", "9s"], shell)
    assert "--prune-begin 1s --prune-end 9s: steps 1 to 9 of 5; let pruning end" in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("below", [".", "deeper"])
def test_a_run_folder_that_cannot_be_made(below, shell, tmp_path):
    (tmp_path / "file").write_text("in the way")  # root may write anywhere, but not below a file
    message = refusal(["--dataset", "synthetic", "--run-dir", str(tmp_path / "file" / below)], shell)
    assert "--run-dir" in message
    assert "choose another" in message
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_flag_with_a_line_break_is_still_one_line(shell):
    refusal(["--name", "a\nb"], shell)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (World(), None)),
        ({"HOROVOD_RANK": "3", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"},
         (World(3, 8, 1, 2), "horovodrun")),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (World(1, 4, 1, 2), "mpirun")),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1"}, (World(), "horovodrun")),
        ({"SLURM_PROCID": "3"}, (World(), None)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (World(), None)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2,1",
          "SLURM_NODEID": "1", "SLURMD_NODENAME": "n2"}, (World(2, 3, 0, 1), "srun")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (World(), None)),  # a batch script: no srun
        ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
         (World(1, 4, 1, 2), "mpiexec")),
    ],
)  # fmt: skip
def test_what_the_launchers_say(variables, expected):
    assert launched(variables) == expected


ODD = [
    ({"HOROVOD_RANK": "", "HOROVOD_SIZE": ""}, "HOROVOD_RANK=, HOROVOD_SIZE="),
    ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2"}, "HOROVOD_RANK=0, HOROVOD_SIZE=2, HOROVOD_LOCAL_RANK is not set"),
    ({"HOROVOD_SIZE": "2"}, "HOROVOD_RANK is not set"),
    ({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"},
     "HOROVOD_RANK=2, HOROVOD_SIZE=2"),
    ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"},
     "HOROVOD_SIZE=2, but HOROVOD_GLOO_RENDEZVOUS_ADDR is not set"),
    ({"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2",
      "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"},
     "HOROVOD_SIZE=2, but no launcher answers at 127.0.0.1:9 ([Errno 111] Connection refused)"),
    ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "1", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
      "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"},
     "HOROVOD_SIZE=1, but no launcher answers at 127.0.0.1:9 ([Errno 111] Connection refused)"),
    ({"HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "9"},
     "HOROVOD_GLOO_RENDEZVOUS_ADDR=127.0.0.1, but HOROVOD_RANK is not set"),
    ({"HOROVOD_CROSS_RANK": "-1"}, "HOROVOD_LOCAL_SIZE is not set, HOROVOD_CROSS_RANK=-1: "),
    ({"HOROVOD_SIZE": "1", "HOROVOD_CROSS_RANK": "1", "HOROVOD_CROSS_SIZE": "1"},
     "HOROVOD_CROSS_RANK=1, HOROVOD_CROSS_SIZE=1: "),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NODEID is not set"),
    ({"PMI_RANK": "x", "PMI_SIZE": "2"}, "PMI_RANK=x, PMI_SIZE=2"),
    ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_LOCAL_RANK is not set"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2: Horovod does not read those of torchrun"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "message"), ODD, ids=[", ".join(each) for each, _ in ODD])
def test_launcher_variables_that_are_no_whole_are_refused_by_what_trains(variables, message, shell, tmp_path):
    said = refusal(["--dataset", "synthetic", "--run-dir", str(tmp_path / "runs")], {**shell, **variables})
    assert message in said
    assert "start with horovodrun" in said
    assert not (tmp_path / "runs").exists()
    # What asks for no ranks answers as ever.
    assert program(["--help"], {**shell, **variables}).returncode == 0


@pytest.mark.parametrize(("variables", "message"), ODD, ids=[", ".join(each) for each, _ in ODD])
def test_they_keep_nothing_from_what_computes_alone(variables, message):
    assert is_first(variables)


def test_where_the_launcher_is_there_its_first_rank_is_first():
    with Rendezvous("127.0.0.1") as server:
        for rank in (0, 1):
            assert is_first({**rank_variables(rank, 2), **server.variables()}) == (rank == 0)
        server.shutdown()


def test_a_folder_that_python_is_not_to_look_in_is_found(shell):
    assert "--depth 43: " in refusal(["--depth", "43"], {**shell, "PYTHONSAFEPATH": "1"})


# Whole runs ----------------------------------------------------------------------------------------------------

EPOCHS = 3  # of 512 images: 16 steps each
RUN = """--dataset synthetic --depth 8 --epochs 3 --batch-size 32 --precision float32 --ema 0.9 --deterministic
         --name tiny --sparsity 0.7 --initial-sparsity 0.2 --prune-begin 8s --prune-end 32s --prune-frequency 8s"""


def arguments(runs: Path, *more: str) -> list[str]:
    return [*RUN.split(), "--run-dir", str(runs), *more]


@pytest.fixture(scope="module")
def complete(shell, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    runs = tmp_path_factory.mktemp("complete")
    (runs / "temporary").mkdir()
    return runs / "tiny", program(arguments(runs), {**shell, "TMPDIR": str(runs / "temporary")})


def test_a_run_leaves_nothing_in_the_temporary_folder(complete):
    folder, done = complete
    assert done.returncode == 0, done.stderr
    assert list((folder.parent / "temporary").iterdir()) == []


@pytest.mark.timeout(300)
def test_a_last_step_that_was_too_large_is_no_result(shell, tmp_path):
    one_step = "--dataset synthetic --depth 8 --epochs 1 --batch-size 512 --warmup 0e --base-lr 1e30 --name tiny"
    done = program([*one_step.split(), "--run-dir", str(tmp_path)], shell)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "train_hvd.py: the test loss is not finite after the last step; a lower learning rate (--base-lr) may help"
    ]
    assert not (tmp_path / "tiny/result.json").exists()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lasting(folder: Path) -> list[dict]:
    """What of the metrics does not depend on the clock."""
    timed = {"seconds", "images_per_second", "step_seconds", "exchange_share"}
    return [{name: value for name, value in line.items() if name not in timed} for line in metrics(folder)]


@pytest.mark.timeout(300)
def test_a_run_ends_with_its_result_line_and_its_files(complete):
    folder, done = complete
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *_, line, hint = done.stdout.splitlines()
    assert line.startswith("test accuracy ")
    assert "at the last epoch, sparsity 70.0" in line
    assert line.endswith(str(folder))
    prefix, command, flag, logdir = hint.split()
    assert (prefix, flag, logdir) == ("TensorBoard:", "--logdir", str(folder / "tb"))
    assert Path("/", command).exists()  # from where the run was started
    epochs = [text for text in done.stdout.splitlines() if re.match(r"\d\d:\d\d epoch ", text)]
    assert len(epochs) == EPOCHS
    table = done.stdout.splitlines()[: done.stdout.splitlines().index(epochs[0])]
    assert max(len(text) for text in table + epochs if str(folder) not in text) <= 80
    assert [text.split()[0] for text in table if re.match(r"  \w", text)][:4] == ["started", "run", "ranks", "threads"]
    names = {path.name for path in folder.iterdir()}
    assert names == {".lock", "config.json", "env.json", "metrics.jsonl", "result.json", "tb", "checkpoints"}
    assert {path.name for path in (folder / "tb").iterdir()} == {"train", "test"}
    config, environment = (json.loads((folder / name).read_text()) for name in ("config.json", "env.json"))
    assert (config["name"], config["identity"]["depth"], config["identity"]["sparsity"]) == ("tiny", 8, 0.7)
    assert (environment["ranks"], environment["precision"]) == (1, "float32")
    assert {"horovod", "tensorflow", "tf-keras"} <= environment["packages"].keys()


@pytest.mark.timeout(300)
def test_a_complete_run_is_measured_by_the_same_command(complete, shell, tmp_path):
    folder, _ = complete
    shutil.copytree(folder, tmp_path / "tiny")
    # Whatever the user has set for Keras.
    (tmp_path / ".keras").mkdir()
    (tmp_path / ".keras/keras.json").write_text(json.dumps({"image_data_format": "channels_first"}))
    done = program(arguments(tmp_path, "--quantize"), {**shell, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "tiny/report.json").read_text())
    made = {entry["name"] for entry in report["files"]}
    assert made == {"float32", "float16", "dynamic", "int8", "sparse-float32", "sparse-dynamic", "sparse-int8"}
    assert {path.suffix for path in (tmp_path / "tiny/export").iterdir()} == {".tflite", ".md"}


def test_metrics_have_one_line_an_epoch(complete):
    folder, _ = complete
    lines = metrics(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line["step"] for line in lines] == [16, 32, 48]
    assert lines[-1]["loss"] < lines[0]["loss"]
    for line in lines:
        assert line["images_per_second"] == pytest.approx(32 / line["step_seconds"], rel=1e-4)
        assert 0 <= line["exchange_share"] < 0.5
        assert line["exchange_bytes"] == 0, "one rank sends nothing"
        assert (line["loss_scale"], line["skipped_steps"]) == (1, 0)
        assert line["sparsity"] == pytest.approx(line["target_sparsity"], abs=2e-4)
    result = json.loads((folder / "result.json").read_text())
    last = lines[-1]
    assert (result["test_accuracy"], result["test_loss"]) == (last["test_accuracy"], last["test_loss"])
    assert (result["step"], result["epoch"]) == (48, 3)
    assert result["sparsity"] == pytest.approx(0.7, abs=1e-4)


def test_the_checkpoint_is_sparse_to_the_weight(complete):
    folder, _ = complete
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == "step-00000048"
    with np.load(newest / "arrays.npz") as arrays:
        # Read with numpy alone: kernels of convolutions and of the classifier, and their averages.
        kernels = {name: arrays[name] for name in arrays.files if "/kernel:0" in name}
    for group in ("weights", "ema"):
        mine = {name: value for name, value in kernels.items() if name.startswith(f"{group}/")}
        assert len(mine) == 8
        assert {value.dtype for value in mine.values()} == {np.dtype(np.float32)}
        zeros = sum(int(np.sum(value == 0)) for value in mine.values())
        assert zeros == num_pruned(sum(value.size for value in mine.values()), 0.7)


def test_tensorboard_has_every_promised_curve(complete):
    folder, _ = complete
    lines = metrics(folder)
    steps = [line["step"] for line in lines]
    events = {name: event_files.curves(folder / "tb" / name) for name in ("train", "test")}
    promised = {
        "train": {"epoch/loss": "loss", "epoch/accuracy": "accuracy", "learning/learning_rate": "learning_rate",
                  "learning/loss_scale": "loss_scale", "learning/skipped_steps": "skipped_steps",
                  "performance/images_per_second": "images_per_second", "performance/step_seconds": "step_seconds",
                  "performance/exchange_share": "exchange_share", "performance/exchange_bytes": "exchange_bytes",
                  "pruning/target": "target_sparsity", "pruning/total": "sparsity"},
        "test": {"epoch/accuracy": "test_accuracy", "epoch/loss": "test_loss", "epoch/zeros": "sparsity"},
    }  # fmt: skip
    for name, tags in promised.items():
        for tag, metric in tags.items():
            found = event_files.points(events[name], tag)
            assert list(found) == steps, tag
            assert list(found.values()) == pytest.approx([line[metric] for line in lines], rel=1e-5), tag
    tags = set(events["train"].Tags()["tensors"])
    kernels = [f"stage{s}_block1_conv{c}" for s in (1, 2, 3) for c in (1, 2)] + ["stem", "classifier"]
    assert {f"pruning_by_layer/{name}" for name in kernels} | {f"kept/{name}" for name in kernels} <= tags
    result = json.loads((folder / "result.json").read_text())
    for name in kernels:
        ended = list(event_files.points(events["train"], f"pruning_by_layer/{name}").values())[-1]
        assert ended == pytest.approx(result["kernels"][name], rel=1e-5), name
        assert [event.step for event in events["train"].Tensors(f"kept/{name}")] == steps
    assert len(events["train"].Tensors("pruning/zeros_by_layer")) == len(steps)
    ((settings, results),) = event_files.table(folder)
    assert (settings["depth"], settings["sparsity"], settings["dataset"]) == (8, 0.7, "synthetic")
    assert results["epoch/minutes"] == pytest.approx(result["minutes"], rel=1e-5)


def test_the_same_command_says_that_the_run_is_complete(complete, shell):
    folder, before = complete
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = program(arguments(folder.parent), shell, "-X", "importtime")
    assert done.returncode == 0
    result_line = before.stdout.splitlines()[-2]
    assert done.stdout == f"{folder} is complete: {result_line}\n"
    assert "tensorflow" not in done.stderr
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.timeout(300)
def test_what_a_user_has_set_for_keras_and_tensorflow_computes_nothing(complete, shell, tmp_path):
    folder, _ = complete
    (tmp_path / ".keras").mkdir()
    # Keras 3 knows bfloat16 here, and Keras 2 fails to be imported with it.
    mine = {"image_data_format": "channels_first", "floatx": "bfloat16", "epsilon": 0.1}
    (tmp_path / ".keras/keras.json").write_text(json.dumps(mine))
    theirs = {
        "HOME": str(tmp_path),
        "KERAS_HOME": str(tmp_path / ".keras"),
        "TF_USE_LEGACY_KERAS": "0",
        "TF_ONEDNN_ASSUME_FROZEN_WEIGHTS": "1",
        "TF_DETERMINISTIC_OPS": "1",
    }
    done = program(arguments(tmp_path), {**shell, **theirs})
    assert done.returncode == 0, done.stderr
    assert lasting(tmp_path / "tiny") == lasting(folder)
    assert json.loads((tmp_path / ".keras/keras.json").read_text()) == mine


@pytest.fixture(scope="module")
def latin_1(tmp_path_factory) -> dict[str, str]:
    """Variables of a locale in which names of files are in ISO-8859-1."""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/charmaps").exists():
        pytest.skip("needs localedef and its charmaps, which make a locale")
    folder = tmp_path_factory.mktemp("locale")
    command = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
    subprocess.run(command, check=True, capture_output=True)
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONIOENCODING": "utf-8"}


@pytest.mark.timeout(600)
def test_files_are_in_the_folder_that_was_named_whatever_its_name_and_the_locale(latin_1, shell, tmp_path):
    # In ISO-8859-1 this byte is a letter; in UTF-8 it is no text at all. TensorFlow and Keras open these two formats.
    for variables, name, formats in (
        (latin_1, b"r\xe9", "saved-model,keras"),
        ({"LC_ALL": "C.UTF-8"}, b"s\xe9", "float16"),
    ):
        runs = os.path.join(os.fsencode(tmp_path), name)
        train = [PROGRAM, *RUN.split(), "--epochs", "1", "--prune-end", "16s", "--run-dir", runs]
        quantize = ["-m", "cnnopt.quantize", os.path.join(runs, b"tiny"), "--variants", formats, "--calibration", "32"]
        for command in (train, quantize):
            done = subprocess.run(
                [sys.executable, *command], env={**shell, **variables}, cwd=ROOT, capture_output=True, timeout=280
            )
            assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert name in os.listdir(os.fsencode(tmp_path))
        for part in (b"train", b"test", b"quantize"):
            events = os.listdir(os.path.join(runs, b"tiny/tb", part))
            assert any(event.startswith(b"events.out.tfevents.") for event in events), part
        assert {b"report.json", b"report.md", b"report.png", b"export"} <= set(os.listdir(os.path.join(runs, b"tiny")))
    # Nothing beside them.
    assert sorted(os.listdir(os.fsencode(tmp_path))) == [b"r\xe9", b"s\xe9"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("result", ["lost", "there"])
def test_a_line_that_was_lost_is_there_again_after_the_same_command(complete, shell, tmp_path, result):
    folder, _ = complete
    copy = shutil.copytree(folder, tmp_path / "tiny")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:-1]))
    if result == "lost":
        (copy / "result.json").unlink()
    done = program(arguments(tmp_path), shell)
    assert done.returncode == 0, done.stderr
    assert f"{copy}/metrics.jsonl had lost lines: 1 of 3 written again from the checkpoint" in done.stdout
    assert (copy / "metrics.jsonl").read_text() == "".join(lines)
    before, after = (json.loads((path / "result.json").read_text()) for path in (folder, copy))
    assert {**after, "line": ""} == {**before, "line": ""}
    assert done.stdout.splitlines()[-2] == before["line"].replace(str(folder), str(copy))


def test_another_configuration_is_refused_in_its_folder(complete, shell):
    folder, _ = complete
    message = refusal(arguments(folder.parent, "--depth", "14"), shell)
    assert (
        f"{folder} holds a run of another configuration (--depth was 8, is 14): use its flags, or give another --name"
        in message
    )


def test_never_resuming_does_not_overwrite(complete, shell, tmp_path):
    folder, _ = complete
    shutil.copytree(folder, tmp_path / "tiny")
    (tmp_path / "tiny" / "result.json").unlink()
    assert "--resume never: " in refusal(arguments(tmp_path, "--resume", "never"), shell)


def test_what_one_host_alone_finds_wrong_is_said_by_a_rank_of_it(shell, tmp_path):
    """The launcher would end the others, which know nothing of it."""
    elsewhere = {"HOROVOD_SIZE": "4", "HOROVOD_LOCAL_SIZE": "2", "HOROVOD_HOSTNAME": "b"}
    said = {}
    for rank, local in ((2, 0), (3, 1)):
        place = {"HOROVOD_RANK": str(rank), "HOROVOD_LOCAL_RANK": str(local)}
        done = program(["--data-dir", str(tmp_path / "none")], {**shell, **elsewhere, **place})
        assert done.returncode == 2
        said[rank] = done.stderr
    assert said[2].startswith(f"train_hvd.py: rank 2 (host b): --data-dir {tmp_path / 'none'}: does not exist")
    assert said[3] == ""


@pytest.mark.parametrize("nobody", ["a full disk", "a reader that has gone"])
def test_a_run_goes_on_when_nobody_can_read_it(nobody, shell, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.open("/dev/full", os.O_WRONLY) if nobody == "a full disk" else writer
    command = [sys.executable, str(PROGRAM), *arguments(tmp_path, "--epochs", "1", "--prune-end", "8s")]
    try:
        status = subprocess.run(command, env=shell, stdout=stream, stderr=stream, cwd="/", timeout=200).returncode
    finally:
        for number in {stream, writer}:
            os.close(number)
    assert status == 0
    assert json.loads((tmp_path / "tiny/result.json").read_text())["epoch"] == 1
    assert len(metrics(tmp_path / "tiny")) == len(checkpoint.list_steps(tmp_path / "tiny/checkpoints")) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a host another name")
def test_a_host_whose_name_has_no_address_trains_alone_and_refuses_ranks(shell, tmp_path):
    nameless = ["unshare", "--uts", "sh", "-c", 'hostname nosuch; exec "$@"', "sh"]
    train = [sys.executable, str(PROGRAM), *arguments(tmp_path, "--epochs", "1", "--prune-end", "8s")]
    ranks = [sys.executable, "-m", "cnnopt.launch", "-np", "2", "--", *train]
    done = subprocess.run([*nameless, *ranks], env=shell, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if not line.startswith("cnnopt.launch: ")] == [
        "train_hvd.py: this host's name nosuch has no address here, and Horovod needs one; add it to /etc/hosts"
    ]
    done = subprocess.run([*nameless, *train], env=shell, capture_output=True, text=True, cwd="/", timeout=200)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder read-only for one program")
@pytest.mark.parametrize("command", ["train_hvd.py", "cnnopt.quantize"])
def test_a_host_without_a_folder_for_temporary_files_is_one_line(command, shell, tmp_path):
    program = [str(PROGRAM), "--dataset", "synthetic", "--run-dir", str(tmp_path)]
    if command == "cnnopt.quantize":
        file = tmp_path / "x.tflite"
        file.write_bytes(b"\0\0\0\0TFL3")
        program = ["-m", command, "pack", str(file)]
    closed = "for folder in /tmp /var/tmp; do mount --bind $folder $folder; mount -o remount,bind,ro $folder; done; "
    closed += 'mount --bind "$0" "$0"; mount -o remount,bind,rw "$0"; cd /proc; exec "$@"'
    given = ["unshare", "--mount", "sh", "-ec", closed, str(tmp_path), sys.executable, *program]
    variables = {name: value for name, value in shell.items() if name not in ("TMPDIR", "TEMP", "TMP")}
    done = subprocess.run(
        given, env={**variables, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100
    )
    line = "no folder for temporary files can be written; set TMPDIR to one that can be"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{command}: {line}\n")


def test_a_complete_run_below_a_folder_with_a_colon_is_quantized(shell, tmp_path):
    copy = tmp_path / "a:b"
    copy.mkdir()
    shutil.copy(PROGRAM, copy)
    (copy / "cnnopt").symlink_to(ROOT / "cnnopt")
    flags = ["--dataset", "synthetic", "--run-dir", str(tmp_path / "runs"), "--name", "done", "--quantize"]
    config = parse_args(flags)
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    folder.config_file.write_text(json.dumps({"identity": config.identity()}))
    folder.append({"step": 1})
    folder.finish({"step": 1, "line": "as it was"})
    done = subprocess.run(
        [sys.executable, str(copy / PROGRAM.name), *flags], env=shell, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout == f"{folder.path} is complete: as it was\n"
    # It was found, and misses what this run never had.
    assert done.stderr.startswith("cnnopt.quantize: ")
    assert str(folder.checkpoints) in done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_ctrl_c_while_it_starts_ends_it_at_once_without_a_traceback(shell):
    process = start(["--dataset", "synthetic", "--epochs", "9"], shell, "-X", "importtime")
    lines = []
    while not lines or lines[-1].split("|")[-1].strip() != "cnnopt":
        lines.append(process.stderr.readline())
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    # As a shell reports it, 130: the signal's own end, or ours.
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in stderr


@pytest.mark.timeout(300)
def test_the_first_ctrl_c_saves_and_says_how_to_go_on(shell, tmp_path):
    process = start(arguments(tmp_path, "--epochs", "400"), shell)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "tiny/metrics.jsonl").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, stderr) == (130, "")
    assert stdout.splitlines()[-1].startswith("stopped by a signal, and saved; the same command goes on")
    assert checkpoint.list_steps(tmp_path / "tiny/checkpoints")


@pytest.mark.timeout(300)
def test_a_stop_after_the_last_step_quantizes_nothing(shell, tmp_path):
    code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_hvd
from cnnopt.distributed import entrypoint
import cnnopt.training.callbacks as callbacks

evaluate = callbacks.Evaluate.on_epoch_end
def told_meanwhile(self, epoch, logs=None):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)
    evaluate(self, epoch, logs)

callbacks.Evaluate.on_epoch_end = told_meanwhile
entrypoint.start(train_hvd.main)
"""
    command = [sys.executable, "-c", code, *arguments(tmp_path, "--epochs", "1", "--sparsity", "0", "--quantize")]
    done = subprocess.run(command, env=shell, capture_output=True, text=True, cwd="/", timeout=200)
    assert done.returncode == 75, done.stderr
    assert done.stdout.endswith("stopped by a signal after the last step; the same command quantizes the run\n")
    assert (tmp_path / "tiny/result.json").exists()
    assert not (tmp_path / "tiny/export").exists()


@pytest.mark.timeout(300)
def test_sigterm_saves_and_the_same_command_goes_on_bit_for_bit(complete, shell, tmp_path):
    folder = tmp_path / "tiny"
    process = start(arguments(tmp_path), shell)
    try:
        deadline = time.monotonic() + 150
        while process.poll() is None and time.monotonic() < deadline:
            if (folder / "metrics.jsonl").exists() and len(metrics(folder)) >= 1:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 75, stderr
    assert stdout.splitlines()[-1].startswith("stopped by a signal, and saved; the same command goes on")
    assert stderr == ""
    assert not (folder / "result.json").exists()
    saved = checkpoint.list_steps(folder / "checkpoints")[-1]
    stopped_at = int(saved.name.removeprefix("step-"))
    assert 16 < stopped_at < 48

    done = program(arguments(tmp_path), shell)
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {stopped_at} from {saved}" in done.stdout
    assert [line["step"] for line in metrics(folder)] == [16, 32, 48]
    for name, tag in (("train", "epoch/loss"), ("test", "epoch/accuracy"), ("train", "pruning/total")):
        assert list(event_files.points(event_files.curves(folder / "tb" / name), tag)) == [16, 32, 48]

    uninterrupted, _ = complete
    with (np.load(uninterrupted / "checkpoints" / "step-00000048" / "arrays.npz") as expected,
          np.load(folder / "checkpoints" / "step-00000048" / "arrays.npz") as found):  # fmt: skip
        assert expected.files == found.files
        for name in expected.files:
            np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert metrics(folder)[-1]["test_loss"] == metrics(uninterrupted)[-1]["test_loss"]


def test_ranks_that_do_not_join_are_found_out(shell, tmp_path):
    """mpirun with a Horovod that was built without MPI: each process would train alone."""
    ranks = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
             "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    message = refusal(["--dataset", "synthetic", "--run-dir", str(tmp_path)], {**shell, **ranks})
    assert "mpirun started 2 processes but Horovod joined 1" in message
