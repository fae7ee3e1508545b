"""Saved state and resumed runs: small runs in one process."""

import json
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from tf_keras.callbacks import Callback

from cnnopt.distributed.peer_status import PeerStatus
from cnnopt.distributed.signals import StopRequest
from cnnopt.distributed.world import World
from cnnopt.run import checkpoint, run_folder
from cnnopt.run.atomic_files import ReadError, WriteError
from cnnopt.run.run_folder import RunFolder
from cnnopt.training import callbacks, console, metrics, resume, session
from tests.helpers import small_runs


class Tell(Callback):
    """Tells the run to stop while it takes the step after ``step``."""

    def __init__(self, request: StopRequest, step: int) -> None:
        super().__init__()
        self.request, self.step = request, step

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.request.told = self.request.told or batch == self.step


def run(
    path, *, save_every: str = "100s", stop_in: int | None = None, hooks: Sequence[Callback] = (), **changes: object
) -> tuple[RunFolder, callbacks.StopWhenTold]:
    """Train to the end or until told in step ``stop_in``, from the newest checkpoint; the real hooks in their order."""
    changes = {"run_dir": str(path), "name": "run", "deterministic": True, **changes}
    config = small_runs.settings(save_every=save_every, **changes)
    folder, world, timeline = RunFolder.of(config), World(), small_runs.timeline_of(config)
    model = small_runs.build(config)
    folder.open(config, {})
    first_step = resume.restore(model, config, folder, world, say=print)
    request = StopRequest()
    stop = callbacks.StopWhenTold(request)
    small_runs.fit(
        model,
        config,
        [
            *hooks,
            *([Tell(request, stop_in)] if stop_in is not None else []),
            stop,
            callbacks.Prune(print),
            metrics.Measure(timeline),
            callbacks.Evaluate(small_runs.IMAGES, world),
            *small_runs.writers(config, folder, first_step, console.make_console(quiet=False)),
        ],
    )
    return folder, stop


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., RunFolder]:
    """As ``run``, for what many tests begin with: trained once for the same settings, then copied."""
    originals: dict[tuple, Path] = {}

    def copy(path: Path, **settings: object) -> RunFolder:
        key = tuple(sorted(settings.items()))
        if key not in originals:
            originals[key] = tmp_path_factory.mktemp("made")
            run(originals[key], **settings)
        shutil.copytree(originals[key], path, dirs_exist_ok=True)
        return RunFolder(path / "run")

    return copy


def steps(folder: RunFolder) -> list[int]:
    return [checkpoint.load(path).step for path in checkpoint.list_steps(folder.checkpoints)]


@pytest.mark.parametrize("save_every", ["8s", "4s"])
def test_a_save_at_the_last_step_of_an_epoch_comes_after_its_line(tmp_path, monkeypatch, save_every):
    found = []

    def save(path, step, arrays, state, **settings):
        lines = folder.metrics() if folder.metrics_file.exists() else []
        found.append((step, len(lines), "metric" in state))

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save", save)
    run(tmp_path, save_every=save_every)
    at_ends = [(8, 1, True), (16, 2, True), (24, 3, True)]
    between = [(4, 0, False), (12, 1, False), (20, 2, False)] if save_every == "4s" else []
    assert found == sorted(at_ends + between)


@pytest.mark.parametrize(("stop_in", "lines"), [(7, 1), (8, 1), (23, 3)])
def test_a_stop_at_the_last_step_of_an_epoch_waits_for_its_line(tmp_path, stop_in, lines):
    folder, stop = run(tmp_path, stop_in=stop_in)
    assert stop.stopped
    assert steps(folder) == [stop_in + 1]
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24][:lines]


