"""Ranks that are killed, stopped or told to stop at random steps, and the run afterwards (fault_driver.py)."""

import pytest

from tests.parallel import fault_driver

pytestmark = pytest.mark.timeout(1800)
# One of each kind; `make soak` causes more.
SEEDS = len(fault_driver.KINDS)


@pytest.fixture(scope="module")
def tally(tmp_path_factory) -> fault_driver.Tally:
    return fault_driver.soak(SEEDS, 0, tmp_path_factory.mktemp("faults"), print)


def test_every_job_ends_as_promised_and_the_next_start_resumes(tally):
    assert tally.wrong == []
    assert sum(tally.faults.values()) == SEEDS
    assert set(tally.faults) == {f"{kind} in a {where}" for kind, where in fault_driver.KINDS}


def test_no_more_steps_are_repeated_than_since_the_last_save(tally):
    assert tally.resumes >= SEEDS // 2
    assert sum(tally.repeated) > 0
    assert max(tally.repeated) <= fault_driver.SAVE_EVERY


def test_no_result_is_lost(tally):
    assert tally.runs >= 1
    assert tally.results_lost == 0
