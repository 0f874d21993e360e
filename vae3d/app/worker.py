"""The process of the page that opens files and runs the models. One request at a time; see process.Worker.

The clip and the latents of the last job are kept, so that other noise on the latents needs the decoder alone.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from torch import Tensor

from vae3d import api
from vae3d.app.settings import LESS_MEMORY, READING, Limits, Settings, check_pixels
from vae3d.commands.try_video import default_checkpoint, default_metrics, reduced_size, score
from vae3d.data.batches.clips import read_resized, to_video
from vae3d.data.decoding.images import IMAGE_SUFFIXES
from vae3d.data.decoding.readers import VIDEO_SUFFIXES, open_media
from vae3d.data.media import MediaError, MediaInfo
from vae3d.data.table.versions import source_version
from vae3d.errors import UserError
from vae3d.evaluation.page import page_metrics
from vae3d.inference.video import VideoWriter, video_suffix, write_image
from vae3d.io import is_disk_error
from vae3d.loading import require_file_channels
from vae3d.metrics import MetricSet
from vae3d.metrics.base import frame_curves
from vae3d.models.interface import VideoAutoencoder
from vae3d.models.opensora import OpenSoraVAE
from vae3d.models.streaming import IndependentChunks
from vae3d.pixels import displayable, to_uint8
from vae3d.precision import as_device
from vae3d.report.clip import ORIGINAL
from vae3d.report.page import PAGE, Chapter, Report, Video, encode_clip, write_clip, write_page
from vae3d.seeding import generator_of, randn_like
from vae3d.text import plural
from vae3d.training.memory import first_line, free_cache, is_out_of_memory

CHUNK = 8  # frames that are read at once
LATENT_HEIGHT = 144  # pixels of a picture of a channel, about
SPREAD = 3.0  # standard deviations of a channel from its mean to black or white
DIVERGING = "coolwarm"


def serve(
    connection: Connection,
    checkpoints: Sequence[str],
    device: str | None,
    tiles: tuple[int | None, int | None],
    folder: str,
    limits: Mapping[str, Any],
) -> None:
    """Answer requests until the server is gone; then delete its folder, which it does itself unless it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def send(**message: Any) -> None:
        connection.send_bytes(json.dumps(message, allow_nan=False).encode())

    def progress(stage: str, fraction: float, text: str) -> None:
        send(stage=stage, fraction=fraction, text=text)

    runner = Runner(checkpoints, device, tiles, Limits(**limits), progress)
    try:
        while True:
            message = _answer(runner, json.loads(connection.recv_bytes()))
            if "error" in message:
                free_cache()  # not while the error is handled, whose traceback holds tensors
            send(**message)
    except (EOFError, ConnectionError):
        shutil.rmtree(folder, ignore_errors=True)


def _answer(runner: Runner, request: Mapping[str, Any]) -> dict[str, Any]:
    """{"answer": ...}, or {"error": what went wrong}. Other errors end the process, with their traceback in the
    terminal."""
    try:
        return {"answer": runner.describe() if request["do"] == "describe" else runner.run(request)}
    except UserError as error:
        return {"error": str(error)}
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            runner.forget()
            return {"error": f"out of memory; {LESS_MEMORY} ({first_line(error)[:200]})"}
        if is_disk_error(error):
            return {"error": f"the result cannot be written: {getattr(error, 'strerror', None) or first_line(error)}"}
        raise


