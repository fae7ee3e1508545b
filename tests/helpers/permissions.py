"""Makes permissions stop a command even if the tests run as root, whom permissions do not stop."""

import os
import shutil

import pytest

#: Root without the capabilities that bypass permissions. Another user may not be able to reach this Python.
_AS_ANYBODY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")


def stopped_by_permissions(command: list[str]) -> list[str]:
    """``command`` without access to folders that their owner has closed. Skips the test if that is not possible."""
    if os.geteuid():
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, of util-linux: root is stopped by no permission")
    return [*_AS_ANYBODY, "--", *command]
