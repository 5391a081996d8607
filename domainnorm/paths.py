"""Paths as users write them: the one place where `~` is expanded."""

import errno
import os
from pathlib import Path

from .errors import UserError, cut


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that is meant, with a `~` or `~name` at its beginning expanded. It need not exist.

    Raises:
        UserError: no file can have this name here: it holds a NUL, is too long, is of a user without a home,
            or lies in a folder that may not be searched.
    """
    text = os.fspath(path)
    try:
        expanded = Path(text).expanduser()
        expanded.lstat()
    except RuntimeError as error:
        raise UserError(f"path {cut(text)}: no such user, or one without a home; write the path in full") from error
    except ValueError as error:  # a NUL, or half of a character
        raise UserError(f"path {cut(text)}: holds a character that no path can have") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"path {cut(text)}: is too long, {len(text)} characters") from error
        if error.errno == errno.EACCES:
            raise UserError(f"path {cut(text)}: permission denied for a folder that it is in") from error
    return expanded
