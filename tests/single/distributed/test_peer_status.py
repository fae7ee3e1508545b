"""The rank that is named after a failed exchange. Ranks are objects here, and processes if one is killed."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cnnopt.distributed.peer_status import PeerStatus, Place, sendable
from tests.helpers import ROOT


def ranks(number: int, *others: Place) -> list[PeerStatus]:
    """That many ranks that know each other, and the places of ``others`` as the last ranks."""
    presences = [PeerStatus("train") for _ in range(number)]
    places = [*(peers.open({}) for peers in presences), *others]
    for peers in presences:
        peers.places = places
    return presences


def last_words(presences: list[PeerStatus], *why: str) -> list[str | None]:
    """What each rank says, all failing at the same time."""
    words: dict[int, str | None] = {}

    def fail(rank: int) -> None:
        words[rank] = presences[rank].last_words(rank, why[rank], patience=1)

    threads = [threading.Thread(target=fail, args=[rank]) for rank in range(len(why))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [words[rank] for rank in range(len(why))]


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen, Place]]:
    """A rank in a process of its own, and its place."""
    code = "from cnnopt.distributed.peer_status import PeerStatus\n"
    code += "print(PeerStatus('train').open({}).address[1], flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        yield started, Place("b", started.pid, ("127.0.0.1", int(started.stdout.readline())))
        started.kill()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_is_killed_or_stopped_is_named_by_the_first_that_is_left(process, number):
    started, place = process
    presences = ranks(2, place)
    assert presences[0].ask(2) == "running"
    started.send_signal(number)
    if number == signal.SIGKILL:
        started.wait(30)
    name = f"rank 2 (host b, pid {started.pid})"
    assert last_words(presences, "", "") == [f"{name}: killed, stopped, or cut off from the network", None]


def test_the_first_rank_may_be_the_one_that_is_gone(process):
    started, place = process
    started.kill()
    started.wait(30)
    (peers,) = ranks(1)
    peers.places = [place, *peers.places]
    assert peers.last_words(1, "").startswith(f"rank 0 (host b, pid {started.pid}): killed")


def test_a_rank_that_hangs_is_alive_and_named():
    presences = ranks(3)
    first, second = last_words(presences, "", "")
    assert first.startswith("rank 2 (host ")
    assert first.endswith("): alive, but not taking part in the exchange")
    assert second is None
    # It is told, and has nothing to add if its exchange fails after all.
    assert presences[2].last_words(2, "") is None


def test_an_error_of_one_rank_is_said_by_it_alone():
    first, second, third = last_words(ranks(3), "", "cannot read", "")
    assert (first, third) == (None, None)
    assert second.startswith("rank 1 (host ")
    assert second.endswith("): cannot read")
    assert last_words(ranks(3), "cannot save", "", "") == ["cannot save", None, None]


@pytest.mark.parametrize(
    "why",
    ["x" * 100_000, "cannot read \udcff.bin", "a\nb\n" * 5000, "\u00e9" * 9_999],
    ids=["long", "bytes", "lines", "cut"],
)
def test_an_error_of_any_kind_reaches_the_others_and_makes_no_rank_dead(why):
    presences = ranks(3)
    first, second, third = last_words(presences, "", why, "")
    assert (first, third) == (None, None)
    assert second.startswith("rank 1 (host ")
    assert second.endswith(sendable(why))
    assert len(sendable(why).encode()) <= 10_000
    # All of them still answer.
    assert [presences[0].ask(rank) for rank in range(3)] == ["failed", sendable(why), "failed"]
    assert last_words(ranks(2), why, why) == [sendable(why), None]


@pytest.mark.parametrize("said", [b"\xff\xfe\n", b"x" * 100_000, b""], ids=["no UTF-8", "without an end", "nothing"])
def test_a_rank_answers_on_whatever_it_was_told(said):
    first, second = ranks(2)
    with socket.create_connection(second.places[1].address) as stranger, contextlib.suppress(OSError):
        stranger.sendall(said)
    assert first.ask(1) == "running"


def test_an_error_of_all_ranks_is_said_by_the_first():
    assert last_words(ranks(3), "diverged", "diverged", "diverged") == ["diverged", None, None]


def test_an_error_of_some_ranks_is_said_by_the_lowest_of_them():
    first, second, third, fourth = last_words(ranks(4), "", "no label 12", "no label 12", "no label 12")
    assert (first, third, fourth) == (None, None, None)
    assert second.startswith("rank 1 (host ")
    assert second.endswith("): no label 12")


def test_an_error_that_a_rank_has_said_before_it_ended_is_not_said_again(process):
    started, place = process
    presences = ranks(2, place)
    presences[1].state = "stopped"
    presences[1].heard.add("no label 12")
    started.kill()
    started.wait(30)
    assert presences[1].last_words(1, "no label 12") is None


def test_where_all_ranks_answer_it_is_the_network():
    first, second = last_words(ranks(2), "", "")
    assert first == "the exchange failed with all ranks alive: look at the network between their hosts"
    assert second is None


FIRST_OF_TWO = {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}
SECOND_HOST = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1"}


def ended(failure: str, **variables: str) -> tuple[int, str]:
    """Status and stderr of a rank that fails before the ranks know each other, by lines that raise."""
    code = f"""
