"""Draw one image of a built-in data set: a textured background and textured shapes, several that may overlap or one."""

from dataclasses import dataclass
from typing import Any

import numpy as np

CLASSES = ("disk", "square", "triangle", "ring")
# Colour and texture are hints, not answers: the hue (of 0…6) spreads around the class's own, the texture is the
# class's own in most objects. Without them 800 steps from random weights learn where objects are, but not what.
HUES = (0.0, 1.5, 3.0, 4.5)
TEXTURES = ("plain", "checked", "striped", "plain")
MIN_VISIBLE = 0.5  # of an object's pixels: a place in which one would show less is not taken
TRIES = 10  # places tried for an object before it is left out
# Of a patch, which shows one object: weaker hints, since one need not find it among others.
PATCH_SIDE = 32  # pixels
PATCH_SIZES = (9.0, 28.0)  # pixels, as `Layout.sizes`
PATCH_HUE_SPREAD = 0.8
PATCH_TEXTURE_SHARE = 0.7


@dataclass(frozen=True)
class Look:
    """The appearance of a domain; values are ranges in [0, 1]."""

    background: tuple[float, float]  # brightness
    foreground: tuple[float, float]  # brightness
    background_saturation: tuple[float, float]
    foreground_saturation: tuple[float, float]
    tint: tuple[float, float, float]  # factor of each channel
    noise: float  # standard deviation


LOOKS = {
    "day": Look((0.25, 0.55), (0.7, 1.0), (0.0, 0.25), (0.6, 1.0), (1.0, 1.0, 1.0), 0.02),
    "night": Look((0.05, 0.15), (0.35, 0.6), (0.0, 0.6), (0.3, 0.8), (0.75, 0.85, 1.0), 0.05),
    "xray": Look((0.6, 0.85), (0.1, 0.35), (0.0, 0.0), (0.0, 0.0), (1.0, 1.0, 1.0), 0.03),
}


# Some objects are no lighter than what is behind them, and as grey.
PATCH_LOOK = Look((0.2, 0.6), (0.4, 1.0), (0.0, 0.4), (0.2, 0.9), (1.0, 1.0, 1.0), 0.05)


@dataclass(frozen=True)
class Layout:
    """What is in the images of a set.

    Attributes:
        image_sizes: height and width, with their probabilities.
        counts: numbers of objects, with their probabilities.
        sizes: pixels, the diameter of the circle around an object; log-uniform.
        hue_spread: standard deviation of an object's hue from that of its class.
        texture_share: of the objects that have the texture of their class for sure.
        one_class: whether all objects of an image are of one class.
    """

    image_sizes: dict[tuple[int, int], float]
    counts: dict[int, float]
    sizes: tuple[float, float]
    hue_spread: float
    texture_share: float
    one_class: bool = False


LAYOUTS = {
    "shapes": Layout(
        {(128, 128): 0.7, (128, 160): 0.15, (160, 128): 0.15},
        {0: 0.05, 1: 0.25, 2: 0.25, 3: 0.2, 4: 0.12, 5: 0.08, 6: 0.05},
        (10.0, 110.0),
        hue_spread=0.35,
        texture_share=0.85,
    ),
    # Small objects whose outline, colour and texture hardly tell their class: those of an image tell it together.
    "herds": Layout(
        {(128, 128): 1.0},
        dict.fromkeys(range(8, 12), 0.25),
        (10.0, 24.0),
        hue_spread=2.0,
        texture_share=0.25,
        one_class=True,
    ),
}


@dataclass(frozen=True)
class Scene:
    """An image, uint8 (H, W, 3), with each object's class and visible pixels, bool (H, W), of which there are some."""

    image: np.ndarray
    labels: list[int]
    masks: list[np.ndarray]


def draw_scene(look: Look, rng: np.random.Generator, layout: Layout = LAYOUTS["shapes"]) -> Scene:
    """One scene; the same state of `rng` gives the same pixels."""
    height, width = _choose(layout.image_sizes, rng)
    image = _background(look, height, width, rng)
    ys, xs = np.mgrid[:height, :width] + 0.5
    labels: list[int] = []
    whole: list[int] = []  # pixels of each object, had nothing been drawn over it
    masks: list[np.ndarray] = []
    hints = layout.hue_spread, layout.texture_share
    common = int(rng.integers(len(CLASSES))) if layout.one_class else None
    for _ in range(_choose(layout.counts, rng)):
        label = int(rng.integers(len(CLASSES))) if common is None else common
        radius = np.exp(rng.uniform(*np.log(layout.sizes))) / 2
        for _ in range(TRIES):
            # Up to 0.3 radii beyond the border: some objects are cut off.
            x, y = (rng.uniform(0.7 * radius, side - 0.7 * radius) for side in (width, height))
            distance = _signed_distance(CLASSES[label], xs - x, ys - y, radius, rng.uniform(0, 2 * np.pi))
            inside = distance < 0
            remaining = [mask & ~inside for mask in masks]
            if all(mask.sum() >= MIN_VISIBLE * area for mask, area in zip(remaining, whole, strict=True)):
                masks = [*remaining, inside]
                whole.append(int(inside.sum()))
                labels.append(label)
                image = _cover(image, distance, _paint(look, label, xs, ys, rng, *hints))
                break
    return Scene(_expose(image, look, rng), labels, masks)


