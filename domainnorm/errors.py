"""What a user did wrong, told apart from what we did wrong, and how it is told: in one line."""

import reprlib

MAX_QUOTED = 80  # characters of a value in a message
MAX_MESSAGE = 1200  # characters, whatever is in it


class UserError(ValueError):
    """A mistake in what the user gave (config, data, checkpoint); the message is one line that says how to fix it.

    The command line prints it and exits with code 2. Line breaks in the message become spaces, other characters that
    cannot be printed are escaped, and the middle of a very long message is omitted.

    Example::

        >>> dn.load_config(None, ["SOLVER.BSE_LR", 0.1])
        Traceback (most recent call last):
        domainnorm.errors.UserError: overrides: unknown key SOLVER.BSE_LR; the nearest known key is SOLVER.BASE_LR
    """

    def __init__(self, message: object = "") -> None:
        line = _escaped(str(message))
        if len(line) > MAX_MESSAGE:
            line = f"{line[: MAX_MESSAGE // 2]} … {line[-MAX_MESSAGE // 2 :]}"
        super().__init__(line)


def one_line(text: object) -> str:
    """The lines of `text`, such as another program's message, as one, with escapes for what cannot be printed."""
    return _escaped(" ".join(part.strip() for part in str(text).splitlines()))


def reason_of(error: BaseException) -> str:
    """What the system says is wrong, without number and path, or all that an error says."""
    return getattr(error, "strerror", None) or str(error)


def quote(value: object) -> str:
    """`value` as a message shows it: its `repr`, or the beginning of that, however large the value is."""
    return cut(one_line(_Quote().repr(value)))


def cut(text: str, most: int = MAX_QUOTED) -> str:
    """`text`, or the beginning of it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


class _Quote(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 4 * MAX_QUOTED, MAX_QUOTED
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = MAX_QUOTED // 2

    def repr_int(self, x: int, level: int) -> str:
        """Python refuses to write thousands of digits."""
        return repr(x) if x.bit_length() <= 512 else f"a number of about {int(x.bit_length() * 0.30103)} digits"


class Stopped(SystemExit):
    """Raised when Ctrl-C or SIGTERM ends a run; its exit code is the one that shells use: 130 or 143.

    It is raised once everything worth keeping is saved. A program that does not catch it ends without a traceback.

    Args:
        number: number of the signal.

    Example::

        >>> dn.errors.Stopped(2).code
        130
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
