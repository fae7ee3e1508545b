"""Two real ranks whose driver is made up (tests/helpers/cuda_driver.py)."""

import sys
from pathlib import Path

import pytest

from tests.helpers.cuda_driver import driver

WORKER = str(Path(__file__).with_name("gpu_worker.py"))
LAUNCH = (sys.executable, "-m", "cnnopt.launch", "-np", "{ranks}", "--")


@pytest.mark.parametrize(
    ("share", "numbers", "status"),
    [("alone", "00", 2), ("alone", "01", 0), ("share", "11", 0)],
    ids=["one GPU", "one each", "one GPU, and they may"],
)
def test_two_ranks_on_one_gpu_need_a_word_from_the_user(share, numbers, status, start, tmp_path):
    job = start(2, WORKER, driver(tmp_path), share, *numbers, launcher=LAUNCH)
    assert job.wait() == status, job.output()
    said = [line for line in job.output().splitlines() if "compute on one GPU" in line]
    assert len(said) == (status == 2)
    assert job.output().count("goes on") == (0 if status else 2)
