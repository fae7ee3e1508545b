"""The run folder, and resuming: bit for bit, on one curve, and never from another run's checkpoint."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from cnnopt.config import ConfigError
from cnnopt.distributed.host import versions
from cnnopt.distributed.world import World
from cnnopt.run import checkpoint, run_folder
from cnnopt.run.atomic_files import ReadError
from cnnopt.run.run_folder import RunFolder, environment, summarize
from cnnopt.training import callbacks, metrics, resume
from tests.helpers import ROOT, event_files, small_runs
from tests.helpers.permissions import stopped_by_permissions

# Results -------------------------------------------------------------------------------------------------------


def line(epoch: int, accuracy: float, speed: float = 100.0) -> dict:
    return {"epoch": epoch, "step": 10 * epoch, "test_accuracy": accuracy, "test_loss": 1 - accuracy, "seconds": 30.0,
            "step_seconds": 3.0, "images_per_second": speed}  # fmt: skip


def test_the_result_is_the_last_epoch_never_the_best():
    lines = [line(1, 0.5, 10), line(2, 0.9, 300), line(3, 0.7, 200)]
    assert summarize(lines, {"stem": 0.5, "classifier": 0.7, "total": 0.6}, {}) == {
        "test_accuracy": 0.7, "test_loss": pytest.approx(0.3), "epoch": 3, "step": 30, "sparsity": 0.6,
        "images_per_second": 200, "minutes": 1.5, "kernels": {"stem": 0.5, "classifier": 0.7},
    }  # fmt: skip


def test_minutes_are_of_all_steps_of_a_resumed_epoch():
    lines = [line(1, 0.5), {**line(2, 0.6), "seconds": 6.0}]
    assert summarize(lines, {"total": 0.6}, {})["minutes"] == 1.0


def test_minutes_do_not_multiply_a_step_that_compiled():
    # The second epoch was resumed at its last step, which took 15 s.
    lines = [line(1, 0.5), {**line(2, 0.6), "seconds": 15.0, "step_seconds": 15.0}, line(3, 0.7)]
    assert summarize(lines, {"total": 0.6}, {})["minutes"] == 1.5


def test_the_environment_names_versions_and_settings():
    found = environment({"TF_NUM_INTRAOP_THREADS": "2"})
    assert found["settings"] == {"TF_NUM_INTRAOP_THREADS": "2"}
    assert found["packages"]["horovod"] == "0.28.1"
    assert found["cores"] >= 1
    json.dumps(found)


def test_a_package_that_goes_by_another_name_is_no_error():
    assert versions(["numpy", "absent"]) == {"numpy": np.__version__, "absent": None}


# metrics.jsonl -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def test_rewind_drops_what_comes_after_the_step(folder):
    folder.rewind(5)
    assert not folder.metrics_file.exists()
    for epoch in range(1, 5):
        folder.append(line(epoch, 0.1 * epoch))
    folder.rewind(40)
    assert [entry["epoch"] for entry in folder.metrics()] == [1, 2, 3, 4]
    folder.rewind(29)
    assert [entry["epoch"] for entry in folder.metrics()] == [1, 2]
    folder.append(line(3, 0.3))
    assert folder.metrics() == [line(epoch, 0.1 * epoch) for epoch in (1, 2)] + [line(3, 0.3)]
    folder.rewind(0)
    assert folder.metrics() == []


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_last_line_that_was_cut_off_is_left_out(folder, cut):
    for epoch in (1, 2, 3):
        folder.append(line(epoch, 0.5))
    text = folder.metrics_file.read_text()
    folder.metrics_file.write_text(text[: -1 - cut])
    assert [entry["epoch"] for entry in folder.metrics()] == [1, 2]
    folder.rewind(20)
    folder.append(line(3, 0.5))
    assert folder.metrics_file.read_text() == text


@pytest.mark.parametrize("damage", [b"\0" * 40, b"[1]\n", b'{"epoch": 2}\n', b'"step"\n', b"\xff\n"])
def test_what_is_no_line_ends_the_metrics(folder, damage):
    folder.append(line(1, 0.5))
    with folder.metrics_file.open("ab") as file:
        file.write(damage)
    folder.append(line(2, 0.5))
    assert folder.metrics() == [line(1, 0.5)]
    folder.rewind(10)
    assert folder.metrics_file.read_text() == json.dumps(line(1, 0.5)) + "\n"


def test_a_result_says_that_the_run_is_complete(folder):
    assert folder.result() is None
    folder.append(line(1, 0.5))
    folder.finish({**summarize(folder.metrics(), {"total": 0.6}, {}), "line": "as it was"})
    assert folder.result()["test_accuracy"] == 0.5
    assert {path.name for path in folder.path.iterdir()} == {"metrics.jsonl", "result.json"}


# May this run be here? -----------------------------------------------------------------------------------------


def refusal(config) -> str:
    with pytest.raises((ConfigError, ReadError)) as caught:
        RunFolder.of(config).check(config)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def opened(tmp_path, **changes) -> RunFolder:
    config = small_runs.settings(run_dir=str(tmp_path / "runs"), name="x", **changes)
    folder = RunFolder.of(config)
    folder.check(config)
    folder.open(config, {"host": "here"})
    return folder


def test_a_new_run_and_the_same_run_are_welcome(tmp_path):
    config = small_runs.settings(run_dir=str(tmp_path / "runs"), name="x")
    RunFolder.of(config).check(config)
    assert not (tmp_path / "runs").exists()
    folder = opened(tmp_path)
    folder.check(config)
    assert {path.name for path in folder.path.iterdir()} == {".lock", "config.json", "env.json"}
    assert json.loads((folder.path / "config.json").read_text())["identity"] == config.identity()


def test_another_configuration_is_named(tmp_path):
    opened(tmp_path, seed=1)
    message = refusal(small_runs.settings(run_dir=str(tmp_path / "runs"), name="x", seed=2))
    assert "holds a run of another configuration (--seed was 1, is 2): use its flags, or give another --name" in message


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "null", '{"identity": 3}', '{"identity": [1]}', '{"identity": null}', b"\xff\xfe"]
)
def test_a_damaged_config_is_named(tmp_path, text):
    folder = opened(tmp_path)
    folder.config_file.write_bytes(text.encode() if isinstance(text, str) else text)
    message = refusal(small_runs.settings(run_dir=str(tmp_path / "runs"), name="x"))
    assert f"{folder.config_file} is damaged" in message


def test_never_resuming_needs_an_empty_place(tmp_path):
    folder = opened(tmp_path)
    config = small_runs.settings(run_dir=str(tmp_path / "runs"), name="x", resume="never")
    folder.check(config)
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert "--resume never: " in refusal(config)
    assert "give another --name, or delete it" in refusal(config)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    config = small_runs.settings(run_dir=str(tmp_path / "runs"), name="x")
    assert f"cannot write in {tmp_path / 'runs'}; choose another folder" in refusal(config)
    with pytest.raises(ConfigError, match=r"--run-dir .* choose another"):
        RunFolder.of(config).open(config, {})


def test_a_checkpoint_to_resume_from_must_exist(tmp_path):
    config = small_runs.settings(run_dir=str(tmp_path / "runs"), name="x", resume=str(tmp_path / "none"))
    assert "no such checkpoint folder; give auto, never or a folder" in refusal(config)


@pytest.mark.parametrize(("closed", "said"), [
    (".", "--run-dir {runs}: Permission denied; choose another folder"),
    ("runs", "--run-dir {runs}: Permission denied; choose another folder"),
    ("runs/x", "--run-dir {runs}: Permission denied; choose another folder"),
    ("runs/x/checkpoints", "--run-dir {runs}: Permission denied; choose another folder"),
])  # fmt: skip
def test_a_folder_that_may_not_be_entered_is_one_line(closed, said, tmp_path):
    place = tmp_path / "place"
    runs = place / "runs"
    opened(place)
    (runs / "x/checkpoints").mkdir()
    flags = ["--dataset", "synthetic", "--name", "x", "--run-dir", str(runs), "--resume", "never"]
    code = f"""
