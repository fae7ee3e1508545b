"""The job scripts under a real SLURM: they train, quantize, stop, fail, and refuse wrong input in one line."""

import json
import re
import subprocess
import sys
import urllib.request

import numpy as np
import pytest

from cnnopt.run import checkpoint
from tests.helpers.jobs import assert_pruned

pytestmark = pytest.mark.timeout(900)
TINY = """--dataset synthetic --depth 8 --batch-size 64 --epochs 16
          --precision float32 --deterministic --save-every 10s"""


def super_model(slurm, name: str, *flags: str, sbatch: tuple[str, ...] = ("--nodes=2",), **variables: str):
    return slurm.submit(*sbatch, "slurm/super.sbatch", *TINY.split(), "--name", name, *flags, **variables)


def final(slurm, name: str) -> dict[str, np.ndarray]:
    return checkpoint.load(checkpoint.list_steps(slurm.home / f"runs/{name}/checkpoints")[-1]).arrays


@pytest.fixture(scope="module")
def whole(slurm):
    """A run over two nodes that nothing disturbs, and a job that waits for it."""
    job = super_model(slurm, "whole")
    after = slurm.submit(
        f"--dependency=afterok:{job.number}", "slurm/quantize.sbatch", "runs/whole", "--variants", "int8"
    )
    return job, after


def test_two_nodes_train_to_a_sparse_checkpoint(slurm, whole):
    job, _ = whole
    assert job.wait() == "COMPLETED", job.log()
    for text in ("nodes     n1 n2: 2 ranks, 0 GPUs a node", "(n1: 1 x CPU, n2: 1 x CPU)", "sparsity 60.00%"):
        assert text in job.log()
    assert_pruned(final(slurm, "whole"), 0.6)


def test_quantize_runs_after_it(slurm, whole):
    job, after = whole
    assert job.wait() == "COMPLETED"
    assert after.wait() == "COMPLETED", after.log()
    assert list((slurm.home / "runs/whole/export").glob("*int8*.tflite"))
    assert (slurm.home / "runs/whole/report.json").exists()


def assert_one_curve_as_if_undisturbed(slurm, job, name: str) -> None:
    assert job.wait() == "COMPLETED", job.log()
    assert "back into the queue, restart 1 of at most" in job.log()
    assert "start 2" in job.log()
    assert "resumed after step" in job.log()
    lines = (slurm.home / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 17))
    expected = final(slurm, "whole")
    for key, array in final(slurm, name).items():
        assert array.tobytes() == expected[key].tobytes(), key


def test_usr1_saves_requeues_and_resumes_exactly(slurm, whole):
    job = super_model(slurm, "told")
    job.wait_for("epoch   1/16")
    slurm.run("scancel", "--signal=USR1", "--full", job.number)
    job.wait_for("stopped by a signal, and saved")
    assert_one_curve_as_if_undisturbed(slurm, job, "told")
    assert "status 75: back into the queue" in job.log()


def test_a_killed_rank_requeues_and_resumes_exactly(slurm, whole):
    job = super_model(slurm, "killed")
    # Two epochs have 16 steps, so one checkpoint is there.
    job.wait_for("epoch   2/16")
    (rank,) = job.ranks("n2")
    rank.kill()
    assert_one_curve_as_if_undisturbed(slurm, job, "killed")
    assert "n2: task 1: Killed" in job.log()


def test_out_of_time_requeues_and_resumes_but_not_once_cancelled(slurm):
    job = super_model(slurm, "late", "--epochs", "800", sbatch=("--nodes=2", "--time=30", "--signal=B:USR1@1"))
    job.wait_for("epoch   1/800")
    # Every half minute SLURM looks which jobs are within half a minute of their warning.
    hours, minutes, _ = job.show("RunTime").split(":")
    slurm.run("scontrol", "update", f"jobid={job.number}", f"timelimit={60 * int(hours) + int(minutes) + 1}")
    job.wait_for("back into the queue, restart 1 of at most")
    assert "stopped by a signal, and saved" in job.log(), job.log()
    slurm.run("scontrol", "update", f"jobid={job.number}", "timelimit=30")
    job.wait_for("resumed after step")
    slurm.run("scancel", job.number)
    assert job.wait() == "CANCELLED"
    assert "restart 2" not in job.log()


def test_a_failed_node_requeues(slurm):
    job = super_model(slurm, "node")
    # Two epochs have 16 steps, so one checkpoint is there.
    job.wait_for("epoch   2/16")
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    assert job.wait() == "COMPLETED", job.log()
    assert "start 2" in job.log()
    assert "resumed after step" in job.log()


