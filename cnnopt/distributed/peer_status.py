"""Find out which ranks are still there after the exchange has failed. Each rank has a thread and a port that answer.

Standard library only. Ranks ask each other only after a failure: there are no heartbeats and no collective.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

TIMEOUT = 2.0
LONGEST = 10_000


@dataclass(frozen=True)
class Place:
    """The host and process id of a rank, and the address at which it answers."""

    host: str
    pid: int
    address: tuple[str, int]


class PeerStatus:
    """Answers the other ranks with ``running``, ``stopped``, ``failed``, or this rank's error, and collects theirs."""

    def __init__(self, program: str) -> None:
        self.program = program
        self.state = "running"
        self.heard: set[str] = set()
        self.places: list[Place] = []

    def open(self, environ: Mapping[str, str] = os.environ) -> Place:
        """Begin to answer. Returns this rank's place. Then set ``places`` to the places of all ranks, by rank."""
        self._server = socket.create_server((_address(environ.get("HOROVOD_GLOO_RENDEZVOUS_ADDR")), 0))
        threading.Thread(target=self._answer, name="peers", daemon=True).start()
        host = environ.get("HOROVOD_HOSTNAME") or platform.node()
        return Place(host, os.getpid(), self._server.getsockname()[:2])

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:  # the caller has gone again, or this process may open no more files
                time.sleep(0.1)
                continue
            with connection, contextlib.suppress(OSError):
                connection.settimeout(TIMEOUT)
                if said := connection.makefile("rb").readline(LONGEST + 1).decode(errors="replace").strip():
                    self.heard.add(said)
                connection.sendall(self.state.encode())

    def ask(self, rank: int, say: str = "") -> str | None:
        """Send ``say`` to rank ``rank`` and return its state: empty if it has ended, None if it does not answer."""
        try:
            with socket.create_connection(self.places[rank].address, TIMEOUT) as connection:
                connection.sendall(f"{sendable(say)}\n".encode())
                return connection.makefile("rb").read(LONGEST).decode(errors="replace")
        except ConnectionError:
            return ""
        except OSError:
            return None

    def stop_after_first(self, rank: int, *, patience: float = 30) -> None:
        """Wait until rank 0 has stopped too, has ended, or has not answered for ``patience`` seconds.

        A collective cannot do this: the first rank that leaves it and ends may break it for the others.
        """
        self.state = "stopped"
        heard = time.monotonic()
        while rank and self.places and time.monotonic() - heard < patience:
            state = self.ask(0)
            if state == "running":
                heard = time.monotonic()
            elif state is not None:
                return
            time.sleep(0.1)

    def speak(self, rank: int, why: str = "") -> None:
        """Print the line with which this rank, ``rank``, ends, unless another rank prints it."""
        if words := self.last_words(rank, why):
            print(f"{self.program}: {words}", file=sys.stderr, flush=True)

    def last_words(self, rank: int, why: str, *, patience: float = 3) -> str | None:
        """The line with which this rank, ``rank``, ends, or None if another rank prints it.

        ``why`` is this rank's own error. The lowest of the ranks with the same error prints it. ``why`` is empty if the
        exchange failed because of another rank. Then the lowest rank that saw the failure names the ranks that are gone
        or hang, unless some rank has an error of its own.
        """
        why = sendable(why)
        self.state = why or "failed"
        others = [other for other in range(len(self.places)) if other != rank]
        end = time.monotonic() + patience
        while True:
            answers = {other: self.ask(other) for other in others}
            lower = [answers[other] for other in range(rank)]
            errors = self.heard | ({*answers.values()} - {None, "", "running", "stopped", "failed"})
            if (why in {*self.heard, *lower}) if why else (errors or "failed" in lower):
                return None
            # A lower rank that runs may still meet the same error.
            if "running" not in (lower if why else answers.values()) or time.monotonic() > end:
                break
            time.sleep(0.2)
        words = why or self._blame(
            [other for other in others if not answers[other]],
            [other for other in others if answers[other] == "running"],
        )
        # A rank that asks later may find this one ended. So tell all of them now what is printed.
        for other in others:
            self.ask(other, words)
        return f"{self._name(rank)}: {why}" if why and rank else words

    def _blame(self, gone: list[int], hanging: list[int]) -> str:
        names = ", ".join(map(self._name, gone or hanging))
        if gone:
            return f"{names}: killed, stopped, or cut off from the network"
        if hanging:
            return f"{names}: alive, but not taking part in the exchange"
        return "the exchange failed with all ranks alive: look at the network between their hosts"

    def _name(self, rank: int) -> str:
        return f"rank {rank} (host {self.places[rank].host}, pid {self.places[rank].pid})"


def sendable(text: str) -> str:
    """``text`` as the other ranks get it: one line of UTF-8, cut to at most LONGEST bytes."""
    line = " ".join(text.split()).encode(errors="backslashreplace")
    return line[:LONGEST].decode(errors="ignore")


def _address(rendezvous: str | None) -> str:
    """The address from which this host reaches the rendezvous. Nothing is sent."""
    # UnicodeError: a host name that no resolver accepts.
    with contextlib.suppress(OSError, UnicodeError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((rendezvous or platform.node(), 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"
