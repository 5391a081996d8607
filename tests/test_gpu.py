"""On a GPU: every layer computes what it computes in float64 on a CPU, and waits for nothing.

`pytest -m gpu --device cpu` runs what does not need CUDA on a CPU.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import domainnorm as dn
from domainnorm.modeling.retinanet import RetinaNetHead
from domainnorm.ops.select import VARIABLE

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from gpu_checks.backend import FASTEST, used_by

pytestmark = pytest.mark.gpu
TYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = (torch.float32, torch.float64, torch.long)
TOLERANCE = 1e-4
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(6, 16, 40, 50)]
LEVELS = [(2, 16, 40, 50), (2, 16, 20, 25), (2, 16, 10, 13), (2, 16, 5, 7), (2, 16, 1, 1)]
IDS = [0, 2, 1, 0, 2, 2]
LAYERS = {  # of one tensor, of five levels, or of one tensor whose samples have domains
    "BN": (lambda: dn.DomainBatchNorm(16), SHAPES),
    "BN, cumulative": (lambda: dn.DomainBatchNorm(16, momentum=None), SHAPES),
    "BN without affine": (lambda: dn.DomainBatchNorm(16, affine=None), SHAPES),
    "BN, shared": (
        lambda: dn.DomainBatchNorm(16, num_domains=5, sgd_statistics="shared", population_statistics="shared"),
        LEVELS,
    ),
    "BN, shared, statistics per domain": (
        lambda: dn.DomainBatchNorm(16, num_domains=5, sgd_statistics="shared", population_statistics="per_domain"),
        LEVELS,
    ),
    "BN, per domain": (lambda: dn.DomainBatchNorm(16, num_domains=5), LEVELS),
    "BN, per domain, affine too": (lambda: dn.DomainBatchNorm(16, num_domains=5, affine="per_domain"), LEVELS),
    "BN of mixed domains": (lambda: dn.DomainBatchNorm(16, num_domains=3), SHAPES),
    "GhostBN": (lambda: dn.GhostBatchNorm(16, samples_per_group=2), SHAPES),
    "GhostBN, an uneven group": (lambda: dn.GhostBatchNorm(16, samples_per_group=4), SHAPES),
    "GhostBN, shared": (
        lambda: dn.GhostBatchNorm(16, samples_per_group=1, num_domains=5, sgd_statistics="shared"),
        LEVELS,
    ),
    "SeqNorm": (lambda: dn.SeqNorm(16, num_channel_groups=4, num_sample_groups=2), SHAPES),
    "BGN": (lambda: dn.BatchGroupNorm(16, num_groups=4), SHAPES),
    "BGN, channels split in space": (lambda: dn.BatchGroupNorm(16, num_groups=64), SHAPES),
    "GBGN": (lambda: dn.GroupedBatchNorm(16, num_channel_groups=4, samples_per_group=2), SHAPES),
    "BRN": (lambda: dn.BatchRenorm(16), SHAPES),
    "BRN, a schedule": (lambda: dn.BatchRenorm(16, r_max=[(0, 2), (9, 3)], d_max=[(0, 1), (9, 5)]), SHAPES),
    "FrozenBN": (lambda: dn.FrozenBatchNorm(16, train_affine=True), SHAPES),
}
SYNCHRONIZED = {
    "BN": (lambda: dn.DomainBatchNorm(16, sync=True), SHAPES),
    "BN, shared": (
        lambda: dn.DomainBatchNorm(
            16, num_domains=5, sgd_statistics="shared", population_statistics="shared", sync=True
        ),
        LEVELS,
    ),
}
ROWS = ["BN, cumulative", "BN, shared", "GhostBN", "SeqNorm", "BGN", "GBGN", "BRN"]  # not torch's own kernel


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("it needs CUDA")
    return device


@pytest.fixture
def group(device):
    """A process group of this process alone."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tensor(shape, dtype, seed, layout=torch.contiguous_format):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1
    return values.to(dtype).contiguous(memory_format=layout)


def make(name, layers=LAYERS):
    """A layer with an affine and population statistics that are not those it begins with, and shapes for it."""
    build, shapes = layers[name]
    layer = build()
    with torch.no_grad():
        for k, (key, value) in enumerate(layer.state_dict().items()):
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(k)) + 0.5)
            assert key in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return layer, shapes


def call(layer, xs, domains=None):
    """A list of outputs."""
    if len(xs) > 1:
        return list(layer(xs))
    if layer.num_domains > 1:
        return [layer(xs[0], domain=torch.tensor(IDS, device=xs[0].device) if domains is None else domains)]
    return [layer(xs[0])]


