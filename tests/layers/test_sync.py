"""SyncBN: W processes with uneven and empty inputs equal one process with all of them (App. A.6, A.10)."""

import copy
import itertools
import os

import pytest
import torch
import torch.distributed as dist
from ranks import Counted, run_ranks

import domainnorm as dn
from domainnorm.layers import normalize_layers
from domainnorm.ops import select
from domainnorm.ops.moments import Moments

K, C = 3, 4
CHOICES = ("shared", "per_domain")
# Batch sizes of each domain on each rank; the spatial size of a domain may differ between ranks, too.
PATTERNS = {
    2: [[3, 1, 2], [1, 2, 0]],
    3: [[2, 0, 1], [0, 0, 0], [1, 0, 3]],
}


def make(sgd, population, sync):
    layer = dn.DomainBatchNorm(
        C,
        num_domains=K,
        sgd_statistics=sgd,
        population_statistics=population,
        affine="per_domain",
        sync=sync,
        dtype=torch.float64,
    )
    generator = torch.Generator().manual_seed(7)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.5, generator=generator)
    return layer


def rank_inputs(rank, sizes):
    generator = torch.Generator().manual_seed(rank)
    shapes = [(n, C, 2 + k, 3 + rank) for k, n in enumerate(sizes)]
    return [(torch.randn(s, dtype=torch.float64, generator=generator) * 2 + rank).requires_grad_() for s in shapes]


def loss_of(ys):
    return sum((y.pow(3) * (y.detach().sin() + 1)).sum() for y in ys)


def state_of(layer, xs, ys):
    return {
        "ys": [y.detach() for y in ys],
        "grads": [x.grad for x in xs],
        "affine": [p.grad for p in layer.parameters()],
        "buffers": [b.clone() for b in layer.buffers()],
    }


def synchronized(rank, sgd, population, pattern, backends=()):
    if backends:
        os.environ[select.VARIABLE] = backends[rank]
    layer = make(sgd, population, sync=True)
    for _ in range(2):
        layer.zero_grad()
        xs = rank_inputs(rank, pattern[rank])
        ys = layer(xs)
        loss_of(ys).backward()
    return state_of(layer, xs, ys)


def in_one_process(sgd, population, pattern):
    """All ranks' elements in one tensor per domain: `(1, C, elements)`."""
    layer = make(sgd, population, sync=False)
    world = len(pattern)
    for _ in range(2):
        layer.zero_grad()
        per_rank = [rank_inputs(r, pattern[r]) for r in range(world)]
        flat = [torch.cat([per_rank[r][k].transpose(0, 1).flatten(1) for r in range(world)], 1)[None] for k in range(K)]
        ys = layer(flat)
        loss_of(ys).backward()
    results = []
    for r in range(world):
        outputs = []
        for k, y in enumerate(ys):
            parts = y[0].split([per_rank[i][k][:, 0].numel() for i in range(world)], 1)
            n, _, *spatial = per_rank[r][k].shape
            outputs.append(parts[r].view(C, n, *spatial).transpose(0, 1))
        results.append(state_of(layer, per_rank[r], outputs))
    return results


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(("sgd", "population"), list(itertools.product(CHOICES, CHOICES)))
def test_ranks_equal_one_process(sgd, population, world):
    pattern = PATTERNS[world]
    ranks = run_ranks(synchronized, world, sgd, population, pattern)
    expected = in_one_process(sgd, population, pattern)
    for rank, (got, want) in enumerate(zip(ranks, expected, strict=True)):
        for name in ("ys", "grads", "buffers"):
            for a, b in zip(got[name], want[name], strict=True):
                torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10, msg=lambda m, w=(rank, name): f"{w}: {m}")
    for i, total in enumerate(expected[0]["affine"]):  # local, DDP averages them
        torch.testing.assert_close(sum(r["affine"][i] for r in ranks), total, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("sgd", "population"), list(itertools.product(CHOICES, CHOICES)))
def test_ranks_that_compute_with_other_backends_share_their_collectives(sgd, population):
    pattern = PATTERNS[3]
    ranks = run_ranks(synchronized, 3, sgd, population, pattern, ("eager", "native", "eager"))
    for got, want in zip(ranks, in_one_process(sgd, population, pattern), strict=True):
        for name in ("ys", "grads", "buffers"):
            torch.testing.assert_close(got[name], want[name], atol=1e-10, rtol=1e-10)


