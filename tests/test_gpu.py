"""On a GPU: the same numbers as on a CPU, by Triton's kernels, waiting for nothing."""

import copy
from unittest import mock

import pytest
import torch
from kernel_cases import LAYERS, tensor

import domainnorm as dn
from domainnorm import kernels, moments
from domainnorm.kernels import gpu
from domainnorm.layers import in_step
from domainnorm.modeling.retinanet import RetinaNetHead

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE = "cuda"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}
LEVELS = [(2, 16, 40, 50), (2, 16, 20, 25), (2, 16, 10, 13), (2, 16, 5, 7), (2, 16, 1, 1)]


def training_step(layer, xs):
    ys = layer(xs if len(xs) > 1 else xs[0])
    ys = list(ys) if len(xs) > 1 else [ys]
    torch.autograd.backward(ys, [torch.cos(x.detach().float()).to(x.dtype) for x in xs])
    return [*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.buffers()]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*LAYERS, "shared", "per_domain"])
def test_layers_equal_those_on_a_cpu(name, dtype):
    several = name not in LAYERS
    layer = dn.DomainBatchNorm(16, len(LEVELS), name, name) if several else LAYERS[name]()
    xs = [tensor(shape, dtype, k) for k, shape in enumerate(LEVELS if several else [(6, 16, 40, 50)])]
    with mock.patch.object(in_step, "suits_torch", lambda *_: False):
        expected = training_step(copy.deepcopy(layer), [x.requires_grad_() for x in xs])
        with mock.patch.object(moments, "kernel", wraps=kernels.kernel) as chosen:
            found = training_step(layer.to(DEVICE), [x.detach().to(DEVICE).requires_grad_() for x in xs])
    assert chosen.call_count >= 4  # moments, affine, sums, gradient
    assert gpu._tried[torch.device(DEVICE, 0), dtype] is not None
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close([v.cpu() for v in found], expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return RetinaNetHead(16, 3, 4, norm="BN", sgd_statistics="shared", population_statistics="shared").to(DEVICE)


def levels():
    return [tensor(shape, torch.float32, k).to(DEVICE).requires_grad_() for k, shape in enumerate(LEVELS)]


def step(head, features, targets, anchors, matched):
    sum(head.compute_loss(targets, head(features), anchors, matched).values()).backward()


def test_a_step_of_retinanets_head_waits_for_nothing(head):
    features, number = levels(), 3 * sum(h * w for _, _, h, w in LEVELS)
    box = torch.tensor([[10.0, 20.0, 60.0, 90.0]], device=DEVICE)
    targets = [{"boxes": box, "labels": torch.tensor([1], device=DEVICE)}] * 2
    anchors = [box.expand(number, 4) + 3.0] * 2
    matched = [(torch.arange(number, device=DEVICE) % 4 - 2).clamp(max=0)] * 2
    step(head, features, targets, anchors, matched)  # kernels are compiled, and tried
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(head, features, targets, anchors, matched)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_repeats_the_step(head):
    twin, features = copy.deepcopy(head), levels()
    others = [x.detach().clone().requires_grad_() for x in features]

    def run(head, features):
        outputs = head(features)
        torch.autograd.backward([y.square().mean() for y in outputs.values()])

    warm = copy.deepcopy(head)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(warm, [x.detach().clone().requires_grad_() for x in features])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(head, features)
    head.load_state_dict(twin.state_dict())  # as before: in a capture nothing is computed
    graph.replay()
    run(twin, others)
    torch.testing.assert_close([x.grad for x in features], [x.grad for x in others])
    torch.testing.assert_close(dict(head.named_buffers()), dict(twin.named_buffers()))


def test_it_compiles_without_a_break(head):
    twin, features = copy.deepcopy(head), levels()
    found = torch.compile(head, fullgraph=True)(features)
    torch.testing.assert_close(found, twin(features), rtol=1e-3, atol=1e-3)
