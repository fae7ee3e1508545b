"""What can go wrong as expected: one line for the user, and the exit status that goes with it."""


class CnnoptError(Exception):
    """Its message is one line that names the flag or the file and the remedy."""

    exit_status = 1


class UserError(CnnoptError):
    """What was asked for, or the files that were named, cannot be used."""

    exit_status = 2


class RunError(CnnoptError):
    """A run that was asked for rightly has failed."""
