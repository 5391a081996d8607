"""RoIShuffle: W processes equal one process with the same permutation, for any counts of RoIs; order comes back."""

import collections
import copy
import dataclasses
import re

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from rois import Head, rois
from torch import nn
from torch.utils.checkpoint import checkpoint

import domainnorm as dn
from domainnorm.distributed.roi_shuffle import roi_permutation

SEED = 5


def make_head(norm="BN"):
    """A head as in the detectors, small: convolution, norm, linear; two outputs."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), dn.get_norm(norm, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return Head(body).double()


def loss_of(y, x):
    # of each RoI's own output and input: an output that came back to another RoI changes it
    weight = 1 + x.detach().flatten(1).sum(1, keepdim=True)
    return (weight * (y["all"].pow(3) + y["parts"][0] * y["parts"][1])).sum()


def shuffled(rank, patterns):
    results = []
    for counts in patterns:
        head = dn.RoIShuffle(make_head(), seed=SEED)
        x = rois(rank, counts[rank]).requires_grad_()
        y = head(x)
        loss_of(y, x).backward()
        assert head.module.batches[0].shape[0] in (sum(counts) // len(counts), -(-sum(counts) // len(counts)))
        results.append(
            {
                "all": y["all"].detach(),
                "x.grad": x.grad,
                "grads": [p.grad for p in head.parameters()],
                "batch": head.module.batches[0],
                "buffers": list(head.module.buffers()),
            }
        )
    return results


def in_one_process(counts):
    """The RoIs of all ranks, permuted, in as many normalization batches as there were ranks, and put back."""
    world, total = len(counts), sum(counts)
    x = torch.cat([rois(rank, count) for rank, count in enumerate(counts)]).requires_grad_()
    permutation = torch.from_numpy(roi_permutation(SEED, 0, total))
    head = make_head()
    heads = [copy.deepcopy(head) for _ in range(world)]
    shares = [share(counts, r, permutation) for r in range(world)]
    batches = [x[of_rank] for of_rank in shares]
    outputs = [h(batch) for h, batch in zip(heads, batches, strict=True)]
    back = torch.cat(shares).argsort()
    y = {
        "all": torch.cat([o["all"] for o in outputs])[back],
        "parts": [torch.cat([o["parts"][i] for o in outputs])[back] for i in range(2)],
    }
    loss_of(y, x).backward()
    return [
        {
            "all": own,
            "x.grad": grad,
            "grads": [p.grad for p in heads[rank].parameters()],
            "batch": batches[rank].detach(),
            "buffers": list(heads[rank].buffers()),
        }
        for rank, (own, grad) in enumerate(zip(y["all"].detach().split(counts), x.grad.split(counts), strict=True))
    ]


def share(counts, rank, permutation):
    """The RoIs that a rank computes, in its order: by the rank that brings them."""
    world, total = len(counts), sum(counts)
    own = permutation[total * rank // world : total * (rank + 1) // world]
    source = torch.repeat_interleave(torch.arange(world), torch.tensor(counts))[own]
    return own[source.argsort(stable=True)]


def draw_patterns(world, number):
    drawn = []

    @settings(max_examples=number, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.lists(st.one_of(st.just(0), st.integers(0, 9)), min_size=world, max_size=world))
    def draw(counts):
        drawn.append(counts)

    draw()
    return drawn


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_equal_one_process_with_the_same_permutation(world):
    patterns = [*draw_patterns(world, 90), [0] * world, [1, *[0] * (world - 1)], [*[0] * (world - 1), 7]]
    assert len({tuple(pattern) for pattern in patterns}) > 50
    ranks = run_ranks(shuffled, world, patterns)
    for i, counts in enumerate(patterns):
        expected = in_one_process(counts)
        for rank in range(world):
            torch.testing.assert_close(
                ranks[rank][i], expected[rank], rtol=1e-10, atol=1e-10, msg=lambda m, c=(counts, rank): f"{c}: {m}"
            )


def three_steps(rank):
    head = dn.RoIShuffle(Head(nn.Identity()))
    head.module.body = nn.Identity()
    x = torch.arange(6.0)[:, None] + 10 * rank
    for _ in range(2):
        head(x)
    resumed = dn.RoIShuffle(Head(nn.Identity()))
    resumed.load_state_dict(head.state_dict())
    head(x)
    resumed(x)
    assert torch.equal(head.module.batches[2], resumed.module.batches[0])
    head.eval()
    assert head(x)["all"] is x and int(head.step) == 3  # eval: the module alone, not counted
    return torch.stack(head.module.batches[:3])


def test_each_step_has_its_own_permutation_and_a_resumed_run_goes_on():
    batches = torch.cat(run_ranks(three_steps, 2), dim=1)[..., 0]
    everyone = torch.cat([torch.arange(6.0), torch.arange(6.0) + 10])
    for step in range(3):
        permutation = torch.from_numpy(roi_permutation(0, step, 12))
        assert torch.equal(batches[step], everyone[torch.cat([share([6, 6], r, permutation) for r in range(2)])])
    assert not torch.equal(batches[0], batches[1]) and not torch.equal(batches[1], batches[2])


def half_precision(rank):
    sent = []
    original = torch.distributed.all_to_all_single

    def spy(output, x, *args, **kwargs):
        sent.append(x.dtype)
        return original(output, x, *args, **kwargs)

    torch.distributed.all_to_all_single = spy
    head = dn.RoIShuffle(nn.Linear(3, 2).bfloat16())
    x = torch.randn(2 * rank, 3, dtype=torch.bfloat16, requires_grad=rank == 1)
    head(x).float().sum().backward()
    return sent, x.grad is None or x.grad.dtype, [p.grad is not None for p in head.parameters()]


def test_features_and_gradients_travel_in_their_own_dtype_also_where_a_rank_has_none_to_give():
    for rank, (sent, own, grads) in enumerate(run_ranks(half_precision, 2)):
        assert sent == [torch.bfloat16] * 4  # there and back, and the gradients
        assert own is (True if rank == 0 else torch.bfloat16) and all(grads)


def double_backward(rank):
    head = dn.RoIShuffle(nn.Sequential(nn.Linear(3, 2), nn.Tanh())).double()
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(head(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    own = x.grad.clone()
    x.grad = None
    (grad,) = torch.autograd.grad(head.module(x).sum(), x, create_graph=True)
    grad.square().sum().backward()
    torch.testing.assert_close(own, x.grad)


def test_double_backward():
    run_ranks(double_backward, 2)


def channels_last(rank):
    head = dn.RoIShuffle(nn.Identity())
    x = torch.randn(3 + rank, 4, 2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(3 + rank, 4, 3, 2).transpose(2, 3)  # a gradient that is dense, but not contiguous
    y = head(x)
    (y * weight).sum().backward()
    assert torch.equal(y, x) and torch.equal(x.grad, weight)


def test_any_memory_format():
    run_ranks(channels_last, 2)


class NoRows(nn.Module):
    def forward(self, x):
        return 2 * x if len(x) else x.new_zeros(0, 2)


def mistakes(rank):
    head = dn.RoIShuffle(nn.Flatten(0))
    with pytest.raises(ValueError, match="one row for each"):
        head(torch.zeros(3, 2))
    if rank:
        head.step += 1
    with pytest.raises(ValueError, match=r"the ranks are at steps \[2, 3\]"):
        head(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"with seeds \[0, 1\]"):
        dn.RoIShuffle(nn.Identity(), seed=rank)(torch.zeros(3, 2))
    with pytest.raises(RuntimeError, match="checkpoint the wrapped module"):
        x = torch.zeros(3, 2, requires_grad=True)
        checkpoint(dn.RoIShuffle(nn.Linear(2, 2)), x, use_reentrant=False).sum().backward()


def no_rows(rank):
    head = dn.RoIShuffle(NoRows())
    x = torch.ones(1 - rank, 2, requires_grad=True)  # rank 0 gets none of one RoI
    head(x).sum().backward()
    return x.grad


def test_a_head_that_leaves_early_without_rows_takes_part_in_the_backward_pass():
    first, second = run_ranks(no_rows, 2)
    assert first.shape == (1, 2) and first.any() and second.shape == (0, 2)


Pair = collections.namedtuple("Pair", ["scores", "boxes"])


@dataclasses.dataclass(frozen=True)
class Outputs:
    scores: torch.Tensor
    name: str
    rest: object


class Mapping(collections.OrderedDict):
    pass


class Every(nn.Module):
    """Returns tensors in every container that a head may use."""

    def forward(self, x):
        y, labels = x * 2, x.argmax(1)
        return {
            "tuple": (y, [y + 1, None]),
            "named": Pair(y, labels),
            "data": Outputs(y, "name", {"labels": labels}),
            "ordered": Mapping(a=y, b=3),
            "default": collections.defaultdict(list, c=[y]),
            "others": [None, 1.5, "text", True, torch.float32, ()],
        }


def containers(rank):
    x = torch.arange(12.0).view(4, 3) + 100 * rank
    shuffled, alone = dn.RoIShuffle(Every())(x), Every()(x)
    assert [type(v) for v in shuffled.values()] == [type(v) for v in alone.values()]
    assert isinstance(shuffled["data"].rest, dict) and shuffled["ordered"]["b"] == 3
    assert shuffled["default"].default_factory is list and shuffled["others"] == alone["others"]
    of_pytree = [torch.utils._pytree.tree_leaves(v) for v in (shuffled, alone)]
    torch.testing.assert_close(*[[v for v in leaves if isinstance(v, torch.Tensor)] for leaves in of_pytree])
    torch.testing.assert_close(shuffled["data"].scores, alone["data"].scores)
    torch.testing.assert_close(shuffled["data"].rest, alone["data"].rest)


def test_every_container():
    run_ranks(containers, 2)


def disagreement(rank, case):
    head = nn.Linear(4, 2)
    shuffle, x = dn.RoIShuffle(head), torch.randn(3, 4)
    try:
        if case == "dtype":
            shuffle.double()(x.double()) if rank else shuffle(x)
        elif case == "width":
            dn.RoIShuffle(nn.Identity())(torch.randn(3, 4 + rank))
        elif case == "dimensions":
            dn.RoIShuffle(nn.Identity())(torch.randn(3, 4, *[1] * rank))
        elif case == "gradients":
            with torch.set_grad_enabled(not rank):
                shuffle(x)
        elif case == "width of an output":
            dn.RoIShuffle(nn.Linear(4, 2 + rank))(x)
        elif case == "number of outputs":
            dn.RoIShuffle(lambda x: (x, x)[: 1 + rank])(x)
        elif case == "rows":
            dn.RoIShuffle(lambda x: x[rank:])(x)
        elif case == "an error":
            dn.RoIShuffle((lambda x: x) if rank else nn.Linear(5, 2))(x)
        elif case == "unknown output":
            dn.RoIShuffle((lambda x: x) if rank else (lambda x: {1}))(x)
        elif case == "no backward pass":
            y = shuffle(x)
            y.sum().backward() if rank else shuffle(x)
        elif case == "skipped":
            for _ in range(2 - rank):
                shuffle(x)
            if rank:
                shuffle.step += 1
                shuffle(x)
        return "nothing raised"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("dtype", r"rank 0: its forward pass float32 \(\*, 4\).*rank 1: its forward pass float64 \(\*, 4\)", ""),
        ("width", r"rank 0: .*float32 \(\*, 4\); rank 1: .*float32 \(\*, 5\)", ""),
        ("dimensions", r"\(\*, 4\); rank 1: .*\(\*, 4, 1\)", ""),
        ("gradients", r"rank 1: its forward pass float32 \(\*, 4\), without gradients", ""),
        ("width of an output", r"rank 0: the outputs float32 \(\*, 2\); rank 1: the outputs float32 \(\*, 3\)", ""),
        ("number of outputs", r"rank 1: the outputs float32 \(\*, 4\), float32 \(\*, 4\)", ""),
        ("rows", r"rank 1: the outputs ValueError .*one row for each", r"ValueError: RoIShuffle: .*one row for each"),
        ("an error", r"RuntimeError: .*mat1 and mat2", r"ValueError: .*rank 0: the outputs RuntimeError \(.*mat1 and"),
        ("unknown output", r"ValueError: RoIShuffle: the module returns a set", r"rank 0: the outputs ValueError"),
        ("no backward pass", r"steps \[2, 1\].*rank 0: its forward pass .*rank 1: the gradients of its outputs", ""),
        ("skipped", r"steps \[2, 3\]", ""),
    ],
)
def test_ranks_that_disagree_learn_it_at_once(case, first, second):
    told = run_ranks(disagreement, 2, case, timeout=60)
    assert re.search(first, told[0]), told
    assert re.search(second or first, told[1]), told


def unused(rank):
    head = dn.RoIShuffle(Every())
    x = torch.randn(4, 3, requires_grad=True)
    outputs = head(x)
    (outputs["tuple"][0] if rank else outputs["named"].scores + outputs["ordered"]["a"]).sum().backward()
    return x.grad


def test_ranks_may_use_different_outputs():
    """Each gradient is that of the own rank's loss with respect to the own rows."""
    first, second = run_ranks(unused, 2)
    assert (first == 4).all() and (second == 2).all()


def sub_groups(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    head = copy.deepcopy(dn.RoIShuffle(Head(nn.Identity()), group=groups[rank // 2]))
    x = torch.arange(3.0)[:, None] + 10 * rank
    assert torch.equal(head(x)["all"], x)
    return head.module.batches[0]


def test_a_group_of_ranks_shuffles_among_itself_also_a_copy():
    batches = run_ranks(sub_groups, 4)
    permutation = torch.from_numpy(roi_permutation(0, 0, 6))
    shares = torch.cat([share([3, 3], r, permutation) for r in range(2)])
    for first in (0, 2):
        own = torch.cat([torch.arange(3.0)[:, None] + 10 * rank for rank in (first, first + 1)])
        assert torch.equal(torch.cat(batches[first : first + 2]), own[shares])


def test_mistakes():
    run_ranks(mistakes, 2)


def test_one_process_is_the_wrapped_module():
    head = make_head()
    shuffle = dn.RoIShuffle(copy.deepcopy(head))
    x = rois(0, 5)
    for mode in (True, False):
        expected, got = head.train(mode)(x), shuffle.train(mode)(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert int(shuffle.step) == 1
    torch.testing.assert_close(list(shuffle.module.buffers()), list(head.buffers()), rtol=0, atol=0)
