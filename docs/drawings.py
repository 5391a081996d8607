"""The drawings of docs/layers: which samples and channels each layer normalizes together.

    python docs/drawings.py [FOLDER]

writes them as SVG into docs/layers/drawings, or FOLDER. Columns are samples, rows are channels. What lies together
without a gap is one normalization batch, of which one is colored. Colors and text are legible on white and on black.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

SAMPLES, CHANNELS = 8, 6
CELL, GAP = 15, 5  # of a sample's channel; between normalization batches
BATCH, SECOND, THIRD, POPULATION = "#2f7fd1", "#2a9960", "#9a5fc4", "#e0791b"
LINE, EMPTY, TEXT = "#8a8a8a", "#8a8a8a", "#7a7a7a"
PANEL = 216  # width of one drawing within the comparison

# Samples and channels of a normalization batch of each layer, with the arguments of that layer.
# tests/test_layer_pages.py compares them with what the layers compute.
BLOCKS: dict[str, tuple[int, float, str, dict[str, int]]] = {
    "BatchNorm": (SAMPLES, 1, "BN", {}),
    "GhostBatchNorm": (4, 1, "GhostBN", {"samples_per_group": 4}),
    "GroupedBatchNorm": (2, 3, "GBGN", {"samples_per_group": 2, "num_channel_groups": 2}),
    "BatchGroupNorm": (SAMPLES, 3, "BGN", {"num_groups": 2}),
    "BatchGroupNorm, G > C": (SAMPLES, 0.5, "BGN", {"num_groups": 12}),
    "GroupNorm": (1, 3, "GN", {"num_groups": 2}),
    "InstanceNorm": (1, 1, "IN", {}),
}


class Drawing:
    """Shapes, and the text of the SVG file that has them."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.shapes: list[str] = []

    def rectangle(self, x: float, y: float, width: float, height: float, color: str = "") -> None:
        fill = f'fill="{color}"' if color else f'fill="{EMPTY}" fill-opacity="0.3"'
        self.shapes.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" {fill}/>')

    def line(self, x: float, y: float, x2: float, y2: float, width: float = 0.7, arrow: bool = False) -> None:
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.shapes.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}" stroke-width="{width:g}"{end}/>'
        )

    def text(self, x: float, y: float, words: str, size: int = 16, bold: bool = False, anchor: str = "start") -> None:
        weight = ' font-weight="bold"' if bold else ""
        escaped = words.replace("&", "&amp;").replace("<", "&lt;")
        style = f'font-size="{size}" fill="{TEXT}" text-anchor="{anchor}"{weight}'
        self.shapes.append(f'<text x="{x:g}" y="{y:g}" {style}>{escaped}</text>')

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" font-family="system-ui, sans-serif" role="img">'
        )
        arrow = (
            '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{LINE}"/></marker>'
        )
        title = self.title.replace("&", "&amp;").replace("<", "&lt;")
        return "\n".join([head, f"<title>{title}</title>", f"<defs>{arrow}</defs>", *self.shapes, "</svg>", ""])


