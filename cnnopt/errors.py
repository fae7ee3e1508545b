"""Expected errors: each has one line for the user and an exit status."""


class CnnoptError(Exception):
    """An expected error. The message is one line that names the flag or the file and the remedy."""

    exit_status = 1
    #: Whether only one rank knows of the error. That rank must then print it.
    of_one_rank = False

    def __init__(self, message: str) -> None:
        # The message may quote an argument or a file name that holds a line break.
        super().__init__(" ".join(message.splitlines()))


class UserError(CnnoptError):
    """The user's request, or a file that the user named, cannot be used."""

    exit_status = 2


class RunError(CnnoptError):
    """A run with valid input has failed."""


class ThreadLimitError(RunError):
    """This process may not start threads. One rank may hit the limit alone, because all ranks of a host share it."""

    of_one_rank = True
