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
"""
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

    def heading(self, text: str, level: int = 2) -> None:
        """A heading, of level 2 or 3."""
        self._parts.append(f"<h{level}>{html.escape(text)}</h{level}>")

    def text(self, text: str) -> None:
        """A paragraph, in grey."""
        self._parts.append(f'<p class="note">{html.escape(text)}</p>')

    def items(self, texts: Sequence[str]) -> None:
        """A list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts) + "</ul>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
        """A table, which scrolls if it is long. Its first `words` columns are text, the others are numbers."""
        header = _cells("th", head, words)
        lines = [f"<tr>{_cells('td', row, words)}</tr>" for row in rows]
        look = "scroll long" if len(rows) > _LONG else "scroll"
        body = "\n".join(lines)
        self._parts.append(
            f'<div class="{look}"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def picture(self, image: bytes | Tensor, caption: str = "") -> None:
        """A picture: the bytes of a PNG, or uint8 (3, H, W), which is compressed."""
        self._parts.append(_figure(image, caption))

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
        return "\n".join([head, *self._parts, "</body></html>\n"])


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
