"""Running statistics kept per rank, merged: the moments of the union of what the ranks have seen."""

import copy

import torch
from ranks import run_ranks
from torch import nn

import domainnorm as dn
from domainnorm.statistics.preserve import preserve_state


def make_model():
    return nn.ModuleDict(
        {
            "plain": dn.DomainBatchNorm(3, momentum=None),
            "domains": dn.DomainBatchNorm(3, num_domains=2, momentum=None),
            "shared": dn.DomainBatchNorm(3, num_domains=2, population_statistics="shared"),
            "synchronized": dn.DomainBatchNorm(3, sync=True),
            "frozen": dn.FrozenBatchNorm(3),
            "unseen": dn.DomainBatchNorm(3),
        }
    )


def seen(rank):
    """What rank r has seen of two domains; rank 1 has nothing of the second, rank 2 nothing at all."""
    generator = torch.Generator().manual_seed(rank)
    counts = [(8, 8), (8, 0), (0, 0)][rank]
    return [torch.randn(n, 3, 5, generator=generator) * (1 + rank) + 1000 * rank for n in counts]


def merge(rank):
    model = make_model()
    xs = seen(rank)
    model["plain"](xs[0])
    model["domains"](xs)
    model["shared"](xs)
    model["synchronized"](xs[0])
    before = copy.deepcopy(model.state_dict())
    with preserve_state(model):
        dn.merge_population_statistics(model)
        inside = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    dn.merge_population_statistics(model)
    torch.testing.assert_close(model.state_dict(), inside, rtol=0, atol=0)
    dn.merge_population_statistics(model)  # of equal statistics: the same
    torch.testing.assert_close(model.state_dict(), inside, rtol=0, atol=0)
    return before, inside


def test_merged_statistics_are_those_of_the_union_and_equal_on_all_ranks():
    results = run_ranks(merge, 3)
    for _, merged in results:
        torch.testing.assert_close(merged, results[0][1], rtol=0, atol=0)
    before, merged = [own for own, _ in results], results[0][1]

    first = torch.cat([seen(0)[0], seen(1)[0]]).double()  # of ranks 0 and 1, in equal numbers
    for name, domain in (("plain", ...), ("domains", 0)):
        torch.testing.assert_close(merged[f"{name}.running_mean"][domain], first.mean((0, 2)).float())
        # each rank's variance carries its own Bessel's correction, 40 / 39
        within = sum(seen(r)[0].double().var((0, 2)) for r in range(2)) / 2
        between = first.unflatten(0, (2, 8)).mean((1, 3)).var(0, correction=0)
        torch.testing.assert_close(merged[f"{name}.running_var"][domain], (within + between).float())
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(merged[f"domains.{key}"][1], before[0][f"domains.{key}"][1], rtol=0, atol=0)
        for name in ("synchronized", "frozen", "unseen"):
            torch.testing.assert_close(merged[f"{name}.{key}"], before[2][f"{name}.{key}"], rtol=0, atol=0)
    assert merged["domains.num_batches_tracked"].tolist() == [1, 1]

    # two steps on rank 0, one on rank 1
    weights = torch.tensor([2, 1, 0]) / 3
    mean = sum(w * b["shared.running_mean"] for w, b in zip(weights, before, strict=True))
    torch.testing.assert_close(merged["shared.running_mean"], mean)
    assert int(merged["shared.num_batches_tracked"]) == 2


def test_one_process_is_left_alone():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    assert dn.merge_population_statistics(model) is model
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
