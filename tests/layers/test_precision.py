"""Moments are float32 or better, whatever the input is and whoever computes them."""

import pytest
import torch
from norm_cases import CASES, C, make
from torch import nn

import domainnorm as dn

LAYERS = {
    **{name: lambda dtype, name=name: make(name, dtype=dtype) for name in CASES},
    "bn": lambda dtype: dn.DomainBatchNorm(C, dtype=dtype),
    "no_affine": lambda dtype: dn.DomainBatchNorm(C, dtype=dtype, affine=None),
    "no_statistics": lambda dtype: dn.DomainBatchNorm(C, dtype=dtype, affine=None, track_running_stats=False),
    "frozen": lambda dtype: dn.FrozenBatchNorm(C, dtype=dtype),
    "gn": lambda dtype: dn.get_norm("GN", 2 * C).to(dtype),
    "in": lambda dtype: dn.get_norm("IN", C).to(dtype),
    "pn": lambda dtype: dn.get_norm("PN", C).to(dtype),
}
HALVES = {torch.float16: (1000, 2), torch.bfloat16: (300, 30)}  # mean and deviation, of which rounding leaves enough


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("mode", ["train", "minibatch", "eval"])
@pytest.mark.parametrize("shape", [(64, C), (8, C, 7, 8), (4, C, 180, 160)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_half_precision_of_a_large_mean(name, dtype, mode, shape, memory_format):
    if len(shape) == 2 and (memory_format == torch.channels_last or name == "bgn_pieces"):
        return
    mean, deviation = HALVES[dtype]
    channels = 2 * C if name == "gn" else C
    x = mean + deviation * torch.randn(shape[0], channels, *shape[2:]).to(memory_format=memory_format)
    x = x.to(dtype)
    for of_layer in (torch.float32, dtype):
        layer, exact = LAYERS[name](of_layer), LAYERS[name](torch.float64)
        for each in (layer, exact):
            if getattr(each, "running_mean", None) is not None:
                each.running_mean.fill_(mean), each.running_var.fill_(deviation**2), each.num_batches_tracked.fill_(9)
            each.train(mode == "train")
            if isinstance(each, dn.DomainBatchNorm) and mode == "minibatch" and name != "frozen":
                each.statistics = "minibatch"
        exact.load_state_dict({key: value.double() for key, value in layer.state_dict().items()})
        y, expected = layer(x), exact(x.double())
        assert y.dtype == dtype
        rounding = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=rounding)
        if mode == "train" and of_layer == torch.float32:
            found, right = dict(layer.named_buffers()), dict(exact.named_buffers())
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_layer, of_input", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_mixed_precision_is_refused_as_by_torch(name, training, of_layer, of_input):
    x = torch.randn(4, 2 * C if name == "gn" else C, 5, 5, dtype=of_input)
    torchs = nn.BatchNorm2d(C, dtype=of_layer).train(training)
    with pytest.raises(RuntimeError):
        torchs(x[:, :C])
    if name != "no_statistics":  # which has nothing to mix
        with pytest.raises(RuntimeError, match=r"dtype|for an input of torch\.float"):
            LAYERS[name](of_layer).train(training)(x)
