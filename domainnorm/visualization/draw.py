"""Objects drawn on an image: boxes, masks, names and scores."""

import functools
import io
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..errors import one_line

# Readable on photographs, and told apart by most who see few colours; the first ones differ most.
PALETTE = (
    *("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#46f0f0", "#f032e6", "#ffe119", "#008080", "#bfef45", "#911eb4"),
    *("#fabed4", "#9a6324", "#aaffc3", "#800000", "#dcbeff", "#808000", "#ffd8b1", "#42d4f4", "#000075", "#a9a9a9"),
)
MASK_OPACITY = 0.35
MAX_HIDDEN = 0.2  # share of the image


def draw_objects(
    image: Tensor,
    boxes: Tensor,
    names: Sequence[str],
    *,
    masks: Tensor | None = None,
    scores: Tensor | Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> Tensor:
    """A copy of an image with its objects drawn; each class has a colour, lines and letters are sized to the image.

    Args:
        image: uint8.
        boxes: XYXY, in pixels; a name stands above its box or, at the upper border, in it.
        names: of each object; '' writes none. None is written where together they would hide a fifth of the image.
        masks: bool.
        scores: from 0 to 1, written behind the names.
        classes: all names that there are: the colour is that of the place in it, the same in all pictures. A name that
            is not in it has a colour by its spelling.

    Shape:
        - image: :math:`(3, H, W)`
        - boxes: :math:`(n, 4)`
        - masks: :math:`(n, H, W)`

    Returns:
        uint8 (3, H, W), on the CPU.

    Raises:
        ValueError: from torchvision, for other types and shapes.

    Example::

        >>> import torch
        >>> image = torch.zeros(3, 60, 80, dtype=torch.uint8)
        >>> picture = draw_objects(image, torch.tensor([[10.0, 20, 50, 50]]), ["cat"], scores=[0.9])
        >>> picture.shape, picture[:, 20, 30].tolist() == list(color_of("cat"))
        (torch.Size([3, 60, 80]), True)
    """
    picture, boxes = image.detach().cpu().clone(), boxes.detach().cpu()
    if len(boxes) != len(names):
        raise ValueError(f"expected a name for each box, got {len(names)} names and {len(boxes)} boxes")
    if not len(boxes):
        return picture
    colors = [color_of(name, classes) for name in names]
    width, font_size = line_width(image), letter_size(image)
    if masks is not None:
        masks = masks.detach().cpu()
        picture = draw_segmentation_masks(picture, _nearest(masks), MASK_OPACITY, colors)
        for outline, color in zip(_outlines(masks, width), colors, strict=True):
            picture[:, outline] = torch.tensor(color, dtype=torch.uint8)[:, None]
    picture = draw_bounding_boxes(picture, boxes, colors=colors, width=width)
    texts = [one_line(name) for name in names]
    if scores is not None:
        texts = [f"{name} {float(score):.2f}".strip() for name, score in zip(texts, scores, strict=True)]
    named = [row for row, text in enumerate(texts) if text]
    font = font_of_size(font_size)
    # With torchvision's margin of one pixel around a text.
    sides = torch.tensor([font.getbbox(texts[row])[2:] for row in named]).view(-1, 2) + 2
    if not named or sides.prod(1).sum() > MAX_HIDDEN * image.shape[-2] * image.shape[-1]:
        return picture
    return draw_bounding_boxes(
        picture,
        _places(sides, boxes[named], image.shape[-2:]),
        [texts[row] for row in named],
        [colors[row] for row in named],
        width=0,  # of the boxes: names alone, over all boxes
        font=_font_file(),
        font_size=font_size,
        label_colors=[_on(colors[row]) for row in named],
        fill_labels=True,
    )


def color_of(name: str, classes: Sequence[str] = ()) -> tuple[int, int, int]:
    """The RGB colour of a class, from 0 to 255: by its place in `classes`, else by its spelling."""
    place = classes.index(name) if name in classes else zlib.crc32(name.encode())
    code = PALETTE[place % len(PALETTE)]
    red, green, blue = bytes.fromhex(code[1:])
    return red, green, blue


def line_width(image: Tensor) -> int:
    """Pixels, for an image (..., H, W)."""
    return max(1, round(sum(image.shape[-2:]) / 600))


def letter_size(image: Tensor) -> int:
    """Points, for an image (..., H, W)."""
    return max(9, round(sum(image.shape[-2:]) / 100))


def font_of_size(points: int) -> ImageFont.FreeTypeFont:
    """The font of all pictures."""
    return ImageFont.truetype(_font_file(), points)


def _on(color: tuple[int, int, int]) -> str:
    """Black or white, what is read better on `color`; by ITU-R 601's luma."""
    return "black" if color[0] * 0.299 + color[1] * 0.587 + color[2] * 0.114 > 140 else "white"


def _nearest(masks: Tensor) -> Tensor:
    """Masks (n, H, W) of which each pixel has one at most, the smallest: torchvision blackens where they overlap."""
    owner = torch.full(masks.shape[1:], -1)
    for row in masks.sum((1, 2)).argsort(descending=True).tolist():
        owner[masks[row]] = row
    return owner == torch.arange(len(masks))[:, None, None]


def _outlines(masks: Tensor, width: int) -> Tensor:
    """The pixels of each mask within `width` of its border."""
    outside = F.pad(~masks, [width] * 4, value=True).float()
    return masks & (F.max_pool2d(outside[:, None], 2 * width + 1, 1)[:, 0] > 0)


def _places(sides: Tensor, boxes: Tensor, size: torch.Size) -> Tensor:
    """Where torchvision, which writes into boxes, must be told that they are, for texts to stand above their own."""
    limit = (torch.tensor([size[1], size[0]]) - sides).clamp(min=0)
    corners = torch.stack([boxes[:, 0], boxes[:, 1] - sides[:, 1]], 1).clamp(min=0).minimum(limit)
    return torch.cat([corners, corners + 1], 1)


def _font_file() -> str | io.BytesIO:
    """What `ImageFont.truetype` takes."""
    font = _font()
    return font if isinstance(font, str) else io.BytesIO(font)


@functools.cache
def _font() -> str | bytes:
    """DejaVu Sans, which has most alphabets: the system's or matplotlib's; else Pillow's own font, of ASCII."""
    try:
        return str(ImageFont.truetype("DejaVuSans.ttf").path)
    except OSError:
        pass
    try:
        import matplotlib
    except ImportError:
        return ImageFont.load_default(10).font_bytes  # type: ignore[union-attr]
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
