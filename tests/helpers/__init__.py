"""Helpers that several test files share."""

from pathlib import Path

#: The root of the repository.
ROOT = Path(__file__).parents[2]