def training_step(layer, xs, grads, domains=None):
    """Outputs and what a step leaves: gradients of inputs and parameters."""
    for x in xs:
        x.grad = None
    layer.zero_grad()
    ys = call(layer, xs, domains)
    torch.autograd.backward(ys, grads)
    return [*ys, *(x.grad for x in xs), *(p.grad for p in layer.parameters())]


def inputs(shapes, dtype, device, layout=torch.contiguous_format):
    """Leaves and gradients of the outputs: on the device, and the same values in float64 on the CPU."""
    xs, grads = ([tensor(shape, dtype, k + 10 * j, layout) for k, shape in enumerate(shapes)] for j in range(2))
    here = [x.to(device, copy=True).requires_grad_() for x in xs], [g.to(device) for g in grads]
    wide = [x.double().contiguous().requires_grad_() for x in xs], [g.double().contiguous() for g in grads]
    return here, wide


def assert_close(found, expected, tolerance=TOLERANCE):
    """Differences are a share of the largest value, and in half precision what one rounding of each value makes."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        rounding = 0.0 if one.dtype in WIDE else 0.51 * torch.finfo(one.dtype).eps
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        excess = (one - other).abs() - rounding * other.abs()
        error, size = excess.max().item(), max(other.abs().max().item(), 1e-3)
        assert error <= tolerance * size, f"{error:.3g} too far from it, where values are up to {size:.3g}"


def check(layer, shapes, dtype, device, layout=torch.contiguous_format):
    """A training step and an inference, with and without example weighing, are those in float64 on the CPU."""
    reference = copy.deepcopy(layer).double()
    layer.to(device)
    (xs, grads), (wide_xs, wide_grads) = inputs(shapes, dtype, device, layout)
    found = training_step(layer, xs, grads)
    assert_close(found, training_step(reference, wide_xs, wide_grads))
    for y, x in zip(found, xs, strict=False):
        assert y.dtype == dtype and y.device == x.device
        assert y.is_contiguous(memory_format=layout)
    for y in found[2 * len(xs) :]:
        assert y.dtype == torch.float32
    assert_close(list(layer.buffers()), list(reference.buffers()))
    for weight in (0.0, 0.3):
        found, expected = (_inference(layer, xs, weight), _inference(reference, wide_xs, weight))
        assert_close(found, expected)
        assert all(y.dtype == dtype for y in found)


@torch.no_grad()
def _inference(layer, xs, weight):
    return call(dn.set_example_weight(layer, weight).eval(), xs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, layout, device):
    check(*make(name), dtype, device, LAYOUTS[layout])


@pytest.mark.parametrize("backend", ["eager", "torch"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_by_other_backends(name, backend, device, monkeypatch):
    """Which the library would choose elsewhere."""
    monkeypatch.setenv(VARIABLE, backend)
    layer, shapes = make(name)
    check(layer, shapes, torch.float32, device)
    (xs, grads), _ = inputs(shapes, torch.float32, device)
    assert used_by(lambda: training_step(layer.train(), xs, grads)) in (backend, "eager", "another way")


@pytest.mark.parametrize("name", SYNCHRONIZED)
def test_synchronized_layers(name, device, group):
    check(*make(name, SYNCHRONIZED), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_autocast(name, dtype, device):
    layer, shapes = make(name)
    for own in (dtype, torch.float32):
        with torch.autocast(device.type, dtype=dtype):
            check(copy.deepcopy(layer), shapes, own, device)


def test_numbers_far_from_zero(device):
    """A mean of 500 standard deviations costs no precision that the numbers have."""
    layer, x = dn.DomainBatchNorm(16, momentum=None), tensor(SHAPES[0], torch.float32, 0) * 1e-3 + 1
    reference = copy.deepcopy(layer).double()
    assert_close([layer.to(device)(x.to(device))], [reference(x.double())], 2e-3)
    assert_close([layer.running_var], [reference.running_var], 1e-3)


def test_no_samples(device):
    layer = dn.DomainBatchNorm(16, num_domains=5, sgd_statistics="shared", population_statistics="shared").to(device)
    xs = [torch.randn(n, 16, 12, 13, device=device, requires_grad=True) for n in (2, 0, 1, 0, 0)]
    torch.autograd.backward(layer(xs), [torch.ones_like(x) for x in xs])
    flat = torch.cat([x.detach() for x in xs]).double()
    assert_close([layer.running_mean], [0.1 * flat.mean((0, 2, 3))], 1e-4)
    assert [x.grad.shape for x in xs] == [x.shape for x in xs]


@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_repeats_a_step(name, cuda):
    layer, shapes = make(name)
    layer.to(cuda)
    twin, warm = copy.deepcopy(layer), copy.deepcopy(layer)
    (xs, grads), _ = inputs(shapes, torch.float32, cuda)
    domains = torch.tensor(IDS, device=cuda)
    _warm_up(lambda: training_step(warm, xs, grads, domains))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = training_step(layer, xs, grads, domains)
    layer.load_state_dict(twin.state_dict())  # as before: in a capture nothing is computed
    for _ in range(2):
        graph.replay()
        assert_close(found, training_step(twin, xs, grads, domains))
        assert_close(list(layer.buffers()), list(twin.buffers()))


def _warm_up(run):
    """On a stream of its own, as torch asks for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("name", LAYERS)
