"""Reports of latent probes, models side by side: text table, probes.json, page with plots and pictures."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from vae3d.arguments import flatten
from vae3d.io import write_json
from vae3d.latents import probes
from vae3d.latents.probes import TRANSFORMS
from vae3d.pixels import to_uint8
from vae3d.report import page, text_table
from vae3d.report.html import img, png, resize_to_width, subplots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Results = Mapping[str, Any]  # of probe_run.probe_model, or of probe_pixels
Report = Mapping[str, Any]  # settings, source, pixels, models (name -> Results), warnings, notes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for colour-blind readers
PIXEL_COLOR = "#222222"
OCTAVES = [2.0**-octave for octave in range(8, -1, -1)]  # in units of the Nyquist frequency
STYLE = {"axes.titlesize": 10, "axes.labelsize": 8, "legend.fontsize": 8}
WIDTH = 192  # pixels of a picture in the page

ROWS = Path(__file__).with_name("probe_rows.csv")  # of the table; key: of the results, flat


def write_report(folder: Path, report: Report, pictures: Mapping[str, Mapping[str, Tensor]], command: str = "") -> None:
    """Write probes.json and the page into the folder. pictures: model -> label -> [3, H, W] in [-1, 1]."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "probes.json", report)
    head, rows = _table(report)
    settings = report["settings"]
    size = f"{settings['frames']} x {settings['height']} x {settings['width']}"
    shared = {key: value for key, value in report.items() if key not in ("models", "pixels", "warnings", "notes")}
    chapters = [
        page.Chapter("Results", tables=[page.Table("Probes", [*head, "meaning"], rows)]),
        page.Chapter("Plots", pictures=[page.Picture(title, png(figure)) for title, figure in figures(report).items()]),
        *(
            page.Chapter(
                f"Decoded by {name}",
                "Noise, and the midpoint of two clips.",
                pictures=[page.Picture(label, _picture(frame)) for label, frame in frames.items()],
            )
            for name, frames in pictures.items()
        ),
    ]
    page.write_page(
        folder,
        page.Report(
            "Latent probes",
            chapters,
            f"{report['pixels']['clips']} clips of {size} (frames, height, width) from {report['source']}",
            facts={name: str(value) for name, value in flatten(shared).items() if value is not None},
            commands=command,
            links={"probes.json": "probes.json"},
            warnings=[*report["warnings"], *report["notes"]],
        ),
    )


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
    import matplotlib  # slow to import

    with matplotlib.rc_context(STYLE):
        return {
            "Spectra": _spectra(report["models"], report["pixels"]),
            "Channels": _channels(report["models"]),
            "Equivariance and robustness to noise": _decoder(report["models"]),
        }


def _colored(models: Mapping[str, Results]) -> Iterator[tuple[str, Results, str]]:
    for (name, results), color in zip(models.items(), cycle(COLORS), strict=False):
        yield name, results, color


def _spectra(models: Mapping[str, Results], pixels: Results) -> Figure:
    """Power divided by its mean, on logarithmic axes; dashed lines for pixels."""
    references = {"space": {f"pixels / {stride}": spectrum for stride, spectrum in pixels["space_at_stride"].items()}}
    if pixels["time"]:
        references["time"] = {"pixels, all frames": pixels["time"]}
    figure, axes = subplots(len(references), columns=2, width=4.6, height=3.4)
    for axis, (kind, of_pixels) in zip(axes, references.items(), strict=True):
        for name, results, color in _colored(models):
            _plot_power(axis, results[kind], color=color, label=name, marker=".", markersize=4)
        for (name, spectrum), dashes in zip(of_pixels.items(), cycle(("--", ":", "-.")), strict=False):
            _plot_power(axis, spectrum, color=PIXEL_COLOR, label=name, linestyle=dashes)
        axis.axvline(0.5, color="#bbb", linewidth=0.8)
        lowest = axis.get_xlim()[0]
        octaves = [octave for octave in OCTAVES if octave >= lowest]
        axis.set_xticks(octaves, [f"1/{round(1 / octave)}" if octave < 1 else "1" for octave in octaves])
        axis.minorticks_off()
        axis.set_xlim(lowest, 1.05)
        axis.set(title=f"power in {kind}", ylabel="power / its mean", xlabel="frequency / Nyquist")
        axis.legend()
    return figure


def _plot_power(axis: Axes, spectrum: Results | None, **style: Any) -> None:
    if spectrum and spectrum["power"]:
        axis.loglog(spectrum["frequency"], np.array(spectrum["power"]) / np.mean(spectrum["power"]), **style)


def _channels(models: Mapping[str, Results]) -> Figure:
    """Standard deviations, KL and covariance eigenvalues of the channels, each in descending order. Without KL if no
    model has a posterior."""
    statistics = {name: results["statistics"] for name, results in models.items()}
    sums = {name: sum(own["covariance_eigenvalues"]) or 1 for name, own in statistics.items()}
    curves = {
        "standard deviation": {name: own["std"] for name, own in statistics.items()},
        "KL, nats per element": {name: results["kl"] for name, results in models.items() if results["kl"]},
        "eigenvalue / sum": {
            name: np.array(own["covariance_eigenvalues"]) / sums[name] for name, own in statistics.items()
        },
    }
    titles = [title for title, by_model in curves.items() if by_model]
    figure, axes = subplots(len(titles), columns=3, width=4.6, height=3.4)
    for axis, title in zip(axes, titles, strict=True):
        for name, _, color in _colored(models):
            if name in curves[title]:
                values = sorted(curves[title][name], reverse=True)
                axis.plot(range(1, len(values) + 1), values, color=color, marker=".", label=name)
        axis.set(title=title, xlabel="channel or eigenvalue, largest first")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].axhline(1, color="#bbb", linewidth=0.8)
    for axis in axes[:-1]:
        axis.set_ylim(bottom=0)
    axes[-1].set_yscale("log")
    _legend(figure)
    return figure


def _decoder(models: Mapping[str, Results]) -> Figure:
    """Bars by transform: errors of the encoder, and decibels that the decoder loses; and PSNR over noise."""
    figure, axes = subplots(3, columns=3, width=4.6, height=3.4)
    width = 0.8 / len(models)
    for index, (name, results, color) in enumerate(_colored(models)):
        at = np.arange(len(TRANSFORMS)) + (index - (len(models) - 1) / 2) * width
        curve = results["noise_psnr"]
        errors = np.array([*results["encoder_equivariance"].values()], float)  # NaN for None
        losses = [curve["0.0"] - psnr for psnr in results["decoder_equivariance_psnr"].values()]
        axes[0].bar(at, errors, width, color=color, label=name)
        axes[1].bar(at, losses, width, color=color, label=name)
        axes[2].plot(list(map(float, curve)), list(curve.values()), color=color, marker=".", label=name)
    for axis in axes[:2]:
        axis.set_xticks(range(len(TRANSFORMS)), TRANSFORMS)
    axes[0].set(title=r"|E($\tau$x) - $\tau$E(x)| / |E(x)|")
    axes[1].set(title=r"PSNR(D(z), x) - PSNR(D($\tau$z), $\tau$x), dB")
    axes[2].set(title=r"PSNR of D(z + $\sigma \epsilon$), dB", xlabel=r"$\sigma$, in standard deviations of a channel")
    _legend(figure)
    return figure


def _legend(figure: Figure) -> None:
    """One legend for all plots, below them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)


def _picture(frame: Tensor) -> Markup:
    return img(resize_to_width(Image.fromarray(to_uint8(frame[:, None])[0]), WIDTH))
