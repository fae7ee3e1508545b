"""What can go wrong as expected: one line for the user, and the exit status that goes with it."""


class CnnoptError(Exception):
    """Its message is one line that names the flag or the file and the remedy."""

    exit_status = 1
    #: Whether one rank alone knows of it, which then has to say it.
    of_one_rank = False

    def __init__(self, message: str) -> None:
        # What the message quotes, an argument or a file name, may hold a line break.
        super().__init__(" ".join(message.splitlines()))


class UserError(CnnoptError):
    """What was asked for, or the files that were named, cannot be used."""

    exit_status = 2


class RunError(CnnoptError):
    """A run that was asked for rightly has failed."""
