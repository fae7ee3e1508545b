"""Fixtures that the tests of ranks share."""

from tests.helpers.jobs import start

__all__ = ["start"]
