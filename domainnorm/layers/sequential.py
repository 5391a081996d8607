"""Lists of tensors through an `nn.Sequential`."""

from typing import Any

from torch import Tensor, nn

from .domain_batch_norm import DomainBatchNorm
from .inputs import Input


class DomainSequential(nn.Sequential):
    """`nn.Sequential` that also carries a list with one tensor per domain, or a `domain=`.

    `DomainBatchNorm` layers (and nested `DomainSequential`s) get the whole list, or the domain; every other layer is
    applied to one tensor at a time. State-dict keys are those of `nn.Sequential`.
    """

    def forward(self, x: Input, domain: int | Tensor | None = None) -> Any:
        for module in self:
            if isinstance(module, (DomainBatchNorm, DomainSequential)):
                x = module(x, domain)
            elif isinstance(x, Tensor):
                x = module(x)
            else:
                x = [module(tensor) for tensor in x]
        return x
