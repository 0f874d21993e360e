"""What probes found, side by side: a table, a JSON file and one self-contained page with plots and pictures."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from vae3d.evaluation.tables import text_table, write_json
from vae3d.io import naming, write_text
from vae3d.latents.probes import COLLAPSED_KL, COLLAPSED_SHARE, TRANSFORMS
from vae3d.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Told = Mapping[str, Any]  # of probe_run.probe_model
Report = Mapping[str, Any]  # settings, source, pixels (of probe_pixels), models (name -> Told), warnings, notes
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's, for all eyes
PIXELS = "#222222"
OCTAVES = [2.0**-octave for octave in range(8, -1, -1)]  # of Nyquist's frequency
WIDTH = 192  # of a shown picture, in pixels

PAGE = """<!doctype html>
<meta charset="utf-8">
<title>Latent probes</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
  h1, h2 {{ line-height: 1.2 }} h2 {{ margin-top: 2.5rem }} img {{ max-width: 100%; height: auto }}
  table {{ border-collapse: collapse }} .warning {{ background: #fff4d6; padding: .3rem .8rem; margin: .3rem 0 }}
  .warning {{ white-space: pre-wrap }}
  td, th {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }}
  td:first-child, th:first-child {{ text-align: left; white-space: pre }}
  td:last-child, th:last-child {{ text-align: left; color: #555; max-width: 30rem }}
  .shots {{ display: flex; flex-wrap: wrap; gap: .6rem }} .shots figure {{ margin: 0 }}
  .shots figcaption {{ color: #555; font-size: .85rem }} pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto }}
</style>
<h1>Latent probes</h1>
<p>{facts}</p>
{warnings}
<h2>Figures</h2>
{table}
{sections}
<h2>How it was measured</h2>
<pre>{details}</pre>
"""


def write_report(folder: Path, report: Report, pictures: Mapping[str, Mapping[str, Tensor]]) -> None:
    """FOLDER/probes.json and FOLDER/report.html. pictures: model -> label -> [3, H, W] in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probes.json", report)
    pixels = report["pixels"]
    settings = report["settings"]
    size = f"{settings['frames']} x {settings['height']} x {settings['width']}"
    page = PAGE.format(
        facts=html.escape(f"{pixels['clips']} clips of {size} (frames, height, width) from {report['source']}"),
        warnings="".join(f'<p class="warning">{html.escape(w)}</p>' for w in report["warnings"] + report["notes"]),
        table=_html_table(report),
        sections="\n".join(f"<h2>{title}</h2>\n{_png(figure)}" for title, figure in figures(report).items())
        + "\n<h2>The decoder on noise, and midway between two clips</h2>\n"
        + "\n".join(_shots(name, shots) for name, shots in pictures.items()),
        details=html.escape(json.dumps({k: v for k, v in report.items() if k not in ("models", "pixels")}, indent=2)),
    )
    with naming(folder / "report.html"):
        write_text(folder / "report.html", page)


def console_table(report: Report) -> str:
    """The figures as text, one column per model, and one of the pixels."""
    head, rows = _rows(report)
    return text_table(head, [row[:-1] for row in rows])


def _html_table(report: Report) -> str:
    head, rows = _rows(report)
    lines = [("th", [*head, "what it tells"]), *(("td", row) for row in rows)]
    cells = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """The table's head, and rows of a name, a cell per model, a cell for the pixels, and what the row tells; rows that
    no model has are left out."""
    models, pixels = report["models"], report["pixels"]
    rows = []
    for figure in [*CHANNELS, *_spectral(pixels), *STRUCTURE, *DECODER]:
        cells = [_text(figure.of(told)) for told in models.values()]
        if set(cells) != {"-"}:
            rows.append([figure.label, *cells, _text(figure.of_pixels), figure.meaning])
    return ["", *models, "pixels"], rows


class Row(NamedTuple):
    """One line of the table. of: the figure of a model. of_pixels: that of the clips themselves."""

    label: str
    of: Callable[[Told], Any]
    meaning: str
    of_pixels: float | None = None


def _spread(key: str, form: str) -> Callable[[Told], str | None]:
    return lambda m: _range(m["statistics"][key], form)


def _part(probe: str, key: str) -> Callable[[Told], Any]:
    return lambda m: (m[probe] or {}).get(key)


CHANNELS = (
    Row("latents, C x t x h x w", lambda m: " x ".join(map(str, m["latent_shape"])), "of one clip"),
    Row("strides, time x space", lambda m: "{} x {}".format(*m["strides"]), "pixels to a latent"),
    Row("mean, of all channels", _spread("mean", "+.2f"), "0 is due, in normalised latents"),
    Row("standard deviation", _spread("std", ".2f"), "of samples; 1 is due, in normalised latents"),
    Row("  of the posterior", _spread("posterior_std", ".2f"), "noise among that"),
    Row("kurtosis", _spread("kurtosis", ".1f"), "3 is Gaussian; above, rare outliers"),
    Row("KL, nats per element", lambda m: _range(m["kl"], ".2f"), "of the posterior against N(0, 1), by channel"),
    Row(
        "collapsed channels",
        lambda m: f"{len(m['collapsed'])} of {m['latent_shape'][0]}",
        f"KL below {COLLAPSED_KL:g} nats, or not {COLLAPSED_SHARE:g} of the variance is that of the mean",
    ),
)


def _spectral(pixels: Told) -> list[Row]:
    space, time = pixels["space"], pixels["time"] or {}
    steep = "how fast power falls with frequency; 0 is white noise, images have about -2 (arXiv 2502.14831)"
    return [
        Row("spectrum, slope", _part("space", "slope"), steep, space["slope"]),
        Row(
            "  power above half Nyquist",
            _part("space", "high"),
            "of white noise about 0.8; what pixels on the same grid do not have must be learnt as noise",
            space["high"],
        ),
        Row("  same, of samples", _part("space_of_samples", "high"), "with the posterior's noise: what is diffused"),
        Row(
            "  same, pixels on its grid",
            lambda m: pixels["space_at_stride"][str(m["strides"][1])]["high"],
            "of the clips, averaged down to the latents' size",
        ),
        Row("in time, slope", _part("time", "slope"), steep, time.get("slope")),
        Row("  power above half Nyquist", _part("time", "high"), "of white noise 0.5", time.get("high")),
    ]


STRUCTURE = (
    Row(
        "local correlation",
        _part("local_correlation", "mean"),
        "of channel vectors in windows of 2 x 2 x 2; SSVAE asks for 0.75 at least (arXiv 2512.05394)",
    ),
    Row(
        "participation ratio",
        lambda m: m["statistics"]["participation_ratio"],
        "channels that vary alone, from 1 to C; few large modes are easier to learn (arXiv 2512.05394)",
    ),
    Row(
        "first frame's mean",
        lambda m: m["first_against_rest"] and _range(m["first_against_rest"]["mean_gap"], "+.2f"),
        "less that of the others, in their standard deviations; far from 0, two distributions must be learnt",
    ),
    Row(
        "first frame's deviation",
        lambda m: m["first_against_rest"] and _range(m["first_against_rest"]["std_ratio"], ".2f"),
        "over that of the others; 1 is alike",
    ),
)
DECODER = (
    *(
        Row(
            f"E({tau} x), error",
            _part("encoder_equivariance", tau),
            "|E(tau x) - tau E(x)| / |E(x)|; 1.41 is unrelated",
        )
        for tau in TRANSFORMS
    ),
    Row("D(z), dB", _part("noise_psnr", "0.0"), "PSNR of the reconstruction"),
    *(
        Row(f"D({tau} z), dB", _part("decoder_equivariance_psnr", tau), "PSNR against the transformed clip")
        for tau in TRANSFORMS
    ),
    *(
        Row(f"D(z + {sigma} noise), dB", _part("noise_psnr", sigma), "PSNR; noise in standard deviations of a channel")
        for sigma in ("0.1", "0.3", "1.0")
    ),
    Row("midway, sharpness", _part("interpolation", "sharpness"), "1 as sharp as others, 0.5 is a double exposure"),
    Row("midway, MSE to cross-fade", _part("interpolation", "mse"), "0 is a cross-fade of both pictures"),
    Row("midway, LPIPS", _part("interpolation", "lpips"), "mean distance to both ends, over theirs"),
    Row("tiles, error of latents", _part("tiles", "latents"), "against whole frames"),
    Row("tiles, dB", _part("tiles", "psnr"), "reconstructions against each other"),
    Row("tiles, worst line", _part("tiles", "worst_line"), "its error over that of all; 1 is no seam"),
)


def _range(values: Sequence[float | None] | None, form: str) -> str | None:
    """From the least to the greatest."""
    known = [v for v in values or () if v is not None]
    if not known:
        return None
    low, high = (format(value, form) for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"


def _text(value: float | str | None) -> str:
    if isinstance(value, float):
        return (
            f"{value:.2f}"
            if abs(value) >= 10
            else f"{value:.3f}"
            if abs(value) >= 0.01 or not value
            else f"{value:.1e}"
        )
    return value or "-"


def figures(report: Report) -> dict[str, Figure]:
    """Title -> plot; what no model has is left out."""
    models, pixels = report["models"], report["pixels"]
    drawn = {"Spectra": _panels(2 if pixels["time"] else 1)}
    axes = drawn["Spectra"].axes
    grids = {f"pixels / {stride}": told for stride, told in pixels["space_at_stride"].items()}
    _spectra(axes[0], {name: told["space"] for name, told in models.items()}, grids, "in the plane")
    if pixels["time"]:
        frames = {"pixels, all frames": pixels["time"]}
        _spectra(axes[1], {name: told["time"] for name, told in models.items()}, frames, "in time")
    drawn["Channels"] = _panels(3)
    _channels(drawn["Channels"].axes, models)
    _legend(drawn["Channels"])
    drawn["Equivariance, and what noise costs"] = _panels(3)
    axes = drawn["Equivariance, and what noise costs"].axes
    errors = {name: list(told["encoder_equivariance"].values()) for name, told in models.items()}
    _bars(axes[0], errors, r"|E($\tau$x) - $\tau$E(x)| / |E(x)|")
    lost = {name: _lost(told) for name, told in models.items()}
    _bars(axes[1], lost, r"dB that D($\tau$z) is farther from $\tau$x than D(z) from x")
    _noise(axes[2], models)
    _legend(drawn["Equivariance, and what noise costs"])
    return drawn


def _legend(figure: Figure) -> None:
    """One for all plots, below them, where it covers nothing."""
    shown, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(shown, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)


def _lost(told: Told) -> list[float]:
    return [told["noise_psnr"]["0.0"] - psnr for psnr in told["decoder_equivariance_psnr"].values()]


def _panels(count: int) -> Figure:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    figure.subplots(1, count)
    return figure


def _spectra(axis: Axes, spectra: Mapping[str, Told | None], pixels: Mapping[str, Told], where: str) -> None:
    """Power over its mean, on logarithmic axes; of pixels broken lines."""
    for (name, told), colour in zip(spectra.items(), _colours(spectra), strict=True):
        if told and told["power"]:
            power = np.array(told["power"]) / np.mean(told["power"])
            axis.loglog(told["frequency"], power, color=colour, label=name, marker=".", markersize=4)
    for (name, told), dashes in zip(pixels.items(), cycle(("--", ":", "-.")), strict=False):
        if told["power"]:
            power = np.array(told["power"]) / np.mean(told["power"])
            axis.loglog(told["frequency"], power, dashes, color=PIXELS, label=name)
    axis.axvline(0.5, color="#bbb", linewidth=0.8)
    least = axis.get_xlim()[0]
    octaves = [octave for octave in OCTAVES if octave >= least]
    axis.set_xticks(octaves, [f"1/{round(1 / octave)}" if octave < 1 else "1" for octave in octaves])
    axis.minorticks_off()
    axis.set_xlim(least, 1.05)
    axis.set_title(f"power {where}", fontsize=10)
    axis.set_ylabel("power / its mean", fontsize=8)
    axis.set_xlabel("frequency / Nyquist", fontsize=8)
    axis.legend(fontsize=8)


def _channels(axes: Sequence[Axes], models: Mapping[str, Told]) -> None:
    """Deviations, KL and the eigenspectrum, each sorted."""
    for (name, told), colour in zip(models.items(), _colours(models), strict=True):
        modes = np.array(told["statistics"]["covariance_eigenvalues"])
        curves = (told["statistics"]["std"], told["kl"] or [], modes / (modes.sum() or 1))
        for axis, values in zip(axes, curves, strict=True):
            if len(values):
                places = range(1, len(values) + 1)
                axis.plot(places, sorted(values, reverse=True), color=colour, marker=".", label=name)
    titles = ("standard deviation", "KL, nats per element", "eigenvalue / sum")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("channel or mode, the largest first", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].axhline(1, color="#bbb", linewidth=0.8)
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    axes[2].set_yscale("log")


def _bars(axis: Axes, values: Mapping[str, list[float | None]], title: str) -> None:
    width = 0.8 / len(values)
    for place, ((name, heights), colour) in enumerate(zip(values.items(), _colours(values), strict=True)):
        at = np.arange(len(TRANSFORMS)) + (place - (len(values) - 1) / 2) * width
        axis.bar(at, [np.nan if h is None else h for h in heights], width, color=colour, label=name)
    axis.set_xticks(range(len(TRANSFORMS)), TRANSFORMS)
    axis.set_title(title, fontsize=10)


def _noise(axis: Axes, models: Mapping[str, Told]) -> None:
    for (name, told), colour in zip(models.items(), _colours(models), strict=True):
        curve = told["noise_psnr"]
        axis.plot(list(map(float, curve)), list(curve.values()), color=colour, marker=".", label=name)
    axis.set_title(r"PSNR of D(z + $\sigma \epsilon$), dB", fontsize=10)
    axis.set_xlabel(r"$\sigma$, in standard deviations of a channel", fontsize=8)


def _colours(models: Mapping[str, Any]) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(models))]


def _png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _shots(name: str, shots: Mapping[str, Tensor]) -> str:
    cells = "".join(
        f"<figure>{_picture(shot)}<figcaption>{html.escape(label)}</figcaption></figure>"
        for label, shot in shots.items()
    )
    return f"<h3>{html.escape(name)}</h3><div class='shots'>{cells}</div>"


def _picture(frame: Tensor) -> str:
    image = Image.fromarray(to_uint8(frame[:, None])[0])
    scale = Image.Resampling.NEAREST if image.width < WIDTH else Image.Resampling.LANCZOS
    file = io.BytesIO()
    image.resize((WIDTH, max(1, round(image.height * WIDTH / image.width))), scale).save(file, format="PNG")
    return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
