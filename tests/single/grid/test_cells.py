"""The grids: what a cell's flags say, the order of cells, and grid files that are refused."""

import pytest

from cnnopt.grid import cells
from cnnopt.grid.cells import NAME, GridError, choose, expand, read, recipe
from cnnopt.presets import PRESETS
from cnnopt.study import main

GRID = """
epochs: {20: 30, 44: 40}
datasets: [digits]
depths: [20, 44]
seeds: [0, 1]
cells:
  dense: {preset: baseline}
  same: {preset: baseline, ranks: all}
  half: {preset: polynomial, sparsity: 0.5, sparsity-scope: uniform, warmup: 10e, deterministic: true}
questions:
  - ask: What does it cost?
    compare: [[dense, half]]
"""


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "mine.yaml").write_text(GRID)
    return read(tmp_path / "mine.yaml")


def test_the_first_seed_of_everything_comes_first_and_in_it_the_smallest_network(grid):
    found = expand(grid, scale=0.1, ranks=2, run_dir="runs")
    places = [(cell.config.seed, cell.config.depth, cell.label) for cell in found]
    assert places == [(seed, depth, label) for seed in (0, 1) for depth in (20, 44) for label in grid.cells]
    assert {(cell.config.depth, cell.config.epochs) for cell in found} == {(20, 3), (44, 4)}
    assert [cell.ranks for cell in found[:3]] == [1, 2, 1]


def test_a_cell_is_what_its_settings_and_the_scale_say(grid):
    half = expand(grid, scale=0.1, ranks=2, run_dir="here", data_dir="/images")[2]
    config = half.config
    assert (config.sparsity, config.sparsity_scope, config.precision) == (0.5, "uniform", "float32")
    assert (config.warmup, config.deterministic) == ("1e", True)
    assert (config.prune_begin, config.prune_end) == ("30%", "80%")
    assert (config.run_dir, config.data_dir) == ("here", "/images")
    assert half.name == "mine-digits-resnet20-half-3epochs-seed0"
    assert NAME.fullmatch(half.name).groupdict() == {
        "recipe": "mine", "dataset": "digits", "depth": "20", "label": "half", "epochs": "3", "seed": "0"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "epochs", "drops", "frequency"),
    [
        (1, 300, "80e:0.1,120e:0.01,160e:0.001,180e:0.0005", "100s"),
        (0.1, 30, "8e:0.1,12e:0.01,16e:0.001,18e:0.0005", "10s"),
        (0.01, 3, "0.8e:0.1,1.2e:0.01,1.6e:0.001,1.8e:0.0005", "1s"),
        # The shortest run is one epoch, 1/300 of the recipe, and nothing becomes shorter than a step.
        (0.001, 1, "0.266666666667e:0.1,0.4e:0.01,0.533333333333e:0.001,0.6e:0.0005", "1s"),
    ],
)
def test_the_scale_shortens_every_duration_of_the_original_recipe(scale, epochs, drops, frequency):
    for cell in expand(recipe("original"), scale=scale, ranks=2, run_dir="runs", seeds=[0]):
        assert (cell.config.epochs, cell.config.lr_drops, cell.config.prune_frequency) == (epochs, drops, frequency)
        assert cell.config.warmup == "0e"


def test_on_one_rank_the_same_run_is_not_done_twice(grid):
    assert [cell.label for cell in expand(grid, scale=1, ranks=1, run_dir="runs", depths=[8], seeds=[0])] == [
        "dense", "half"
    ]  # fmt: skip


@pytest.mark.parametrize("name", cells.RECIPES)
def test_the_pairs_of_a_recipe_differ_in_one_thing(name):
    by_label = {cell.label: cell for cell in expand(recipe(name), scale=1, ranks=2, run_dir="runs", seeds=[0])}
    # How and how far to prune is one thing. So is precision, and that of float32 is not asked for by name.
    pruning = {"sparsity", "sparsity_schedule", "initial_sparsity", "prune_begin", "prune_end", "prune_frequency"}
    for question in recipe(name).questions:
        for pair in question.pairs:
            before, after = (by_label[label] for label in pair)
            same = after.config.identity()
            differing = {key for key, value in before.config.identity().items() if same[key] != value}
            things = {"pruning" if key in pruning else key for key in differing}
            things |= {"ranks"} if before.ranks != after.ranks else set()
            combined = "combination" in question.ask
            assert len(things) == 1 or (combined and things == {"precision", "ranks"}), (question.ask, pair, things)


def test_the_original_recipe_has_every_preset_of_the_study():
    used = {settings["preset"] for settings in recipe("original").cells.values()}
    assert used == {name for name in PRESETS if name.startswith("study-")}


