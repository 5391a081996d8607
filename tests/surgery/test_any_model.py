"""Models of torchvision and timm with our norms: the same in one domain; in several, each domain has its own."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

import domainnorm as dn

_BatchNorm = nn.modules.batchnorm._BatchNorm


def classifier(name):
    return lambda: models.get_model(name, num_classes=5)


def from_timm(name, **options):
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **options)


def segmentation(name):
    return lambda: models.get_model(name, weights=None, weights_backbone=None, num_classes=3)


def detector(name, **options):
    sizes = {"min_size": 64, "max_size": 64, "num_classes": 3}
    return lambda: models.get_model(name, weights=None, weights_backbone=None, **sizes, **options)


FEW_BOXES = {
    **{f"rpn_{what}_top_n_{mode}": 4 for what in ("pre_nms", "post_nms") for mode in ("train", "test")},
    "box_batch_size_per_image": 4,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 2,
}
MODELS = {
    "resnet18": (classifier("resnet18"), (4, 3, 32, 32)),
    "regnet_y_400mf": (classifier("regnet_y_400mf"), (4, 3, 64, 64)),
    "mobilenet_v3_small": (classifier("mobilenet_v3_small"), (4, 3, 64, 64)),
    "efficientnet_b0": (classifier("efficientnet_b0"), (4, 3, 48, 48)),
    "densenet121": (classifier("densenet121"), (4, 3, 48, 48)),
    "mc3_18": (classifier("mc3_18"), (2, 3, 2, 16, 16)),  # videos
    "lraspp": (segmentation("lraspp_mobilenet_v3_large"), (2, 3, 32, 32)),
    "deeplabv3": (segmentation("deeplabv3_mobilenet_v3_large"), (2, 3, 32, 32)),
    "mask_rcnn_v2": (detector("maskrcnn_resnet50_fpn_v2", **FEW_BOXES), None),
    "retinanet_v2": (
        detector("retinanet_resnet50_fpn_v2", score_thresh=0.0, topk_candidates=8, detections_per_img=4),
        None,
    ),
    "timm_resnet10t": (from_timm("resnet10t"), (4, 3, 64, 64)),
    "timm_convnext": (from_timm("convnext_atto", norm_layer="batchnorm2d"), (4, 3, 64, 64)),
    "timm_levit": (from_timm("levit_128s", img_size=64), (4, 3, 64, 64)),  # BatchNorm1d too
    # With BatchNormAct2d:
    "timm_regnetx": (from_timm("regnetx_002"), (4, 3, 64, 64)),
    "timm_efficientnet_lite0": (from_timm("efficientnet_lite0"), (4, 3, 64, 64)),
    "timm_mobilenetv3": (from_timm("mobilenetv3_small_050"), (4, 3, 64, 64)),
    "timm_repvgg": (from_timm("repvgg_a0"), (4, 3, 32, 32)),
    "timm_cspresnet50": (from_timm("cspresnet50"), (4, 3, 48, 48)),
}
each_model = pytest.mark.parametrize("name", MODELS)


def original(name):
    """The model in float64, its γ, β and statistics different in every channel."""
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                nn.init.uniform_(value, low, high)
    return model, inputs(shape)


def inputs(shape, seed=1):
    """What the model takes: images, or images and targets."""
    generator = torch.Generator().manual_seed(seed)
    if shape is not None:
        return (torch.randn(shape, dtype=torch.float64, generator=generator),)
    images = list(torch.rand(2, 3, 64, 64, dtype=torch.float64, generator=generator))
    boxes = torch.tensor([[4.0, 6, 44, 40], [20, 20, 60, 52]], dtype=torch.float64)
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 6:40, 4:44] = masks[1, 20:52, 20:60] = 1
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks} for _ in images]


def forward(model, x):
    """All outputs, or losses, by name; whatever is drawn, the same each time."""
    torch.manual_seed(5)
    output = model(*x) if model.training else model(x[0])
    return flat(output)


def flat(output):
    if torch.is_tensor(output):
        return {"": output}
    pairs = output.items() if isinstance(output, dict) else enumerate(output)
    return {f"{key}.{inner}": value for key, part in pairs for inner, value in flat(part).items()}


def same(output, expected, tolerance=1e-9):
    assert list(output) == list(expected)
    for key, value in expected.items():
        assert output[key].shape == value.shape, key
        assert torch.allclose(output[key], value, tolerance, tolerance), key


def equal(output, expected):
    assert list(output) == list(expected) and all(torch.equal(output[key], expected[key]) for key in expected)


def train_step(model, x):
    """Outputs or losses of a training forward, and the gradients of all parameters."""
    output = forward(model.train(), x)
    sum(value.sin().sum() for value in output.values()).backward()
    return output, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@each_model
def test_one_domain_is_the_original(name):
    model, x = original(name)
    before = copy.deepcopy(model.state_dict())
    ours = dn.convert_batchnorm(copy.deepcopy(model), "DomainBatchNorm")
    assert all(isinstance(module, dn.DomainBatchNorm) for module in ours.modules() if isinstance(module, _BatchNorm))
    with torch.no_grad():
        expected = forward(model.eval(), x)
        assert all(value.numel() for value in expected.values())  # a detector detects
        equal(forward(ours.eval(), x), expected)
    (output, grads), (expected, of_original) = (train_step(m, x) for m in (ours, model))
    same(output, expected)
    same(grads, of_original, 1e-7)
    state, expected = ours.state_dict(), model.state_dict()
    same(state, expected)
    # each the other's checkpoint, from before and after the step
    ours.load_state_dict(before)
    model.load_state_dict(state)
    equal(ours.state_dict(), before)
    equal(model.state_dict(), state)


@pytest.mark.parametrize("name", ["resnet18", "timm_regnetx"])
def test_in_float32(name):
    model, (x,) = original(name)
    ours = dn.convert_batchnorm(copy.deepcopy(model.float()), "DomainBatchNorm")
    with torch.no_grad():
        for mode in (False, True):
            same(*(forward(m.train(mode), (x.float(),)) for m in (ours, model)), 1e-5)


@pytest.mark.slow
@each_model
def test_a_second_domain_leaves_the_first_as_it_was(name):
    """An old checkpoint counts for both domains; the norms are then trained in one of them."""
    model, x = original(name)
    ours = dn.convert_batchnorm(copy.deepcopy(model), "BN", num_domains=2, affine="per_domain")
    for value in ours.state_dict().values():
        value.zero_()
    ours.load_state_dict(model.state_dict())
    with torch.no_grad():
        before = forward(model.eval(), x)
        for domain in range(2):
            with dn.use_domain(ours.eval(), domain):
                equal(forward(ours, x), before)
    norms = [module for module in ours.modules() if isinstance(module, dn.DomainBatchNorm)]
    optimizer = torch.optim.SGD([p for norm in norms for p in norm.parameters(recurse=False)], lr=0.01)
    with dn.use_domain(ours, 1):
        train_step(ours, x)
        optimizer.step()
        changed = {key: value.detach() for key, value in forward(ours.eval(), x).items()}
    with torch.no_grad(), dn.use_domain(ours, 0):
        equal(forward(ours, x), before)
    assert not all(torch.equal(changed[key], before[key]) for key in before)
    twin = dn.convert_batchnorm(model, "BN", num_domains=2, affine="per_domain")
    twin.load_state_dict(ours.state_dict())
    with torch.no_grad(), dn.use_domain(twin.eval(), 1):
        equal(forward(twin, x), changed)
