"""The bar on a terminal and the lines in a log."""

import io
import re
import sys
import time
from types import SimpleNamespace

import pytest
import tensorflow as tf
from rich.console import Console

from cnnopt.distributed.world import World
from cnnopt.schedules import Timeline
from cnnopt.training import callbacks, metrics, progress
from tests.helpers import small_runs

#: 30 epochs of 100 steps with 32 images each.
TIMELINE = Timeline(3200, 32, 30)


class Sparsity(callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        logs["sparsity"] = self.model.pruner.sparsities()["total"]


class Loss:
    """A loss that counts how often it is read."""

    reads = 0

    def __float__(self):
        self.reads += 1
        return 0.4321


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """The hook's clock, which stands still until a test moves it."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: found.now)
    return found


def shown(*, terminal: bool, step: int = 0) -> tuple[progress.Show, io.StringIO]:
    screen = io.StringIO()
    show = progress.Show(TIMELINE, Console(file=screen, force_terminal=terminal, width=80, soft_wrap=True))
    show.set_model(SimpleNamespace(run=SimpleNamespace(global_step=tf.constant(step))))
    return show, screen


def test_the_lines_of_a_run_fit_80_columns_and_have_the_time():
    config = small_runs.settings(epochs=3)
    model, screen = small_runs.build(config), io.StringIO()
    timeline = small_runs.timeline_of(config)
    hooks = [metrics.Measure(timeline), callbacks.Evaluate(small_runs.IMAGES, World()), Sparsity(),
             progress.Show(timeline, Console(file=screen, width=80))]  # fmt: skip
    before = time.strftime("%H:%M")
    small_runs.fit(model, config, hooks)
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for number, line in enumerate(lines, start=1):
        found = re.fullmatch(
            rf"(\d\d:\d\d) epoch +{number}/3 loss \d\.\d{{4}} test \d+\.\d\d% zeros \d+\.\d% \d+ img/s (\S+) left", line
        )
        assert found, line
        assert found[1] in (before, time.strftime("%H:%M"))
    assert lines[-1].endswith(" 0:00 left")


def test_a_log_has_a_line_after_five_minutes_without_one(clock):
    show, log = shown(terminal=False)
    show.on_epoch_begin(0)
    for step in range(99):
        # The first step compiles for 20 s. The others take 6 s each.
        clock.now += 20 if step == 0 else 6
        show.on_train_batch_end(step, {"loss": 0.4321})
    lines = log.getvalue().splitlines()
    # 300 s after the start: 20 s + 47 x 6 s = 302 s. 300 s later: 50 steps.
    assert [re.sub(r"^\d\d:\d\d ", "", line) for line in lines] == [
        "epoch 1/30 step 48/3000 loss 0.4321 5 img/s 4:55:12 left",
        "epoch 1/30 step 98/3000 loss 0.4321 5 img/s 4:50:12 left",
    ]


def test_the_time_left_is_that_of_the_run_with_its_evaluations(clock):
    show, log = shown(terminal=False)
    for epoch in range(2):
        show.model.run.global_step = tf.constant(100 * epoch)
        show.on_epoch_begin(epoch)
        for step in range(100 * epoch, 100 * (epoch + 1)):
            clock.now += 1
            show.on_train_batch_end(step, {"loss": 0.4321})
        clock.now += 100
        show.model.run.global_step = tf.constant(100 * (epoch + 1))
        logs = {"loss": 0.4, "accuracy": 1.0, "test_accuracy": 0.9, "sparsity": 0.6, "images_per_second": 32.0}
        show.on_epoch_end(epoch, logs)
    # 199 steps and two evaluations in 399 s; 2,800 steps are left.
    assert log.getvalue().splitlines()[-1].endswith(f" {progress.duration(2800 * 399 / 199)} left")


@pytest.mark.parametrize("steps", [1, 7])
def test_the_bar_says_epoch_loss_speed_and_time_left_in_80_columns(clock, steps):
    show, _ = shown(terminal=True, step=200)
    show.on_epoch_begin(2)
    try:
        loss = Loss()
        for done in range(200 + steps, 250, steps):
            clock.now += steps / 4
            show.on_train_batch_end(done - 1, {"loss": loss})
        show.progress.refresh()
        # A quarter of a second a step: a look at each fourth step, or at each call of seven.
        assert loss.reads == {1: 12, 7: 6}[steps]
        (row,) = (line for line in show.console.render_lines(show.progress.get_renderable()) if line)
        text = "".join(segment.text for segment in row)
        assert len(text) == 80
        place = {1: 49, 7: 49}[steps]
        assert re.fullmatch(rf"epoch 3/30 .+ {place}/100 loss 0\.4321 128 img/s 11:\d\d left", text), text
    finally:
        show.clear()


def test_a_bar_that_nobody_ends_hides_no_cursor_and_takes_no_errors():
    show, screen = shown(terminal=True)
    before = sys.stdout, sys.stderr
    show.on_epoch_begin(0)
    try:
        assert (sys.stdout, sys.stderr) == before
        visible, hidden = (screen.getvalue().rfind(f"\x1b[?25{which}") for which in "hl")
        assert visible > hidden > -1
    finally:
        show.clear()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (86_400 * 2 + 3 * 3600 + 240, "2d 03:04")],
)
def test_a_duration_is_short(seconds, text):
    assert progress.duration(seconds) == text
