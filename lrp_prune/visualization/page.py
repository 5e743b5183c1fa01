"""One HTML page for an explanation, which needs no other file: every text in it is escaped, and images are part of it."""

import base64
import struct
import zlib
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

from lrp_prune.visualization.colours import colour_of, hexadecimal, ink_on
from lrp_prune.visualization.parts import Pixels, Tokens

if TYPE_CHECKING:
    from lrp_prune.visualization.explanation import Explanation

_STYLE = """
body { font: 15px/1.9 system-ui, sans-serif; color: #1f2933; background: #ffffff }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
h1 { font-size: 1.2rem }
h2 { font-size: 1rem; margin: 1.6rem 0 0.2rem }
h3 { font-size: 0.85rem; color: #52606d; margin: 0.6rem 0 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 3px; padding: 2px 0 }
.row span { display: inline-block; margin: 2px; padding: 0 6px }
.scale { font-size: 0.8rem; color: #52606d } .scale span { padding: 2px 10px }
figure { display: inline-block; margin: 0.4rem 1rem 0.4rem 0 } figcaption { font-size: 0.8rem; color: #52606d }
img { image-rendering: pixelated; height: 224px; border: 1px solid #e4e7eb }
""".strip()
_VEIL = 0.75
"""How much of the colour lies over an image where relevance is largest."""


def page(explanation: "Explanation") -> str:
    """The page of an explanation: a section for each sample, a part for each input."""
    title = escape(f"What speaks for {explanation.target}")
    body = [f"<h1>{title}</h1>", f'<p class="scale">rules: {escape(explanation.composite)}; {_scale()}</p>']
    for sample in range(len(explanation)):
        body.append(f"<section>{_section(explanation, sample)}</section>")
    head = f'<meta charset="utf-8"><title>{title}</title>\n<style>{_STYLE}</style>'
    content = "\n".join(body)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{content}\n</body>\n</html>\n'


def _scale() -> str:
    shares = (-1.0, -0.5, 0.0, 0.5, 1.0)
    words = {-1.0: "against", 0.0: "none", 1.0: "for"}
    return "".join(
        f'<span style="background:{hexadecimal(share)};color:{ink_on(share)}">{words.get(share, "&nbsp;")}</span>'
        for share in shares
    )


def _section(explanation: "Explanation", sample: int) -> str:
    largest = explanation.largest(sample) or 1.0
    known = explanation.value_of(sample)
    value = "" if known is None else f" = {known:.4g}"
    parts = [f"<h2>sample {sample}{value}</h2>"] if len(explanation) > 1 or value else []
    for name, part in explanation.inputs.items():
        parts.append(f"<h3>{escape(name)}</h3>")
        parts.append(_images(part, sample) if isinstance(part, Pixels) else _text(part, sample, largest))
    return "\n".join(parts)


def _text(part: Tokens, sample: int, largest: float) -> str:
    spans = []
    for label, value in part.of(sample):
        share = value / largest
        shown = escape(label).replace("\n", "&crarr;\n") if label else "&nbsp;"
        colours = f"background:{hexadecimal(share)};color:{ink_on(share)}"
        spans.append(f'<span style="{colours}" title="{value:+.4g}">{shown}</span>')
    return f'<div class="text{"" if part.kind == "tokens" else " row"}">{"".join(spans)}</div>'


def _images(part: Pixels, sample: int) -> str:
    image, heat = part.images()[sample], part.heat[sample]
    largest = float(heat.abs().max()) or 1.0
    return "".join(
        f'<figure><img alt="{caption}" src="{_data(rows)}"><figcaption>{caption}</figcaption></figure>'
        for caption, rows in (("the image", _rows(image)), ("relevance over it", _veiled(image, heat / largest)))
    )


def _rows(image: Tensor) -> list[bytes]:
    return [bytes(row.flatten().tolist()) for row in (255 * image).round().byte()]


def _veiled(image: Tensor, shares: Tensor) -> list[bytes]:
    """The image in grey, under the colours of the heat map: the more relevant, the less is seen of it."""
    rows = []
    for pixels, row in zip((255 * image.mean(-1)).tolist(), shares.tolist(), strict=True):
        values = bytearray()
        for grey, share in zip(pixels, row, strict=True):
            part = _VEIL * min(1.0, abs(share)) ** 0.5
            end = colour_of(1.0 if share > 0 else -1.0)
            values.extend(round((1 - part) * grey + part * channel) for channel in end)
        rows.append(bytes(values))
    return rows


def _data(rows: list[bytes]) -> str:
    """Rows of red, green and blue as a PNG inside the page (RFC 2083)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", len(rows[0]) // 3, len(rows), 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
