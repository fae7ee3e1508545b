"""The program started in every kind of place and with every kind of input (tests/helpers/start_fuzz.py)."""

from collections.abc import Iterator

import pytest

from tests.helpers.start_fuzz import ENDINGS, Case, Starts, Tally, draw_cases, fuzz, try_case

pytestmark = pytest.mark.timeout(900)
CASES = 60  # `make soak` makes more


@pytest.fixture(scope="module")
def starts() -> Iterator[Starts]:
    with Starts() as made:
        yield made


@pytest.fixture(scope="module")
def tally(starts) -> Tally:
    found = fuzz(starts, draw_cases(CASES, None))
    print(found)
    return found


#: What the fuzz has found: the start, its status, and what is said.
FOUND = {
    "a limit of open files": (
        Case(limits=(("RLIMIT_NOFILE", 8),)),
        2,
        "train_hvd.py: ulimit -n 8: a run needs 128; raise the limit, or ask your administrator",
    ),
    "a limit of memory": (
        Case(limits=(("RLIMIT_AS", 2**31),)),
        2,
        "train_hvd.py: ulimit -v 2097152: a run needs 3145728; raise the limit, or ask your administrator",
    ),
    "a limit of stacks": (
        Case(limits=(("RLIMIT_STACK", 2**17),)),
        2,
        "train_hvd.py: ulimit -s 128: a run needs 512; raise the limit, or ask your administrator",
    ),
    "a limit of threads": (
        Case(nobody=True, limits=(("RLIMIT_NPROC", 1),)),
        1,
        "train_hvd.py: ulimit -u 1: this user has ",
    ),
    "a pipe in the place of a file": (
        Case(before="complete", files=(("runs/run/config.json", "fifo"),)),
        2,
        "train_hvd.py: runs/run/config.json is damaged: give another --name, or move it away",
    ),
    "a pipe in the place of the metrics": (
        Case(before="complete", files=(("runs/run/metrics.jsonl", "fifo"),)),
        0,
        "runs/run/metrics.jsonl had lost lines: 2 of 2 written again from the checkpoint",
    ),
    "a result without its line": (
        Case(before="complete", files=(("runs/run/result.json", b'{"step": 4}'),)),
        2,
        "train_hvd.py: runs/run/result.json is damaged: delete it, and the same command writes it anew",
    ),
    "a folder in the place of the metrics": (
        Case(before="stopped", files=(("runs/run/metrics.jsonl", "folder"),)),
        2,
        "train_hvd.py: runs/run/metrics.jsonl: Is a directory; restore it from a copy",
    ),
    "checkpoints behind a link that leads to itself": (
        Case(before="stopped", files=(("runs/run/checkpoints", "loop"),)),
        2,
        "train_hvd.py: cannot list runs/run/checkpoints: Too many levels of symbolic links; check path and permissions",
    ),
    "a file in the place of TensorBoard's folder": (
        Case(before="stopped", files=(("runs/run/tb", "empty"),)),
        2,
        "train_hvd.py: --run-dir runs: cannot write in runs/run/tb; choose another folder",
    ),
    "checkpoints that may not be written": (
        Case(before="stopped", nobody=True, modes=(("runs/run/checkpoints", 0o500),)),
        2,
        "train_hvd.py: --run-dir runs: cannot write in runs/run/checkpoints; choose another folder",
    ),
    "a part of TensorBoard's folder that may not be written": (
        Case(before="stopped", nobody=True, modes=(("runs/run/tb/train", 0o500),)),
        1,
        "cannot be written (Permission denied); check the folder",
    ),
    "a pipe in the place of a checkpoint": (
        Case(before="stopped", files=(("runs/run/checkpoints/step-00000004", "fifo"),)),
        0,
        "TensorBoard: ",
    ),
    "a folder of the start that is gone": (Case(cwd_is_gone=True), 0, "TensorBoard: "),
    "a network that is not there, and one process": (
        Case(environment=(("HOROVOD_GLOO_IFACE", "none0"),)),
        2,
        "train_hvd.py: HOROVOD_GLOO_IFACE=none0: has no IPv4 address here; there are ",
    ),
    "a local rank without a rank": (
        Case(environment=(("HOROVOD_LOCAL_RANK", "1"),)),
        2,
        "train_hvd.py: HOROVOD_RANK is not set, HOROVOD_SIZE is not set, HOROVOD_LOCAL_RANK=1, ",
    ),
    "an address of a launcher without a rank": (
        Case(environment=(("HOROVOD_GLOO_RENDEZVOUS_ADDR", "x"),)),
        2,
        "train_hvd.py: HOROVOD_GLOO_RENDEZVOUS_ADDR=x, but HOROVOD_RANK is not set: start with ",
    ),
    "a switch of TensorFlow that is neither on nor off": (
        Case(environment=(("TF_ONEDNN_USE_SYSTEM_ALLOCATOR", "2"),)),
        2,
        "train_hvd.py: TF_ONEDNN_USE_SYSTEM_ALLOCATOR=2: give 0 or 1, or unset it",
    ),
    "a umask that forbids the user to read": (
        Case(nobody=True, umask=0o777),
        2,
        "train_hvd.py: umask 0777: this user could not read the files of the run; give umask 022",
    ),
    "more threads than there can be": (
        Case(environment=(("TF_NUM_INTEROP_THREADS", "99999"),)),
        2,
        "train_hvd.py: TF_NUM_INTEROP_THREADS=99999: must be a whole number up to 1,024; unset it for the default, 2",
    ),
    "a number that Python does not read": (
        Case(environment=(("TF_NUM_INTRAOP_THREADS", "9" * 5000),)),
        2,
        "train_hvd.py: TF_NUM_INTRAOP_THREADS=99999999999999999999: must be a whole number; unset it for the default, ",
    ),
    "a digit that is no number": (
        Case(environment=(("TF_NUM_INTRAOP_THREADS", "\N{SUPERSCRIPT TWO}"),)),
        2,
        "train_hvd.py: TF_NUM_INTRAOP_THREADS=\N{SUPERSCRIPT TWO}: must be a whole number; unset it for the default, ",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzz_has_found(name, starts):
    case, status, said = FOUND[name]
    tried = try_case(starts, case)
    assert tried.wrong is None, str(tried)
    assert tried.end.status == status
    assert said in tried.end.stderr + tried.end.stdout


def test_every_start_ends_in_a_run_or_in_one_line_or_after_its_signal(tally):
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.cases == CASES


def test_the_endings_are_of_every_kind_and_a_third_trains(tally):
    # Few fail while they run: those that the fuzz has found are above.
    # How a start ends after a signal depends on how far it has come.
    assert {ENDINGS[status] for status in (0, 2)} <= set(tally.endings)
    assert {ENDINGS[status] for status in (75, 130)} & set(tally.endings)
    assert 3 * tally.trained >= CASES
    assert tally.early >= CASES / 5
    assert tally.real >= CASES / 60
