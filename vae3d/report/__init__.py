"""Tables as text, and what they show; the page that compares reconstructions is report.page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from vae3d.errors import escape


def text_table(head: Sequence[str], rows: Iterable[Sequence[str] | None]) -> str:
    """Align columns to their widest cell, the first to the left, the others to the right; a row of None is a rule.

    Control characters are escaped, since a row or a column may be named as a file is.
    """
    head = [*map(escape, head)]
    rows = [row if row is None else [*map(escape, row)] for row in rows]
    cells = [head, *(row for row in rows if row is not None)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(row: Sequence[str] | None) -> str:
        if row is None:
            return rule
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))

    return "\n".join(map(line, [head, None, *rows])).rstrip()


def number(value: float | None) -> str:
    """Four decimals, or a dash for None."""
    return "-" if value is None else f"{value:.4f}"


def score_names(validations: Iterable[Mapping[str, float]]) -> list[str]:
    """Names `val/...` of the scores to show, in their order: all but psnr_video where every validation has the same
    value for psnr, as on single frames."""
    validations = list(validations)
    names = dict.fromkeys(name for scores in validations for name in scores if name.startswith("val/"))
    if all(scores.get("val/psnr_video") == scores.get("val/psnr") for scores in validations):
        names.pop("val/psnr_video", None)
    return list(names)
