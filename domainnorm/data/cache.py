"""Where generated data sets are kept, and how one appears there: whole, in one step."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..paths import user_path


def cache_root() -> Path:
    """Where the sets are kept: `$DOMAINNORM_DATA`, else `~/.cache/domainnorm`."""
    return user_path(os.environ.get("DOMAINNORM_DATA") or "~/.cache/domainnorm")


def cached(name: str, target: Path, write: Callable[[Path], None]) -> Path:
    """`target`, a file or a folder that `write` makes at the path it is given, if it is not there yet.

    It appears by renaming what is finished: a process that is killed leaves no half of it, and of several that
    generate it at once one wins; their results are equal.

    Args:
        name: of the data set, for the error.

    Raises:
        UserError: the folder of `target` cannot be written.
    """
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            write(draft / target.name)  # within it: mkdtemp's folder is for its owner only, the cache may be shared
            try:
                (draft / target.name).rename(target)
            except OSError:
                if not target.exists():  # else another process was first
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise UserError(
            f"data set {name}: cannot be written to {target} ({error.strerror}); "
            "set DOMAINNORM_DATA to a folder that can"
        ) from error
    return target