def without_gradients_on_one_rank(rank):
    layer = dn.DomainBatchNorm(C, affine=None, sync=True)
    x = torch.randn(4 * (1 - rank), C, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(rank == 0)
    y = layer(x)
    assert y.requires_grad
    y.pow(3).sum().backward()
    return y.detach(), x.grad


def test_a_rank_without_gradients_takes_part_in_the_backward_collective():
    (y, grad), _ = run_ranks(without_gradients_on_one_rank, 2)
    x = torch.randn(4, C, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = dn.DomainBatchNorm(C, affine=None)(x)
    expected.pow(3).sum().backward()
    torch.testing.assert_close([y, grad], [expected.detach(), x.grad], atol=1e-5, rtol=1e-5)


def one_collective(rank):
    layers = [make("per_domain", "per_domain", True) for _ in range(2)]
    twins = [make("per_domain", "per_domain", True) for _ in range(2)]
    xs = rank_inputs(rank, [2, 1, 0])
    with Counted() as forward:
        together = normalize_layers(layers, [xs, [torch.randn_like(x).requires_grad_() for x in xs]])
    with Counted() as backward:
        loss_of(itertools.chain(*together)).backward()
    apart = [twins[0](xs)]
    try:
        normalize_layers(layers, [xs, [x[..., 1:] for x in xs]])
        raise AssertionError("unequal sizes in step were accepted")
    except ValueError as error:
        assert "equal N and spatial sizes" in str(error)
    same = all(torch.equal(a, b) for a, b in zip(together[0], apart[0], strict=True))
    with torch.no_grad(), Counted() as eval_calls:
        for layer in layers:
            layer.eval()(xs)
            dn.set_statistics(layer, "minibatch")(xs)
    return list(forward), list(backward), list(eval_calls), same


def test_one_collective_per_direction_for_all_domains_and_layers():
    for forward, backward, evaluation, same in run_ranks(one_collective, 2):
        assert len(forward) == 1 and len(backward) == 1 and evaluation == [] and same


def different_domains(rank):
    """Each rank trains on its own domain; rank 2 has no image at all."""
    layer = make("per_domain", "per_domain", True)
    x = torch.randn(0 if rank == 2 else 4, C, 3, dtype=torch.float64, requires_grad=True)
    y = layer(x, domain=rank)
    y.square().sum().backward()
    plain = make("per_domain", "per_domain", False)
    expected = plain(x.detach(), domain=rank)
    return torch.allclose(y, expected), layer.num_batches_tracked.tolist(), layer.running_mean


def test_ranks_with_different_domains():
    results = run_ranks(different_domains, 3)
    for same, steps, mean in results:
        assert same and steps == [1, 1, 0] and torch.equal(mean, results[0][2]) and (mean[2] == 0).all()


def no_gradient_needed_here(rank):
    """Rank 1's input needs no gradient; the backward collective of rank 0 must not wait for it forever."""
    layer = make("shared", "shared", True)
    xs = [x.detach().requires_grad_(rank == 0) for x in rank_inputs(rank, [2, 2, 2])]
    loss_of(layer(xs)).backward()
    return xs[0].grad is not None


def test_a_rank_whose_input_needs_no_gradient():
    assert run_ranks(no_gradient_needed_here, 2) == [True, False]


def all_empty(rank):
    layer = make("shared", "per_domain", True)
    xs = rank_inputs(rank, [0, 0, 0])
    ys = layer(xs)
    sum(y.sum() for y in ys).backward()
    return (
        [y.shape[0] for y in ys],
        layer.num_batches_tracked.tolist(),
        [p.grad.abs().sum().item() for p in layer.parameters()],
    )


def test_a_step_that_is_empty_on_every_rank():
    for sizes, steps, grads in run_ranks(all_empty, 2):
        assert sizes == [0, 0, 0] and steps == [0, 0, 0] and grads == [0, 0]


def one_element(rank):
    layer = make("per_domain", "per_domain", True)
    xs = [
        torch.randn(2, C, 3).double(),
        torch.randn(1 if rank == 0 else 0, C, 1).double(),
        torch.randn(2, C, 3).double(),
    ]
    try:
        layer(xs)
    except ValueError as error:
        return str(error), layer.num_batches_tracked.tolist()
    return None


def test_one_element_in_all_raises_on_every_rank():
    for message, steps in run_ranks(one_element, 2):
        assert "domain 1 on all 2 ranks" in message and steps == [0, 0, 0]


def subgroups(rank):
    """Ranks 0 and 1 share their statistics; rank 2 is alone in its group."""
    pair, alone = dist.new_group([0, 1]), dist.new_group([2])
    layer = dn.DomainBatchNorm(C, sync=pair if rank < 2 else alone, dtype=torch.float64, momentum=1.0)
    layer = copy.deepcopy(torch.nn.Sequential(layer))[0]  # keeps its group
    layer(torch.randn(2 + rank, C, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)))
    return layer.running_mean


def test_process_groups():
    xs = [torch.randn(2 + r, C, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(3)]
    means = run_ranks(subgroups, 3)
    pair = torch.cat(xs[:2]).mean((0, 2))
    for got, want in zip(means, [pair, pair, xs[2].mean((0, 2))], strict=True):
        torch.testing.assert_close(got, want)


def autocast_with_an_empty_rank(rank):
    model = dn.DomainSequential(torch.nn.Conv2d(3, C, 3), dn.DomainBatchNorm(C, sync=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2 if rank == 0 else 0, 3, 6, 6))
    y.float().square().sum().backward()
    return y.dtype, model[1].running_mean, model[0].weight.grad.isfinite().all().item()


def test_autocast_with_an_empty_rank():
    (dtype0, mean0, finite0), (dtype1, mean1, finite1) = run_ranks(autocast_with_an_empty_rank, 2)
    assert dtype0 == dtype1 == torch.bfloat16 and finite0 and finite1
    assert torch.equal(mean0, mean1) and (mean0 != 0).all()


def double_backward(rank):
    x = torch.randn(3, C, 2, dtype=torch.float64, requires_grad=True)
    try:
        torch.autograd.grad(dn.DomainBatchNorm(C, sync=True, dtype=torch.float64)(x).pow(3).sum(), x, create_graph=True)
    except RuntimeError as error:
        return str(error)
    return ""


def test_double_backward_over_ranks_says_that_it_is_absent():
    assert all("double backward is not implemented" in message for message in run_ranks(double_backward, 2))


def large_means(rank):
    x = (torch.randn(4, C, 50, 50, generator=torch.Generator().manual_seed(rank)) + 1e3).float()
    merged = Moments.rows(x).merge(0).merge_ranks(None)
    return x, merged.var.detach(), merged.count


def test_large_means_over_ranks_in_float32():
    results = run_ranks(large_means, 2)
    exact = torch.cat([x for x, _, _ in results]).double().transpose(0, 1).flatten(1).var(1, correction=0)
    for _, var, count in results:
        assert ((var - exact) / exact).abs().max() < 1e-5 and count.item() == 20000
