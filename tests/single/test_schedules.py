"""Schedules by tables of every step, and the timeline against a count of single images."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnopt.config import PRESETS, TrainConfig
from cnnopt.schedules import Duration, LearningRate, PruningWindow, Timeline, parse_drops, parse_duration

# Durations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("500s", 500, "s"), ("2e", 2, "e"), ("15%", 15, "%"), (".5e", 0.5, "e"), ("2.e", 2, "e"), (" 0s ", 0, "s"),
     ("100%", 100, "%"), ("12.5%", 12.5, "%")],
)  # fmt: skip
def test_durations_are_read(text, value, unit):
    assert parse_duration(text) == Duration(value, unit)
    assert parse_duration(str(parse_duration(text))) == Duration(value, unit)


@given(st.decimals(0, 10**9, allow_nan=False, places=6), st.sampled_from("se"))
def test_a_duration_is_written_as_it_is_read(value, unit):
    duration = parse_duration(f"{value:f}{unit}")
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    ("value", "text"), [(1_500_001, "1500001s"), (0.1 * 3, "0.3s"), (0, "0s"), (78.12345678, "78.12345678s")]
)
def test_durations_are_written_in_full(value, text):
    assert str(Duration(value, "s")) == text


@pytest.mark.parametrize("text", ["", "s", "5", "5m", "-5s", "1e3s", "5 s", "100.5%", "5ss", "nan%", "infe", "0x5s"])
def test_other_texts_are_no_durations(text):
    with pytest.raises(ValueError, match=r"'2s' \(steps\)|at most 100%"):
        parse_duration(text)


def test_minutes_are_read_only_where_they_mean_something():
    assert parse_duration("10m", "esm") == Duration(10, "m")
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration("10%", "esm")
    with pytest.raises(ValueError, match="minutes cannot be turned into steps"):
        Timeline(100, 10, 1).steps(Duration(10, "m"))


@pytest.mark.parametrize(
    ("text", "steps"),
    [("500s", 500), ("1e", 391), ("2e", 781), ("0.5e", 195), ("10%", 1172), ("50%", 5860), ("100%", 11719),
     ("0%", 0), ("0e", 0), ("30e", 11719)],
)  # fmt: skip
def test_durations_in_steps_of_thirty_epochs_of_cifar(text, steps):
    # 50,000 images in batches of 128: 390.625 steps an epoch, 11,718.75 in thirty.
    assert Timeline(50_000, 128, 30).steps(parse_duration(text)) == steps


# The timeline --------------------------------------------------------------------------------------------------


def test_the_timeline_of_cifar():
    timeline = Timeline(50_000, 128, 4)
    assert [timeline.epoch_end(epoch) for epoch in range(4)] == [391, 782, 1172, 1563]
    assert timeline.total_steps == 1563
    assert [timeline.epoch_of(step) for step in (0, 390, 391, 781, 782, 1171, 1172, 1562)] == [0, 0, 1, 1, 2, 2, 3, 3]


SMALL = st.builds(Timeline, st.integers(1, 60), st.integers(1, 80), st.integers(1, 6))


@settings(max_examples=300)
@given(SMALL)
def test_an_epoch_ends_with_the_first_step_that_has_seen_all_of_it(timeline):
    for epoch in range(timeline.epochs):
        end = timeline.epoch_end(epoch)
        needed = (epoch + 1) * timeline.num_images
        assert end * timeline.batch_size >= needed > (end - 1) * timeline.batch_size
    assert timeline.total_steps == timeline.epoch_end(timeline.epochs - 1)


@settings(max_examples=300)
@given(SMALL)
def test_epoch_of_is_the_first_epoch_that_has_not_ended(timeline):
    for step in range(timeline.total_steps):
        not_ended = (epoch for epoch in range(timeline.epochs) if step < timeline.epoch_end(epoch))
        assert timeline.epoch_of(step) == next(not_ended)


@given(st.integers(1, 10**7), st.integers(1, 10**5), st.integers(0, 10**4))
def test_epoch_of_and_epoch_end_agree_for_large_runs(num_images, batch_size, epoch):
    timeline = Timeline(num_images, batch_size, epoch + 1)
    end = timeline.epoch_end(epoch)
    assert timeline.epoch_of(end) > epoch
    if end > (timeline.epoch_end(epoch - 1) if epoch else 0):
        assert timeline.epoch_of(end - 1) == epoch


# Learning rate -------------------------------------------------------------------------------------------------


def rates(rate: LearningRate) -> list[float]:
    return [rate(step) for step in range(rate.total_steps)]


def test_warm_up_then_linear():
    expected = [0.05, 0.10, 0.15, 0.20, 0.20, 0.15, 0.10, 0.05]
    assert rates(LearningRate(0.2, warmup_steps=4, total_steps=8)) == pytest.approx(expected)


def test_linear_without_warm_up():
    assert rates(LearningRate(1.0, warmup_steps=0, total_steps=5)) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_warm_up_then_cosine():
    half = math.sqrt(0.5)
    expected = [1.0, 2.0, 2.0, 1 + half, 1.0, 1 - half]
    assert rates(LearningRate(2.0, warmup_steps=2, total_steps=6, schedule="cosine")) == pytest.approx(expected)


def test_warm_up_then_drops():
    rate = LearningRate(1.0, warmup_steps=2, total_steps=8, schedule="step", drops=((3, 0.1), (6, 0.01)))
    assert rates(rate) == pytest.approx([0.5, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert rates(LearningRate(1.0, 0, 3, "step")) == [1.0, 1.0, 1.0]


def test_drops_count_from_the_latest_in_whatever_order_they_are_written():
    rate = LearningRate(1.0, warmup_steps=0, total_steps=8, schedule="step", drops=((6, 0.01), (3, 0.1)))
    assert rates(rate) == pytest.approx([1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_a_drop_inside_the_warm_up_waits_for_its_end():
    rate = LearningRate(1.0, warmup_steps=2, total_steps=4, schedule="step", drops=((0, 0.5),))
    assert rates(rate) == pytest.approx([0.5, 1.0, 0.5, 0.5])


def test_the_study_divides_at_80_120_160_and_180():
    config = TrainConfig(**PRESETS["study-super-60"])
    timeline = Timeline(50_000, 128, config.epochs)
    drops = tuple((timeline.steps(when), factor) for when, factor in parse_drops(config.lr_drops))
    rate = LearningRate(config.base_lr, 0, timeline.total_steps, "step", drops)
    by_epoch = [rate(math.ceil(epoch * 50_000 / 128)) for epoch in range(300)]
    assert by_epoch == pytest.approx([1e-3] * 80 + [1e-4] * 40 + [1e-5] * 40 + [1e-6] * 20 + [5e-7] * 120)


def test_drops_are_read():
    assert parse_drops("") == []
    assert parse_drops("80e:0.1,5s:2,50%:0") == [
        (Duration(80, "e"), 0.1),
        (Duration(5, "s"), 2.0),
        (Duration(50, "%"), 0.0),
    ]


@pytest.mark.parametrize("text", ["80e", "80e:", ":0.1", "80:0.1", "80e:x", "80e:nan", "80e:inf", "80e:-1", "1m:1"])
def test_other_texts_are_no_drops(text):
    with pytest.raises(ValueError, match=r"is not DURATION:FACTOR; write for example '80e:0.1'"):
        parse_drops(f"5e:1,{text}")


@given(
    st.integers(0, 20),
    st.integers(1, 60),
    st.sampled_from(["linear", "cosine"]),
)
def test_a_rate_never_leaves_0_to_peak(warmup, total, schedule):
    values = rates(LearningRate(0.3, warmup, total, schedule))
    assert all(0 <= value <= 0.3 + 1e-12 for value in values)
    after = values[warmup:]
    assert after == sorted(after, reverse=True)
    if warmup < total:
        assert after[0] == pytest.approx(0.3)
    assert values[:warmup] == sorted(values[:warmup])


# Pruning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begin", "end", "frequency", "updates"),
    [
        (0, 10, 5, [0, 5, 10]),
        (2, 10, 4, [2, 6, 10]),
        (2, 11, 4, [2, 6, 10]),  # moved down, so that the end is an update
        (2, 13, 4, [2, 6, 10]),
        (3, 8, 100, [3, 8]),  # one update at each end
        (3, 3, 1, [3]),
        (3, 5, 0, [3, 4, 5]),
        (0, 0, 7, [0]),
    ],
)
def test_updates_of_a_pruning_window(begin, end, frequency, updates):
    window = PruningWindow.aligned(begin, end, frequency)
    assert [step for step in range(30) if window.updates_after(step)] == updates
    assert window.end == updates[-1]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 600))
def test_the_end_of_a_window_is_always_an_update(begin, length, frequency):
    window = PruningWindow.aligned(begin, begin + length, frequency)
    assert window.updates_after(window.begin)
    assert window.updates_after(window.end)
    assert begin + length - max(1, frequency) < window.end <= begin + length
    assert not window.updates_after(window.begin - 1)
    assert not window.updates_after(window.end + window.frequency)
