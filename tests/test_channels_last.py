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
            model = tiny("MODEL.BACKBONE.NORM", norm, "MODEL.RETINANET.NORM", norm)
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
