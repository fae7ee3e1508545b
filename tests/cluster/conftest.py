"""The SLURM cluster that the tests share. It ends with the session."""

from collections.abc import Iterator

import pytest

from tests.helpers import slurm_cluster
from tests.helpers.jobs import start

__all__ = ["start"]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    """Two nodes, n1 and n2; skips where SLURM is not installed."""
    if reason := slurm_cluster.missing():
        pytest.skip(reason)
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
