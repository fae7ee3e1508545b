"""The tables of results in README.md and docs/study.md are those of the stored records."""

import json
import shutil
import subprocess
import sys

from tests.helpers import ROOT


def fill(root, *flags):
    command = [sys.executable, str(root / "scripts/fill_tables.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_tables_are_those_of_the_stored_results():
    done = fill(ROOT, "--check")
    assert done.returncode == 0, done.stderr


def test_a_table_that_differs_is_found_and_written(tmp_path):
    for name in ("README.md", "docs", "cnnopt", "scripts"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    path = tmp_path / "docs/results/study/ours-cifar10-resnet20-super-60-30epochs-seed0.json"
    record = json.loads(path.read_text())
    record["result"]["accuracy"] = 0.1234
    path.write_text(json.dumps(record))
    done = fill(tmp_path, "--check")
    assert (done.returncode, done.stderr.split()[0]) == (1, "README.md")
    before = (tmp_path / "README.md").read_text()
    assert fill(tmp_path).stdout.splitlines() == ["README.md", "docs/study.md", "docs/results/study/README.md"]
    after = (tmp_path / "README.md").read_text()
    changed = [line for line in after.splitlines() if line not in before.splitlines()]
    assert len(changed) == 1
    assert changed[0].startswith("| ResNet-20, CIFAR-10 | 60% | 12.34 (0) |")
    assert fill(tmp_path, "--check").returncode == 0
