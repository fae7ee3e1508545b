"""The rendezvous of Horovod's ranks: a small HTTP store of keys, as Horovod's Gloo client expects it.

Each rank puts the address on which it listens and gets those of the others. After that no rank asks again. Gloo sends
no password, so the store listens on one address, and on this host it answers only one user (docs/slurm.md, "Who can
reach a run"). Standard library only, so it also runs without Horovod and TensorFlow.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cnnopt.errors import UserError

_ADDRESS, _PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"
_SIOCGIFADDR = 0x8915


class RendezvousError(UserError):
    """The ranks could not find each other. The message is one line. Only one rank knows it and prints it."""

    of_one_rank = True


class _Handler(BaseHTTPRequestHandler):
    server: Rendezvous
    # Seconds until a request that never ends is dropped.
    timeout = 10

    def do_GET(self) -> None:
        """Send the value of a key. 404 tells Gloo to ask again."""
        value = self.server.store.get(self.path)
        self._answer(404 if value is None else 200, value or b"")

    def do_PUT(self) -> None:
        """Store a value."""
        self.server.store[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200)

    def do_DELETE(self) -> None:
        """Answer a rank that has found its peers, but keep its key: others may not have read it yet."""
        self._answer(200)

    def _answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing, because ranks ask a hundred times a second."""


class Rendezvous(ThreadingHTTPServer):
    """The store. It listens on one IPv4 address until it is closed. Horovod's client supports IPv4 only."""

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, address: str, port: int = 0) -> None:
        self.store: dict[str, bytes] = {}
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {address} port {port}: {error.strerror}; leave --port out for any free one"
            ) from None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def server_bind(self) -> None:
        """Bind as HTTPServer does, but do not look up the host's full name, which can take seconds."""
        self.allow_reuse_address = True
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_name, self.server_port = self.server_address = self.socket.getsockname()

    def verify_request(self, request: object, client_address: Any) -> bool:
        """Accept other hosts, and on this host only the user who started the run."""
        return owner(*client_address) in (None, os.getuid())

    def variables(self) -> dict[str, str]:
        """The environment variables that lead ranks to this store."""
        return {
            _ADDRESS: self.server_name,
            _PORT: str(self.server_port),
            "HOROVOD_CONTROLLER": "gloo",
            "HOROVOD_CPU_OPERATIONS": "gloo",
        }


def owner(address: str, port: int) -> int | None:
    """The id of the user who holds this end of a TCP connection. None if the end is on another host."""
    end = f"{struct.unpack('=I', socket.inet_aton(address))[0]:08X}:{port:04X}"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1] == end:
            return int(fields[7])
    return None


def address_of(interface: str | None, named: str = "--interface ") -> str:
    """The IPv4 address of ``interface``, which ``named`` has given. If that is None, of this host's name.

    Gloo listens on the latter too. Raises UserError.
    """
    if interface is None:
        name = socket.gethostname()
        try:
            return socket.gethostbyname(name)
        except (OSError, UnicodeError) as error:
            raise UserError(f"this host's name {name} has no IPv4 address ({error}); add it to /etc/hosts") from None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", os.fsencode(interface)[:15]))
    except OSError:
        names = ", ".join(name for _, name in socket.if_nameindex())
        raise UserError(f"{named}{interface}: has no IPv4 address here; there are {names}") from None
    return socket.inet_ntoa(answer[20:24])


