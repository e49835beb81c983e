"""The ways a run can fail that are not bugs; `cli.py` turns each into one line and an exit code."""


class InputError(ValueError):
    """What the user gave is wrong: a file, an option, a prompt. Exit code 2. The message says where, and the remedy."""


class NonFinite(ArithmeticError):
    """The model computed NaN or infinity, so nothing that follows would mean anything. Exit code 4."""


class EnvironmentFailure(RuntimeError):
    """What the machine lacks: a device, memory, disk space. Exit code 3."""


class InternalError(RuntimeError):
    """This code is at fault: two computations that must agree do not, or a measured process failed. Exit code 1."""


class Stopped(Exception):
    """A signal asked a run to end, and it ended in good order. Exit code 128 + the signal's number."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Notice(UserWarning):
    """What a user should know although all goes on; `cli.py` makes it a line on stderr."""