class Runner:
    """Models, the last clip, and its latents. progress: (stage, fraction, text)."""

    def __init__(
        self,
        checkpoints: Sequence[str],
        device: str | None,
        tiles: tuple[int | None, int | None],
        limits: Limits,
        progress: Callable[[str, float, str], None],
    ) -> None:
        self.checkpoints, self.tiles, self.limits, self.progress = checkpoints, tiles, limits, progress
        self.device_name = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.names = unique_names([short_name(name) for name in checkpoints] or ["TAEF2"], taken=[ORIGINAL])
        self.models: dict[int, VideoAutoencoder] = {}
        self.metrics: MetricSet | None = None
        self.forget()

    def forget(self) -> None:
        """Drop the last clip and what was computed of it."""
        self.clip: Clip | None = None
        self.coded: dict[int, Coded] = {}

    def describe(self) -> dict[str, Any]:
        """Load all models. Returns facts of each, and the suffixes of files that can be read. Raises UserError."""
        found = []
        for index, name in enumerate(self.names):
            model = self.model(index)
            spec = model.spec
            parameters = sum(p.numel() for p in model.parameters()) / 1e6
            text = (
                f"{type(model).__name__}, {parameters:.1f} M parameters; latents of {plural(spec.channels, 'channel')}"
            )
            text += f", 1/{spec.space_stride} of the size"
            text += f" and 1/{spec.time_stride} of the frames" if spec.time_stride > 1 else ""
            text += "" if model.tiling is None else f"; coded in {model.tiling}"
            found.append({"name": name, "facts": text})
        suffixes = [*VIDEO_SUFFIXES, *IMAGE_SUFFIXES]
        return {"checkpoints": found, "suffixes": suffixes, "device": str(self.device())}

    def device(self) -> torch.device:
        return as_device(self.device_name)

    def model(self, index: int) -> VideoAutoencoder:
        if index not in self.models:
            path = self.checkpoints[index] if self.checkpoints else default_checkpoint()
            model = api.from_pretrained(path).to(self.device())
            require_file_channels(model, path)
            try:
                model.set_tiles(*self.tiles)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            self.models[index] = model.requires_grad_(False)
        return self.models[index]

    @torch.inference_mode()
    def run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Reconstruct, score, and write the page into a folder. Returns its files and facts. Raises UserError."""
        settings = Settings(**{**request["settings"], "checkpoints": tuple(request["settings"]["checkpoints"])})
        out, name = Path(request["folder"]), request["name"]
        models = {index: self.model(index) for index in settings.checkpoints}
        if len({model.pixel_channels for model in models.values()}) > 1:
            raise UserError("some of the checkpoints take RGBA and some RGB; choose one kind")
        alpha = next(iter(models.values())).pixel_channels == 4
        clip = self._read(Path(request["path"]), name, settings, alpha)
        panels: dict[str, np.ndarray] = {}
        latents: dict[str, tuple[VideoAutoencoder, Tensor]] = {}
        facts: dict[str, str] = {}
        for place, (index, model) in enumerate(models.items()):
            span = 0.2 + 0.6 * place / len(models), 0.6 / len(models)
            label = self.names[index]

            def report(doing: str, done: int, label: str = label, span: tuple[float, float] = span) -> None:
                text = f"{doing} with {label}: frame {done} of {len(clip.frames)}"
                self.progress("reconstructing", span[0] + span[1] * done / len(clip.frames), text)

            if index not in self.coded:
                self.coded[index] = code(model, clip, partial(report, "encoding and decoding"))
            coded = self.coded[index]
            z = coded.z
            if settings.beside or not settings.noise:
                panels[label] = coded.frames
            if settings.noise:
                z = with_noise(z, settings.noise)
                frames = decode(model, z, clip, partial(report, "decoding noisy latents"))
                panels[noisy_name(label, settings)] = frames
            latents[label] = model, z
            facts[label] = coded.facts
        return self._write(out, name, settings, clip, panels, latents, facts)

    def _read(self, path: Path, name: str, settings: Settings, alpha: bool) -> Clip:
        """The frames of the settings, at their size: those of the last job, if they are the same."""
        key = (path, settings.start, settings.frames, settings.height, alpha, source_version(str(path)))
        if self.clip is not None and self.clip.key == key:
            return self.clip
        self.forget()
        self.progress(READING, 0.0, "opening the file")
        try:
            with closing(open_media(path, alpha=alpha)) as reader:
                info = reader.info
                indices = range(settings.start, min(settings.start + settings.frames, info.num_frames))
                if not indices:
                    raise MediaError(
                        path, f"has {plural(info.num_frames, 'frame')}, so none from frame {settings.start} on"
                    )
                size = reduced_size(info, settings.height)
                check_pixels(len(indices), *size, self.limits)
                chunks = []
                for start in range(0, len(indices), CHUNK):
                    done = f"frame {start} of {len(indices)}"
                    self.progress(READING, 0.2 * start / len(indices), f"reading {done}")
                    chunks.append(read_resized(reader, indices[start : start + CHUNK], size))
        except MediaError as error:  # the path is of the server, and the name is what the user knows
            raise UserError(f"{name}: {error.reason_for(str(path))}") from None
        self.clip = Clip(key, np.concatenate(chunks), info, settings.start)
        return self.clip

    def _write(
        self,
        out: Path,
        name: str,
        settings: Settings,
        clip: Clip,
        panels: Mapping[str, np.ndarray],
        latents: Mapping[str, tuple[VideoAutoencoder, Tensor]],
        facts: Mapping[str, str],
    ) -> dict[str, Any]:
        fps, device = clip.info.fps, self.device()
        self.progress("writing", 0.82, "scoring")
        self.metrics = self.metrics or default_metrics(device)
        results = {label: score(self.metrics, clip.frames, frames, device) for label, frames in panels.items()}
        scored, columns, left_out = next(iter(results.values()))
        metrics = page_metrics({key: columns[key] for key, one in scored.items() if one.value is not None})
        found = {label: one for label, (one, *_) in results.items()}
        curves = {label: frame_curves(one) for label, one in found.items()}
        scores = {label: {key: one[key].value for key in metrics} for label, one in found.items()}

        self.progress("writing", 0.9, "writing the page")
        shown = {label: [displayable(frames)] for label, frames in panels.items()}
        write_clip(out, "video", encode_clip([displayable(clip.frames)], shown, fps), curves)
        exact = {ORIGINAL: clip.frames, **panels}
        stems = unique_names([file_stem(label) for label in exact], "-{}")
        files = {
            label: write_exact(out, stem, frames, fps)
            for stem, (label, frames) in zip(stems, exact.items(), strict=True)
        }
        rows = [Video("video", name, scores, clip.facts())]
        if settings.latents != "none":
            self.progress("writing", 0.95, "writing the latents")
            rows += self._latents(out, settings, clip, latents)
        chapter = Chapter("", reconstructions=list(panels), metrics=metrics, videos=rows)
        if settings.noise:
            facts = {"noise": f"{settings.noise:g} standard deviations of the latents", **facts}
        title = f"{name} through {', '.join(latents)}"
        about = {**clip.facts(), **facts, "device": str(device)}
        about |= {f"without {metric}": reason for metric, reason in left_out.items()}
        page = Report(title, [chapter], facts=about)
        write_page(out, page, single=True)
        return {"title": title, "page": PAGE, "files": files, "facts": facts, "scores": scores}

    def _latents(
        self, out: Path, settings: Settings, clip: Clip, latents: Mapping[str, tuple[VideoAutoencoder, Tensor]]
    ) -> list[Video]:
        """A clip for each checkpoint: the original, small, and a picture of each channel."""
        low, middle, high = ("blue", "white", "red") if settings.latents == "colours" else ("black", "grey", "white")
        scale = f"{low} to {high}: {SPREAD:g} standard deviations below and above the channel's mean, which is {middle}"
        rows = []
        for number, (name, (model, z)) in enumerate(latents.items()):
            pictures = channel_pictures(model, z, len(clip.frames), settings.latents == "colours")
            height, width = next(iter(pictures.values())).shape[1:3]
            small = np.stack(
                [cv2.resize(f, (width, height), interpolation=cv2.INTER_AREA) for f in displayable(clip.frames)]
            )
            others = {label: [frames] for label, frames in pictures.items()}
            write_clip(out, f"latents-{number}", encode_clip([small], {}, clip.info.fps, others))
            shape = " x ".join(map(str, z.shape[1:]))
            facts = {"latents": f"{shape} (channels, frames, height, width)", "colours": scale}
            rows.append(Video(f"latents-{number}", f"latents of {name}", facts=facts))
        return rows


@dataclass(frozen=True)
class Clip:
    """The frames that are reconstructed, [T, H, W, 3 or 4] uint8. key: of what was read. info: of the file. start:
    index of the first frame in it."""

    key: tuple[Any, ...]
    frames: np.ndarray
    info: MediaInfo
    start: int = 0

    def facts(self) -> dict[str, str]:
        frames, height, width = self.frames.shape[:3]
        size = f"{width} x {height}"
        if (height, width) != (self.info.height, self.info.width):
            size += f", reduced from {self.info.width} x {self.info.height}"
        if not self.info.fps:
            return {"image": size}
        part = plural(frames, "frame")
        if frames != self.info.num_frames:
            part = f"frames {self.start} to {self.start + frames - 1} of {self.info.num_frames}"
        return {"video": f"{part}, {size}, {self.info.fps:g} frames per second, {self.info.codec}"}


@dataclass(frozen=True)
class Coded:
    """Raw latents [1, C, t, h, w], their reconstruction [T, H, W, 3 or 4] uint8, and facts of it."""

    z: Tensor
    frames: np.ndarray
    facts: str


def code(model: VideoAutoencoder, clip: Clip, report: Callable[[int], None]) -> Coded:
    """Encode and decode a clip in the chunks of the model's stream."""
    frames, height, width = clip.frames.shape[:3]
    device = next(model.parameters()).device
    stream = model.stream(height, width)
    model.fit_chunks(height, width)
    lengths = stream.chunks(frames)
    parts, latents = [], []
    report(0)
    start = time.perf_counter()
    for length, end in zip(lengths, accumulate(lengths), strict=True):
        chunk = clip.frames[end - length : end + stream.lookahead]
        rec = stream(to_video(chunk, device))
        parts.append(to_uint8(rec.video[0], start=end - length))
        latents.append(rec.z)
        report(end)
    seconds = time.perf_counter() - start
    z = torch.cat(latents, 2)
    shape = " x ".join(map(str, z.shape[2:]))
    ratio = clip.frames.size / z.numel()
    speed = f"{frames / seconds:.1f} frames per second, encoding and decoding"
    return Coded(
        z,
        np.concatenate(parts),
        f"{plural(z.shape[1], 'channel')} of {shape}, {ratio:.1f} times fewer numbers; {speed}",
    )


