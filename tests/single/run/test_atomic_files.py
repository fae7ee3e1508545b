"""Atomic replacement of files."""

import resource
import subprocess
import sys

import pytest

from cnnopt.run import atomic_files
from tests.helpers import ROOT


def little_space() -> None:
    """In a child: pytest itself may have more to write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def test_a_file_holds_the_last_content_that_was_written_whole(tmp_path):
    path = tmp_path / "report.json"
    code = "import sys; from pathlib import Path; from cnnopt.run.atomic_files import replace\n"
    code += "for content in ('first', b'second', 'x' * 1001): replace(Path(sys.argv[1]), content)"
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=little_space, stderr=subprocess.PIPE, text=True)
    assert f"WriteError: {path}: cannot be written (File too large); free some space" in done.stderr
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(atomic_files.WriteError, match=r"none/a\.txt: cannot be written \(No such file or directory\)"):
        atomic_files.replace(tmp_path / "none/a.txt", "")
