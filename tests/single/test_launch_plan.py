"""One plan for each launcher; every command of scripts, manifests and documents is known to TrainConfig."""

import re
import shlex
import subprocess
import sys

import pytest

from cnnopt import launch_plan
from cnnopt.config import parse_args
from tests.helpers import ROOT
from tests.helpers.manifests import Manifests, TrainJob, render_plan

GPUS = ["--nodes", "2", "--gpus-per-node", "4", "--", "--depth", "44", "--sparsity", "0.6"]
OTHER = ["--", "--dataset", "cifar100", "--epochs=2"]
CPUS = ["--ranks-per-node", "8"]
CORES = ["--nodes", "4", "--ranks-per-node", "2", "--cpus-per-rank", "8", "--", "--preset", "super", "--seed=7"]


def values(words: list[str]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=") for word in words if "=" in word and word.startswith("--n"))


@pytest.mark.parametrize(
    ("argv", "nodes", "ranks", "memory"),
    [(GPUS, 2, 8, "64Gi"), (CORES, 4, 8, "8Gi"), (CPUS, 1, 8, "16Gi"), (OTHER, 1, 1, "8Gi"), ([], 1, 1, "8Gi")],
)
def test_all_start_the_same_ranks_with_the_same_flags(argv, nodes, ranks, memory, tmp_path, monkeypatch):
    plan, _ = launch_plan.parse_plan(argv)
    assert (plan.nodes, plan.ranks) == (nodes, ranks)

    launcher = shlex.split(launch_plan.horovodrun(plan))
    assert launcher[launcher.index("-np") + 1] == str(ranks)
    if nodes > 1:
        hosts = launcher[launcher.index("-H") + 1].split(",")
        assert sum(int(host.split(":")[1]) for host in hosts) == ranks
        assert len(hosts) == nodes
    trained = parse_args(launcher[launcher.index("train_hvd.py") + 1 :])
    assert trained.expect_ranks == ranks

    batch = shlex.split(launch_plan.sbatch(plan))
    script = batch.index("slurm/super.sbatch")
    sizes = values(batch[:script])
    assert int(sizes["nodes"]) * int(sizes["ntasks-per-node"]) == ranks
    (own,) = re.findall(r'^train (.*) "\$@"$', (ROOT / "slurm/super.sbatch").read_text(), re.MULTILINE)
    queued = parse_args([*shlex.split(own), *batch[script + 1 :]])
    assert queued.identity() == trained.identity() == plan.config.identity()

    for rendered in (
        Manifests("mine", render_plan(tmp_path / "mpijob", launch_plan.mpijob(plan))),
        TrainJob("mine", render_plan(tmp_path / "trainjob", launch_plan.trainjob(plan))),
    ):
        assert rendered.workers * rendered.slots == ranks
        config = parse_args(rendered.container("Launcher")["args"])
        assert config.identity() == trained.identity()
        kinds = [document["kind"] for document in rendered.documents]
        assert "TrainJob" not in kinds or kinds.index("TrainingRuntime") < kinds.index("TrainJob")
        # Without the flag an empty volume is downloaded to; k8s/base names it by a variable.
        assert config.data_dir == ("/data" if trained.data_dir else None)
        assert (config.run_dir, config.name) == ("/runs", trained.name)
        resources = rendered.container("Worker")["resources"]
        assert (
            resources["limits"]["cpu"] == resources["requests"]["cpu"] == str(plan.cpus_per_rank * plan.ranks_per_node)
        )
        assert resources["limits"].get("nvidia.com/gpu", "0") == str(plan.gpus_per_node)
        assert resources["limits"]["memory"] == resources["requests"]["memory"] == memory
        assert rendered.variables("Launcher")["TF_NUM_INTRAOP_THREADS"] == str(plan.cpus_per_rank)
        quantize = rendered.of("Job")[0]["spec"]["template"]["spec"]
        assert quantize["containers"][0]["args"][0] == f"/runs/{trained.name}"
        assert f"/runs/{trained.name}/result.json" in quantize["initContainers"][0]["command"][2]


@pytest.mark.parametrize(("nodes", "memory"), [(4, "2Gi"), (16, "5Gi")])
def test_the_launcher_gets_memory_for_a_process_of_each_rank(nodes, memory, tmp_path):
    plan, _ = launch_plan.parse_plan(["--nodes", str(nodes), "--gpus-per-node", "8", "--", "--batch-size", "1024"])
    for rendered in (
        Manifests("mine", render_plan(tmp_path / "mpijob", launch_plan.mpijob(plan))),
        TrainJob("mine", render_plan(tmp_path / "trainjob", launch_plan.trainjob(plan))),
    ):
        assert rendered.container("Launcher")["resources"]["limits"]["memory"] == memory


def test_the_command_prints_all_or_one():
    command = [sys.executable, "-m", "cnnopt.launch_plan"]
    done = subprocess.run([*command, *GPUS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "horovodrun -np 8 -H node1:4,node2:4 python train_hvd.py --depth 44 --sparsity 0.6 --exp" in done.stdout
    assert "sbatch --nodes=2 --ntasks-per-node=4 --cpus-per-task=4 --gpus-per-node=4 slurm/super.sbatch" in done.stdout
    assert '"/spec/slotsPerWorker", "value": 4' in done.stdout
    assert '"/spec/trainer/numProcPerNode", "value": 4' in done.stdout
    only = subprocess.run([*command, "--only", "slurm", *GPUS], cwd=ROOT, capture_output=True, text=True)
    assert only.stdout == launch_plan.sbatch(launch_plan.parse_plan(GPUS)[0]) + "\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nodes", "0"], "--nodes 0: must be at least 1"),
        (
            ["--gpus-per-node=4", "--ranks-per-node=2"],
            "--ranks-per-node 2: --gpus-per-node 4 means one rank for each",
        ),
        (["--nodes", "3"], "--batch-size 128: cannot be split evenly over 3 ranks; use 126 or 129"),
        (["--nodes", "2", "--", "--expect-ranks", "4"], "--expect-ranks 4: 2 started"),
        (["--", "--depth", "21"], "--depth 21: the depth of a CIFAR ResNet is 6n+2"),
        (["--depth", "44"], "unrecognized argument --depth: flags of train_hvd.py go after --"),
        (["--only", "lsf"], "--only: invalid choice"),
    ],
)
def test_wrong_input_is_one_line(argv, message, capsys):
    assert launch_plan.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("cnnopt.launch_plan: ")
    assert message in line


