"""What autograd is doing."""

import torch


def is_recomputed() -> bool:
    """Whether activation checkpointing runs this forward again, within the backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