def test_a_step_and_an_inference_wait_for_nothing(name, weight, cuda):
    layer, shapes = make(name)
    dn.set_example_weight(layer.to(cuda), weight)
    (xs, grads), _ = inputs(shapes, torch.float32, cuda)
    domains = torch.tensor(IDS, device=cuda)

    def run():
        training_step(layer.train(), xs, grads, domains)
        with torch.no_grad():
            call(layer.eval(), xs, domains)

    _without_waiting(run)


def _without_waiting(run):
    run()  # kernels are compiled, and tried
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_layers_are_computed_by_the_fastest_way(name, dtype, cuda):
    layer, shapes = make(name)
    layer.to(cuda)
    (xs, grads), _ = inputs(shapes, dtype, cuda)
    assert used_by(lambda: training_step(layer, xs, grads)) == FASTEST["cuda"]


@pytest.fixture
def head(device):
    torch.manual_seed(0)
    return RetinaNetHead(16, 3, 4, norm="BN", sgd_statistics="shared", population_statistics="shared").to(device)


def levels(device):
    return [tensor(shape, torch.float32, k).to(device).requires_grad_() for k, shape in enumerate(LEVELS)]


def test_a_step_of_retinanets_head_waits_for_nothing(head, cuda):
    features, number = levels(cuda), 3 * sum(h * w for _, _, h, w in LEVELS)
    box = torch.tensor([[10.0, 20.0, 60.0, 90.0]], device=cuda)
    targets = [{"boxes": box, "labels": torch.tensor([1], device=cuda)}] * 2
    anchors = [box.expand(number, 4) + 3.0] * 2
    matched = [(torch.arange(number, device=cuda) % 4 - 2).clamp(max=0)] * 2

    def step():
        sum(head.compute_loss(targets, head(features), anchors, matched).values()).backward()

    _without_waiting(step)


def test_a_graph_repeats_a_step_of_retinanets_head(head, cuda):
    twin, warm, features = copy.deepcopy(head), copy.deepcopy(head), levels(cuda)
    others = [x.detach().clone().requires_grad_() for x in features]

    def run(head, features):
        torch.autograd.backward([y.square().mean() for y in head(features).values()])

    _warm_up(lambda: run(warm, [x.detach().clone().requires_grad_() for x in features]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(head, features)
    head.load_state_dict(twin.state_dict())  # as before: in a capture nothing is computed
    graph.replay()
    run(twin, others)
    # convolutions may be computed in another way in the capture, in TF32
    assert_close([x.grad for x in features], [x.grad for x in others], 1e-2)
    assert_close(list(head.buffers()), list(twin.buffers()), 1e-2)


@pytest.mark.parametrize("name", LAYERS)
def test_trace_without_a_break(name, device):
    """What `torch.compile` makes of a layer is the layer, forward and backward."""
    _compare_compiled(*make(name), device, "aot_eager")


@pytest.mark.parametrize("name", ["BN, shared", "BN, per domain", "GhostBN", "SeqNorm", "BRN"])
def test_compile_without_a_break(name, cuda):
    """And compiled for the device."""
    _compare_compiled(*make(name), cuda, "inductor")


def _compare_compiled(layer, shapes, device, backend):
    torch.compiler.reset()
    twin = copy.deepcopy(layer).to(device)
    (xs, grads), _ = inputs(shapes, torch.float32, device)
    domains = torch.tensor(IDS, device=device)
    compiled = torch.compile(layer.to(device), fullgraph=True, backend=backend)
    found = training_step(compiled, xs, grads, domains)
    assert_close(found, training_step(twin, xs, grads, domains))
    assert_close(list(layer.buffers()), list(twin.buffers()))


def test_compile_retinanets_head_without_a_break(head, cuda):
    torch.compiler.reset()
    twin, features = copy.deepcopy(head), levels(cuda)
    found = torch.compile(head, fullgraph=True)(features)
    expected = twin(features)
    assert found.keys() == expected.keys()
    assert_close(list(found.values()), list(expected.values()), 1e-2)
