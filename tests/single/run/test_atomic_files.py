"""Atomic replacement of files."""

import resource
import subprocess
import sys

import pytest

from cnnopt.errors import UserError
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


def test_files_and_folders_are_replaced_together(tmp_path):
    (tmp_path / "a").write_text("old")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/old").touch()
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new/of a process that was killed").touch()
    with atomic_files.replace_together(tmp_path) as new:
        assert list(new.iterdir()) == []
        (new / "a").write_text("new")
        (new / "model").mkdir()
        (new / "model/new").touch()
        assert (tmp_path / "a").read_text() == "old"
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert found == ["a", "kept", "model", "model/new"]
    assert (tmp_path / "a").read_text() == "new"


def test_after_an_error_nothing_is_replaced_and_it_names_the_file_to_come(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic_files.replace_together(tmp_path) as new:
            (new / "a").write_text("new")
            raise UserError(f"{new}/a equals b")

    with pytest.raises(UserError, match=f"^{tmp_path}/a equals b$"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(atomic_files.WriteError, match=r"none/a\.txt: cannot be written \(No such file or directory\)"):
        atomic_files.replace(tmp_path / "none/a.txt", "")
