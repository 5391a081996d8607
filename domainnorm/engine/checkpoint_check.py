"""What a training checkpoint holds, against what it is for: before anything of it is loaded."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError, cut, one_line, quote
from ..modeling.checkpoint_file import not_plain
from .average import WeightAverage

PARTS = ("model", "optimizer", "scaler", "iteration", "ranks", "config")
_SHAPE = (2, 3)  # of a parameter that shows what an optimizer keeps of one


def check_training(
    checkpoint: Mapping[str, Any],
    file: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: WeightAverage | None,
) -> None:
    """Refuse a checkpoint of which anything does not fit: a key, a shape, a dtype, a number that is not finite.

    Nothing else looks at an optimizer's state: torch's fused optimizers write to memory as if its shapes were right.

    Raises:
        UserError: naming the first such entry.
    """
    state = model.state_dict()
    buffers = {name: state[name] for name, _ in model.named_buffers(remove_duplicate=False) if name in state}

    def problems() -> Iterator[str]:
        yield from _tensors("model", state, checkpoint["model"])
        yield from _optimizer(optimizer, checkpoint["optimizer"])
        yield from _scaler(scaler.state_dict(), checkpoint["scaler"])
        for number, own in enumerate(checkpoint["ranks"]):
            if not isinstance(own, dict) or own.keys() != {"random", "buffers"}:
                yield f"ranks[{number}] takes 'random' and 'buffers'"
            else:
                yield from _tensors(f"ranks[{number}].buffers", buffers, own["buffers"])
                yield from _random(f"ranks[{number}].random", own["random"])
        if average:
            yield from _tensors("average", average.average.state_dict(), checkpoint["average"])

    for problem in problems():
        raise UserError(f"cannot resume {file}: {problem}; take an earlier checkpoint (name it in last_checkpoint)")


def _tensors(what: str, own: Mapping[str, Tensor], found: Any) -> Iterator[str]:
    """What differs between tensors by name, but for their numbers."""
    if not isinstance(found, dict):
        yield f"{what} is a {type(found).__name__}, expected tensors by name"
        return
    for key in [*(key for key in own if key not in found), *(key for key in found if key not in own)]:
        yield f"{what} {'lacks' if key in own else 'holds an unknown'} {quote(key)}"
    for key, value in own.items():
        yield from _tensor(f"{what} {key}", value.shape, value.dtype, found[key])
        if key.endswith("_var") and bool((found[key] < 0).any()):
            yield f"{what} {key} is a variance below 0"


def _tensor(what: str, shape: tuple[int, ...], dtype: torch.dtype, found: Any) -> Iterator[str]:
    if problem := not_plain(found):
        yield f"{what}: expected a tensor, got {problem}"
    elif (found.dtype, tuple(found.shape)) != (dtype, tuple(shape)):
        yield f"{what} is {_kind(found.dtype, found.shape)}, expected {_kind(dtype, shape)}"
    elif found.is_floating_point() and not bool(found.isfinite().all()):
        yield f"{what} is not finite"


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _optimizer(optimizer: torch.optim.Optimizer, found: Any) -> Iterator[str]:
    if not isinstance(found, dict) or not isinstance(found.get("state"), dict):
        yield "optimizer: expected its state_dict"
        return
    own, groups = optimizer.state_dict()["param_groups"], found.get("param_groups")
    groups = groups if isinstance(groups, list) else []
    numbers = [group.get("params") if isinstance(group, dict) else None for group in groups]
    whole = all(isinstance(ids, list) and all(type(number) is int for number in ids) for ids in numbers)
    if not whole or numbers != [group["params"] for group in own]:
        yield "optimizer: its groups of parameters are not those of this model"
        return
    parameters = {
        number: (parameter, group)
        for numbered, group in zip(own, optimizer.param_groups, strict=True)
        for number, parameter in zip(numbered["params"], group["params"], strict=True)
    }
    examples: dict[Any, dict[str, Any]] = {}
    for number, state in found["state"].items():
        what = f"optimizer state of parameter {str(number)[:20]}"
        if number not in parameters or not isinstance(state, dict):
            yield f"{what}: there is no such parameter" if number not in parameters else f"{what}: is not a dict"
            return
        parameter, group = parameters[number]
        key = parameter.dtype, id(group)
        if key not in examples:
            examples[key] = _example(optimizer, group, parameter.dtype)
        if state and state.keys() != examples[key].keys():  # none: of a parameter that never had a gradient
            yield f"{what}: holds {sorted(map(str, state))}, expected {sorted(examples[key])}"
            return
        for name, value in state.items():
            of_shape = tuple(examples[key][name].shape) == _SHAPE
            shape = parameter.shape if of_shape else examples[key][name].shape
            yield from _tensor(f"{what}: {name}", shape, examples[key][name].dtype, value)
            if (name == "step" or "sq" in name) and bool((value < 0).any()):
                yield f"{what}: {name} is below 0"


def _example(optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What the optimizer keeps of a parameter of this group, learned from one on the CPU."""
    parameter = nn.Parameter(torch.zeros(_SHAPE, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    twin = type(optimizer)([{**group, "params": [parameter]}], lr=0.0)  # type: ignore[call-arg]
    twin.step()
    return {name: value for name, value in twin.state[parameter].items() if value is not None}


def _scaler(own: Mapping[str, Any], found: Any) -> Iterator[str]:
    if not isinstance(found, dict) or found.keys() != own.keys():
        yield f"scaler: expected {sorted(own)}"
        return
    for key, value in found.items():
        if type(value) is not type(own[key]) or not 0 <= value < float("inf") or (key == "scale" and not value):
            yield f"scaler: {key} is a {type(value).__name__} that does not fit"


def _random(what: str, states: Any) -> Iterator[str]:
    """Tried on generators that nothing else uses."""
    generators: dict[str, Any] = {"torch": torch.Generator().set_state, "python": random.Random().setstate}
    generators["numpy"] = _try_numpy
    if torch.cuda.is_available() and isinstance(states, dict) and "cuda" in states:
        generators["cuda"] = torch.Generator("cuda").set_state
    if not isinstance(states, dict) or generators.keys() - states.keys():
        yield f"{what}: expected the states of {', '.join(generators)}"
        return
    for name, put in generators.items():
        try:
            put(states[name])
        except Exception as error:
            yield f"{what}: no state of {name}'s generator ({cut(one_line(error))})"


def _try_numpy(state: Any) -> None:
    np.random.RandomState().set_state(state)
    if not 0 <= state["state"]["pos"] <= len(state["state"]["key"]):  # which numpy does not check
        raise ValueError("a position outside of it")
