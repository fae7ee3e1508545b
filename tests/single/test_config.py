"""The command line: presets, one line for every mistake, and the settings that a run may change."""

import contextlib
import dataclasses
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnopt.config import MOST_LAYERS, MOST_STEPS, PRESETS, STUDY, ConfigError, TrainConfig, completed, parse_args
from cnnopt.errors import UserError
from cnnopt.schedules import Timeline, parse_drops, parse_duration

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
FLAGS = [f"--{name.replace('_', '-')}" for name in FIELDS]


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_args(argv)
    assert caught.value.exit_status == 2
    return str(caught.value)


# What is accepted ----------------------------------------------------------------------------------------------


def test_every_field_is_a_flag_with_its_default():
    config = parse_args([])
    for name, field in FIELDS.items():
        if name not in ("base_lr", "weight_decay", "name"):
            assert getattr(config, name) == field.default, name
    assert (config.base_lr, config.weight_decay) == (0.2, 1e-3)
    assert config.name == "cifar10-resnet20-polynomial60-auto-seed0"
    assert config == TrainConfig()


def test_flags_reach_their_fields_with_their_types():
    argv = "--dataset digits --depth 14 --sparsity .5 --prune-begin 3s --deterministic --expect-ranks 4 --base-lr 1e-2"
    config = parse_args([*argv.split(), "--data-dir", "a b", "--name", "x-1"])
    assert (config.dataset, config.depth, config.sparsity, config.prune_begin) == ("digits", 14, 0.5, "3s")
    assert (config.deterministic, config.expect_ranks, config.base_lr) == (True, 4, 0.01)
    assert (config.data_dir, config.name) == ("a b", "x-1")
    assert parse_args(["--deterministic", "--no-deterministic"]).deterministic is False


def test_rate_and_weight_decay_follow_the_optimizer_unless_they_are_given():
    assert parse_args(["--optimizer", "adam"]).base_lr == 1e-3
    decays = [parse_args(["--optimizer", name]).weight_decay for name in ("sgd", "adam", "muon")]
    assert decays == [5e-4, 5e-4, 1e-3]
    assert parse_args(["--optimizer", "muon"]).base_lr == parse_args(["--optimizer", "sgd"]).base_lr == 0.2
    assert parse_args(["--optimizer", "adam", "--base-lr", "0.5"]).base_lr == 0.5


@pytest.mark.parametrize(("optimizer", "factor"), [("sgd", 4), ("muon", 2), ("adam", 2)])
def test_the_peak_follows_the_batch_or_where_steps_have_one_size_its_root(optimizer, factor):
    rates = [TrainConfig(optimizer=optimizer, batch_size=batch, base_lr=0.3).peak_rate() for batch in (128, 512)]
    assert rates == pytest.approx([0.3, factor * 0.3])


@pytest.mark.parametrize("argv", [["--sparsity", "0"], ["--sparsity-schedule", "none"]])
def test_dense_is_one_thing_however_it_is_asked_for(argv):
    config = parse_args(argv)
    assert (config.sparsity, config.sparsity_schedule) == (0.0, "none")
    assert config.name == "cifar10-resnet20-dense-auto-seed0"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_hold_what_they_say(preset):
    config = parse_args(["--preset", preset])
    for name, value in PRESETS[preset].items():
        assert getattr(config, name) == value, name
    for name in FIELDS.keys() - PRESETS[preset].keys() - {"base_lr", "weight_decay", "name"}:
        assert getattr(config, name) == FIELDS[name].default, name


@pytest.mark.parametrize("preset", PRESETS)
def test_flags_beside_a_preset_win(preset):
    before = parse_args(
        ["--preset", preset, "--depth", "56", "--epochs", "3", "--seed", "9", "--precision", "bfloat16"]
    )
    after = parse_args(["--depth", "56", "--epochs", "3", "--seed", "9", "--precision", "bfloat16", "--preset", preset])
    assert before == after
    assert (before.depth, before.epochs, before.seed, before.precision) == (56, 3, 9, "bfloat16")


