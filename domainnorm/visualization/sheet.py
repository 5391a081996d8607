"""Many small pictures as one: a contact sheet, or a page of HTML that needs no other file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from ..output import replace_file
from .draw import font_of_size
from .page import Page

SUFFIXES = (".png", ".html")
_GAP, _LETTERS, _NARROWEST = 12, 13, 150  # pixels: between pictures; of letters; of a caption


@dataclass(frozen=True)
class Group:
    """Pictures under one heading.

    Args:
        title: of one line.
        pictures: uint8 (3, H, W), of any sizes.
        captions: of each, of several lines.
    """

    title: str
    pictures: Sequence[Tensor]
    captions: Sequence[str]


def write_pictures(file: Path, title: str, groups: Sequence[Group]) -> None:
    """A contact sheet if `file` ends in `.png`, or a page if it ends in `.html`.

    Raises:
        UserError: it ends otherwise, or cannot be written.
    """
    check_suffix(file)
    if file.suffix == ".html":
        with replace_file(file) as stream:
            stream.write(page(title, groups))
    else:
        with replace_file(file, "wb") as stream:
            F.to_pil_image(contact_sheet(groups)).save(stream, "PNG")


def check_suffix(file: Path) -> None:
    """UserError if `write_pictures` does not know what `file` shall be."""
    if file.suffix not in SUFFIXES:
        raise UserError(f"--out {file}: expected a name that ends in {' or '.join(SUFFIXES)}")


def contact_sheet(groups: Sequence[Group]) -> Tensor:
    """All pictures, in rows that fill a sheet about as wide as high, with their captions below, groups under titles.

    Returns:
        uint8 (3, H, W).
    """
    figures = [[_figure(*both) for both in zip(group.pictures, group.captions, strict=True)] for group in groups]
    sizes = [figure.size for of_group in figures for figure in of_group]
    widest = max((width for width, _ in sizes), default=0)
    width = max(widest, math.isqrt(sum(width * height for width, height in sizes)), 320) + _GAP
    rows: list[tuple[int, int, Image.Image]] = []  # left, top, what is there
    top = 0
    for group, of_group in zip(groups, figures, strict=True):
        title = _text(width, [group.title], _LETTERS + 3)
        rows.append((_GAP, top + _GAP, title))
        left, top, high = _GAP, top + title.height + 2 * _GAP, 0
        for figure in of_group:
            if left > _GAP and left + figure.width > width:
                left, top, high = _GAP, top + high, 0
            rows.append((left, top, figure))
            left, high = left + figure.width, max(high, figure.height)
        top += high
    sheet = Image.new("RGB", (width, top + _GAP), "white")
    for left, above, picture in rows:
        sheet.paste(picture, (left, above))
    return F.pil_to_tensor(sheet)


def page(title: str, groups: Sequence[Group]) -> str:
    """A page of HTML in which all pictures are."""
    content = Page(title)
    for group in groups:
        content.heading(group.title)
        content.pictures(list(zip(group.pictures, group.captions, strict=True)), large=True)
    return str(content)


def _figure(picture: Tensor, caption: str) -> Image.Image:
    """A picture and its caption, with a gap to the right and below."""
    height, width = picture.shape[1:]
    lines = [piece for line in caption.splitlines() for piece in _broken(line, max(width, _NARROWEST))]
    text = _text(max(width, _NARROWEST), lines, _LETTERS)
    figure = Image.new("RGB", (text.width + _GAP, height + 4 + text.height + _GAP), "white")
    figure.paste(F.to_pil_image(picture), (0, 0))
    figure.paste(text, (0, height + 4))
    return figure


def _text(width: int, lines: Sequence[str], size: int) -> Image.Image:
    line_height = round(1.3 * size)
    picture = Image.new("RGB", (width, line_height * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((0, number * line_height), line, fill="#222222", font=font_of_size(size))
    return picture


def _broken(line: str, width: int) -> list[str]:
    """A line in pieces that are no wider, at spaces where there are some."""
    font, pieces = font_of_size(_LETTERS), [""]
    for word in line.split(" "):
        longer = f"{pieces[-1]} {word}" if pieces[-1] else word
        if font.getlength(longer) <= width:
            pieces[-1] = longer
            continue
        pieces += [""] if pieces[-1] else []
        for letter in word:
            if font.getlength(pieces[-1] + letter) > width and pieces[-1]:
                pieces.append("")
            pieces[-1] += letter
    return pieces


def enlarged(image: Tensor, least: int, most: int) -> tuple[Tensor, float]:
    """A small image by a whole factor, so that its shorter side has about `least` pixels; a large one scaled down.

    Args:
        most: pixels of the longer side.

    Returns:
        The image, uint8 (3, H, W), and the factor of its sides.
    """
    height, width = image.shape[-2:]
    if max(height, width) > most:
        factor = most / max(height, width)
        size = [max(round(side * factor), 1) for side in (height, width)]
        return F.resize(image, size, antialias=True), factor
    whole = max(min(math.ceil(least / min(height, width)), most // max(height, width)), 1)
    return image.repeat_interleave(whole, -1).repeat_interleave(whole, -2), float(whole)


def as_uint8(image: Tensor) -> Tensor:
    """An image of floats in [0, 1], as the models take it, or of uint8."""
    plain = image.detach().cpu().as_subclass(Tensor)
    return plain if plain.dtype == torch.uint8 else F.to_dtype(plain, torch.uint8, scale=True)