def test_an_epoch_that_was_stopped_in_the_middle_has_the_loss_of_all_its_steps(made, tmp_path):
    undisturbed = made(tmp_path / "one")
    folder, _ = run(tmp_path / "two", stop_in=10)
    assert steps(folder) == [11]
    run(tmp_path / "two", stop_in=13)
    folder, stop = run(tmp_path / "two")
    assert not stop.stopped
    last, wanted = (checkpoint.load(checkpoint.list_steps(f.checkpoints)[-1]) for f in (folder, undisturbed))
    for name, value in wanted.arrays.items():
        np.testing.assert_array_equal(last.arrays[name], value, err_msg=name)
    for line, other in zip(folder.metrics(), undisturbed.metrics(), strict=True):
        assert line["step"] == other["step"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert line["accuracy"] == pytest.approx(other["accuracy"], rel=1e-6)
        assert (line["test_loss"], line["test_accuracy"]) == (other["test_loss"], other["test_accuracy"])


class Break(Callback):
    """Puts a file where the folder of checkpoints belongs, before the step after ``step``."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__()
        self.folder, self.step = folder, step

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        if batch == self.step:
            self.folder.write_text("")


def test_a_save_that_fails_costs_the_run_only_where_no_other_follows(tmp_path, capsys):
    path = tmp_path / "run" / "checkpoints"
    with pytest.raises(checkpoint.SaveError, match="step-00000024"):
        run(tmp_path, save_every="1e", hooks=[Break(path, 3)])
    said = capsys.readouterr().out
    assert [f"step-{step:08d}" in said for step in (8, 16, 24)] == [True, True, False]
    assert said.count("training goes on") == 2
    path.unlink()
    with pytest.raises(checkpoint.SaveError, match="step-00000005"):
        run(tmp_path, save_every="1e", hooks=[Break(path, 3)], stop_in=4)


class Kept:
    """A standard output that notes what is kept on the disk when an epoch's line comes."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.found = folder, []

    def write(self, text: str) -> int:
        if " epoch " in text:
            lines = len(self.folder.metrics()) if self.folder.metrics_file.exists() else 0
            self.found.append((lines, len(checkpoint.list_steps(self.folder.checkpoints))))
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def test_what_is_printed_waits_until_all_is_kept(tmp_path, monkeypatch):
    config = small_runs.settings(save_every="1e", run_dir=str(tmp_path), name="run")
    folder, model = RunFolder.of(config), small_runs.build(config)
    folder.open(config, {})
    monkeypatch.setattr("sys.stdout", Kept(folder))
    rank = session.Rank(World(), console.make_console(quiet=False), StopRequest(), PeerStatus("test"))
    session.train(rank, model, small_runs.IMAGES, config, folder, masks=[callbacks.Prune(print)])
    found = sys.stdout.found
    monkeypatch.undo()
    assert found == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_a_log_holds_no_codes_of_a_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    said = console.make_console(quiet=False)
    assert not said.is_terminal
    said.print("[bold]a line", style="red")
    assert capsys.readouterr().out == "[bold]a line\n"


def test_strict_save_ends_the_run_at_the_first_save_that_fails(tmp_path):
    with pytest.raises(checkpoint.SaveError, match="step-00000008"):
        run(tmp_path, save_every="1e", strict_save=True, hooks=[Break(tmp_path / "run" / "checkpoints", 3)])


class Limit(Callback):
    """While epoch ``epoch`` ends, files may grow by ``spare`` bytes: as on a full disk, a write falls short."""

    def __init__(self, path: Path, spare: int, epoch: int) -> None:
        super().__init__()
        self.path, self.spare, self.epoch = path, spare, epoch
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if epoch == self.epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.path.stat().st_size + self.spare, self.before[1]))

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("spare", [0, 50])
def test_a_line_that_finds_no_space_is_written_with_the_next(tmp_path, capsys, spare):
    folder = RunFolder(tmp_path / "run")
    run(tmp_path, hooks=[Limit(folder.metrics_file, spare, 1)])
    said = capsys.readouterr().out
    assert f"cannot record epoch 2 in {folder.path}" in said
    assert said.count("training goes on") == 1
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]