def with_noise(z: Tensor, noise: float) -> Tensor:
    """z + noise * std(z) * eps, the same eps each time, so that the slider changes its strength alone.

    std(z) is over all channels, as that of stage.latent_noise (models.interface.add_latent_noise).
    """
    return z + noise * z.float().std(correction=0) * randn_like(z, generator_of(0, device=z.device))


def decode(model: VideoAutoencoder, z: Tensor, clip: Clip, report: Callable[[int], None]) -> np.ndarray:
    """[T, H, W, 3 or 4] uint8 of raw latents. report: called with the number of decoded frames."""
    frames, height, width = clip.frames.shape[:3]
    stream = model.stream(height, width)
    lengths = stream.chunks(frames) if isinstance(stream, IndependentChunks) else [frames]
    latents = z.split([model.latent_frames(length) for length in lengths], 2)
    parts = []
    for length, part in zip(lengths, latents, strict=True):
        report(sum(map(len, parts)))
        parts.append(to_uint8(model.decode(part, length)[0, ..., :height, :width]))
    return np.concatenate(parts)


def channel_pictures(model: VideoAutoencoder, z: Tensor, frames: int, colours: bool) -> dict[str, np.ndarray]:
    """A picture of each channel, [T, H', W', 3] uint8, each latent as a square of pixels.

    Black or blue is SPREAD standard deviations below the channel's mean over the clip, white or red above it.
    """
    values = z[0].float().cpu().numpy()  # [C, t, h, w]
    mean, std = (fold(values, (1, 2, 3), keepdims=True) for fold in (np.mean, np.std))
    grey = np.rint(((values - mean) / (SPREAD * np.maximum(std, 1e-8)) + 1).clip(0, 2) * 127.5).astype(np.uint8)
    times = max(1, round(LATENT_HEIGHT / grey.shape[2]))
    of_frame = [latent_of_frame(model, frame, frames) for frame in range(frames)]
    table = (
        matplotlib.colormaps[DIVERGING](np.arange(256), bytes=True)[:, :3]
        if colours
        else np.arange(256)[:, None].repeat(3, 1)
    )
    enlarged = grey[:, of_frame].repeat(times, 2).repeat(times, 3)
    return {f"channel {index}": table.astype(np.uint8)[picture] for index, picture in enumerate(enlarged)}


