"""What autograd, and what records or transforms operations, is doing."""

import torch
from torch.autograd import forward_ad


def is_recomputed() -> bool:
    """Whether activation checkpointing runs this forward again, within the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_transform_active() -> bool:
    """Whether operations are recorded or transformed: what C++ or Triton does would not be seen."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def sees_operations() -> bool:
    """Whether somebody must see torch's operations: a compiler, a transform, a dispatch mode."""
    return torch.compiler.is_compiling() or is_transform_active()