@pytest.mark.parametrize(
    ("argv", "pruned"),
    [
        ("--preset baseline --sparsity 0.9", (0.9, "polynomial")),
        ("--sparsity 0.7 --preset mixed", (0.7, "polynomial")),
        ("--preset study-baseline --sparsity-schedule constant", (0.6, "constant")),
        ("--preset baseline --sparsity-schedule constant --sparsity 0.5", (0.5, "constant")),
        ("--preset constant --sparsity 0", (0.0, "none")),
        ("--preset super --sparsity-schedule none", (0.0, "none")),
    ],
)
def test_pruning_that_is_asked_for_beside_a_preset_is_done(argv, pruned):
    config = parse_args(argv.split())
    assert (config.sparsity, config.sparsity_schedule) == pruned


@pytest.mark.parametrize("preset", STUDY)
def test_study_presets_are_the_original_study(preset):
    config = parse_args(["--preset", preset])
    assert (config.dataset, config.depth, config.batch_size, config.epochs) == ("cifar100", 20, 128, 300)
    assert (config.optimizer, config.base_lr, config.warmup) == ("adam", 1e-3, "0e")
    drops = [(str(when), config.base_lr * factor) for when, factor in parse_drops(config.lr_drops)]
    assert config.lr_schedule == "step"
    assert [when for when, _ in drops] == ["80e", "120e", "160e", "180e"]
    assert [rate for _, rate in drops] == pytest.approx([1e-4, 1e-5, 1e-6, 5e-7], rel=1e-12)
    assert config.weight_decay == 2 * 1e-4  # the gradient of 1e-4 x w^2
    assert config.normalize == "pixel-mean"
    if config.sparsity:
        assert (config.prune_begin, config.prune_end, config.prune_frequency) == ("0s", "100%", "100s")
        assert config.initial_sparsity == 0.5
        assert config.sparsity_scope == "uniform"


def test_presets_share_no_default_folder():
    """On one data set and seed; of what is not told by the name, the study's presets differ in more than one thing."""
    names = {preset: parse_args(["--preset", preset, "--dataset", "cifar100"]).name for preset in PRESETS}
    assert len(set(names.values())) == len(names), names
    assert names["study-baseline"] == "study-cifar100-resnet20-dense-float32-seed0"
    assert names["baseline"] == "cifar100-resnet20-dense-float32-seed0"
    assert parse_args(["--preset", "study-baseline", "--name", "mine"]).name == "mine"


def test_study_presets_differ_in_what_the_study_varied():
    varied = {
        name: tuple(getattr(parse_args(["--preset", name]), field) for field in
                    ("sparsity_schedule", "sparsity", "precision", "augment"))
        for name in STUDY
    }  # fmt: skip
    assert varied == {
        "study-baseline": ("none", 0.0, "float32", "none"),
        "study-constant": ("constant", 0.6, "float32", "none"),
        "study-polynomial": ("polynomial", 0.6, "float32", "none"),
        "study-polynomial-90": ("polynomial", 0.9, "float32", "none"),
        "study-mixed": ("none", 0.0, "float16", "none"),
        "study-super-60": ("polynomial", 0.6, "float16", "shift"),
        "study-super-70": ("polynomial", 0.7, "float16", "shift"),
    }


