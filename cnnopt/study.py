"""Run a grid of cells, and write its tables and figures beside those of the original study.

    python -m cnnopt.study --scale 0.1 --np 2 --run-dir runs/study
    python -m cnnopt.study --recipe ours --np 2 --only 'super-*' --seed 0
    python -m cnnopt.study --scale 0.01 --dataset digits --dry-run
    python -m cnnopt.study --run-dir runs/study --report

Each cell is a run of train_hvd.py, measured by cnnopt.quantize. After each cell the tables (study.md, .tex, .csv), the
figures (.png, .svg), the page (study.html) and the records (records/*.json) are written to --output. The same command
goes on after any interruption (docs/study.md). Exit status: 0 done, 1 a cell has failed, 2 wrong input, 75 stopped by
a signal and saved, 130 stopped by Ctrl-C and saved.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cnnopt.command_line import Parser, one_line
from cnnopt.errors import CnnoptError
from cnnopt.export import options
from cnnopt.grid import cells, progress
from cnnopt.grid.cells import Cell, Grid, GridError
from cnnopt.output import outlive_readers

VARIANTS = "float32,float16,dynamic,int8,clustered-int8"


def parser() -> Parser:
    """The flags of this command."""
    made = Parser(prog="python -m cnnopt.study", description=__doc__)
    made.add_argument("--recipe", choices=cells.RECIPES, default="original", help="which grid [original]")
    made.add_argument(
        "--grid", type=Path, metavar="FILE", help="your own grid, in the form of cnnopt/grid/original.yaml"
    )
    made.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="factor on every duration of the recipe [1]"
    )
    made.add_argument("--np", type=int, default=1, metavar="N", help="ranks of the cells with `ranks: all` [1]")
    made.add_argument(
        "--run-dir", type=Path, default=Path("runs/study"), metavar="DIR", help="folder of the runs [runs/study]"
    )
    made.add_argument("--data-dir", metavar="DIR", help="folder that holds the data sets, as for train_hvd.py")
    made.add_argument("--dataset", nargs="+", default=[], metavar="NAME", help="data sets, instead of the grid's")
    made.add_argument("--depth", nargs="+", type=int, default=[], metavar="N", help="depths, instead of the grid's")
    made.add_argument("--seed", nargs="+", type=int, default=[], metavar="N", help="seeds, instead of the grid's")
    made.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="cells or runs, such as 'super-*'")
    made.add_argument(
        "--variants",
        default=VARIANTS,
        metavar="A,B",
        help=f"files to export and measure; none: only train [{VARIANTS}]",
    )
    made.add_argument("--output", type=Path, metavar="DIR", help="folder of the tables and figures [--run-dir/report]")
    made.add_argument("--dry-run", action="store_true", help="list the cells, their state and their commands")
    made.add_argument("--report", action="store_true", help="only write tables and figures of what is there")
    made.add_argument("--records", type=Path, metavar="DIR", help="only write tables and figures of these records")
    made.add_argument("--task", type=int, metavar="I", help="print ranks and flags of cell I (slurm/sweep.sbatch)")
    made.add_argument("--tasks", type=int, metavar="N", help="with --task: fail unless the grid has N cells")
    return made


def planned(given: argparse.Namespace) -> tuple[Grid, list[Cell]]:
    """The grid and the chosen cells of a command line. Raises UserError."""
    grid = cells.read(given.grid) if given.grid else cells.recipe(given.recipe)
    if not 0 < given.scale <= 100:
        raise GridError(f"--scale {given.scale:g}: must be above 0; 0.1 makes each run a tenth as long")
    if given.np < 1:
        raise GridError(f"--np {given.np}: must be at least 1")
    expanded = cells.expand(
        grid,
        scale=given.scale,
        ranks=given.np,
        run_dir=str(given.run_dir),
        data_dir=given.data_dir,
        datasets=given.dataset,
        depths=given.depth,
        seeds=given.seed,
    )
    return grid, cells.choose(expanded, given.only)


def measuring(given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The flags of ``cnnopt.quantize``, and the variants that they make. Both are empty for ``--variants none``."""
    if given.variants == "none":
        return [], []
    names = [name.strip() for name in given.variants.split(",")]
    for name in names:
        if "qat" in options.NEEDS.get(name, ()):
            raise GridError(f"--variants {name}: a study does not fine-tune; leave it out")
    flags = ["--variants", given.variants, "--pack"]
    if "clustered-int8" in names:
        flags += ["--clusters", str(progress.CLUSTERS)]
    if given.data_dir:
        flags += ["--data-dir", given.data_dir]
    variants = options.parse_args(["RUN", *flags]).variants
    assert variants is not None
    return flags, list(dict.fromkeys(["float32", *variants]))


def list_cells(chosen: Sequence[Cell], variants: Sequence[str]) -> None:
    """Print each cell with its state and its training command."""
    states = []
    for number, cell in enumerate(chosen, start=1):
        try:
            states.append(progress.state(cell, variants))
        except CnnoptError as error:
            states.append(f"failed: {error}")
        print(f"{number:3d} {states[-1]:8} {cell.name}")
        command = ["train_hvd.py", *cell.flags]
        print(f"    python -m cnnopt.launch -np {cell.ranks} -- python {shlex.join(command)}")
    left = progress.spoken(progress.Pace(chosen).left(chosen))
    print(f"{len(chosen)} cells, {states.count(progress.DONE)} done; time left: {left}")


def print_task(given: argparse.Namespace, chosen: Sequence[Cell]) -> None:
    """Print the ranks of a cell and its flags, one a line. Raises GridError if the grid has no such cell."""
    if given.tasks not in (None, len(chosen)) or not 0 <= given.task < len(chosen):
        raise GridError(f"the grid has {len(chosen)} cells: give sbatch --array=0-{len(chosen) - 1}%4")
    cell = chosen[given.task]
    print(cell.ranks, *cell.flags, sep="\n")


@one_line("cnnopt.study")
def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line. Every expected failure prints one line and gives an exit status."""
    given = parser().parse_args(argv)
    grid, chosen = planned(given)
    quantize, variants = measuring(given)
    if given.task is not None:
        print_task(given, chosen)
        return 0
    if given.dry_run:
        list_cells(chosen, variants)
        return 0
    output = given.output or given.run_dir / "report"
    from cnnopt.grid import report

    if given.report or given.records:
        if given.records:
            report.of_records(given.records, output, [grid])
        else:
            report.of_runs(given.run_dir, output, [grid])
        print(f"{output}/study.md, study.tex, a .csv for each table, a .png and a .svg for each figure")
        return 0
    from cnnopt.data import datasets
    from cnnopt.grid import runner

    for dataset in dict.fromkeys(cell.config.dataset for cell in chosen):
        datasets.check(dataset, given.data_dir)

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GridError(f"--output {output}: {error.strerror}; choose another folder") from None
    if not os.access(output, os.W_OK):
        raise GridError(f"--output {output}: may not be written; choose another folder")
    unwritten = ""

    def after_each(cell: Cell) -> None:
        nonlocal unwritten
        print(f"{cell.name}: {report.summary(cell.folder)}", flush=True)
        # What is wrong here is not the fault of this cell: the tables are made of all cells.
        try:
            report.of_runs(given.run_dir, output, [grid])
            unwritten = ""
        except CnnoptError as error:
            unwritten = str(error)

    print(f"{len(chosen)} cells; tables and figures go to {output}", flush=True)
    status = runner.Runner(chosen, quantize, variants).run(after_each)
    if unwritten:
        print(f"cnnopt.study: no tables and figures: {unwritten}", file=sys.stderr)
    return status or bool(unwritten)


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