def test_patterns_choose_cells_by_label_or_by_name(grid):
    found = expand(grid, scale=0.1, ranks=2, run_dir="runs")
    assert choose(found, []) == found
    assert {cell.label for cell in choose(found, ["d*", "half"])} == {"dense", "half"}
    assert [cell.name for cell in choose(found, ["*resnet44-half-*seed1"])] == [
        "mine-digits-resnet44-half-4epochs-seed1"
    ]
    with pytest.raises(GridError, match="--only halv: did you mean half"):
        choose(found, ["half", "halv"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("epochs:", "epoch:", "epoch: not a key of a grid: did you mean epochs?"),
        ("seeds: [0, 1]", "", "seeds is missing"),
        ("[20, 44]", "[20, deep]", "depths: give a list"),
        ("{20: 30, 44: 40}", "many", "epochs: give a whole number"),
        ("{20: 30, 44: 40}", "{20: 0}", "epochs: give a whole number"),
        ("  dense:", "  60:", "cells: 60: use small letters"),
        ("  dense: {preset: baseline}", "  dense: baseline", "cells: give a name and the settings"),
        ("  dense:", "  Dense:", "cells: Dense: use small letters"),
        ("{preset: baseline}", "{preset: baseline, depth: 8}", "dense: depth is not a setting of a cell"),
        ("ranks: all", "ranks: 2", "same: ranks: 2: give all"),
        ("compare: [[dense, half]]", "compare: [[dense, halv]]", "there is no cell halv: did you mean half?"),
        ("compare: [[dense, half]]", "compare: [dense, half]", "compare pairs of cells"),
        ("compare: [[dense, half]]", "compare: [[[dense], half]]", "there is no cell ['dense']"),
        ("{preset: baseline}", "{help: true}", "dense: help is not a setting of a cell"),
        ("{preset: baseline}", "{on: 2}", "dense: True is not a setting of a cell"),
        (GRID, GRID[: GRID.index("questions:")] + "questions: 5", "questions: give a list"),
        ("cells:", "cells: [", "is not YAML"),
        (GRID, "- a list", "a grid has the keys"),
        ("sparsity: 0.5", "sparsety: 0.5", "mine, half: unrecognized argument --sparsety: did you mean --sparsity?"),
        ("sparsity: 0.5", "sparsity: 50", "mine, half: --sparsity 50"),
    ],
)
def test_a_grid_that_cannot_be_used_is_one_line(old, new, message, tmp_path, capsys):
    assert old in GRID
    (tmp_path / "mine.yaml").write_text(GRID.replace(old, new))
    assert main(["--grid", str(tmp_path / "mine.yaml"), "--dry-run", "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnnopt.study: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--scale 0", "--scale 0: must be above 0"),
        ("--np 0", "--np 0: must be at least 1"),
        ("--np 3", "--batch-size 128: cannot be split evenly over 3 ranks"),
        ("--dataset cifar", "--dataset"),
        ("--depth 21", "--depth 21"),
        ("--variants int9", "--variants int9"),
        ("--variants int8,int8-qat", "--variants int8-qat: a study does not fine-tune; leave it out"),
        ("--task 99 --only baseline", "the grid has 12 cells: give sbatch --array=0-11%4"),
        ("--task 0 --tasks 4 --only baseline --seed 0 --depth 20", "the grid has 2 cells"),
        ("--report", "no cell is complete yet"),
        ("--dataset digits --output /proc/none", "--output /proc/none: No such file or directory"),
        ("--grid none.yaml", "none.yaml: No such file"),
    ],
)
def test_a_flag_that_cannot_be_used_is_one_line(flags, message, tmp_path, capsys):
    assert main([*flags.split(), "--run-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnnopt.study: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_run_dir_may_begin_with_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = ["--only", "super-60", "--seed", "0", "--depth", "20", "--dataset", "cifar10"]
    assert main([*flags, "--run-dir=~/studies", "--task", "0"]) == 0
    assert str(tmp_path / "studies") in capsys.readouterr().out.splitlines()
    assert main([*flags, "--run-dir=~nobody-of-this-name/x", "--task", "0"]) == 2
    assert "no such home folder" in capsys.readouterr().err


def test_a_task_prints_its_ranks_and_its_flags(tmp_path, capsys):
    assert main(["--np", "2", "--only", "super-60", "--seed", "0", "--task", "1", "--tasks", "4"]) == 0
    ranks, *flags = capsys.readouterr().out.splitlines()
    cell = choose(expand(recipe("original"), scale=1, ranks=2, run_dir="runs/study", seeds=[0]), ["super-60"])[1]
    assert (ranks, flags) == ("2", list(cell.flags))
