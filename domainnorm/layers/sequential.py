"""Lists of tensors through an `nn.Sequential`."""

from typing import Any

from torch import Tensor, nn

from .domain_batch_norm import DomainBatchNorm
from .inputs import Input


class DomainSequential(nn.Sequential):
    """`nn.Sequential` that also passes on a list with one tensor per domain, or a `domain=`.

    `DomainBatchNorm` layers (and nested `DomainSequential`s) get the whole list, or the domain; every other layer is
    applied to one tensor at a time. State-dict keys are those of `nn.Sequential`.

    Args:
        *args: modules, or one `OrderedDict` of them.

    Shape:
        - Input: a tensor, or a list of tensors
        - Output: same as the input

    Example::

        >>> tower = dn.DomainSequential(nn.Conv2d(3, 16, 3), dn.DomainBatchNorm(16, num_domains=2), nn.ReLU())
        >>> [tuple(x.shape) for x in tower([torch.randn(2, 3, 10, 10), torch.randn(2, 3, 6, 6)])]
        [(2, 16, 8, 8), (2, 16, 4, 4)]
        >>> tower(torch.randn(2, 3, 6, 6), domain=1).shape
        torch.Size([2, 16, 4, 4])
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
