"""Detectors train on a CPU in channels_last: the same numbers, in all layers, and nothing of it elsewhere."""

import pytest
import torch
from test_mask_rcnn import batch, build
from test_retinanet import images_and_targets, tiny
from torchvision.models.detection.transform import GeneralizedRCNNTransform


@pytest.mark.parametrize("norm", ["", "BN", "SyncBN", "GN", "BRN"])
@pytest.mark.parametrize("detector", ["RetinaNet", "Mask R-CNN"])
def test_losses_and_gradients_are_those_of_contiguous_batches(detector, norm):
    results = []
    for transform in (None, GeneralizedRCNNTransform):
        torch.manual_seed(0)
        if detector == "RetinaNet":
            model = tiny("MODEL.BACKBONE.NORM", norm, "MODEL.RETINANET.NORM", norm, "MODEL.NORM.GN.NUM_GROUPS", 4)
            images, targets = images_and_targets()
            images[0] = images[0][:, :50]  # images of different sizes
        else:
            model = build(norm)
            images, targets = batch(2, 1)
        model = model.double().train()
        if transform is not None:
            model.transform.__class__ = transform
        targets = [target | {"boxes": target["boxes"].double()} for target in targets]
        seen = []
        model.backbone.register_forward_hook(lambda _, args, out, seen=seen: seen.extend([args[0], *out.values()]))
        losses = model([image.double() for image in images], targets)
        for x in seen:
            last = x.is_contiguous(memory_format=torch.channels_last)
            assert (last if transform is None else x.is_contiguous()) or 1 in x.shape[2:]
        sum(losses.values()).backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_weights_and_inference_keep_their_format():
    model = tiny().train()
    sum(model(*images_and_targets()).values()).backward()
    for parameter in model.parameters():
        assert parameter.is_contiguous() and (parameter.grad is None or parameter.grad.is_contiguous())
    batched, _ = model.eval().transform(images_and_targets()[0])
    assert batched.tensors.is_contiguous()


@pytest.mark.parametrize("detector", [tiny, lambda: build("BN")])
def test_weights_are_channels_last_while_they_train_if_asked_to_be(detector):
    model, twin = detector(), detector()
    twin.load_state_dict(model.state_dict())
    model.weights_last = True
    weights = [m.weight for m in model.train().modules() if isinstance(m, torch.nn.Conv2d)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, targets = images_and_targets() if detector is tiny else batch(2, 1)
    for _ in range(2):  # an evaluation between them
        optimizer.zero_grad()
        sum(model.train()(images, targets).values()).backward()
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        assert any(not w.is_contiguous() for w in weights)
        optimizer.step()
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(images), twin.eval()(images), rtol=0, atol=0)
        assert all(w.is_contiguous() for w in weights)


@pytest.mark.parametrize("detector", [tiny, lambda: build("BN")])
def test_inference_in_half_precision_is_channels_last_too(detector):
    model = detector().eval()
    model.weights_last = True
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    images, _ = images_and_targets() if detector is tiny else batch(2, 1)
    ours, seen = model.transform.__class__, []
    model.backbone.register_forward_hook(lambda _, args, out: seen.append([args[0], *out.values()]))
    with torch.no_grad():
        for transform in (ours, GeneralizedRCNNTransform):
            model.transform.__class__ = transform
            with torch.autocast("cpu", torch.bfloat16):
                model(images[:1])
            assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
        model(images[:1])
    assert all(w.is_contiguous() for w in weights)
    lasts, expected, _ = seen
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in lasts)
    assert expected[0].is_contiguous()
    for x, y in zip(lasts, expected, strict=True):
        assert (x.float() - y.float()).abs().max() <= 0.05 * y.float().abs().max()


def test_what_an_inference_arranges_is_trained_on():
    model = tiny()
    model.weights_last = True
    images, targets = images_and_targets()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(images)
    sum(model.train()(images, targets).values()).backward()
    assert any(p.grad is not None for p in model.parameters())