import sys; from cnnopt.config import parse_args; from cnnopt.run.run_folder import RunFolder
import dataclasses, json
config = parse_args({flags!r})
config = dataclasses.replace(config, **json.loads(sys.argv[1]))
RunFolder.of(config).check(config)
"""
    identity = json.dumps(small_runs.settings().identity())
    (place / closed).chmod(0)
    try:
        done = subprocess.run(
            stopped_by_permissions([sys.executable, "-c", code, identity]), cwd=ROOT, capture_output=True, text=True
        )
    finally:
        (place / closed).chmod(0o700)
    # Python 3.14 does not tell such a folder from one that is not there, and then finds that it cannot write there.
    assert re.match(
        rf"cnnopt.config.ConfigError: {said.format(runs=runs)}|.*cannot write in", done.stderr.splitlines()[-1]
    ), done.stderr


@pytest.mark.parametrize("run_dir", ["{tmp}/" + "d" * 300, "~no-such-user/runs"])
def test_a_run_folder_that_no_name_leads_to_is_refused_at_once(run_dir, tmp_path):
    config = small_runs.settings(run_dir=run_dir.format(tmp=tmp_path), name="x")
    assert refusal(config).startswith(f"--run-dir {config.run_dir}: ")


def test_a_run_of_an_earlier_version_goes_on_in_its_folder(tmp_path):
    folder = opened(tmp_path)
    content = json.loads(folder.config_file.read_text())
    del content["identity"]["wire_dtype"]
    folder.config_file.write_text(json.dumps(content))
    assert folder.identity("") == small_runs.settings().identity()
    opened(tmp_path)
    assert json.loads(folder.config_file.read_text())["identity"]["wire_dtype"] == "float32"
    with pytest.raises(ConfigError, match="--wire-dtype was float32, is float16"):
        opened(tmp_path, wire_dtype="float16")


def test_a_folder_in_which_another_process_trains_is_refused_until_that_ends(tmp_path, monkeypatch, capsys):
    config = small_runs.settings(run_dir=str(tmp_path), name="x")
    folder = RunFolder.of(config)
    lock = folder.path / ".lock"
    folder.path.mkdir()
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        monkeypatch.setattr(run_folder, "PATIENCE", 0.2)
        with pytest.raises(ConfigError, match=rf"{folder.path}: another process trains in it; stop it, .*{lock}"):
            folder.open(config, {})
        assert f"{folder.path}: another process trains in it; waiting" in capsys.readouterr().out
        assert not folder.config_file.exists()
        other.kill()
    # What a killed process held is free, unless it was another run.
    other_config = small_runs.settings(run_dir=str(tmp_path), name="x", seed=1)
    RunFolder.of(other_config).open(other_config, {})
    with pytest.raises(ConfigError, match="another configuration"):
        folder.open(config, {})


def test_a_run_that_another_process_completed_meanwhile_keeps_its_records(tmp_path):
    config = small_runs.settings(run_dir=str(tmp_path), name="x")
    first, second = RunFolder.of(config), RunFolder.of(config)
    assert first.open(config, {"ranks": 1}) is None
    result = {"step": 24, "accuracy": 0.5, "line": "done"}
    first.append({"step": 24, "epoch": 3, "test_accuracy": 0.5})
    first.finish(result)
    first._held.release()
    assert second.open(config, {"ranks": 2}) == second.result() is not None
    assert json.loads((first.path / "env.json").read_text()) == {"ranks": 1}


# Going on ------------------------------------------------------------------------------------------------------


def run(config, stop_after: int | None = None) -> tuple[RunFolder, dict[str, np.ndarray], list[str]]:
    """What train_hvd.py does, in this process; the folder, the state at the end, and what was said."""
    folder, said = RunFolder.of(config), []
    model = small_runs.build(config)
    folder.open(config, {})
    first_step = resume.restore(model, config, folder, World(), said.append)
    timeline = small_runs.timeline_of(config)

    class Stop(callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch + 1 == stop_after

    hooks = [Stop(), callbacks.Prune(), metrics.Measure(timeline), callbacks.Evaluate(small_runs.IMAGES, World()),
             *small_runs.writers(config, folder, first_step, Console(quiet=True))]  # fmt: skip
    small_runs.fit(model, config, hooks)
    return folder, small_runs.state(model), said


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, float32_policy):
    stop_after = 10  # in the middle of an epoch, and between two mask updates
    config = small_runs.settings(
        precision="float16", optimizer="adam", ema=0.9, deterministic=True, name="x", keep=9, save_every="4s"
    )
    config = {name: dataclasses.replace(config, run_dir=str(tmp_path / name)) for name in ("whole", "parts")}
    whole, expected, said = run(config["whole"])
    assert said == []
    parts, stopped, _ = run(config["parts"], stop_after)
    assert int(stopped["global_step"]) == stop_after
    _, found, said = run(config["parts"])
    assert said == [f"resumed after step {stop_after} from {parts.checkpoints / f'step-{stop_after:08d}'}"]
    groups = {name.partition("/")[0] for name in expected}
    assert groups == {"weights", "optimizer", "masks", "loss_scale", "ema", "global_step"}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert [entry["test_loss"] for entry in parts.metrics()] == [entry["test_loss"] for entry in whole.metrics()]
    assert [entry["step"] for entry in parts.metrics()] == [8, 16, 24]

    # A crash after the metrics of three epochs, with only checkpoints of the first left: the rest is done again.
    for path in checkpoint.list_steps(parts.checkpoints)[2:]:
        shutil.rmtree(path)
    _, found, said = run(config["parts"])
    assert said == [f"resumed after step 8 from {parts.checkpoints / 'step-00000008'}"]
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert [entry["step"] for entry in parts.metrics()] == [8, 16, 24]
    for name, tag in (("train", "epoch/loss"), ("test", "epoch/accuracy"), ("train", "pruning/total"),
                      ("train", "kept/stem")):  # fmt: skip
        curve = event_files.curves(parts.tensorboard / name).Tensors(tag)
        assert [event.step for event in curve] == [8, 16, 24], tag


def test_a_damaged_result_is_one_line(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.result() is None
    for damage in ("{", "[1]", "", '{"accuracy": 0.5}', '{"step": "8"}'):
        folder.result_file.write_text(damage)
        with pytest.raises(ReadError, match=r"result\.json is damaged: delete it"):
            folder.result()


@pytest.mark.parametrize("how", ["auto", "never"])
def test_a_run_that_starts_again_forgets_the_metrics_of_its_first_attempt(how, tmp_path, float32_policy):
    config = small_runs.settings(name="x", run_dir=str(tmp_path), resume=how)
    folder, said = RunFolder.of(config), []
    folder.open(config, {})
    folder.append(line(1, 0.5))
    assert resume.restore(small_runs.build(config), config, folder, World(), said.append) == 0
    assert folder.metrics() == said == []


def test_checkpoints_that_do_not_fit_are_passed_over_with_the_reason(tmp_path, float32_policy):
    config = small_runs.settings(name="x", run_dir=str(tmp_path), keep=9)
    model, folder, said = small_runs.build(config), RunFolder.of(config), []
    folder.open(config, {})
    identity, arrays = config.identity(), small_runs.state(model)

    def save(step, arrays, state):
        return checkpoint.save(folder.checkpoints, step, arrays, state, keep=9)

    good = save(2, {**arrays, "global_step": np.int64(2)}, {"identity": identity})
    save(4, {"weights": np.zeros(3)}, {"identity": identity})
    save(8, arrays, {"identity": small_runs.settings(weight_decay=0.25).identity()})
    save(12, arrays, {})
    (save(16, arrays, {"identity": identity}) / "arrays.npz").write_bytes(b"")
    assert resume.restore(model, config, folder, World(), said.append) == 2
    assert int(model.run.global_step.numpy()) == 2
    reasons = [
        "arrays.npz is not what was saved",
        "of another configuration: it names none",
        "of another configuration: --weight-decay was 0.25, is 0.001",
        "of another model: ",
        f"resumed after step 2 from {good}",
    ]
    assert len(said) == len(reasons)
    for text, reason in zip(said, reasons, strict=True):
        assert reason in text


def test_a_named_checkpoint_that_does_not_fit_stops_the_run(tmp_path, float32_policy):
    model = small_runs.build(small_runs.settings())
    other = small_runs.settings(seed=5).identity()
    path = checkpoint.save(tmp_path / "c", 8, small_runs.state(model), {"identity": other})
    config = small_runs.settings(resume=str(path), run_dir=str(tmp_path))
    with pytest.raises(checkpoint.CheckpointError, match=rf"--resume {path}: .*--seed was 5, is 0"):
        resume.restore(model, config, RunFolder.of(config), World(), print)


def test_resume_restores_every_variable(tmp_path, float32_policy):
    config = small_runs.settings(precision="float16", ema=0.9, run_dir=str(tmp_path), name="x")
    model = small_runs.build(config)
    rng = np.random.default_rng(0)
    folder = RunFolder.of(config)
    folder.open(config, {})
    old = small_runs.state(model)
    arrays = {name: (rng.random(value.shape) * 100).astype(value.dtype) for name, value in old.items()}
    # Mean and deviation of the pixels are constants: each is its own average.
    constants = [name for name in arrays if name.startswith("weights/") and name.endswith(("/mean:0", "/std:0"))]
    for name in constants:
        _, number, variable = name.split("/")
        arrays[f"ema/{number}/ema/{variable}:0"] = arrays[name]
    assert len(constants) == 2
    assert arrays.keys() == old.keys()
    checkpoint.save(folder.checkpoints, 7, arrays, {"identity": config.identity()})
    assert resume.restore(model, config, folder, World(), print) == 7
    for name, value in small_runs.state(model).items():
        np.testing.assert_array_equal(value, arrays[name], err_msg=name)