def test_a_line_that_waits_is_written_when_the_run_is_told_to_stop(tmp_path):
    folder = RunFolder(tmp_path / "run")
    limit = Limit(folder.metrics_file, 50, 1)
    run(tmp_path, hooks=[limit], stop_in=18)
    run(tmp_path)
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]


def test_a_last_line_that_finds_no_space_ends_the_run_and_is_made_again(tmp_path):
    limit = Limit(tmp_path / "run/metrics.jsonl", 50, 2)
    try:
        with pytest.raises(WriteError, match=r"cannot record epoch 3 .*; free some space"):
            run(tmp_path, save_every="1e", hooks=[limit])
    finally:
        limit.on_epoch_begin(0)
    folder, _ = run(tmp_path, save_every="1e")
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]


def test_a_run_goes_on_in_another_precision_with_a_loss_scale_of_its_own(tmp_path, capsys, float32_policy):
    folder, _ = run(tmp_path, stop_in=7, precision="float16")
    identity = small_runs.settings(precision="auto").identity()
    saved = checkpoint.load(checkpoint.list_steps(folder.checkpoints)[-1])
    assert saved.arrays["loss_scale/000/loss_scale:0"] == 2**15
    # What a run with --precision auto leaves on a machine with a GPU.
    saved.state["identity"] = {**identity, "deterministic": True}
    checkpoint.save(folder.checkpoints, 8, saved.arrays, saved.state)
    folder.config_file.write_text(json.dumps({"identity": saved.state["identity"]}))
    run(tmp_path, precision="auto", stop_in=15)
    assert "--precision auto was float16 until now, and is " in capsys.readouterr().out
    (last,) = [load for load in map(checkpoint.load, checkpoint.list_steps(folder.checkpoints)) if load.step == 16]
    assert last.arrays["loss_scale/000/loss_scale:0"] == 1
    assert max(np.abs(value).max() for name, value in last.arrays.items() if "kernel" in name) < 5


def test_a_named_checkpoint_of_another_run_is_for_the_first_start(tmp_path, capsys):
    first, _ = run(tmp_path, stop_in=3)
    (source,) = checkpoint.list_steps(first.checkpoints)
    second, _ = run(tmp_path, name="second", resume=str(source), stop_in=6)
    assert f"resumed after step 4 from {source}" in capsys.readouterr().out
    run(tmp_path, name="second", resume=str(source), stop_in=9)
    said = capsys.readouterr().out
    assert f"--resume {source} was for the first start" in said
    assert f"resumed after step 7 from {second.checkpoints / 'step-00000007'}" in said
    assert steps(second) == [7, 10]
    # A checkpoint of its own takes a run back.
    run(tmp_path, name="second", resume=str(second.checkpoints / "step-00000007"), stop_in=8)
    assert "resumed after step 7" in capsys.readouterr().out


def test_a_run_goes_back_once_and_never_on_from_what_it_has_left(tmp_path, capsys):
    folder, _ = run(tmp_path, save_every="5s", keep=9, stop_in=17)
    assert steps(folder) == [5, 10, 15, 18]
    back = str(folder.checkpoints / "step-00000010")
    run(tmp_path, keep=9, resume=back, stop_in=12)
    assert f"resumed after step 10 from {back}" in capsys.readouterr().out
    assert steps(folder) == [5, 10, 13]
    assert sorted(path.name for path in folder.checkpoints.glob("abandoned-*")) == [
        "abandoned-step-00000015",
        "abandoned-step-00000018",
    ]
    # Queued again with the same flags, and then started without them.
    run(tmp_path, keep=9, resume=back, stop_in=13)
    said = capsys.readouterr().out
    assert f"--resume {back} was for the first start" in said
    assert "resumed after step 13" in said
    run(tmp_path, keep=9)
    assert "resumed after step 14" in capsys.readouterr().out
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]
    # The checkpoint that it went back to has gone meanwhile.
    shutil.move(back, tmp_path)
    folder.check(small_runs.settings(run_dir=str(tmp_path), name="run", deterministic=True, resume=back))
    shutil.move(tmp_path / "step-00000010", back)
    # Asked for anew after another start, it is done again.
    run(tmp_path, keep=9, resume=back, stop_in=10)
    assert f"resumed after step 10 from {back}" in capsys.readouterr().out


