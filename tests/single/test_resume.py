"""What a run leaves at a save, and what another takes up from it: small runs in one process."""

import numpy as np
import pytest
import small_runs
from rich.console import Console
from tf_keras.callbacks import Callback

from cnnopt import callbacks, checkpoint, monitoring, resume
from cnnopt.distributed import World
from cnnopt.record import RunFolder
from cnnopt.schedules import parse_duration
from cnnopt.signals import StopRequest


class Tell(Callback):
    """Tells the run to stop while it takes the step after ``step``."""

    def __init__(self, request: StopRequest, step: int) -> None:
        super().__init__()
        self.request, self.step = request, step

    def on_train_batch_begin(self, batch: int, logs: dict | None = None) -> None:
        self.request.told = self.request.told or batch == self.step


def run(path, *, save_every: str = "100s", stop_in: int | None = None) -> tuple[RunFolder, callbacks.StopWhenTold]:
    """Train to the end or until told in step ``stop_in``, from the newest checkpoint; the real hooks in their order."""
    config = small_runs.settings(save_every=save_every, run_dir=str(path), name="run", deterministic=True)
    folder, world, timeline = RunFolder.of(config), World(), small_runs.timeline_of(config)
    model = small_runs.build(config)
    folder.open(config, {})
    first_step = resume.restore(model, config, folder, world, say=print)
    request = StopRequest()
    stop = callbacks.StopWhenTold(request)
    every = parse_duration(save_every, "esm")
    console = Console(quiet=True)
    small_runs.fit(
        model,
        config,
        [
            *([Tell(request, stop_in)] if stop_in is not None else []),
            stop,
            callbacks.Prune(),
            callbacks.Evaluate(small_runs.IMAGES, world),
            monitoring.Measure(timeline),
            monitoring.Record(folder, config, first_step),
            callbacks.Save(every, timeline, config, folder.checkpoints, world, console),
        ],
    )
    return folder, stop


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


def test_an_epoch_that_was_stopped_in_the_middle_has_the_loss_of_all_its_steps(tmp_path):
    undisturbed, _ = run(tmp_path / "one")
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
        assert (line["val_loss"], line["val_accuracy"]) == (other["val_loss"], other["val_accuracy"])


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
def test_a_checkpoint_that_verifies_but_does_not_fit_is_skipped_with_the_reason(tmp_path, capsys, change, reason):
    folder, _ = run(tmp_path, stop_in=3)
    saved = checkpoint.load(checkpoint.list_steps(folder.checkpoints)[-1])
    change(saved.arrays, saved.state)
    checkpoint.save(folder.checkpoints, 5, saved.arrays, saved.state)
    run(tmp_path, stop_in=6)
    said = capsys.readouterr().out
    assert f"skipped {folder.checkpoints / 'step-00000005'}: {reason}\n" in said
    assert "resumed after step 4 from" in said
