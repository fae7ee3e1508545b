"""Ranks that are killed, stopped and told to stop at random steps, and what is left of the run (fault_driver.py)."""

import fault_driver
import pytest

pytestmark = pytest.mark.timeout(1800)
SEEDS = 20


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


def test_a_rank_that_hangs_ends_the_job_and_is_named(tmp_path):
    jobs = fault_driver.Jobs(tmp_path)
    try:
        hang = fault_driver.Fault("hang", 1, "step", 3)
        stall = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "5", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "15"}
        end = jobs.run(tmp_path, hang, stall)
    finally:
        jobs.close()
    assert end.statuses[0] == 1
    assert "rank 1 (host localhost" in end.output
    assert "takes no part in the exchange" in end.output
    assert "Traceback" not in end.output