def test_a_save_in_the_same_step_does_not_hide_a_stop(tmp_path):
    folder, stop = run(tmp_path, save_every="0.000001m", stop_in=3)
    assert stop.stopped
    assert steps(folder)[-1] == 4


def test_a_part_of_a_minute_between_saves(tmp_path):
    folder, _ = run(tmp_path, save_every="0.000001m", epochs=2)
    assert steps(folder)[-1] == 16


def test_the_end_of_another_run_is_no_start(made, tmp_path):
    folder = made(tmp_path)
    last = checkpoint.list_steps(folder.checkpoints)[-1]
    fault = f"--resume {last}: is the last checkpoint of a complete run; give an earlier one"
    with pytest.raises(checkpoint.CheckpointError, match=fault):
        run(tmp_path, name="second", resume=str(last))


def test_the_speed_of_an_epoch_is_that_of_its_training(tmp_path, monkeypatch):
    late = 0.0

    def slow_evaluation(*given, **named):
        nonlocal late
        late += 1000
        return evaluate(*given, **named)

    evaluate, clock = callbacks.evaluate, time.perf_counter
    monkeypatch.setattr(callbacks, "evaluate", slow_evaluation)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock() + late)
    monkeypatch.setenv("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "0")
    config = small_runs.settings(run_dir=str(tmp_path), name="run", deterministic=True)
    folder = RunFolder.of(config)
    folder.open(config, {})
    rank = session.Rank(World(), console.make_console(quiet=True), StopRequest(), PeerStatus("test"))
    assert not session.train(rank, small_runs.build(config), small_runs.IMAGES, config, folder)
    assert [line["seconds"] < 1000 for line in folder.metrics()] == [True] * 3
    assert late == 3000


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda arrays, state: state.update(identity=3), "of another configuration: it names none"),
        (lambda arrays, state: state.pop("identity"), "of another configuration: it names none"),
        (lambda arrays, state: arrays.update(other=np.zeros(3)), "of another model: other"),
        (lambda arrays, state: arrays.pop("global_step"), "of another model: global_step"),
        (lambda arrays, state: arrays.update(global_step=np.zeros(3)), "of another model: global_step"),
        (lambda arrays, state: state.update(epoch_sums="many"), "of another model: epoch_sums"),
        (lambda arrays, state: state.update(epoch_sums=[1.0, None, 2.0, 3.0]), "of another model: epoch_sums"),
    ],
)
def test_a_checkpoint_that_verifies_but_does_not_fit_is_skipped_with_the_reason(made, tmp_path, capsys, change, reason):
    folder = made(tmp_path, stop_in=3)
    saved = checkpoint.load(checkpoint.list_steps(folder.checkpoints)[-1])
    change(saved.arrays, saved.state)
    checkpoint.save(folder.checkpoints, 5, saved.arrays, saved.state)
    run(tmp_path, stop_in=4)
    said = capsys.readouterr().out
    assert f"skipped {folder.checkpoints / 'step-00000005'}: {reason}\n" in said
    assert "resumed after step 4 from" in said


def test_where_no_checkpoint_can_be_used_the_run_is_not_begun_anew(tmp_path, capsys):
    folder, _ = run(tmp_path, stop_in=11)
    lines = folder.metrics()
    assert lines
    for path in checkpoint.list_steps(folder.checkpoints):
        (path / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"^no checkpoint in {folder.checkpoints} can be used: move"):
        run(tmp_path)
    assert f"skipped {path}: " in capsys.readouterr().out
    assert folder.metrics() == lines