# What is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    ("--depth 43", "--depth 43: ", "the nearest is 44"),
    ("--depth 3", "--depth 3: ", "the nearest is 8"),
    ("--depth -20", "--depth -20: ", "the nearest is 8"),
    ("--depth x", "--depth", "invalid int value: 'x'; see --help"),
    ("--depth", "--depth", "expected one argument; see --help"),
    ("--dataset mnist", "--dataset", "choose from"),
    ("--preset best", "--preset", "choose from"),
    ("--sparsity 1.0", "--sparsity 1.0: ", "below 1"),
    ("--sparsity -0.1", "--sparsity -0.1: ", "at least 0"),
    ("--sparsity nan", "--sparsity nan: ", "at least 0 and below 1"),
    ("--initial-sparsity nan", "--initial-sparsity nan: ", "at least 0 and below 1"),
    ("--initial-sparsity 0.7", "--initial-sparsity 0.7: ", "must not exceed --sparsity 0.6"),
    ("--label-smoothing 1", "--label-smoothing 1.0: ", "below 1"),
    ("--label-smoothing nan", "--label-smoothing nan: ", "below 1"),
    ("--ema 1", "--ema 1.0: ", "below 1"),
    ("--ema nan", "--ema nan: ", "below 1"),
    ("--base-lr nan", "--base-lr nan: ", "above 0, and at most 1e+30"),
    ("--base-lr inf", "--base-lr inf: ", "above 0, and at most 1e+30"),
    ("--base-lr 1e31", "--base-lr 1e+31: ", "above 0, and at most 1e+30"),
    ("--base-lr 0", "--base-lr 0.0: ", "above 0, and at most 1e+30"),
    ("--base-lr -1", "--base-lr -1.0: ", "above 0, and at most 1e+30"),
    ("--weight-decay nan", "--weight-decay nan: ", "0 or more, and at most 1e+30"),
    ("--weight-decay inf", "--weight-decay inf: ", "0 or more, and at most 1e+30"),
    ("--weight-decay 1e39", "--weight-decay 1e+39: ", "0 or more, and at most 1e+30"),
    ("--weight-decay=-1e-4", "--weight-decay -0.0001: ", "0 or more, and at most 1e+30"),
    ("--epochs 0", "--epochs 0: ", "at least 1"),
    ("--batch-size 0", "--batch-size 0: ", "at least 1"),
    ("--keep 0", "--keep 0: ", "at least 1"),
    ("--expect-ranks 0", "--expect-ranks 0: ", "at least 1"),
    ("--seed -1", "--seed -1: ", "0 or more"),
    ("--validation -1", "--validation -1: ", "must be 0 or more"),
    ("--validation 10%", "--validation", "10%"),
    ("--prune-begin 10", "--prune-begin: '10' is not a duration", "'2s' (steps), '2e' (epochs), '15%'"),
    ("--prune-end 101%", "--prune-end: '101%'", "at most 100%"),
    ("--prune-frequency 5m", "--prune-frequency: '5m'", "write one of '2s' (steps)"),
    ("--prune-frequency -5s", "--prune-frequency", "expected one argument"),
    ("--prune-begin 60% --prune-end 50%", "--prune-begin 60%: ", "must not be after --prune-end 50%"),
    ("--prune-end 25%", "--prune-begin 30%: ", "must not be after --prune-end 25%; give both flags"),
    ("--prune-begin 9e --prune-end 8.5e", "--prune-begin 9e: ", "must not be after --prune-end 8.5e"),
    ("--prune-begin " + "9" * 400 + "s", "--prune-begin: ", "use at most"),
    ("--warmup 2", "--warmup: '2' is not a duration", "write one of"),
    ("--sparsity 0.8 --sparsity-schedule none", "--sparsity 0.8: ", "leave one out"),
    ("--seed 4294967296", "--seed 4294967296: ", "below 2^32"),
    ("--save-every 5%", "--save-every: '5%'", "'2m' (minutes)"),
    ("--save-every 0m", "--save-every 0m: ", "must be above 0"),
    ("--save-every 0.25e", "--save-every 0.25e: ", "give whole epochs or steps"),
    ("--sparsity 60", "--sparsity 60.0: ", "60% is 0.6"),
    ("--lr-drops 80:0.1 --lr-schedule step", "--lr-drops: '80:0.1'", "write for example '80e:0.1'"),
    ("--lr-drops 80e:nan --lr-schedule step", "--lr-drops: '80e:nan'", "write for example '80e:0.1'"),
    ("--lr-drops 80e:-1 --lr-schedule step", "--lr-drops: '80e:-1'", "write for example '80e:0.1'"),
    ("--lr-drops 80e --lr-schedule step", "--lr-drops: '80e'", "write for example '80e:0.1'"),
    ("--lr-drops 80e:0.1", "--lr-drops", "give both or neither"),
    ("--lr-schedule step", "--lr-schedule step", "give both or neither"),
    ("--name a/b", "--name a/b: ", "--run-dir is the place for a path"),
    ("--name ..", "--name ..: ", "letters, digits"),
    ("--name=-x", "--name -x: ", "letters, digits"),
    ("--name=", "--name : ", "letters, digits"),
    ("--sparcity 0.6", "--sparcity", "did you mean --sparsity?"),
    ("--spars 0.6", "--spars", "did you mean --sparsity?"),  # an abbreviation would change with a new flag
    ("--lr 0.1", "--lr", "did you mean --base-lr or --lr-schedule or --lr-drops?"),
    ("--preset dmo", "--preset", "did you mean demo?"),
    ("--preset study", "--preset", "did you mean study-"),
    ("--dataset cifar-10", "--dataset", "did you mean cifar10?"),
    ("--optimizer adamw", "--optimizer", "did you mean adam?"),
    ("--name " + "n" * 300, "--name nnnnnnnnnnnnnnnnnnnn...: 300 characters", "use at most 255"),
    ("--depth 1202", "--depth 1202: ", f"use at most {MOST_LAYERS}"),
    ("extra", "extra", "see --help"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "names", "remedy"), REFUSED, ids=[argv[:40] for argv, _, _ in REFUSED])
