"""This machine as another host, named 127.0.0.2: a real sshd on that address, and an `ssh` that knows its key."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

NAME = "127.0.0.2"


def missing() -> str | None:
    """The reason why this machine cannot be another host, or None if it can."""
    for tool, package in {"sshd": "openssh-server", "ssh": "openssh-client", "pkill": "procps"}.items():
        if _path(tool) is None:
            return f"{tool} is not installed: apt-get install {package}"
    return None if os.geteuid() == 0 else "sshd needs root"


def _path(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class SshHost:
    """The host, until ``end``. ``environment`` are the variables with which ``ssh`` reaches it."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o700)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        with socket.socket() as free:
            free.bind((NAME, 0))
            port = free.getsockname()[1]
        server, client = folder / "sshd_config", folder / "ssh_config"
        server.write_text(
            f"ListenAddress {NAME}\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized\n"
            "StrictModes no\nUsePAM no\nPidFile none\n"
        )
        client.write_text(
            f"Host {NAME}\n Port {port}\n IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known\n"
            " StrictHostKeyChecking no\n LogLevel ERROR\n"
        )
        binaries = folder / "bin"
        binaries.mkdir()
        (binaries / "ssh").write_text(f'#!/bin/sh\nexec {_path("ssh")} -F {client} "$@"\n')
        (binaries / "ssh").chmod(0o755)
        self.environment: Mapping[str, str] = {"PATH": f"{binaries}:{os.environ['PATH']}"}
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = _path("sshd")
        assert sshd is not None
        self._sshd = subprocess.Popen([sshd, "-D", "-f", str(server)], stdin=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while subprocess.run([str(binaries / "ssh"), "-n", NAME, "true"], capture_output=True).returncode:
            assert time.monotonic() < end, "sshd does not answer"
            time.sleep(0.1)

    def end(self) -> None:
        """Stop sshd."""
        self._sshd.terminate()
        self._sshd.wait(30)