def latent_of_frame(model: VideoAutoencoder, frame: int, frames: int) -> int:
    """Index of the latent that stands for a frame of a clip: the last one of a clip that ends with it. OpenSoraVAE
    extends clips at their beginning: there it is the first one of a clip that begins with it."""
    if isinstance(model, OpenSoraVAE):
        return model.latent_frames(frames) - model.latent_frames(frames - frame)
    return model.latent_frames(frame + 1) - 1


def file_stem(label: str) -> str:
    return label if label == ORIGINAL else f"reconstruction_{re.sub(r'[^A-Za-z0-9.-]+', '-', label).strip('.-')}"


def write_exact(out: Path, stem: str, frames: np.ndarray, fps: float) -> str:
    """Write frames without loss, and return the name of the file."""
    if not fps:
        write_image(out / f"{stem}.png", frames[0])
        return f"{stem}.png"
    file = f"{stem}{video_suffix(frames.shape[-1])}"
    with VideoWriter(out / file, fps, "lossless") as writer:
        writer.write(frames)
    return file


def noisy_name(label: str, settings: Settings) -> str:
    """Of the reconstruction with noise: the plain name where there is no other, so that the view of it stays."""
    return f"{label}, noise" if settings.beside else label


def short_name(checkpoint: str) -> str:
    """The last part of a path or of owner/name, without the suffix of a file of weights."""
    return re.sub(r"\.(pth|pt|ckpt|bin|safetensors)$", "", checkpoint.rstrip("/").rpartition("/")[2])


def unique_names(names: Sequence[str], number: str = " ({})", taken: Sequence[str] = ()) -> list[str]:
    """The names, those that occur twice, or are taken, with a number."""
    found: list[str] = []
    for name in names:
        label, count = name, 1
        while label in (*found, *taken):
            count += 1
            label = name + number.format(count)
        found.append(label)
    return found