def test_a_sweep_of_uneven_nodes_requeues_one_task_alone(slurm):
    # The batch of 128 does not divide over three ranks.
    common = "precision: float32, batch-size: 66"
    grid = slurm.home / "uneven.yaml"
    grid.write_text(
        "epochs: 80\ndatasets: [synthetic]\ndepths: [8]\nseeds: [0]\ncells:\n"
        f"  dense: {{preset: baseline, {common}}}\n  pruned: {{preset: super, sparsity: 0.8, {common}, ranks: all}}\n"
    )
    shape = ["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "slurm/sweep.sbatch"]
    flags = ["--grid", str(grid), "--scale", "0.2"]
    number = slurm.submit("--array=0-1%1", *shape, *flags).number
    tasks = [slurm.job(f"{number}_{task}") for task in (0, 1)]
    # The last task's own number is that of the array.
    tasks[1].wait_for("epoch   1/16")
    slurm.run("scancel", "--signal=USR1", "--full", tasks[1].number)
    for task in tasks:
        assert task.wait() == "COMPLETED", task.log()
    assert ["(n1: 2 x CPU, n2: 1 x CPU)" in task.log() for task in tasks] == [False, True]
    assert ["start 2" in task.log() for task in tasks] == [False, True]
    for name, ranks, sparsity in (("dense", 1, 0), ("pruned", 3, 0.8)):
        folder = slurm.home / f"runs/study/uneven-synthetic-resnet8-{name}-16epochs-seed0"
        assert json.loads((folder / "env.json").read_text())["ranks"] == ranks
        assert json.loads((folder / "result.json").read_text())["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    # One task again: its cell is complete.
    again = slurm.job(f"{slurm.submit('--array=1', *shape, *flags).number}_1")
    assert again.wait() == "COMPLETED", again.log()
    assert "is complete" in again.log()
    large = slurm.job(f"{slurm.submit('--array=0-2%1', *shape, *flags).number}_0")
    assert large.wait() == "FAILED"
    assert "cnnopt.study: the grid has 2 cells: give sbatch --array=0-1%4" in large.log()


def test_horovodrun_as_launcher(slurm):
    job = super_model(slurm, "horovodrun", "--epochs", "1", LAUNCHER="horovodrun")
    assert job.wait() == "COMPLETED", job.log()
    assert "sparsity 60.00%" in job.log()


def test_pmix_trains_with_mpi_in_horovod_and_is_one_line_without(slurm):
    if "pmix" not in "".join(slurm.run("srun", "--mpi=list").stdout.split()):
        pytest.skip("SLURM finds no PMIx here: sudo apt-get install libpmix-dev")
    # One node, as PMIx takes /tmp for its own, and these two nodes share it.
    job = super_model(slurm, "pmix", sbatch=("--nodes=1", "--ntasks-per-node=2"), LAUNCHER="pmix")
    built = [sys.executable, "-c", "import horovod.tensorflow as horovod; print(horovod.mpi_built())"]
    if "True" in subprocess.run(built, capture_output=True, text=True, check=True).stdout:
        assert job.wait() == "COMPLETED", job.log()
        assert ": 2 x CPU)" in job.log()
        assert "sparsity 60.00%" in job.log()
        return
    assert job.wait() == "FAILED"
    lines = [line for line in job.log().splitlines() if line.startswith("train_hvd.py: ")]
    assert len(lines) == 1, job.log()
    assert "srun started 2 processes but Horovod joined 1: start it with horovodrun or cnnopt.launch" in lines[0]


def test_apptainer_gets_the_command_of_a_rank(slurm):
    # No Apptainer here: one that runs the command of each rank as it is.
    fake = slurm.folder / "bin/apptainer"
    fake.parent.mkdir()
    fake.write_text('#!/bin/bash\nwhile [[ $1 != *.sif ]]; do shift; done\nshift; exec "$@"\n')
    fake.chmod(0o755)
    path = f"{fake.parent}:{slurm.environment['PATH']}"
    job = super_model(slurm, "image", "--epochs", "1", CONTAINER="cnnopt.sif", CNNOPT_MOUNTS="/srv/cifar", PATH=path)
    assert job.wait() == "COMPLETED", job.log()
    command = f"apptainer exec --bind {slurm.home},/srv/cifar --pwd {slurm.home} cnnopt.sif python train_hvd.py"
    assert command in job.log()


@pytest.mark.parametrize(
    ("gpus", "seen"),
    [("--gpus-per-node=2", ["0,1"] * 4), ("--gpus-per-task=1", ["0", "1"] * 2)],
    ids=["of the node", "of the task"],
)
def test_each_rank_is_set_up_and_sees_the_gpus_that_slurm_gives_it(slurm, gpus, seen):
    setup = slurm.home / "setup.sh"
    # A variable that is not there, as in many a module; then the devices are hidden, as they are made up.
    setup.write_text(
        'export SITE=$NOT_SET:set\n[ -z "$SLURM_STEP_ID" ] ||'
        ' echo "rank $SLURM_PROCID on $SLURMD_NODENAME was given GPU $CUDA_VISIBLE_DEVICES"\nCUDA_VISIBLE_DEVICES=\n'
    )
    shape = ("--nodes=2", "--ntasks-per-node=2", gpus)
    # With this flag srun itself would pass on the named variables alone.
    export = "--export=PATH,HOME,CNNOPT_SETUP=setup.sh"
    job = super_model(slurm, gpus.strip("-=12"), "--epochs", "1", sbatch=(*shape, export))
    assert job.wait() == "COMPLETED", job.log()
    given = re.findall(r"rank (\d) on (n\d) was given GPU (\S*)", job.log())
    assert sorted(given) == [(str(rank), f"n{1 + rank // 2}", seen[rank]) for rank in range(4)]
    assert "nodes     n1 n2: 4 ranks, 2 GPUs a node" in job.log()


def test_wrong_input_is_not_tried_again_where_a_rank_is_slow_to_start(slurm):
    # srun ends rank 1 before it has loaded what would hear a signal.
    late = slurm.folder / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text(
        "import os, time\nif os.environ.get('SLURM_PROCID') == '1': time.sleep(20)\n"
    )
    job = super_model(slurm, "slow", "--dataset", "cifar10", "--data-dir", "/no/data", PYTHONPATH=str(late))
    assert job.wait() == "FAILED", job.log()
    assert "srun ended with status 143" in job.log()
    # Which srun drops if it comes less than a moment before it ends a rank.
    assert "\ntrain_hvd.py: --data-dir /no/data: does not " in job.log()
    assert "back into the queue" not in job.log()


@pytest.mark.parametrize(
    ("sbatch", "flags", "variables", "line"),
    [
        (["--gpus-per-node=1"], [], {}, "train_hvd.py: SLURM gave 1 GPU on each node, but TensorFlow finds none"),
        (
            ["--gpus-per-node=1", "--ntasks-per-node=2"],
            [],
            {},
            "super: 2 ranks for 1 GPUs on each node: give ",
        ),
        (
            [],
            ["--dataset", "cifar10", "--data-dir", "/no/data"],
            {},
            "train_hvd.py: --data-dir /no/data: does not ",
        ),
        ([], [], {"LAUNCHER": "ssh"}, "super: LAUNCHER=ssh: choose srun, horovodrun or pmix"),
        ([], [], {"CONTAINER": "some#image"}, "srun: unrecognized option '--container-image=some#image'"),
        ([], [], {"CNNOPT_SETUP": "none.sh"}, "super: CNNOPT_SETUP=none.sh: there is no such file on "),
        ([], [], {"CNNOPT_INTERFACE": "ib9"}, "cnnopt.launch: --interface ib9: has no IPv4 address here"),
    ],
    ids=["no GPU seen", "more ranks than GPUs", "no data", "no such launcher", "no pyxis", "no set-up", "no network"],
)
def test_what_cannot_work_is_one_line_and_is_not_tried_again(slurm, sbatch, flags, variables, line):
    job = super_model(slurm, "wrong", *flags, sbatch=("--nodes=2", *sbatch), **variables)
    assert job.wait() == "FAILED", job.log()
    assert sum(said.startswith(line) for said in job.log().splitlines()) == 1, job.log()
    assert "back into the queue" not in job.log()
    assert not (slurm.home / "runs/wrong").exists()


def test_a_wrong_partition_is_refused_by_sbatch(slurm):
    done = slurm.run("sbatch", "--partition=nowhere", "slurm/super.sbatch")
    assert done.returncode == 1
    assert "invalid partition specified: nowhere" in done.stderr


def test_tensorboard_prints_its_tunnel_and_answers(slurm, whole):
    job = slurm.submit("slurm/tensorboard.sbatch")
    job.wait_for("Press CTRL+C")
    (port,) = re.findall(r"ssh -N -L 6006:localhost:([0-9]+) -J .* and then http://localhost:6006", job.log())
    with urllib.request.urlopen(f"http://localhost:{port}/data/runs", timeout=60) as answer:
        assert "whole/tb/train" in answer.read().decode()
    slurm.run("scancel", job.number)
