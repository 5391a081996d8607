"""One configuration of each layer with its reference, and the comparison of the two step by step."""

import torch
from reference_norms import (
    BatchGroupReference,
    GhostReference,
    GhostThenGroupReference,
    GroupedReference,
    Reference,
    RenormReference,
    SeqReference,
)
from torch import nn

import domainnorm as dn

C = 4
CASES = {  # name: (layer, options, its reference)
    "ghost": ("GhostBatchNorm", {"samples_per_group": 2}, GhostReference),
    "ghost_num": ("GhostBatchNorm", {"num_sample_groups": 2}, GhostReference),
    "seq": ("SeqNorm", {"num_channel_groups": 2, "num_sample_groups": 2}, SeqReference),
    "seq_ghost_first": (
        "SeqNorm",
        {"num_channel_groups": 2, "num_sample_groups": 2, "group_norm_first": False},
        GhostThenGroupReference,
    ),
    "bgn": ("BatchGroupNorm", {"num_groups": 2}, BatchGroupReference),
    "bgn_pieces": ("BatchGroupNorm", {"num_groups": 8}, BatchGroupReference),
    "gbgn": ("GroupedBatchNorm", {"num_channel_groups": 2, "samples_per_group": 2}, GroupedReference),
    "renorm": ("BatchRenorm", {}, RenormReference),
    "renorm_micro": ("BatchRenorm", {"samples_per_group": 2, "r_max": 1.5, "d_max": 0.5}, RenormReference),
}
# One of each kind, where the options make no difference.
KINDS = ("ghost", "seq", "bgn", "gbgn", "renorm")


def make(name, dtype=torch.float64, **options):
    """The layer, with a random affine."""
    kind, own, _ = CASES[name]
    return build(kind, **own, dtype=dtype, **options)


def build(kind, channels=C, dtype=torch.float64, **options):
    layer = getattr(dn, kind)(channels, dtype=dtype, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 1.0, 0.5)
    return layer


def refer(name, **options):
    _, own, reference = CASES[name]
    return reference(C, **own, **options)


def random_input(*shape, seed=0, dtype=torch.float64):
    """Samples and channels of different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    row = (*shape[:2], *[1] * (len(shape) - 2))
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    scale = 0.5 + torch.rand(row, dtype=torch.float64, generator=generator)
    x = x * scale + torch.randn(row, dtype=torch.float64, generator=generator) * 0.7 + 1
    return x.to(dtype).requires_grad_()


def clone(x):
    return x.detach().clone().requires_grad_()


def close(a, b, atol=1e-9):
    torch.testing.assert_close(a, b, atol=atol, rtol=atol)


def all_close(a, b, atol=1e-9):
    for one, other in zip(a, b, strict=True):
        close(one, other, atol)


def gradients(y, inputs):
    """The gradients of a loss whose gradient differs in every element."""
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(99))
    return torch.autograd.grad((y * cotangent).sum(), inputs, retain_graph=True)


def affine_of(layer):
    """Copies of γ and β to compute with beside the layer."""
    return [None if p is None else clone(p) for p in (layer.weight, layer.bias)]


def check_step(layer, reference: Reference, x, alpha=0.0):
    """One forward and backward of the layer, in training or inference, is that of the reference."""
    twin, (weight, bias) = clone(x), affine_of(layer)
    y = layer(x)
    expected = reference.train(twin, weight, bias) if layer.training else reference.infer(twin, weight, bias, alpha)
    assert y.shape == x.shape and y.dtype == x.dtype
    close(y, expected)
    twins = [twin] if weight is None else [twin, weight, bias]
    all_close(gradients(y, [x, *layer.parameters()]), gradients(expected, twins))
    check_buffers(layer, reference)


def check_buffers(layer, reference: Reference):
    close(layer.running_mean, reference.mean)
    close(layer.running_var, reference.var)
    assert layer.num_batches_tracked.item() == reference.steps


def check_steps(layer, reference: Reference, *shape, steps=3):
    """Several steps of training, then inference of a smaller batch."""
    for step in range(steps):
        check_step(layer.train(), reference, random_input(*shape, seed=step))
    check_step(layer.eval(), reference, random_input(1, *shape[1:], seed=steps))


def check_same_step(layer, other, x, buffers=True):
    """Two layers with equal affine: same output, gradients and, if asked for, buffers."""
    twin = clone(x)
    y, expected = layer(x), other(twin)
    close(y, expected)
    all_close(gradients(y, [x, *layer.parameters()]), gradients(expected, [twin, *other.parameters()]))
    if buffers:
        for name, value in other.named_buffers():
            close(layer.get_buffer(name), value)


def with_affine_of(layer, other):
    """`other` with the γ and β of `layer`."""
    with torch.no_grad():
        other.weight.copy_(layer.weight)
        other.bias.copy_(layer.bias)
    return other.train(layer.training)


def unchanged(layer, before):
    return all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