# ---- Commands anywhere in the project -------------------------------------------------------------------------------


#: What comes before the flags of train_hvd.py: a rank, SLURM's script, a plan.
COMMAND = re.compile(r"(?:python3? (?:\S*/)?train_hvd\.py|sbatch\b.* slurm/super\.sbatch|launch_plan\b.* --) (--\S.*)")
#: A command ends at a comment, a redirection, a pipe, a gap, or where what is set as code ends.
END = re.compile(r"\s#|\s>|[`|;&)\"]|:\s|\s{2,}")
#: Words that stand for others.
PLACEHOLDER = re.compile(r"[\[<]|\.\.\.|NAME|\bN\b|--help")


def commands() -> list[tuple[str, list[str]]]:
    """Each command line with literal flags of train_hvd.py, and the file that it is in."""
    files = [ROOT / name for name in ("README.md", "train_hvd.py", "Makefile")]
    files += [path for folder in ("cnnopt", "docs", "slurm", "k8s") for path in sorted((ROOT / folder).rglob("*"))]
    found = []
    for path in files:
        if path.suffix in {".md", ".py", ".sbatch", ".sh", ".yaml", ""} and path.is_file():
            for line in path.read_text().replace("\\\n", " ").splitlines():
                match = COMMAND.search(line)
                if match and "$" not in match[1]:
                    flags = END.split(match[1])[0]
                    if not PLACEHOLDER.search(flags):
                        found.append((path.relative_to(ROOT).as_posix(), shlex.split(flags)))
    return found


def test_commands_are_found_where_they_are():
    assert {"README.md", "train_hvd.py", "cnnopt/launch_plan.py"} <= {path for path, _ in commands()}


@pytest.mark.parametrize(("path", "flags"), commands())
def test_every_command_parses(path, flags):
    parse_args(flags)
