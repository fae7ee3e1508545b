"""What CI runs: every supported Python, and scripts that the linters accept."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests.helpers import ROOT

WORKFLOW = ".github/workflows/ci.yml"
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def test_the_workflow_trains_with_each_python_and_tests_the_oldest_and_the_newest():
    job = yaml.safe_load((ROOT / WORKFLOW).read_text())["jobs"]["python"]
    assert job["strategy"]["matrix"]["python"] == PYTHONS
    train, test = job["steps"][-2:]
    assert train["run"].startswith("make train ")
    assert "if" not in train
    assert test["run"].startswith("make test ")
    assert re.findall(r"'(.*?)'", test["if"]) == [PYTHONS[0], PYTHONS[-1]]


def test_ci_looks_for_each_python():
    (listed,) = re.findall(r"for version in (.*); do", (ROOT / ".ci/run").read_text())
    assert sorted(listed.split()) == PYTHONS


@pytest.mark.parametrize(
    ("tool", "file"), [("actionlint", WORKFLOW), ("shellcheck", ".ci/run"), ("shellcheck", "scripts/make_env.sh")]
)
def test_linters_have_nothing_to_say(tool, file):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, ROOT / file], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