def test_damaged_checkpoints_of_a_run_do_not_send_it_back_to_the_named_one(tmp_path, capsys):
    first, _ = run(tmp_path, stop_in=3)
    (source,) = checkpoint.list_steps(first.checkpoints)
    second, _ = run(tmp_path, name="second", resume=str(source), stop_in=11)
    lines = second.metrics()
    assert lines
    for path in checkpoint.list_steps(second.checkpoints):
        (path / "manifest.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=f"^no checkpoint in {second.checkpoints} can be used: move"):
        run(tmp_path, name="second", resume=str(source))
    assert f"skipped {path}: " in capsys.readouterr().out
    assert second.metrics() == lines


def test_a_refused_checkpoint_does_not_take_the_name_of_the_run(tmp_path):
    first, _ = run(tmp_path, stop_in=3)
    (source,) = checkpoint.list_steps(first.checkpoints)
    with pytest.raises(checkpoint.CheckpointError, match="of another configuration: --epochs was"):
        run(tmp_path, name="second", resume=str(source), epochs=5)
    second, _ = run(tmp_path, name="second", resume=str(source), stop_in=4)
    assert checkpoint.list_steps(second.checkpoints)


def test_epochs_between_saves_are_counted(tmp_path):
    # 256 images: a step of 256 is an epoch.
    folder, _ = run(tmp_path, save_every="4e", batch_size=256, epochs=12, warmup="0s", sparsity=0.0, keep=9)
    assert [path.name for path in checkpoint.list_steps(folder.checkpoints)] == [
        "step-00000004", "step-00000008", "step-00000012"
    ]  # fmt: skip


# One truth in checkpoint, metrics and result -------------------------------------------------------------------


@pytest.fixture
def finished(made, tmp_path) -> RunFolder:
    """A run of three epochs with its result, as train_hvd.py leaves it."""
    folder = made(tmp_path, save_every="1e")
    folder.finish({**run_folder.summarize(folder.metrics(), {"total": 0.6}, {}), "line": "as it was"})
    assert folder.result() is not None
    return folder


@pytest.mark.parametrize("lost", ["last", "all", "file", "middle", "in part"])
def test_lines_that_are_lost_are_written_again_as_they_were(finished, tmp_path, capsys, lost):
    folder = finished
    whole, result = folder.metrics_file.read_bytes(), folder.result()
    lines = whole.splitlines(keepends=True)
    left = {"last": b"".join(lines[:2]), "all": b"", "middle": lines[0] + lines[2], "in part": whole[:-9]}
    if lost == "file":
        folder.metrics_file.unlink()
    else:
        folder.metrics_file.write_bytes(left[lost])
    if lost != "middle":
        assert folder.result() is None
    folder.result_file.unlink()
    capsys.readouterr()
    run(tmp_path, save_every="1e")
    lost_lines = {"last": 1, "all": 3, "file": 3, "middle": 1, "in part": 1}[lost]
    said = f"{folder.metrics_file} had lost lines: {lost_lines} of 3 written again from the checkpoint"
    assert said in capsys.readouterr().out
    assert folder.metrics_file.read_bytes() == whole
    assert {**run_folder.summarize(folder.metrics(), {"total": 0.6}, {}), "line": result["line"]} == result


def test_a_line_that_is_lost_before_the_end_is_no_hole_in_the_curve(tmp_path):
    folder, _ = run(tmp_path, save_every="1e", stop_in=18)
    folder.rewind(8)
    run(tmp_path, save_every="1e")
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]


def test_a_run_that_begins_at_a_checkpoint_of_another_folder_has_its_curve_too(tmp_path):
    first, _ = run(tmp_path, save_every="1e", stop_in=9)
    second, _ = run(tmp_path, name="second", resume=str(first.checkpoints / "step-00000008"))
    assert [line["step"] for line in second.metrics()] == [8, 16, 24]


def without_lines(folder: RunFolder, step: int) -> Path:
    """Save a checkpoint again as earlier versions did."""
    found = checkpoint.load(folder.checkpoints / f"step-{step:08d}")
    state = {name: value for name, value in found.state.items() if name != "metrics"}
    return checkpoint.save(folder.checkpoints, step, found.arrays, state, keep=9)


