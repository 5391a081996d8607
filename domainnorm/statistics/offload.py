"""Tensors of a forward that waits, moved out of the device's memory and back, in place."""

import itertools
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import TensorWeakRef


class ActivationOffloader:
    """Moves the tensors of all but a few of several forwards that take turns out of the device's memory.

    Args:
        model: what the forwards run; tensors that it holds (parameters, buffers, caches) stay where they are.
        live: forwards whose tensors may be on the device at once, at least one.
        folder: where the others go, into memory-mapped files; None: into the host's memory.
    """

    def __init__(self, model: nn.Module, live: int, folder: str | Path | None = None) -> None:
        if live < 1:
            raise ValueError(f"live takes 1 or more forwards, got {live}")
        self.model = model
        self.folder = folder
        # Forwards come back in the order in which they left: whoever left last is needed last.
        self._numbers = itertools.count()
        self.live = live
        self.offloaded: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # by the storage's address
        self.shared: set[int] = set()  # storages that several forwards use: they stay

    def track(self) -> "TrackedTensors":
        """The tensors of the next forward."""
        return TrackedTensors(self, stays=next(self._numbers) < self.live - 1)

    def restore(self, address: int) -> None:
        """Fill a storage again, if it is offloaded."""
        if address in self.offloaded:
            storage, host = self.offloaded.pop(address)
            storage.resize_(host.nbytes)
            storage.copy_(host.untyped_storage())

    def held_by_model(self) -> set[int]:
        """The storages that the model holds, by their address; caches in plain attributes included."""
        held = itertools.chain(self.model.parameters(), self.model.buffers(), *map(_attributes, self.model.modules()))
        return _addresses(held)

    def restore_all(self) -> None:
        """Fill what is still offloaded: the forwards were ended, but their inputs belong to somebody."""
        for address in list(self.offloaded):
            self.restore(address)

    def empty(self, size: int) -> Tensor:
        """`size` bytes to offload to."""
        if self.folder is None:
            return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:  # it loses its name here, and lives with the tensor
            return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)


class TrackedTensors(TorchDispatchMode):
    """Within it, every tensor that an operation returns is registered; `offload` empties those still alive."""

    def __init__(self, offloader: ActivationOffloader, stays: bool) -> None:
        super().__init__()
        self.offloader = offloader
        self.stays = stays
        self._seen: list[TensorWeakRef] = []
        self._offloaded: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.offloader.offloaded:
            for address in _addresses(_tensors((args, kwargs or {}))) & self.offloader.offloaded.keys():
                self.offloader.restore(address)  # of another forward: a constant that the model made for one and keeps
                self.offloader.shared.add(address)
        out = func(*args, **(kwargs or {}))
        self.register(out)
        return out

    def register(self, tree: Any) -> None:
        """The tensors in `tree`, results or inputs, belong to this forward."""
        if not self.stays:
            self._seen += [TensorWeakRef(tensor) for tensor in _tensors(tree)]

    def offload(self, value: Any) -> None:
        """Empty what is alive, but for the tensors in `value`, which others will read."""
        if self.stays:
            return
        alive = {ref: tensor for ref in self._seen if (tensor := ref()) is not None}
        self._seen = list(alive)
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in alive.values()}
        for address in self.offloader.held_by_model() | self.offloader.shared | _addresses(_tensors(value)):
            storages.pop(address, None)
        del alive
        for address, storage in storages.items():
            if storage.resizable() and storage.nbytes():
                host = self.offloader.empty(storage.nbytes())
                host.untyped_storage().copy_(storage)
                self.offloader.offloaded[address] = storage, host
                self._offloaded.append(address)
                storage.resize_(0)

    def restore(self) -> None:
        """Fill again what `offload` emptied."""
        for address in self._offloaded:
            self.offloader.restore(address)
        self._offloaded.clear()


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        yield from itertools.chain.from_iterable(map(_tensors, tree.values()))
    elif isinstance(tree, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, tree))


def _attributes(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain.from_iterable(
        _tensors(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")
    )
