"""What one process of a run has read, mapped into the memory of the others on its machine instead of read again."""

import fcntl
import hashlib
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..distributed import SHARED_FOLDER
from ..output import replace_file

T = TypeVar("T")


def shared(key: object, make: Callable[[], T]) -> T:
    """What `make()` returns: made by the first process of a run that asks for `key`, mapped by all.

    Arrays in it are then read-only, and in memory once. Outside of a run of several processes, it is what `make()`
    returns.

    Args:
        key: says what is made; its `repr` is the same in all processes.
        make: of something that can be pickled. If it raises, the next process tries again.

    Raises:
        UserError: the folder of what is shared is full.
    """
    folder = os.environ.get(SHARED_FOLDER)
    if not folder:
        return make()
    file = Path(folder) / hashlib.sha256(repr(key).encode(errors="surrogateescape")).hexdigest()
    with open(f"{file}.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _write(make(), file)
    found: T = _mapped(file)
    return found


def _write(value: object, file: Path) -> None:
    """The pickle, after it the arrays, each at a multiple of 64 bytes, and at the end where they are."""
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    with replace_file(file, "wb") as stream:
        stream.write(content)
        places = [(0, len(content))]
        for buffer in buffers:
            stream.seek(-stream.tell() % 64, os.SEEK_CUR)
            start = stream.tell()
            places.append((start, start + stream.write(buffer.raw())))
        index = pickle.dumps(places)
        stream.write(index)
        stream.write(len(index).to_bytes(8, "little"))


def _mapped(file: Path) -> Any:
    with open(file, "rb") as stream:
        memory = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    end = len(memory) - 8
    places = pickle.loads(memory[end - int.from_bytes(memory[end:], "little") : end])
    content, *buffers = (memory[start:stop] for start, stop in places)
    return pickle.loads(content, buffers=buffers)
