"""What `import vae3d` offers: models, videos, reconstruction, scores, latents. See docs/python.md."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from vae3d.data.batches.clips import read_resized, to_video
from vae3d.data.decoding.readers import open_media, open_pair
from vae3d.data.media import MediaError
from vae3d.errors import UserError
from vae3d.hub import from_pretrained, push_to_hub
from vae3d.inference.reconstruct import read_chunks
from vae3d.inference.video import VideoWriter, video_suffix
from vae3d.io import is_same_file
from vae3d.latents.codec import LatentCodec
from vae3d.loading import build, list_models, load, open_codec, save
from vae3d.metrics import MetricError, MetricSet, build_metrics
from vae3d.metrics.base import SCORED_FRAMES
from vae3d.models.interface import Stream, VideoAutoencoder
from vae3d.pixels import as_unit, check_video, no_waiting_checks, quantize_unchecked, to_uint8
from vae3d.progress import Bar
from vae3d.seeding import generator_of
from vae3d.text import plural
from vae3d.transfer import on_host, to_device

__all__ = [
    "LatentCodec",
    "Video",
    "VideoAutoencoder",
    "build",
    "from_pretrained",
    "list_models",
    "load",
    "open_codec",
    "push_to_hub",
    "read_video",
    "reconstruct",
    "save",
    "score",
    "write_video",
]

Source = str | Path


class Video(NamedTuple):
    """A video in memory. frames: [1, 3, T, H, W] in [-1, 1], or RGBA [1, 4, T, H, W]. fps: frames per second; 0 for an
    image."""

    frames: Tensor
    fps: float


def read_video(
    path: Source,
    *,
    start: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    alpha: bool = False,
) -> Video:
    """Read a video, an image or numbered images, frame by frame as it is shown.

    start, num_frames: which frames; None: to the end. height, width: resize and centre-crop; None: as the file.
    alpha: read RGBA, not premultiplied.
    Raises MediaError, also for transparent pixels (with `alpha`: for files without alpha), and UserError for a size
    that is not positive.
    """
    if (height is not None and height < 1) or (width is not None and width < 1):
        raise UserError(f"height={height} and width={width} are no size in pixels")
    with closing(open_media(path, alpha=alpha)) as reader:
        count = reader.info.num_frames
        stop = count if num_frames is None else start + num_frames
        if not 0 <= start < stop <= count:
            raise MediaError(
                str(path), f"has {plural(count, 'frame')}; start={start} and num_frames={num_frames} do not fit"
            )
        size = height or reader.info.height, width or reader.info.width
        return Video(to_video(read_resized(reader, range(start, stop), size)), reader.info.fps)


def write_video(path: Source, video: Tensor, fps: float, *, codec: str | None = None) -> None:
    """Write [1, 3, T, H, W] or [3, T, H, W] in [-1, 1] as an .mp4 file, or RGBA, of 4 channels, as an .mkv file.

    fps: frames per second, above 0. codec: h264, for viewing, or lossless, bit-exact; None: h264 for RGB, lossless for
    RGBA, the only one with alpha.
    Raises PixelError for another shape, NaN or values of 0 to 255, UserError for another codec or suffix, FileError.
    """
    _require(video, Tensor)
    clips = video if video.dim() == 5 else video[None]
    channels = _channels(clips)
    check_video(clips, channels)
    if len(clips) != 1:
        raise UserError(f"video has shape {list(video.shape)}; give one video, [1, 3, T, H, W] or [3, T, H, W]")
    with _writer(path, fps, codec, channels) as writer:
        writer.write(to_uint8(clips[0]))


def _require(video: Any, *types: type) -> None:
    """Raises UserError for what is no tensor and, where `types` has them, no file."""
    if not isinstance(video, types):
        hints = {"Video": "give its .frames", "ndarray": "give torch.from_numpy(array)"}
        kind = type(video).__name__
        raise UserError(f"{kind} is not a {' or '.join(t.__name__ for t in types)}; {hints.get(kind, 'give one')}")


def _channels(video: Tensor) -> int:
    """4 of RGBA [B, 4, T, H, W]; else 3, those that any other shape should have."""
    return 4 if video.dim() == 5 and video.shape[1] == 4 else 3


def _writer(path: Source, fps: float, codec: str | None, channels: int) -> VideoWriter:
    """Raises UserError for a file of another suffix than such videos have."""
    suffix = video_suffix(channels)
    if Path(path).suffix.lower() != suffix:
        kind = "videos with alpha" if channels == 4 else "videos"
        raise UserError(f"{path}: {kind} are written as {suffix}; give a name that ends so")
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"fps is {fps}; give frames per second, above 0")
    return VideoWriter(Path(path), fps, codec or ("lossless" if channels == 4 else "h264"))


@overload
def reconstruct(
    model: VideoAutoencoder,
    source: Tensor,
    target: None = None,
    *,
    sample: bool = False,
    seed: int = 0,
    memory_gib: float | None = None,
    progress: bool = False,
) -> Tensor: ...


@overload
def reconstruct(
    model: VideoAutoencoder,
    source: Source,
    target: Source,
    *,
    sample: bool = False,
    seed: int = 0,
    memory_gib: float | None = None,
    codec: str | None = None,
    progress: bool = False,
) -> Path: ...


@torch.inference_mode()
def reconstruct(
    model: VideoAutoencoder,
    source: Tensor | Source,
    target: Source | None = None,
    *,
    sample: bool = False,
    seed: int = 0,
    memory_gib: float | None = None,
    codec: str | None = None,
    progress: bool = False,
) -> Tensor | Path:
    """Encode and decode a video of any length, chunk by chunk; the memory does not grow with the length of a file.

    source: [B, 3, T, H, W] in [-1, 1], which returns as much in [-1, 1] on the CPU; or a file, whose reconstruction is
    written to `target`: of a model of four channels RGBA, as .mkv. sample: sample the latents, instead of taking their
    mode. memory_gib: see VideoAutoencoder.stream. codec: see write_video. progress: show a bar.
    Raises MediaError, PixelError, FileError, and UserError for a file without target or as its own target, a tensor
    with one, and as write_video does.
    """
    _require(source, Tensor, str, os.PathLike)
    device = next(model.parameters()).device

    @torch.inference_mode()
    def code(stream: Stream, chunks: Iterable[Tensor], frames: int) -> Iterator[Tensor]:
        """Reconstructions of the chunks, which are given with their lookahead."""
        with Bar(total=frames, unit="frame", disable=not progress) as bar:
            for index, chunk in enumerate(chunks):
                video = to_device(chunk, device)
                with no_waiting_checks(device):
                    out = stream(video, sample=sample, generator=generator_of(seed, index, device=device))
                bar.update(out.video.shape[2])
                yield out.video.clamp(-1, 1)

    if isinstance(source, Tensor):
        if target is not None:
            raise UserError(f"{target}: is written of a file only; write what a tensor returns with write_video")
        check_video(source, model.pixel_channels)
        frames, height, width = source.shape[2:]
        stream = model.stream(height, width, memory_gib)
        lengths = stream.chunks(frames)
        chunks = (
            source[:, :, end - n : end + stream.lookahead] for n, end in zip(lengths, accumulate(lengths), strict=True)
        )
        return torch.cat([video.clone() for video in on_host(code(stream, chunks, frames), device)], 2)
    if target is None:
        raise UserError(f"{source}: give the file to write, as in reconstruct(model, {str(source)!r}, 'out.mp4')")
    if is_same_file(source, target):
        raise UserError(f"{target} is the source, and would be replaced; give the reconstruction another name")
    channels = model.pixel_channels
    if channels not in (3, 4):
        raise UserError(f"the model takes {channels} channels of pixels, and files have 3 or 4; give a tensor")
    with closing(open_media(source, alpha=channels == 4)) as reader:
        info = reader.info
        if not info.fps:
            raise MediaError(str(source), "is an image; read it with read_video and reconstruct its tensor")
        stream = model.stream(info.height, info.width, memory_gib)
        read = read_chunks(reader, range(info.num_frames), (info.height, info.width), stream)
        with _writer(target, info.fps, codec, channels) as writer:
            videos = code(stream, (to_video(frames, device) for frames, _ in read), info.num_frames)
            for quantized in on_host((quantize_unchecked(video[0]) for video in videos), device):
                writer.write(quantized.numpy())
    return Path(target)


def score(
    reference: Tensor | Source,
    reconstruction: Tensor | Source,
    metrics: str | Sequence[str] | MetricSet = ("psnr", "ssim"),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float | None]:
    """Scores of a reconstruction: column -> mean over frames and clips; None where undefined.

    reference, reconstruction: both [B, 3, T, H, W] in [-1, 1], or both files. RGBA, of 4 channels or of files that both
    have alpha, is scored as MetricSet.update says. metrics: names, see docs/score.md; or
    what vae3d.metrics.build_metrics returns, which keeps its networks from one call to the next.
    Raises MetricError for unknown metrics and videos that do not fit together, PixelError, WeightsMissing, MediaError.
    """
    for video in (reference, reconstruction):
        _require(video, Tensor, str, os.PathLike)
    names = [metrics] if isinstance(metrics, str) else metrics
    metric_set = names if isinstance(names, MetricSet) else build_metrics(list(names), device)
    if isinstance(reference, Tensor) and isinstance(reconstruction, Tensor):
        check_video(reference, _channels(reference))
        check_video(reconstruction, _channels(reconstruction), values=False)  # of a model that may be far off
        if reference.shape != reconstruction.shape:
            raise MetricError(f"the videos differ in shape: {list(reference.shape)} and {list(reconstruction.shape)}")
        results = []
        for clips in zip(reference, reconstruction, strict=True):
            parts = zip(*(clip.split(SCORED_FRAMES, 1) for clip in clips), strict=True)
            results.append(metric_set.score((_unit(a, device), _unit(b, device)) for a, b in parts))
        return metric_set.aggregate(results)
    if isinstance(reference, Tensor) or isinstance(reconstruction, Tensor):
        raise UserError("give two tensors or two files")
    ref, rec = open_pair(reference, reconstruction)
    with closing(ref), closing(rec):
        if ref.info.num_frames != rec.info.num_frames:
            raise UserError(
                f"{reference} has {plural(ref.info.num_frames, 'frame')} and {reconstruction} has {rec.info.num_frames}"
            )
        indices = range(ref.info.num_frames)
        chunks = (indices[start : start + SCORED_FRAMES] for start in indices[::SCORED_FRAMES])
        pairs = ((read_resized(ref, chunk), read_resized(rec, chunk)) for chunk in chunks)
        return metric_set.aggregate([metric_set.score((as_unit(a, device), as_unit(b, device)) for a, b in pairs)])


def _unit(clip: Tensor, device: torch.device | str) -> Tensor:
    """[C, T, H, W] in [-1, 1] -> [T, C, H, W] in [0, 1]."""
    return (clip.transpose(0, 1).to(device).float() / 2 + 0.5).clamp(0, 1)
