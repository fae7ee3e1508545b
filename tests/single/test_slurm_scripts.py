"""The job scripts as text: what they pass on, and shellcheck's opinion of them. tests/cluster runs them."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from cnnopt.config import parse_args

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here: sudo apt-get install shellcheck")
def test_shellcheck_finds_nothing():
    files = [str(path.relative_to(ROOT)) for path in [*SCRIPTS, ROOT / "slurm/common.sh", ROOT / ".ci/run"]]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["slurm/super.sbatch", "slurm/quantize.sbatch", "docs/slurm.md"])
def test_the_commands_it_shows_parse(name):
    text = (ROOT / name).read_text().replace("\\\n#", " ").replace("\\\n", " ")
    commands = re.findall(r"slurm/super\.sbatch +(--[^)\n#`]*)", text)
    assert commands
    for flags in commands:
        parse_args(["--preset", "super", *shlex.split(flags)])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_folder_of_the_log_is_in_the_repository(path):
    (output,) = re.findall(r"^#SBATCH --output=(\S+)/", path.read_text(), re.M)
    assert (ROOT / output).is_dir()
