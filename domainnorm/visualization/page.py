"""A page of HTML that needs no other file and no network: headings, text, tables and pictures."""

import base64
import html
import io
from collections.abc import Sequence

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

# Readable on a phone: one column, wide tables scroll within themselves, pictures are as wide as the page at most.
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 0 auto;
       padding: 0.5rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem;
       border-bottom: 1px solid #ccc; } h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; }
li { margin: 0.3rem 0; } img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
figcaption, .note { color: #555; font-size: 0.9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums;
       overflow-wrap: normal; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap; }
.word { text-align: left; }
thead th { border-bottom: 2px solid #999; position: sticky; top: 0; background: #fff; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0 1rem; }
.grid figure { margin: 0.5rem 0; } .grid img { width: 100%; } figcaption { white-space: pre-line; }
.grid.large { grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); }
.long { max-height: 32rem; overflow: auto; }
.scroll img { max-width: none; }
pre { background: #f4f4f4; padding: 0.4rem 0.6rem; margin: 0.5rem 0; white-space: pre-wrap; font-size: 0.85rem; }
.level-error, .level-warning, .level-note { border-left: 0.4rem solid #c22; padding-left: 0.6rem; }
.level-warning { border-color: #e90; } .level-note { border-color: #999; }
.sortable th { cursor: pointer; } .sortable th::after { content: " ↕"; color: #bbb; }
.sortable [aria-sort=ascending]::after { content: " ↑"; color: #222; }
.sortable [aria-sort=descending]::after { content: " ↓"; color: #222; }
"""
# A click on a head sorts: numbers from the largest on, words by the alphabet; another click the other way. Dashes come
# last.
_SORT = """
for (const table of document.querySelectorAll("table.sortable")) table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th"), body = table.tBodies[0], before = head.getAttribute("aria-sort");
  const down = before ? before === "ascending" : !head.classList.contains("word");
  const order = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b;
  const compare = (a, b) => (a === "-") - (b === "-") || (down ? order(b, a) : order(a, b));
  const text = row => row.cells[head.cellIndex].textContent;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => compare(text(a), text(b))));
});
"""
_SORTABLE = "<table class=sortable>"
_LONG = 25  # rows, from which on a table scrolls


class Page:
    """Parts are added from top to bottom; all text is escaped.

    Args:
        title: also the first heading; "" for what is to be appended to another page.

    Example::

        >>> page = Page("A <b>")
        >>> page.items(["one"])
        >>> "<h1>A &lt;b&gt;</h1>" in str(page), "<li>one</li>" in str(page)
        (True, True)
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>"] if title else []

    def append(self, other: "Page") -> None:
        """All parts of another page."""
        self._parts += other._parts

    def heading(self, text: str, level: int = 2, *, mark: str = "") -> None:
        """A heading, of level 2 or 3, with the colour of an "error", a "warning" or a "note" as its `mark`."""
        look = f' class="level-{mark}"' if mark else ""
        self._parts.append(f"<h{level}{look}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph, in grey."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def code(self, text: str) -> None:
        """Lines of code."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1, sortable: bool = False
    ) -> None:
        """A table, which scrolls if it is long. Its first `words` columns are text, the others are numbers.

        A `sortable` one is sorted by a column whose head is clicked.
        """
        header = _cells("th", head, words)
        lines = [f"<tr>{_cells('td', row, words)}</tr>" for row in rows]
        look = "scroll long" if len(rows) > _LONG else "scroll"
        body, table = "\n".join(lines), _SORTABLE if sortable else "<table>"
        self._parts.append(
            f'<div class="{look}">{table}<thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, image: bytes | Tensor, caption: str = "", *, wide: bool = False) -> None:
        """A picture: the bytes of a PNG, or uint8 (3, H, W), which is compressed.

        A `wide` one keeps its size, and scrolls where the page is narrower.
        """
        figure = _figure(image, caption)
        self._parts.append(f'<div class="scroll">{figure}</div>' if wide else figure)

    def pictures(self, pictures: Sequence[tuple[bytes | Tensor, str]], *, large: bool = False) -> None:
        """Small or larger pictures and their captions of one or more lines, several in a row where there is space."""
        look = "grid large" if large else "grid"
        self._parts.append(f'<div class="{look}">' + "\n".join(_figure(*each) for each in pictures) + "</div>")

    def __str__(self) -> str:
        head = (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
        )
        script = f"<script>{_SORT}</script>" if any(_SORTABLE in part for part in self._parts) else ""
        return "\n".join([head, *self._parts, f"{script}</body></html>\n"])


def _cells(tag: str, texts: Sequence[str], words: int) -> str:
    return "".join(
        f"<{tag}{' class=word' if k < words else ''}>{html.escape(text)}</{tag}>" for k, text in enumerate(texts)
    )


def _figure(image: bytes | Tensor, caption: str) -> str:
    kind, content = ("png", image) if isinstance(image, bytes) else ("jpeg", _jpeg(image))
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text or "figure"}"><figcaption>{text}</figcaption></figure>'


def _jpeg(image: Tensor) -> bytes:
    stream = io.BytesIO()
    to_pil_image(image).save(stream, "JPEG", quality=88, subsampling=0)  # lines stay sharp
    return stream.getvalue()