def test_a_checkpoint_that_does_not_hold_the_lost_line_is_passed_over(tmp_path, capsys):
    folder, _ = run(tmp_path, save_every="1e", keep=9)
    loss = folder.metrics()[-1]["test_loss"]
    last, *_ = (without_lines(folder, step) for step in (24, 16, 8))
    # With its lines an earlier run goes on as before.
    run(tmp_path, save_every="1e", keep=9)
    assert f"resumed after step 24 from {last}" in capsys.readouterr().out
    without_lines(folder, 24)
    folder.rewind(16)
    run(tmp_path, save_every="1e", keep=9)
    said = capsys.readouterr().out
    assert f"skipped {last}: {folder.metrics_file} has lost the line of step 24" in said
    assert "resumed after step 16" in said
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]
    assert folder.metrics()[-1]["test_loss"] == loss


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({8, 16}, "step 24, but the newest good checkpoint is of step 16: restore the last checkpoint, or delete"),
        ({24}, None),
        (set(), None),
    ],
)
def test_a_result_without_its_checkpoint_is_said_to_be_that(finished, tmp_path, left, said):
    folder = finished
    for step in {8, 16, 24} - left:
        shutil.rmtree(folder.checkpoints / f"step-{step:08d}")
    if said is None:
        assert folder.result() is not None
        return
    with pytest.raises(ReadError, match=f"{folder.result_file} is of {said}"):
        folder.result()
    folder.result_file.unlink()
    run(tmp_path, save_every="1e")
    assert [line["step"] for line in folder.metrics()] == [8, 16, 24]


def test_a_result_whose_checkpoints_are_all_damaged_is_said_to_be_that(finished):
    folder = finished
    for path in checkpoint.list_steps(folder.checkpoints):
        (path / "arrays.npz").write_bytes(b"")
    with pytest.raises(ReadError, match="but no checkpoint is good"):
        folder.result()


def test_lines_that_no_checkpoint_has_are_missed(finished):
    folder = finished
    shutil.rmtree(folder.checkpoints)
    folder.rewind(16)
    with pytest.raises(ReadError, match=f"{folder.metrics_file} ends with step 16, but result.json is of step 24, and"):
        folder.result()


@pytest.mark.parametrize("lines", [[{"epoch": 1}], [3], ["x"], {"a": 1}, [{"step": "8"}]])
def test_lines_of_a_checkpoint_that_are_none_are_passed_over(made, tmp_path, capsys, lines):
    folder = made(tmp_path, save_every="1e", keep=9, stop_in=17)
    found = checkpoint.load(folder.checkpoints / "step-00000016")
    checkpoint.save(folder.checkpoints, 16, found.arrays, {**found.state, "metrics": lines}, keep=9)
    shutil.rmtree(folder.checkpoints / "step-00000018")
    run(tmp_path, save_every="1e", keep=9, stop_in=8)
    assert "of another model: metrics" in (said := capsys.readouterr().out)
    assert "resumed after step 8" in said


# Warnings ------------------------------------------------------------------------------------------------------


def test_a_kernel_that_loses_its_last_weight_is_named_once_and_at_once(tmp_path, capsys):
    folder, _ = run(tmp_path, sparsity=0.999, epochs=3)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warnings
    named = [name for line in warnings for name in re.findall(r"stage\d_block1_conv\d|stem|classifier", line)]
    assert len(set(named)) == len(named)
    arrays = checkpoint.load(folder.checkpoints / "step-00000024").arrays
    empty = {name.split("/")[2] for name, value in arrays.items()
             if name.startswith("weights/") and name.endswith("kernel:0") and not value.any()}  # fmt: skip
    assert empty
    assert empty <= set(named)
    assert re.search(r"after step (\d+) all weights of ", warnings[0])


def test_a_run_that_keeps_some_of_each_kernel_is_told_nothing(tmp_path, capsys):
    run(tmp_path, sparsity=0.6)
    assert "warning" not in capsys.readouterr().out
