"""The job scripts under a real SLURM: training, quantizing, stopping, breaking, and what they say when it cannot work."""


import numpy as np
import pytest

from cnnopt import checkpoint

pytestmark = pytest.mark.timeout(900)
TINY = ["--dataset", "synthetic", "--depth", "8", "--batch-size", "64", "--epochs", "4", "--precision", "float32", "--deterministic", "--save-every", "10s"]


def super_model(slurm, name: str, *flags: str, sbatch: tuple[str, ...] = ("--nodes=2",), **variables: str):
    return slurm.submit(*sbatch, "slurm/super.sbatch", *TINY, "--name", name, *flags, **variables)


def final(slurm, name: str) -> dict[str, np.ndarray]:
    return checkpoint.load(checkpoint.list_steps(slurm.home / f"runs/{name}/checkpoints")[-1]).arrays


@pytest.fixture(scope="module")
def whole(slurm):
    """A run over two nodes that nothing disturbs, and a job that waits for it."""
    job = super_model(slurm, "whole")
    after = slurm.submit(f"--dependency=afterok:{job.number}", "slurm/quantize.sbatch", "runs/whole", "--images", "64")
    return job, after


def test_two_nodes_train_to_a_sparse_checkpoint(slurm, whole):
    job, _ = whole
    assert job.wait() == "COMPLETED", job.log()
    print(job.log())
    for text in ("nodes     n1 n2: 2 ranks, 0 GPUs a node", "(n1: 1 x CPU, n2: 1 x CPU)", "sparsity 60.00%"):
        assert text in job.log()
    kernels = {n: a for n, a in final(slurm, "whole").items() if n.startswith("weights/") and n.endswith("kernel:0")}
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        assert int(np.sum(kernel == 0)) == kernel.size - round(0.4 * kernel.size), name
