"""Self-contained HTML pages, with pictures and plots inline."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
  h1, h2, h3 { line-height: 1.2 } h2 { margin-top: 2.5rem } img, svg { max-width: 100%; height: auto }
  table { border-collapse: collapse }
  td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }
  td:first-child, th:first-child { text-align: left }
  .warning { background: #fff4d6; padding: .3rem .8rem; margin: .3rem 0; white-space: pre-wrap }
  pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
  .strip { display: grid; grid-template-columns: 8rem auto; gap: .3rem .6rem; align-items: center }
  .strip span { color: #555; text-align: right }
  {% block style %}{% endblock %}
</style>
<h1>{{ title }}</h1>
{% block content %}{% endblock %}
"""

TABLE = """<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{%- for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>"""

_environment = Environment(autoescape=True, undefined=StrictUndefined, loader=DictLoader({"page.html": PAGE}))


def render(template: str, **values: Any) -> Markup:
    """Fill in a Jinja template, which may extend page.html (blocks: style, content); text is escaped."""
    return Markup(_environment.from_string(template).render(values))


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    return render(TABLE, head=head, rows=rows)


def img(image: Image.Image, attributes: str = "", **save_options: Any) -> Markup:
    """An <img> that holds the picture. save_options: of PIL's save; PNG by default."""
    file = io.BytesIO()
    options = {"format": "PNG", **save_options}
    image.save(file, **options)
    return _img(file.getvalue(), options["format"].lower(), attributes)


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
    return _img(file.getvalue(), "png")


def _img(data: bytes, kind: str, attributes: str = "") -> Markup:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Markup(f'<img src="{source}" {attributes}'.rstrip() + ">")
