"""Files of a data set are opened here: only regular ones, as a pipe or a device would be waited for without end."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | Path) -> BinaryIO:
    """`path`, opened for reading bytes.

    Raises:
        OSError: it cannot be opened; its `strerror` says so also where it is no regular file.
    """
    kind = stat.S_IFMT(os.stat(path).st_mode)
    if kind != stat.S_IFREG:
        raise OSError(None, f"it is {_KINDS.get(kind, 'no regular file')}, expected a file")
    return open(path, "rb")