def check(environ: Mapping[str, str] = os.environ, *, gpu: bool = False, patience: float = 30) -> None:
    """Raise UserError if this rank cannot reach the rendezvous, or the others could not reach this rank.

    Horovod itself would try for minutes, print "Connection refused", or abort in C++. ``patience`` is in seconds.
    ``gpu``: whether this rank computes on a GPU, and so exchanges through NCCL.
    """
    if interface := environ.get("HOROVOD_GLOO_IFACE"):
        # Also for one process, which Gloo would end in C++.
        address_of(interface, "HOROVOD_GLOO_IFACE=")
    size = environ.get("HOROVOD_SIZE", "1")
    # mpirun sets neither. Horovod asks at an address that is set, also for one process.
    if environ.keys().isdisjoint({"HOROVOD_RANK", "HOROVOD_SIZE"}) or (size == "1" and _ADDRESS not in environ):
        return
    left = "start with horovodrun or cnnopt.launch, or unset HOROVOD_*, if another job has left them"
    if not environ.get(_ADDRESS):
        raise RendezvousError(f"HOROVOD_SIZE={size}, but {_ADDRESS} is not set: {left}")
    name, address = socket.gethostname(), environ[_ADDRESS]
    if size != "1" and not own_name_is_here():
        raise UserError(f"this host's name {name} has no address here, and Horovod needs one; add it to /etc/hosts")
    one_host = size in ("1", environ.get("HOROVOD_LOCAL_SIZE"))
    place = f"{address}:{environ.get(_PORT)}"
    end = time.monotonic() + patience
    while True:
        fault = _fault(environ)
        if fault is None:
            break
        if one_host and (isinstance(fault, ConnectionRefusedError) or time.monotonic() > end):
            raise RendezvousError(f"HOROVOD_SIZE={size}, but no launcher answers at {place} ({fault}): {left}")
        if time.monotonic() > end:
            remedy = (
                "that is the loopback address of the first host; in /etc/hosts there, give its name its network address"
                if address.startswith("127.")
                else "is there a firewall between the hosts? --interface chooses another network, --port a port"
            )
            rank = environ.get("HOROVOD_RANK", "0")
            raise RendezvousError(f"rank {rank} on {name} cannot reach the rendezvous {place} ({fault}); {remedy}")
        time.sleep(1)
    if one_host:
        return
    if gpu:
        check_nccl_interface(environ)
    if not _is_here(address):
        check_own_name(address)


def check_nccl_interface(environ: Mapping[str, str]) -> None:
    """Raise RendezvousError if this host has none of the networks that NCCL_SOCKET_IFNAME allows.

    NCCL reads the variable as beginnings of names, separated by commas. A "=" before the first turns them into whole
    names. A "^" before the first turns them into names to leave out.
    """
    given = environ.get("NCCL_SOCKET_IFNAME", "")
    here = [name for _, name in socket.if_nameindex()]
    names = given.lstrip("^=").split(",")
    whole = given.startswith(("=", "^="))
    named = {name for name in here for other in names if (name == other if whole else name.startswith(other))}
    if given and not (set(here) - named if given.startswith("^") else named):
        raise RendezvousError(
            f"NCCL_SOCKET_IFNAME={given}: {socket.gethostname()} has no such network, but {', '.join(here)}; give the "
            "beginning of a name that every host has, several with commas, or unset it"
        )


def check_own_name(address: str) -> None:
    """Raise RendezvousError if Gloo will listen on the loopback while the rendezvous, ``address``, is on a network.

    gloo_context.cc takes no interface for the ranks as a whole: each listens on the address of its host's name.
    """
    name, own = socket.gethostname(), address_of(None)
    if own.startswith("127.") and not address.startswith("127."):
        raise RendezvousError(
            f"the name of this host, {name}, resolves to {own}, which other hosts cannot reach; in /etc/hosts on "
            f"{name}, give the name its network address"
        )


def answers(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher that set these variables still answers."""
    return _fault(environ) is None


def _fault(environ: Mapping[str, str]) -> OSError | None:
    """The reason why the rendezvous does not answer. None if it answers."""
    url = f"http://{environ.get(_ADDRESS)}:{environ.get(_PORT)}/cnnopt/{environ.get('HOROVOD_RANK', '0')}"
    try:
        # No proxy, because the address is inside this cluster.
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        error.close()
        return None  # It answers, but has no such key.
    except urllib.error.URLError as error:
        return error.reason if isinstance(error.reason, OSError) else OSError(error.reason)
    except OSError as error:
        return error
    # The variables give no valid address, or another program has the port by now.
    except (http.client.HTTPException, ValueError) as error:
        return OSError(f"{type(error).__name__}: {error}")
    return None


def own_name_is_here() -> bool:
    """Whether this host's name leads to an address on which Gloo can listen. Without one, Gloo aborts."""
    with contextlib.suppress(OSError, UnicodeError):
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        # From its third item on, an IPv6 address holds its scope.
        return any(_is_here(str(address[0]), *address[2:], family=family) for family, _, _, _, address in found)
    return False


def _is_here(address: str, *scope: Any, family: int = socket.AF_INET) -> bool:
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0, *scope))
        except OSError:
            return False
    return True
