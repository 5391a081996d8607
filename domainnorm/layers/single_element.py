"""The check that no normalization batch of training has one element only: it has no variance."""

from collections.abc import Sequence
from functools import partial

from ..distributed.collectives import world_size
from ..ops.formula import Normalization
from .inputs import LayerInput


def refuse_single_element(problem: Normalization, inputs: LayerInput, elements: Sequence[int], name: str) -> None:
    """A normalization batch of one element: ValueError, on every rank alike.

    What the shapes on this rank leave open is checked once the moments are merged; a GPU is waited for then.

    Args:
        elements: that a sample of each tensor has in a channel.
        name: the layer's class, for the message.
    """
    counts = inputs.elements_of_domains(elements, problem.shared)
    ranks = 1 if problem.sync is None else world_size(problem.sync[0])
    refuse = partial(_refuse, name, inputs.num_domains, problem.shared, ranks)
    if counts is None:  # the samples of a domain are counted on the device, but come in whole rows
        if ranks > 1 or 1 in elements:
            problem.check_counts = refuse
    elif ranks > 1 or problem.external is not None:
        if min(counts) < 2:
            problem.check_counts = refuse
    else:
        refuse(counts)


def _refuse(name: str, num_domains: int, shared: bool, ranks: int, counts: Sequence[float]) -> None:
    """ValueError if a domain, or all where they are shared, has one element."""
    counts = [sum(counts)] if shared else counts
    if 1 in counts:
        which = "the normalization batch" if shared or num_domains == 1 else f"domain {counts.index(1)}"
        where = f" on all {ranks} ranks together" if ranks > 1 else ""
        raise ValueError(
            f"{name}: expected more than 1 value per channel in training, got 1 in {which}{where}: "
            "use a larger batch or input, or statistics='population'"
        )
