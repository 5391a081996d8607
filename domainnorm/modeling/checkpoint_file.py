"""A file of torch.save with a checksum of its bytes, read without running code that it may hold."""

import hashlib
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from ..errors import UserError, cut, one_line, quote
from ..output import replace_file
from ..paths import user_path

# The file is a zip archive, whose comment the checksum is: other programs read the file as they always did.
_MARK = b"sha256 "
_COMMENT = len(_MARK) + 64  # bytes
_UNDER = ("model", "state_dict", "model_state_dict")  # where checkpoints of this library and of others have weights


def write_checkpoint(content: dict[str, Any], file: str | Path) -> None:
    """`torch.save` to `file`, whole or not at all, with a checksum by which `read_checkpoint` finds what was damaged.

    Raises:
        UserError: it cannot be written.
    """
    with replace_file(file, "wb+") as stream:
        writer = _Writer(stream)
        torch.save(content, cast(IO[bytes], writer))
        if writer.error:
            raise writer.error
        stream.seek(-2, os.SEEK_END)
        stream.write(_COMMENT.to_bytes(2, "little"))  # the last field of an archive, before its comment
        digest = _sha256(stream, stream.tell())
        stream.seek(0, os.SEEK_END)
        stream.write(_MARK + digest)


class _Writer:
    """What torch writes to, in C++: an error there would end the process, or hide which one it was."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            if self.error is None:
                self.stream.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """What `torch.save` or safetensors wrote to `file`, on the CPU. Never runs code from it (`weights_only=True`).

    Raises:
        UserError: no such file, one that is broken, truncated or changed since it was written, or one that holds more
            than weights (says what).
    """
    try:
        path = user_path(file)
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "no such file"
            raise UserError(f"checkpoint {file}: {what}")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        _check_sum(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"checkpoint {file}: permission denied") from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"checkpoint {file}: broken, or not written by torch.save") from error
        raise UserError(
            f"checkpoint {file}: refused, because it holds {refused[1]}, which may run code when loaded; "
            "save its state_dict alone"
        ) from error
    except Exception as error:  # a truncated file: EOFError, RuntimeError, KeyError, … depending on where it was cut
        raise UserError(f"checkpoint {str(file)!r}: broken or truncated ({cut(one_line(error))})") from error
    if not isinstance(content, dict):
        raise UserError(f"checkpoint {file}: expected a state_dict, got {type(content).__name__}")
    return content


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"checkpoint {file}: safetensors is not installed; pip install safetensors") from None
    return load_file(file)


def state_dict_of(content: dict[str, Any], file: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint: those under "model", "state_dict" or, without these, all of it.

    Raises:
        UserError: what is there is no state dict of plain tensors.
    """
    under = next((key for key in _UNDER if key in content), "")
    state = content[under] if under else content
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {file}: expected a state_dict under {under!r}, got {type(state).__name__}")
    for key, value in state.items():
        if problem := _no_name(key) or not_plain(value):
            raise UserError(f"checkpoint {file}: {quote(key)} is no weight: expected a plain tensor, got {problem}")
    metadata = getattr(state, "_metadata", None)
    if isinstance(metadata, dict) and all(isinstance(own, dict) for own in metadata.values()):
        versions = [own.get("version") for own in metadata.values()]
        if all(version is None or type(version) is int for version in versions):
            return state
    return dict(state)  # without what torch would stumble over


def not_plain(value: Any) -> str:
    """What `value` is if not a dense tensor of real numbers on the CPU; else ""."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_nested or value.device.type != "cpu":
        return f"one that is not dense, or on device {value.device}"
    return f"{value.dtype}" if value.is_complex() else ""


def _no_name(key: Any) -> str:
    return "" if isinstance(key, str) else f"a name that is a {type(key).__name__}"


def _check_sum(file: Path) -> None:
    with open(file, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _COMMENT))
        comment = stream.read()
        if comment.startswith(_MARK) and _sha256(stream, size - _COMMENT) != comment[len(_MARK) :]:
            raise UserError(f"checkpoint {file}: broken: its bytes are not those that were written (checksum)")


def _sha256(stream: IO[bytes], size: int) -> bytes:
    """The SHA-256 of the first `size` bytes, as text."""
    digest = hashlib.sha256()
    stream.seek(0)
    while size and (part := stream.read(min(size, 1 << 20))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()
