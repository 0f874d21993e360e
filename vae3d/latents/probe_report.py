"""Reports of latent probes, models side by side: text table, probes.json, HTML page with plots and pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from vae3d.io import write_json, write_text
from vae3d.latents.probes import MIN_KL, MIN_VARIANCE_SHARE, TRANSFORMS
from vae3d.pixels import to_uint8
from vae3d.report.html import html_table, img, png, render, subplots
from vae3d.report.images import resize_to_width
from vae3d.report.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]  # of probe_run.probe_model, or of probe_pixels
Report = Mapping[str, Any]  # settings, source, pixels, models (name -> Results), warnings, notes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for colour-blind readers
PIXEL_COLOR = "#222222"
OCTAVES = [2.0**-octave for octave in range(8, -1, -1)]  # in units of the Nyquist frequency
WIDTH = 192  # pixels of a picture in the page

PAGE = """{% extends "page.html" %}
{% block style %}
  td:first-child, th:first-child { white-space: pre }
  td:last-child, th:last-child { text-align: left; color: #555; max-width: 30rem }
  .pictures { display: flex; flex-wrap: wrap; gap: .6rem } .pictures figure { margin: 0 }
  .pictures figcaption { color: #555; font-size: .85rem }
{% endblock %}
{% block content %}
<p>{{ report.pixels.clips }} clips of {{ size }} (frames, height, width) from {{ report.source }}</p>
{% for warning in report.warnings + report.notes %}
<p class="warning">{{ warning }}</p>
{% endfor %}
<h2>Results</h2>
{{ table }}
{% for title, plot in plots.items() %}
<h2>{{ title }}</h2>
{{ plot }}
{% endfor %}
<h2>Decoded noise, and the midpoint of two clips</h2>
{% for name, shown in pictures.items() %}
<h3>{{ name }}</h3>
<div class="pictures">
{% for label, picture in shown.items() %}
<figure>{{ picture }}<figcaption>{{ label }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
<h2>How it was measured</h2>
<pre>{{ details }}</pre>
{% endblock %}
"""


def write_report(folder: Path, report: Report, pictures: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write probes.json and report.html into the folder. pictures: model -> label -> [3, H, W] in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probes.json", report)
    head, rows = _table(report)
    settings = report["settings"]
    page = render(
        PAGE,
        title="Latent probes",
        report=report,
        size=f"{settings['frames']} x {settings['height']} x {settings['width']}",
        table=html_table([*head, "meaning"], rows),
        plots={title: png(figure) for title, figure in figures(report).items()},
        pictures={
            name: {label: _picture(frame) for label, frame in frames.items()} for name, frames in pictures.items()
        },
        details=json.dumps({k: v for k, v in report.items() if k not in ("models", "pixels")}, indent=2),
    )
    write_text(folder / "report.html", page)


def console_table(report: Report) -> str:
    """The results as text: a column per model, and one for the pixels."""
    head, rows = _table(report)
    return text_table(head, [row[:-1] for row in rows])


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows: label, a cell per model, a cell for the pixels, meaning. Rows without a value are dropped."""
    models, pixels = report["models"], report["pixels"]
    rows = []
    for row in [*CHANNELS, *_spectral_rows(pixels), *STRUCTURE, *DECODER]:
        cells = [_cell(row.value(results)) for results in models.values()]
        if set(cells) != {"-"}:
            rows.append([row.label, *cells, _cell(row.of_pixels), row.meaning])
    return ["", *models, "pixels"], rows


class Row(NamedTuple):
    """A row of the table. value: results of a model -> its cell. of_pixels: the same quantity of the clips."""

    label: str
    value: Callable[[Results], Any]
    meaning: str
    of_pixels: float | None = None


def _channel_range(key: str, form: str) -> Callable[[Results], str | None]:
    return lambda m: _range(m["statistics"][key], form)


def _value(probe: str, key: str) -> Callable[[Results], Any]:
    return lambda m: (m[probe] or {}).get(key)


CHANNELS = (
    Row("latents, C x t x h x w", lambda m: " x ".join(map(str, m["latent_shape"])), "of one clip"),
    Row("strides, time x space", lambda m: "{} x {}".format(*m["strides"]), "pixels per latent"),
    Row("mean, range over channels", _channel_range("mean", "+.2f"), "normalised latents should have 0"),
    Row("standard deviation", _channel_range("std", ".2f"), "of samples; normalised latents should have 1"),
    Row("  of the posterior", _channel_range("posterior_std", ".2f"), "the noise in a sample"),
    Row("kurtosis", _channel_range("kurtosis", ".1f"), "3 is Gaussian; more means rare outliers"),
    Row("KL, nats per element", lambda m: _range(m["kl"], ".2f"), "of the posterior against N(0, 1), by channel"),
    Row(
        "collapsed channels",
        lambda m: f"{len(m['collapsed'])} of {m['latent_shape'][0]}",
        f"KL below {MIN_KL:g} nats, or posterior mean with at most {MIN_VARIANCE_SHARE:g} of the variance",
    ),
)


def _spectral_rows(pixels: Results) -> list[Row]:
    space, time = pixels["space"], pixels["time"] or {}
    slope = "of log power over log frequency; white noise has 0, images about -2 (arXiv 2502.14831)"
    return [
        Row("spectrum, slope", _value("space", "slope"), slope, space["slope"]),
        Row(
            "  power above half Nyquist",
            _value("space", "high"),
            "white noise has about 0.8; more than pixels on the same grid have is noise to the diffusion model",
            space["high"],
        ),
        Row("  same, of samples", _value("space_of_samples", "high"), "with posterior noise, as diffusion sees them"),
        Row(
            "  same, pixels on its grid",
            lambda m: pixels["space_at_stride"][str(m["strides"][1])]["high"],
            "clips, averaged down to the size of the latents",
        ),
        Row("in time, slope", _value("time", "slope"), slope, time.get("slope")),
        Row("  power above half Nyquist", _value("time", "high"), "white noise has 0.5", time.get("high")),
    ]


STRUCTURE = (
    Row(
        "local correlation",
        _value("local_correlation", "mean"),
        "of channel vectors in windows of 2 x 2 x 2; SSVAE trains for at least 0.75 (arXiv 2512.05394)",
    ),
    Row(
        "participation ratio",
        lambda m: m["statistics"]["participation_ratio"],
        "effective number of independent channels, 1 to C; few are easier to learn (arXiv 2512.05394)",
    ),
    Row(
        "first frame's mean",
        lambda m: m["first_against_rest"] and _range(m["first_against_rest"]["mean_gap"], "+.2f"),
        "minus the mean of other frames, in their standard deviations; far from 0 means two distributions to learn",
    ),
    Row(
        "first frame's deviation",
        lambda m: m["first_against_rest"] and _range(m["first_against_rest"]["std_ratio"], ".2f"),
        "divided by that of other frames; 1 is equal",
    ),
)
DECODER = (
    *(
        Row(
            f"E({tau} x), error",
            _value("encoder_equivariance", tau),
            "|E(tau x) - tau E(x)| / |E(x)|; 1.41 is unrelated",
        )
        for tau in TRANSFORMS
    ),
    Row("D(z), dB", _value("noise_psnr", "0.0"), "PSNR of the reconstruction"),
    *(
        Row(f"D({tau} z), dB", _value("decoder_equivariance_psnr", tau), "PSNR against the transformed clip")
        for tau in TRANSFORMS
    ),
    *(
        Row(f"D(z + {sigma} noise), dB", _value("noise_psnr", sigma), "PSNR; noise in standard deviations of a channel")
        for sigma in ("0.1", "0.3", "1.0")
    ),
    Row(
        "midpoint, sharpness",
        _value("interpolation", "sharpness"),
        "1 is as sharp as the ends; a double exposure has 0.5",
    ),
    Row("midpoint, MSE to cross-fade", _value("interpolation", "mse"), "0 is a cross-fade of the ends"),
    Row("midpoint, LPIPS", _value("interpolation", "lpips"), "mean distance to the ends, divided by theirs"),
    Row("tiles, error of latents", _value("tiles", "latents"), "relative to whole frames"),
    Row("tiles, dB", _value("tiles", "psnr"), "PSNR of tiled against whole reconstructions"),
    Row(
        "tiles, worst line",
        _value("tiles", "worst_line"),
        "RMSE of the worst row or column, relative to the mean; 1 is no seam",
    ),
)


def _range(values: Sequence[float | None] | None, form: str) -> str | None:
    """Minimum to maximum; None where all are undefined."""
    defined = [v for v in values or () if v is not None]
    if not defined:
        return None
    low, high = (format(value, form) for value in (min(defined), max(defined)))
    return low if low == high else f"{low} to {high}"


def _cell(value: float | str | None) -> str:
    if not isinstance(value, float):
        return value or "-"
    if abs(value) >= 10:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.01 or not value else f"{value:.1e}"


def figures(report: Report) -> dict[str, Figure]:
    """Title -> figure with its plots."""
    models, pixels = report["models"], report["pixels"]
    spectra, axes = subplots(2 if pixels["time"] else 1, columns=2, width=4.6, height=3.4)
    grids = {f"pixels / {stride}": spectrum for stride, spectrum in pixels["space_at_stride"].items()}
    _plot_spectra(axes[0], {name: results["space"] for name, results in models.items()}, grids, "power in space")
    if pixels["time"]:
        in_time = {name: results["time"] for name, results in models.items()}
        _plot_spectra(axes[1], in_time, {"pixels, all frames": pixels["time"]}, "power in time")

    channels, axes = subplots(3, columns=3, width=4.6, height=3.4)
    _plot_channels(axes, models)
    _legend(channels)

    decoder, axes = subplots(3, columns=3, width=4.6, height=3.4)
    errors = {name: list(results["encoder_equivariance"].values()) for name, results in models.items()}
    _plot_bars(axes[0], errors, r"|E($\tau$x) - $\tau$E(x)| / |E(x)|")
    losses = {
        name: [results["noise_psnr"]["0.0"] - psnr for psnr in results["decoder_equivariance_psnr"].values()]
        for name, results in models.items()
    }
    _plot_bars(axes[1], losses, r"PSNR(D(z), x) - PSNR(D($\tau$z), $\tau$x), dB")
    _plot_noise(axes[2], models)
    _legend(decoder)
    return {"Spectra": spectra, "Channels": channels, "Equivariance and robustness to noise": decoder}


def _legend(figure: Figure) -> None:
    """One legend for all plots, below them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)


def _plot_spectra(axis: Axes, spectra: Mapping[str, Results | None], pixels: Mapping[str, Results], title: str) -> None:
    """Power divided by its mean, on logarithmic axes; dashed lines for pixels."""
    for (name, spectrum), color in zip(spectra.items(), cycle(COLORS), strict=False):
        if spectrum and spectrum["power"]:
            power = np.array(spectrum["power"]) / np.mean(spectrum["power"])
            axis.loglog(spectrum["frequency"], power, color=color, label=name, marker=".", markersize=4)
    for (name, spectrum), dashes in zip(pixels.items(), cycle(("--", ":", "-.")), strict=False):
        if spectrum["power"]:
            power = np.array(spectrum["power"]) / np.mean(spectrum["power"])
            axis.loglog(spectrum["frequency"], power, dashes, color=PIXEL_COLOR, label=name)
    axis.axvline(0.5, color="#bbb", linewidth=0.8)
    lowest = axis.get_xlim()[0]
    octaves = [octave for octave in OCTAVES if octave >= lowest]
    axis.set_xticks(octaves, [f"1/{round(1 / octave)}" if octave < 1 else "1" for octave in octaves])
    axis.minorticks_off()
    axis.set_xlim(lowest, 1.05)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("power / its mean", fontsize=8)
    axis.set_xlabel("frequency / Nyquist", fontsize=8)
    axis.legend(fontsize=8)


def _plot_channels(axes: Sequence[Axes], models: Mapping[str, Results]) -> None:
    """Standard deviations, KL and covariance eigenvalues of the channels, each in descending order."""
    for (name, results), color in zip(models.items(), cycle(COLORS), strict=False):
        eigenvalues = np.array(results["statistics"]["covariance_eigenvalues"])
        curves = (results["statistics"]["std"], results["kl"] or [], eigenvalues / (eigenvalues.sum() or 1))
        for axis, values in zip(axes, curves, strict=True):
            if len(values):
                ranks = range(1, len(values) + 1)
                axis.plot(ranks, sorted(values, reverse=True), color=color, marker=".", label=name)
    titles = ("standard deviation", "KL, nats per element", "eigenvalue / sum")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("channel or eigenvalue, largest first", fontsize=8)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].axhline(1, color="#bbb", linewidth=0.8)
    for axis in axes[:2]:
        axis.set_ylim(bottom=0)
    axes[2].set_yscale("log")


def _plot_bars(axis: Axes, values: Mapping[str, list[float | None]], title: str) -> None:
    """A group of bars per transform, a bar per model."""
    width = 0.8 / len(values)
    for index, ((name, heights), color) in enumerate(zip(values.items(), cycle(COLORS), strict=False)):
        at = np.arange(len(TRANSFORMS)) + (index - (len(values) - 1) / 2) * width
        axis.bar(at, [np.nan if h is None else h for h in heights], width, color=color, label=name)
    axis.set_xticks(range(len(TRANSFORMS)), TRANSFORMS)
    axis.set_title(title, fontsize=10)


def _plot_noise(axis: Axes, models: Mapping[str, Results]) -> None:
    for (name, results), color in zip(models.items(), cycle(COLORS), strict=False):
        curve = results["noise_psnr"]
        axis.plot(list(map(float, curve)), list(curve.values()), color=color, marker=".", label=name)
    axis.set_title(r"PSNR of D(z + $\sigma \epsilon$), dB", fontsize=10)
    axis.set_xlabel(r"$\sigma$, in standard deviations of a channel", fontsize=8)


def _picture(frame: Tensor) -> str:
    return img(resize_to_width(Image.fromarray(to_uint8(frame[:, None])[0]), WIDTH))