def test_a_mistake_is_one_line_with_flag_and_remedy(argv, names, remedy):
    message = refusal(*argv.split(" "))
    assert names in message
    assert remedy in message
    assert "\n" not in message


@pytest.mark.parametrize("argv", [["--name", "a\nb"], ["--a\nb"], ["--warmup", "2\r\ne"], ["--dataset", "a\nb"]])
def test_a_line_break_in_the_argument_is_none_in_the_message(argv):
    assert len(refusal(*argv).splitlines()) == 1


@pytest.mark.parametrize(
    ("batch", "ranks", "remedy"),
    [(128, 3, "use 126 or 129"), (64, 48, "use 48 or 96"), (2, 4, "use 4"), (129, 2, "use 128 or 130")],
)
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(batch, ranks, remedy):
    config = TrainConfig(batch_size=batch)
    fault = f"^--batch-size {batch}: cannot be split evenly over {ranks} ranks; {remedy}$"
    with pytest.raises(ConfigError, match=fault):
        config.check_ranks(ranks)
    for size in (int(word) for word in remedy.split() if word.isdigit()):
        TrainConfig(batch_size=size).check_ranks(ranks)


def test_another_number_of_ranks_than_expected_is_refused():
    TrainConfig(expect_ranks=2).check_ranks(2)
    with pytest.raises(ConfigError, match=r"^--expect-ranks 2: 1 started; check -np, --ntasks"):
        TrainConfig(expect_ranks=2).check_ranks(1)


RUN = Timeline(num_images=256, batch_size=32, epochs=3)  # 8 steps an epoch


@pytest.mark.parametrize(
    ("begin", "end", "steps"),
    [("2e", "4s", "16 to 4 of 24"), ("50%", "1e", "12 to 8 of 24"), ("0s", "25s", "0 to 25 of 24"),
     ("1e", "4e", "8 to 32 of 24")],
)  # fmt: skip
@pytest.mark.parametrize("schedule", ["constant", "polynomial"])
def test_a_pruning_window_that_would_never_end_is_refused(begin, end, steps, schedule):
    config = TrainConfig(prune_begin=begin, prune_end=end, sparsity_schedule=schedule)
    with pytest.raises(ConfigError, match=rf"^--prune-begin {begin} --prune-end {end}: steps {steps};") as caught:
        config.check_timeline(RUN)
    assert len(str(caught.value).splitlines()) == 1
    TrainConfig(prune_begin=begin, prune_end=end, sparsity=0.0).check_timeline(RUN)


@pytest.mark.parametrize(("warmup", "steps"), [("25s", 25), ("4e", 32)])
def test_a_warm_up_that_is_longer_than_the_run_is_refused(warmup, steps):
    with pytest.raises(ConfigError, match=rf"^--warmup {warmup}: {steps} steps, but the run has 24; "):
        TrainConfig(warmup=warmup).check_timeline(RUN)
    TrainConfig(warmup="24s").check_timeline(RUN)


@pytest.mark.parametrize(("drops", "late"), [("1e:0.1,3e:0.01", "3e"), ("24s:0.1", "24s"), ("100%:0.1", "100%")])
def test_a_drop_that_never_comes_is_refused(drops, late):
    config = TrainConfig(lr_schedule="step", lr_drops=drops, epochs=3)
    with pytest.raises(ConfigError, match=rf"^--lr-drops {drops}: {late} is not before the end of the run, of 3 epo"):
        config.check_timeline(RUN)
    TrainConfig(lr_schedule="step", lr_drops="23s:0.1,50%:0.01").check_timeline(RUN)


@pytest.mark.parametrize("preset", STUDY)
def test_a_study_preset_of_fewer_epochs_does_not_begin_with_drops_that_never_come(preset):
    whole, short = (parse_args(["--preset", preset, "--epochs", str(epochs)]) for epochs in (300, 30))
    whole.check_timeline(Timeline(50_000, 128, 300))
    with pytest.raises(ConfigError, match="80e is not before the end of the run, of 30 epochs; give drops within it"):
        short.check_timeline(Timeline(50_000, 128, 30))


