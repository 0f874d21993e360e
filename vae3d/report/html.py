"""Pictures and plots as HTML that holds them."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

from markupsafe import Markup
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def img(image: Image.Image) -> Markup:
    """An <img> that holds the picture, as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return _img(file.getvalue())


def resize_to_width(image: Image.Image, width: int) -> Image.Image:
    """Keep the aspect ratio; pixels of an enlarged image stay sharp."""
    resampling = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
    return image.resize((width, max(1, round(image.height * width / image.width))), resampling)


def subplots(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` plots of width x height inches each, row by row."""
    from matplotlib.figure import Figure  # slow to import

    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def svg(figure: Figure) -> Markup:
    """A plot as inline SVG, the same text every time."""
    import matplotlib  # slow to import

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "vae3d"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return Markup(text[text.index("<svg") :])


def png(figure: Figure) -> Markup:
    """A plot as an <img>."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return _img(file.getvalue())


def _img(png: bytes) -> Markup:
    return Markup(f'<img src="{data_uri(png, "image/png")}">')


def data_uri(data: bytes, kind: str) -> str:
    """kind: the MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
