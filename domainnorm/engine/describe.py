"""What the normalization batch of each norm really is."""

from fvcore.common.config import CfgNode
from torch import nn

from ..data.sampler import images_per_forward
from ..distributed import world_size
from ..layers import DomainBatchNorm
from ..layers.group_norm import PositionalNorm


def describe_normalization(cfg: CfgNode, model: nn.Module) -> str:
    """`normalization_batches` in one line."""
    found = normalization_batches(cfg, model)
    others = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    others -= sum(isinstance(m, DomainBatchNorm) for m in model.modules())
    texts = [f"{part} x{n}: {text}" for part, n, text in found]
    texts += [f"{others} of torch's BatchNorm: all that each is given"] if others else []
    return "normalization batches: " + ("; ".join(texts) or "none")


def normalization_batches(cfg: CfgNode, model: nn.Module) -> list[tuple[str, int, str]]:
    """For every part of `model` with norms, the number of layers and what one of them normalizes together in training.

    Gradient accumulation does not enlarge it (*Rethinking "Batch"*, App. A.5).
    """
    parts: dict[tuple[str, str], int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (DomainBatchNorm, nn.GroupNorm, PositionalNorm)):
            key = ".".join(name.split(".")[:2]), _batch(cfg, name, module)
            parts[key] = parts.get(key, 0) + 1
    return [(part, n, text) for (part, text), n in parts.items()]


def _batch(cfg: CfgNode, name: str, layer: nn.Module) -> str:
    if isinstance(layer, nn.GroupNorm):
        return "a sample alone, by groups of channels"
    if isinstance(layer, PositionalNorm):
        return "a place of a sample alone, over its channels"
    assert isinstance(layer, DomainBatchNorm)
    ranks = world_size() if layer.sync else 1
    if layer.frozen:
        return "population statistics (frozen)"
    images = images_per_forward(cfg, world_size())
    text = f"{images} images x height x width"
    if name.startswith("roi_heads."):
        head = cfg.MODEL.ROI_BOX_HEAD if ".box_" in name else cfg.MODEL.ROI_MASK_HEAD
        share = 1 if ".box_" in name else cfg.MODEL.ROI_HEADS.POSITIVE_FRACTION
        most = int(cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * share) * images
        shuffled = cfg.MODEL.ROI_HEADS.SHUFFLE and world_size() > 1
        owner = f"a random share of those of {images * world_size()} images" if shuffled else f"of {images} images"
        text = f"up to {most} RoIs, {owner}, x {head.POOLER_RESOLUTION} x {head.POOLER_RESOLUTION}"
    levels, sets = layer.domains_per_name, layer.num_domains // layer.domains_per_name
    if name.startswith("head.") and cfg.MODEL.RETINANET.NORM_DOMAINS == "dataset":
        text += " x levels"
    each = layer.sgd_statistics == "per_domain"
    kinds = [kind if each else f"{n} {kind}s" for n, kind in ((levels, "level"), (sets, "domain")) if n > 1]
    if kinds:
        text += f" of {'each' if each else 'all'} {' and '.join(kinds)}"
    if layer.grouping():
        text = f"{type(layer).__name__} ({layer.grouping()}) of {text}"
    return text + (f" x {ranks} processes" if layer.sync else ", of one process")
