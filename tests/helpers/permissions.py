"""Commands that permissions stop, although the tests may run as root, whom none stops."""

import os
import shutil

import pytest

#: Root without what lets it pass by permissions. Another user may not be able to reach this Python.
_AS_ANYBODY = ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search")


def stopped_by_permissions(command: list[str]) -> list[str]:
    """``command``, for which folders that their owner has closed are closed. Skips where that cannot be had."""
    if os.geteuid():
        return command
    if shutil.which("setpriv") is None:
        pytest.skip("needs setpriv, of util-linux: root is stopped by no permission")
    return [*_AS_ANYBODY, "--", *command]