import os, signal, threading, time
from cnnopt.distributed import entrypoint
from cnnopt.errors import UserError

def body(request, peers):
    {failure.strip().replace(chr(10), chr(10) + "    ")}

entrypoint.start(lambda: entrypoint.run("train_hvd.py", body))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_where_the_exchange_fails_before_ranks_know_each_other_a_line_says_so():
    # TensorFlow's own error, without the seconds that it takes to import it.
    failure = """
error = type("UnknownError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})
raise error("HorovodAllgather failed")
"""
    said = "train_hvd.py: another rank has ended while the ranks were starting: see its message\n"
    assert ended(failure, **FIRST_OF_TWO) == (1, said)


@pytest.mark.parametrize("variables", [{}, FIRST_OF_TWO])
def test_an_error_that_only_quotes_a_folder_of_that_name_is_not_hidden(variables):
    failure = """
error = type("ResourceExhaustedError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})
raise error('OOM when allocating tensor; File "/home/me/horovod-cifar/cnnopt/step.py", line 1')
"""
    status, said = ended(failure, **variables)
    assert status == 1
    why = 'ResourceExhaustedError: OOM when allocating tensor; File "/home/me/horovod-cifar/cnnopt/step.py", line 1\n'
    # The end of the traceback; where there are other ranks, also told to them.
    assert said.endswith(f"{why}train_hvd.py: {why}" if variables else why)
    assert "another rank" not in said


def test_an_error_of_ours_is_a_traceback_and_told_to_the_others():
    failure = """
peers.places = [type(peers)("the first").open(), peers.open()]
raise IndexError("first line" + chr(10) + "second line")
"""
    status, said = ended(failure, **SECOND_HOST)
    assert status == 1
    assert said.startswith("Traceback (most recent call last):")
    assert re.search(r"\ntrain_hvd.py: rank 1 \(host .+, pid \d+\): IndexError: first line\n$", said)
    assert ended(failure)[1].endswith("IndexError: first line\nsecond line\n")


def test_an_error_that_the_first_rank_may_share_is_said_with_the_host():
    status, said = ended('raise UserError("no data")', **SECOND_HOST)
    assert status == 2
    assert re.fullmatch(r"train_hvd\.py: rank 1 \(host .+\): no data\n", said)


def test_a_later_rank_of_a_host_says_that_it_may_start_no_thread():
    # The ranks before it have taken the threads that the user may have.
    second = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": "2", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}
    failure = """
from cnnopt.errors import ThreadLimitError
raise ThreadLimitError("ulimit -u 1: raise it")
"""
    assert ended(failure, **second) == (1, "train_hvd.py: ulimit -u 1: raise it\n")


def test_a_rank_that_is_ended_while_the_first_may_say_its_error_says_nothing():
    failure = """
def launcher():
    while getattr(signal.getsignal(signal.SIGTERM), "__module__", "") != "cnnopt.distributed.entrypoint":
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=launcher, daemon=True).start()
raise UserError("no data")
"""
    assert ended(failure, **SECOND_HOST) == (2, "")
