"""Reports of latent probes, models side by side: text table, probes.json, HTML page with plots and pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from vae3d.arguments import flatten
from vae3d.evaluation.tables import write_json
from vae3d.io import naming, write_text
from vae3d.latents import probes
from vae3d.latents.probes import TRANSFORMS
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

PAGE = Path(__file__).with_name("probe_report.html")
ROWS = Path(__file__).with_name("probe_rows.csv")  # of the table; key: of the results, flat


def write_report(folder: Path, report: Report, pictures: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write probes.json and report.html into the folder. pictures: model -> label -> [3, H, W] in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probes.json", report)
    head, rows = _table(report)
    settings = report["settings"]
    page = render(
        PAGE.read_text(),
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
    with naming(folder / "report.html"):
        write_text(folder / "report.html", page)


def console_table(report: Report) -> str:
    """The results as text: a column per model, and one for the pixels."""
    head, rows = _table(report)
    return text_table(head, [row[:-1] for row in rows])


def _table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows: label, a cell per model, a cell for the pixels, meaning. Rows without a value are dropped."""
    pixels = flatten(report["pixels"])
    models = [_flat(results, report["pixels"]) for results in report["models"].values()]
    rows = []
    with ROWS.open(newline="") as file:
        for row in csv.DictReader(file):
            cells = [_cell(values.get(row["key"]), row["format"]) for values in (*models, pixels)]
            if set(cells[:-1]) != {"-"}:
                rows.append([row["label"], *cells, row["meaning"].format_map(vars(probes))])
    return ["", *report["models"], "pixels"], rows


def _flat(results: Results, pixels: Results) -> dict[str, Any]:
    """The results of a model, and what the table shows of them, as {"statistics.mean": [...], ...}."""
    shape, strides = results["latent_shape"], results["strides"]
    return flatten(results) | {
        "shape": " x ".join(map(str, shape)),
        "strides_of_both": " x ".join(map(str, strides)),
        "num_collapsed": f"{len(results['collapsed'])} of {shape[0]}",
        "pixels_on_its_grid": pixels["space_at_stride"][str(strides[1])]["high"],
    }


def _cell(value: float | str | list[float | None] | None, form: str) -> str:
    """A list becomes its minimum and maximum, in the format `form`."""
    if isinstance(value, list):
        defined = [v for v in value if v is not None]
        ends = [format(v, form) for v in (min(defined), max(defined))] if defined else ["-"]
        return " to ".join(dict.fromkeys(ends))
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
