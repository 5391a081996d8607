"""What a user did wrong, told apart from what we did wrong."""

_MOST = 2000  # characters


class UserError(ValueError):
    """A mistake in what the user gave (config, data, checkpoint), told in one line that says what to do.

    The command line prints it and exits with code 2.

    Example::

        >>> dn.load_config(None, ["SOLVER.BSE_LR", 0.1])
        Traceback (most recent call last):
        domainnorm.errors.UserError: overrides: unknown key SOLVER.BSE_LR; the nearest known key is SOLVER.BASE_LR
    """

    def __init__(self, message: str = "") -> None:
        line = " ".join(str(message).splitlines())  # also where it quotes a name of several lines, or another's message
        super().__init__(line if len(line) <= _MOST else f"{line[:_MOST]}…")


class Stopped(SystemExit):
    """A run ends because Ctrl-C or SIGTERM asked it to, with the exit code that a shell gives that: 130 or 143.

    What it raises once all that is worth keeping is saved; a program that does not catch it ends without a traceback.

    Args:
        number: of the signal.

    Example::

        >>> dn.errors.Stopped(2).code
        130
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
