"""What is handed to compiled code is checked: any memory layout is right, and what does not fit is refused."""

import itertools

import pytest
import torch
from norm_cases import CASES, C, make
from torch import nn

import domainnorm as dn

LAYERS = {
    **{name: lambda dtype, name=name: make(name, dtype=dtype) for name in CASES},
    "bn": lambda dtype: dn.DomainBatchNorm(C, dtype=dtype),
    "total_var": lambda dtype: dn.DomainBatchNorm(C, dtype=dtype, track_total_var=True),
    "frozen": lambda dtype: dn.FrozenBatchNorm(C, dtype=dtype, train_affine=True),
    "gn": lambda dtype: dn.get_norm("GN", C).to(dtype),
    "pn": lambda dtype: dn.get_norm("PN", C).to(dtype),
}
WRONG = {
    "fewer": lambda v: torch.ones(3),
    "more": lambda v: torch.ones(64),
    "none": lambda v: torch.ones(0),
    "one": lambda v: torch.ones(1),
    "rows": lambda v: torch.ones(C, C),
    "column": lambda v: torch.ones(C, 1),
    "meta": lambda v: v.to("meta"),
    "integers": lambda v: torch.ones(v.shape, dtype=torch.long),
    "sparse": lambda v: v.to_sparse(),
}
every = pytest.mark.parametrize("name", LAYERS)


def layouts(shape):
    """`shape` in every order of memory, and with steps, repeated places and a sign that is changed lazily."""
    x = torch.randn(shape, dtype=torch.float64)
    n = len(shape)
    for order in itertools.permutations(range(n)):
        yield x.permute(order).contiguous().permute([order.index(i) for i in range(n)])
    for dim in range(n):
        yield x.repeat_interleave(2, dim).unfold(dim, 1, 2)[..., 0]
    yield torch._neg_view(x)
    yield x[:, :1].expand(shape)
    yield torch.randn(500, dtype=torch.float64).as_strided(shape, [1, *range(2, n + 1)])


def step(layer, x, grad):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return y.detach(), x.grad, [p.grad for p in layer.parameters()], [v.clone() for v in layer.buffers()]


@every
@pytest.mark.parametrize("shape", [(4, C), (4, C, 6), (4, C, 2, 4), (4, C, 1, 4), (2, C, 2, 1, 4)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_any_strides_forward_and_backward(name, shape, training):
    if name == "bgn_pieces" and len(shape) == 2:
        pytest.skip("a piece would be less than an element")
    for x in layouts(shape):
        grad = torch.randn(shape, dtype=torch.float64)
        backwards = range(len(shape) - 1, -1, -1)
        for other in (grad, grad.permute(*backwards).contiguous().permute(*backwards)):
            layers = [LAYERS[name](torch.float64).train(training) for _ in range(2)]
            layers[1].load_state_dict(layers[0].state_dict())
            found = step(layers[0], x, other)
            torch.testing.assert_close(found, step(layers[1], x.clone(memory_format=torch.contiguous_format), grad))


@every
@pytest.mark.parametrize("side", [3, 170])  # small and large inputs go different ways
def test_a_sign_that_is_changed_lazily(name, side):
    x, grad = torch.randn(2, 4, C, side, side + side % 2)
    first, second = LAYERS[name](torch.float32), LAYERS[name](torch.float32)
    second.load_state_dict(first.state_dict())
    found = step(first, torch._neg_view(-x), torch._neg_view(-grad))
    torch.testing.assert_close(found, step(second, x, grad), rtol=1e-4, atol=2e-3)


@every
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("mode", ["train", "eval", "minibatch"])
def test_buffers_and_parameters_that_do_not_fit_are_refused(name, wrong, mode):
    for side, key in itertools.product((4, 170), LAYERS[name](torch.float32).state_dict()):
        layer = LAYERS[name](torch.float32)
        if not isinstance(layer, dn.DomainBatchNorm) or key == "feature_size":
            return
        value = layer.state_dict()[key]
        if key == "num_batches_tracked" and wrong in ("integers", "sparse"):
            continue
        other = WRONG[wrong](value)
        if key in layer._parameters:
            layer._parameters[key] = nn.Parameter(other, requires_grad=other.is_floating_point())
        else:
            layer._buffers[key] = other
        layer.train(mode == "train").statistics = "minibatch" if mode == "minibatch" else "auto"
        before = {name: v.clone() for name, v in layer.named_buffers() if name != key}
        with pytest.raises(RuntimeError, match=rf"{type(layer).__name__}: expected .*{key}"):
            layer(torch.randn(4, C, side, side))
        assert all(torch.equal(v, layer._buffers[name]) for name, v in before.items())


@every
def test_another_device(name):
    layer = LAYERS[name](torch.float32)
    x = torch.randn(4, C, 4, 4)
    if isinstance(layer, dn.DomainBatchNorm):
        with pytest.raises(RuntimeError, match="on the same device, got meta and cpu"):
            layer.to("meta")(x)
        with pytest.raises(RuntimeError, match="on the same device, got cpu and meta"):
            LAYERS[name](torch.float32)(x.to("meta"))
    y = layer.to("meta")(x.to("meta"))
    assert y.is_meta and y.shape == x.shape


@every
@pytest.mark.parametrize("mixed", [False, True])
def test_statistics_of_half_precision_stay_so(name, mixed):
    layer, other = LAYERS[name](torch.bfloat16), LAYERS[name](torch.bfloat16).float()
    if not isinstance(layer, dn.DomainBatchNorm):
        return
    if mixed:
        layer.momentum = other.momentum = None
    for key in ("running_var", "running_total_var"):
        if mixed and layer._buffers[key] is not None:
            layer._buffers[key] = layer._buffers[key].float()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, C, 4, 4).bfloat16()
    torch.testing.assert_close(layer(x).float(), other(x).float(), rtol=0.02, atol=0.02)
    for key, value in layer.named_buffers():
        torch.testing.assert_close(value.float(), other._buffers[key].float(), rtol=0.01, atol=0.01)
    assert layer.running_mean.dtype == torch.bfloat16


@pytest.mark.parametrize("freed", ["input", "running_mean", "running_var"])
@pytest.mark.parametrize("side", [5, 400])
@pytest.mark.parametrize(
    "make", [dn.DomainBatchNorm, lambda c: dn.GhostBatchNorm(c, samples_per_group=2), dn.BatchRenorm]
)
def test_freed_memory_is_an_error(make, side, freed):
    layer, x = make(8), torch.randn(4, 8, side, side)
    tensor = x if freed == "input" else getattr(layer, freed)
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated yet"):
        layer(x)


@pytest.mark.parametrize("domain", [["a", "b"], [None, 1], [0.5, 1.0], [True, 0]])
def test_domains_are_numbers(domain):
    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="domain= takes an int or a LongTensor"):
        dn.DomainBatchNorm(3, num_domains=2)([x, x], domain=domain)