def _choose(probabilities: dict[Any, float], rng: np.random.Generator) -> Any:
    """One of the keys, by their probabilities."""
    return list(probabilities)[rng.choice(len(probabilities), p=list(probabilities.values()))]


def draw_patch(label: int, rng: np.random.Generator) -> np.ndarray:
    """A small image of one object of class `label`: uint8 (PATCH_SIDE, PATCH_SIDE, 3)."""
    image = _background(PATCH_LOOK, PATCH_SIDE, PATCH_SIDE, rng)
    ys, xs = np.mgrid[:PATCH_SIDE, :PATCH_SIDE] + 0.5
    radius = np.exp(rng.uniform(*np.log(PATCH_SIZES))) / 2
    x, y = rng.uniform(0.9 * radius, PATCH_SIDE - 0.9 * radius, 2)
    distance = _signed_distance(CLASSES[label], xs - x, ys - y, radius, rng.uniform(0, 2 * np.pi))
    surface = _paint(PATCH_LOOK, label, xs, ys, rng, PATCH_HUE_SPREAD, PATCH_TEXTURE_SHARE)
    return _expose(_cover(image, distance, surface), PATCH_LOOK, rng)


def _cover(image: np.ndarray, distance: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """`image` with `surface` where `distance` is negative."""
    return image + np.clip(0.5 - distance, 0, 1)[..., None] * (surface - image)  # one pixel of soft edge


def _expose(image: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """What the camera makes of colours in [0, 1]: tinted, noisy, 8 bits."""
    image = image * look.tint + rng.normal(0, look.noise, image.shape)
    return np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Pixels to the outline of a shape around the origin, negative inside; `radius` is of the circle around it."""
    if shape in ("disk", "ring"):
        from_center = np.hypot(x, y)
        # the ring: between 0.5 and 1 radius
        return from_center - radius if shape == "disk" else abs(from_center - 0.75 * radius) - 0.25 * radius
    corners = {"triangle": 3, "square": 4}[shape]
    normals = angle + 2 * np.pi * np.arange(corners) / corners
    return np.max([x * np.cos(n) + y * np.sin(n) for n in normals], axis=0) - radius * np.cos(np.pi / corners)


def _background(look: Look, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One colour, varied smoothly: coarse noise, interpolated. (H, W, 3)."""
    color = _color(rng.uniform(0, 6), look.background, look.background_saturation, rng)
    image = np.broadcast_to(color, (height, width, 3))
    for cells, strength in ((3, 0.3), (12, 0.12)):
        grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
        rows, columns = _interpolation(height, cells), _interpolation(width, cells)
        image = image * (1 + strength * (rows @ grid @ columns.T)[..., None])
    return image


def _interpolation(size: int, cells: int) -> np.ndarray:
    """The linear map (size, cells + 1) from values at the nodes of a grid to pixels."""
    position = (np.arange(size)[:, None] + 0.5) / size * cells
    return np.clip(1 - abs(position - np.arange(cells + 1)), 0, 1)


def _paint(
    look: Look,
    label: int,
    xs: np.ndarray,
    ys: np.ndarray,
    rng: np.random.Generator,
    hue_spread: float,
    texture_share: float,
) -> np.ndarray:
    """The surface of one object over the whole image, (H, W, 3): a texture in shades of one colour."""
    color = _color(rng.normal(HUES[label], hue_spread), look.foreground, look.foreground_saturation, rng)
    texture = TEXTURES[label] if rng.random() < texture_share else rng.choice(TEXTURES)
    period, angle = rng.uniform(4, 12), rng.uniform(0, np.pi)
    along = np.sin((xs * np.cos(angle) + ys * np.sin(angle)) * 2 * np.pi / period)
    across = np.sin((ys * np.cos(angle) - xs * np.sin(angle)) * 2 * np.pi / period)
    pattern = {"plain": np.zeros_like(xs), "striped": along, "checked": along * across}[texture]
    return color * (1 + 0.2 * pattern[..., None])


def _color(
    hue: float, brightness: tuple[float, float], saturation: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """RGB (3,); `hue` goes round in 6, `brightness` is the largest channel's."""
    pure = np.clip(2 - abs((hue - np.array([0.0, 2.0, 4.0]) + 3) % 6 - 3), 0, 1)
    return rng.uniform(*brightness) * (1 - rng.uniform(*saturation) * (1 - pure))
