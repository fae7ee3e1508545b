"""What the tests of ranks share."""

from tests.jobs import start

__all__ = ["start"]