@pytest.mark.parametrize(("batch", "ranks", "most"), [(257, 1, 256), (2000, 1, 256), (300, 3, 255)])
def test_a_batch_of_more_images_than_there_are_is_refused(batch, ranks, most):
    config = TrainConfig(dataset="synthetic", batch_size=batch, warmup="0s")
    with pytest.raises(
        ConfigError, match=rf"^--batch-size {batch}: synthetic has 256 training images; use at most {most}"
    ):
        config.check_timeline(Timeline(256, batch, 3), ranks)
    fits = dataclasses.replace(config, batch_size=most, prune_begin="0s", prune_end="1s")
    fits.check_ranks(ranks)
    fits.check_timeline(Timeline(256, most, 3), ranks)


@pytest.mark.parametrize(("validation", "left"), [(225, 31), (256, 0), (9999, 0)])
def test_validation_leaves_at_least_a_batch(validation, left):
    config = TrainConfig(dataset="synthetic", batch_size=32, validation=validation, warmup="0s", sparsity=0.0)
    with pytest.raises(ConfigError) as caught:
        config.check_timeline(Timeline(256 - validation, 32, 3))
    assert str(caught.value) == (
        f"--validation {validation}: leaves {left} of 256 training images, fewer than a batch of 32; use at most 224"
    )
    dataclasses.replace(config, validation=224).check_timeline(Timeline(32, 32, 3))
    with pytest.raises(ConfigError, match=r"^--batch-size 300: synthetic has 256 training images; use at most 256$"):
        dataclasses.replace(config, batch_size=300).check_timeline(Timeline(256 - validation, 300, 3))


def test_more_steps_than_anybody_waits_for_are_refused():
    config = TrainConfig(epochs=10**8)
    with pytest.raises(
        ConfigError, match=rf"^--epochs 100000000: .* a run can have {MOST_STEPS:,}, so use at most 25600 ep"
    ):
        config.check_timeline(Timeline(50_000, 128, 10**8))
    TrainConfig(epochs=25600).check_timeline(Timeline(50_000, 128, 25600))


TEXTS = st.one_of(
    st.text(max_size=8),
    st.floats().map(str),
    st.integers(-9, 200).map(str),
    st.from_regex(r"[0-9]{1,4}(\.[0-9])?[sem%]", fullmatch=True),
    st.from_regex(r"[0-9]{1,2}[se%]:[0-9.]{1,3}", fullmatch=True),
    st.sampled_from(["nan", "inf", "-inf", "adam", "step", "none", "auto", "float16", "cifar100", "--help", *PRESETS]),
)
WORDS = st.lists(st.one_of(st.sampled_from(["--preset", *FLAGS]), TEXTS), max_size=8)
PAIRS = st.lists(st.tuples(st.sampled_from(["--preset", *FLAGS]), TEXTS), max_size=5).map(
    lambda pairs: [word for pair in pairs for word in pair]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(WORDS, PAIRS))
def test_any_command_line_is_parsed_or_refused_in_one_line(argv):
    config, refused, stopped = None, None, None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = parse_args(argv)
    except UserError as error:
        refused = str(error)
    except SystemExit as error:
        stopped = error.code
    if config is None and refused is None:
        assert stopped == 0
        assert any(word.startswith(("-h", "--help")) for word in argv)
    elif config is None:
        assert len(refused.splitlines()) == 1
    else:
        assert json.loads(json.dumps(config.identity())) == config.identity()
        assert dataclasses.replace(config) == config
        for name in ("prune_begin", "prune_end", "prune_frequency", "warmup"):
            assert 0 <= parse_duration(getattr(config, name)).value < float("inf")


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_args(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in FLAGS)
    assert "15% (of the run) [30%]" in " ".join(text.split())


# How the step runs ---------------------------------------------------------------------------------------------


def test_auto_compiles_and_keeps_images_on_a_gpu_and_does_neither_on_cpus():
    config = TrainConfig()
    assert (config.compiles(gpu=True), config.resident(gpu=True), config.call_length(gpu=True)) == (True, True, None)
    assert (config.compiles(gpu=False), config.resident(gpu=False), config.call_length(gpu=False)) == (False, False, 1)
    for gpu in (True, False):
        asked = TrainConfig(compile="on", stream="device", steps_per_call="7")
        assert (asked.compiles(gpu=gpu), asked.resident(gpu=gpu), asked.call_length(gpu=gpu)) == (True, True, 7)
        refused = TrainConfig(compile="off", stream="host", steps_per_call="1")
        assert (refused.compiles(gpu=gpu), refused.resident(gpu=gpu), refused.call_length(gpu=gpu)) == (False, False, 1)


