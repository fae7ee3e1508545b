"""Atomic replacement of files."""

import resource

import pytest

from cnnopt.run import atomic_files


@pytest.fixture
def little_space():
    """A process that may write no more than 1,000 bytes to a file, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_holds_the_last_content_that_was_written_whole(tmp_path, little_space):
    path = tmp_path / "report.json"
    atomic_files.replace(path, "first")
    atomic_files.replace(path, b"second")
    with pytest.raises(
        atomic_files.WriteError, match=rf"^{path}: cannot be written \(File too large\); free some space"
    ):
        atomic_files.replace(path, "x" * 1001)
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(atomic_files.WriteError, match=r"none/a\.txt: cannot be written \(No such file or directory\)"):
        atomic_files.replace(tmp_path / "none/a.txt", "")