def span(first: float, last: float, size: float, cell: float) -> tuple[float, float]:
    """Where a run of cells begins and how long it is, with a gap after every `size` cells."""
    begin = first * cell + (first // size) * GAP
    return begin, (last - first) * cell


def grid(
    drawing: Drawing,
    x: float,
    y: float,
    block: tuple[float, float],
    *,
    colored: dict[tuple[int, int], str] | None = None,
    samples: int = SAMPLES,
    cell: float = CELL,
) -> tuple[float, float]:
    """Samples × channels in normalization batches of `block` = (samples, channels); `colored`: by their indices.

    Returns its width and height.
    """
    across, down = block
    columns, rows = -(-samples // across), -(-CHANNELS // down)
    colored = {(0, int(rows) // 3): BATCH} if colored is None else colored
    left = top = width = height = 0.0
    for i in range(int(columns)):
        for j in range(int(rows)):
            left, width = span(i * across, min((i + 1) * across, samples), across, cell)
            top, height = span(j * down, min((j + 1) * down, CHANNELS), down, cell)
            drawing.rectangle(x + left, y + top, width, height, colored.get((i, j), ""))
            for k in range(1, round(width / cell)):
                drawing.line(x + left + k * cell, y + top, x + left + k * cell, y + top + height)
            for k in range(1, round(height / cell)):
                drawing.line(x + left, y + top + k * cell, x + left + width, y + top + k * cell)
    return left + width, top + height


def population(
    drawing: Drawing, x: float, y: float, number: int = CHANNELS, colored: Iterable[int] = (2,), color: str = POPULATION
) -> None:
    """The running statistics, one cell for each channel (or piece)."""
    for k in range(number):
        drawing.rectangle(x, y + k * (CELL + GAP), CELL, CELL, color if k in colored else "")


def axes(drawing: Drawing, x: float, y: float, width: float, height: float) -> None:
    """What columns and rows are, above and left of a grid."""
    drawing.text(x + width / 2, y - 8, "samples", 14, anchor="middle")
    drawing.shapes.append(
        f'<text transform="translate({x - 8:g} {y + height / 2:g}) rotate(-90)" font-size="14" fill="{TEXT}" '
        'text-anchor="middle">channels</text>'
    )


def panel(drawing: Drawing, x: float, y: float, title: str, words: str, block: tuple[float, float] | None) -> None:
    """One grid of the comparison, with its title and what is normalized together; no block: another shape follows."""
    drawing.text(x, y, title, 18, bold=True)
    drawing.text(x, y + 20, words, 15)
    if block is not None:
        grid(drawing, x, y + 32, block)


def levels(
    drawing: Drawing,
    x: float,
    y: float,
    colors: Sequence[str],
    cells: Sequence[float] = (11, 8, 5.5),
    numbered: bool = False,
) -> None:
    """Three domains of four samples each, whose maps have other sizes; the same channel of each is colored."""
    for number, (cell, color) in enumerate(zip(cells, colors, strict=True)):
        width, _ = grid(drawing, x, y, (4, 1), colored={(0, 2): color}, samples=4, cell=cell)
        if numbered:
            drawing.text(x, y + 135, f"domain {number}", 13)
        x += width + 14 + 6 * numbered


def comparison() -> Drawing:
    """All layers."""
    drawing = Drawing(3 * PANEL + 10, 4 * 180 + 4, "What each layer normalizes together, samples by channels")
    panels = [
        ("BatchNorm", "all samples, a channel", BLOCKS["BatchNorm"][:2]),
        ("DomainBatchNorm", "a domain, or all", None),
        ("… with sync=True", "… of all processes", None),
        ("GhostBatchNorm", "some samples, a channel", BLOCKS["GhostBatchNorm"][:2]),
        ("GroupedBatchNorm", "some samples, channels", BLOCKS["GroupedBatchNorm"][:2]),
        ("BatchGroupNorm", "all samples, a piece", BLOCKS["BatchGroupNorm"][:2]),
        ("SeqNorm", "GroupNorm, then ghost", None),
        ("BatchRenorm", "BN, to the population", BLOCKS["BatchNorm"][:2]),
        ("FrozenBatchNorm", "the population alone", BLOCKS["BatchNorm"][:2]),
        ("GroupNorm", "a sample, channels", BLOCKS["GroupNorm"][:2]),
        ("InstanceNorm", "a sample, a channel", BLOCKS["InstanceNorm"][:2]),
        ("Example weight", "a sample, the population", BLOCKS["InstanceNorm"][:2]),
    ]
    for k, (title, words, block) in enumerate(panels):
        x, y = 4 + k % 3 * PANEL, 20 + k // 3 * 180
        if title == "FrozenBatchNorm":
            panel(drawing, x, y, title, words, None)
            grid(drawing, x, y + 32, (SAMPLES, 1), colored={})
        else:
            panel(drawing, x, y, title, words, block)
        if title == "DomainBatchNorm":
            levels(drawing, x, y + 32, (BATCH, SECOND, THIRD))
        if title == "SeqNorm":
            grid(drawing, x, y + 32, BLOCKS["GroupNorm"][:2], cell=7.5)
            drawing.line(x + 101, y + 57, x + 115, y + 57, 1.5, arrow=True)
            grid(drawing, x + 121, y + 32, BLOCKS["GhostBatchNorm"][:2], cell=8)
        if title.endswith("sync=True"):
            left = x
            for samples in (4, 3, 1):
                grid(drawing, left, y + 32, (samples, 1), samples=samples)
                left += samples * CELL + 14
        if title in ("BatchRenorm", "FrozenBatchNorm"):
            population(drawing, x + SAMPLES * CELL + 16, y + 32)
        if title == "Example weight":
            population(drawing, x + SAMPLES * (CELL + GAP) + 6, y + 32)
    return drawing


def domain_batch_norm() -> Drawing:
    """The two choices of statistics, for three domains."""
    drawing = Drawing(520, 385, "DomainBatchNorm: shared or per-domain statistics, in training and in inference")
    colors = (BATCH, SECOND, THIRD)
    for column, shared in enumerate((True, False)):
        x = 4 + column * 270
        drawing.text(x, 20, "SGD statistics", 16)
        drawing.text(x, 41, '"shared"' if shared else '"per_domain"', 18, bold=True)
        levels(drawing, x, 56, (BATCH,) * 3 if shared else colors, (16, 13, 10), numbered=True)
        drawing.text(x, 224, "population statistics", 16)
        drawing.text(x, 245, '"shared"' if shared else '"per_domain"', 18, bold=True)
        for k in range(1 if shared else 3):
            population(drawing, x + k * (CELL + 12), 260, color=BATCH if shared else colors[k])
    return drawing


def sync_batch_norm() -> Drawing:
    """Three processes with different numbers of samples."""
    drawing = Drawing(520, 345, "BatchNorm of each process, and synchronized over processes of 4, 2 and 0 samples")
    for row, (title, colors) in enumerate([("sync=False", (BATCH, SECOND)), ("sync=True", (BATCH, BATCH))]):
        y = 22 + row * 178
        drawing.text(4, y, title, 18, bold=True)
        for k, (samples, words) in enumerate([(4, "4 samples"), (2, "2 samples"), (0, "none")]):
            x = 4 + k * 180
            drawing.text(x, y + 22, f"process {k}: {words}", 15)
            if samples:
                grid(drawing, x, y + 32, (samples, 1), colored={(0, 2): colors[k]}, samples=samples, cell=16)
    return drawing


def blocks(title: str, parts: Sequence[tuple[str, tuple[float, float], int]]) -> Drawing:
    """Grids side by side, each with the arguments that it is of."""
    height = max(CHANNELS * 16 + CHANNELS / channels * GAP for _, (_, channels), _ in parts)
    drawing = Drawing(30 + 225 * len(parts), 55 + height, title)
    for k, (words, block, samples) in enumerate(parts):
        x = 28 + k * 225
        drawing.text(x, 20, words, 16, bold=True)
        axes(drawing, x, 55, *grid(drawing, x, 55, block, samples=samples, cell=16))
    return drawing


def seq_norm() -> Drawing:
    """GroupNorm, then GhostBN."""
    drawing = blocks("SeqNorm: a GroupNorm, then a GhostBN", [("1. GroupNorm", (1, 3), 8), ("2. GhostBN", (4, 1), 8)])
    drawing.line(214, 45, 242, 45, 2, arrow=True)
    return drawing


def towards_population(title: str, words: tuple[str, str], block: tuple[float, float], batch: bool) -> Drawing:
    """A grid beside the running statistics."""
    drawing = Drawing(400, 210, title)
    width, height = grid(drawing, 28, 55, block, colored=None if batch else {})
    drawing.text(28, 20, words[0], 16, bold=True)
    axes(drawing, 28, 55, width, height)
    population(drawing, 258, 55)
    drawing.text(258, 20, words[1], 16, bold=True)
    drawing.text(258, 47, "population", 14)
    return drawing


def drawings() -> dict[str, Drawing]:
    """Every drawing by the name of its file."""
    ghost = [("samples_per_group=4", (4, 1), 10)]
    grouped = [("samples_per_group=2", (2, 3), 8), ("samples_per_group=1", (1, 3), 8)]
    pieces = [("num_groups=2", (8, 3), 8), ("num_groups=12", (8, 0.5), 8)]
    return {
        "comparison": comparison(),
        "domain_batch_norm": domain_batch_norm(),
        "sync_batch_norm": sync_batch_norm(),
        "ghost_batch_norm": blocks("GhostBatchNorm: groups of four samples; the last one is smaller", ghost),
        "seq_norm": seq_norm(),
        "batch_group_norm": blocks("BatchGroupNorm: all samples, pieces of the flattened features", pieces),
        "grouped_batch_norm": blocks("GroupedBatchNorm: groups of samples by groups of channels", grouped),
        "batch_renorm": towards_population(
            "BatchRenorm: the batch, corrected towards the population", ("batch: μ, σ", "r, d"), (8, 1), True
        ),
        "frozen_batch_norm": towards_population(
            "FrozenBatchNorm: no sample takes part in the statistics", ("batch: not used", "constants"), (8, 1), False
        ),
        "example_weighing": towards_population(
            "Example weighing: a sample's own moments and the population's", ("weight α", "weight 1 - α"), (1, 1), True
        ),
    }


def main(argv: Sequence[str]) -> None:
    folder = Path(argv[0]) if argv else Path(__file__).parent / "layers" / "drawings"
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in drawings().items():
        (folder / f"{name}.svg").write_text(drawing.svg(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