@pytest.mark.parametrize("steps", ["0", "-1", "1.5", "many", ""])
def test_steps_per_call_is_auto_or_a_number(steps):
    with pytest.raises(ConfigError, match=f"^--steps-per-call {steps}: auto, or a number of steps$"):
        TrainConfig(steps_per_call=steps)


# What a resumed run may change ---------------------------------------------------------------------------------

FREE = {
    "data_dir",
    "run_dir",
    "name",
    "resume",
    "save_every",
    "keep",
    "strict_save",
    "expect_ranks",
    "share_gpus",
    "quantize",
    "verbose",
    "exchange",
    "compile",
    "stream",
    "steps_per_call",
}


def test_the_identity_is_what_decides_the_result():
    assert TrainConfig().identity().keys() == FIELDS.keys() - FREE
    free = TrainConfig(data_dir="x", run_dir="y", name="z", resume="never", save_every="5m", keep=9, strict_save=True,
                       expect_ranks=4, share_gpus=True, quantize=True, verbose=True,
                       exchange="sparse", compile="on", stream="device", steps_per_call="9")  # fmt: skip
    assert free.difference(TrainConfig().identity()) is None


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - FREE))
def test_every_other_field_is_part_of_it_and_is_named(name):
    other = {
        "dataset": "digits", "depth": 32, "sparsity": 0.7, "sparsity_schedule": "constant", "initial_sparsity": 0.1,
        "prune_begin": "11%", "prune_end": "51%", "prune_frequency": "2%", "sparsity_scope": "uniform",
        "optimizer": "adam", "base_lr": 0.1, "lr_schedule": "cosine", "warmup": "1e", "weight_decay": 0.0,
        "label_smoothing": 0.1, "ema": 0.9, "augment": "none", "normalize": "pixel-mean", "batch_size": 64,
        "epochs": 31, "precision": "float32", "seed": 1, "deterministic": True, "wire_dtype": "float16",
        "validation": 5000,
    }  # fmt: skip
    config = TrainConfig()
    if name == "lr_drops":
        config = TrainConfig(lr_schedule="step", lr_drops="1e:0.1")
        changed = dataclasses.replace(config, lr_drops="2e:0.1")
    else:
        changed = dataclasses.replace(config, **{name: other[name]})
    stored = json.loads(json.dumps(config.identity()))
    flag = f"--{name.replace('_', '-')}"
    assert changed.difference(stored) == f"{flag} was {getattr(config, name)}, is {getattr(changed, name)}"


#: What the first version stored. A field that came later must mean what runs did before it, if it is not stored.
FIRST = {
    "augment", "base_lr", "batch_size", "dataset", "depth", "deterministic", "ema", "epochs", "initial_sparsity",
    "label_smoothing", "lr_drops", "lr_schedule", "normalize", "optimizer", "precision", "prune_begin", "prune_end",
    "prune_frequency", "seed", "sparsity", "sparsity_schedule", "sparsity_scope", "warmup", "weight_decay",
}  # fmt: skip
BEFORE = {"wire_dtype": "float32", "validation": 0}


def test_a_run_that_was_stored_before_a_setting_was_there_goes_on():
    config = TrainConfig()
    assert config.identity().keys() - BEFORE.keys() == FIRST
    stored = {name: value for name, value in config.identity().items() if name in FIRST}
    assert completed(stored) == config.identity() == {**stored, **BEFORE}
    assert config.difference(stored) is None
    assert TrainConfig(**completed(stored)) == config
    other = TrainConfig(wire_dtype="float16")
    assert other.difference(stored) == "--wire-dtype was float32, is float16"


def test_a_run_of_a_later_version_says_what_is_not_known_here():
    stored = {**TrainConfig().identity(), "later": 3}
    assert TrainConfig().difference(stored) == "--later was 3, is not known to this version of cnnopt"


def test_all_differences_are_named_at_once():
    stored = TrainConfig(optimizer="sgd", prune_begin="10%", prune_end="50%").identity()
    assert TrainConfig().difference(stored) == (
        "--optimizer was sgd, is muon, --weight-decay was 0.0005, is 0.001, "
        "--prune-begin was 10%, is 30%, --prune-end was 50%, is 80%"
    )
