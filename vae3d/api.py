"""What `import vae3d` offers: models, videos, reconstruction, scores, latents. See docs/python.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, overload

import torch
from torch import Tensor

from vae3d.config.schema import CONF
from vae3d.data.clips import read_resized, to_video
from vae3d.data.media import MediaError
from vae3d.data.readers import open_media
from vae3d.errors import UserError
from vae3d.hub import from_pretrained, push_to_hub
from vae3d.inference.video import VideoWriter
from vae3d.latents.codec import LatentCodec
from vae3d.loading import build, load, open_codec, save
from vae3d.metrics import build_metrics
from vae3d.models.interface import VideoAutoencoder
from vae3d.pixels import as_unit, to_uint8
from vae3d.seeding import generator_of

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
FRAMES = 16  # of a file that are scored at once


class Video(NamedTuple):
    """A video in memory. frames: [1, 3, T, H, W] in [-1, 1]. fps: frames per second; 0 for an image."""

    frames: Tensor
    fps: float


def list_models() -> list[str]:
    """Names that `build` takes."""
    return sorted(file.stem for file in (CONF / "model").glob("*.yaml"))


def read_video(
    path: Source,
    *,
    start: int = 0,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Video:
    """Read a video, an image or numbered images, frame by frame as it is shown.

    start, num_frames: which frames; None: to the end. height, width: resize and centre-crop; None: as the file.
    Raises MediaError.
    """
    with closing(open_media(path)) as reader:
        count = reader.info.num_frames
        stop = count if num_frames is None else start + num_frames
        if not 0 <= start < stop <= count:
            raise MediaError(str(path), f"has {count} frames; start={start} and num_frames={num_frames} do not fit")
        size = height or reader.info.height, width or reader.info.width
        return Video(to_video(read_resized(reader, range(start, stop), size)), reader.info.fps)


def write_video(path: Source, video: Tensor, fps: float, *, codec: str = "h264") -> None:
    """Write [1, 3, T, H, W] or [3, T, H, W] in [-1, 1] as an .mp4 file.

    codec: h264, for viewing, or lossless, bit-exact RGB. Raises UserError for another shape, NaN or another codec.
    """
    frames = video[0] if video.dim() == 5 and len(video) == 1 else video
    if frames.dim() != 4 or len(frames) != 3:
        raise UserError(f"video has shape {list(video.shape)}; give one video, [1, 3, T, H, W] or [3, T, H, W]")
    with VideoWriter(Path(path), fps, codec) as writer:
        writer.write(to_uint8(frames))


@overload
def reconstruct(
    model: VideoAutoencoder,
    source: Tensor,
    target: None = None,
    *,
    sample: bool = False,
    seed: int = 0,
    memory_gib: float | None = None,
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
    codec: str = "h264",
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
    codec: str = "h264",
) -> Tensor | Path:
    """Encode and decode a video of any length, chunk by chunk; the memory does not grow with the length of a file.

    source: [B, 3, T, H, W] in [-1, 1], which returns as much in [-1, 1] on the CPU; or a file, whose reconstruction is
    written to `target`. sample: sample the latents, instead of taking their mode. memory_gib: see
    VideoAutoencoder.stream. Raises MediaError, PixelError, and UserError for a file without target.
    """
    device = next(model.parameters()).device

    def code(frames: int, height: int, width: int, read: Callable[[int, int], Tensor]) -> Iterator[Tensor]:
        """Reconstructions of the chunks. read: (first, last + 1) -> frames."""
        stream = model.stream(height, width, memory_gib)
        start = 0
        for index, length in enumerate(stream.chunks(frames)):
            chunk = read(start, min(frames, start + length + stream.lookahead)).to(device)
            out = stream(chunk, sample=sample, generator=generator_of(seed, index, device=device))
            yield out.video.clamp(-1, 1).cpu()
            start += length

    if isinstance(source, Tensor):
        return torch.cat(list(code(*source.shape[2:], lambda a, b: source[:, :, a:b])), 2)
    if target is None:
        raise UserError(f"{source}: give the file to write, as in reconstruct(model, {str(source)!r}, 'out.mp4')")
    with closing(open_media(source)) as reader:
        info = reader.info
        if not info.fps:
            raise MediaError(str(source), "is an image; read it with read_video and reconstruct its tensor")
        with VideoWriter(Path(target), info.fps, codec) as writer:
            for video in code(
                info.num_frames, info.height, info.width, lambda a, b: to_video(read_resized(reader, range(a, b)))
            ):
                writer.write(to_uint8(video[0]))
    return Path(target)


def score(
    reference: Tensor | Source,
    reconstruction: Tensor | Source,
    metrics: Sequence[str] = ("psnr", "ssim"),
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float | None]:
    """Scores of a reconstruction: column -> mean over frames and clips; None where undefined.

    reference, reconstruction: both [B, 3, T, H, W] in [-1, 1], or both files. metrics: see docs/score.md.
    Raises MetricError for unknown metrics and videos that do not fit together, WeightsMissing, MediaError.
    """
    metric_set = build_metrics(list(metrics), device)
    if isinstance(reference, Tensor) and isinstance(reconstruction, Tensor):
        results = []
        for clip, other in zip(reference, reconstruction, strict=True):
            metric_set.update(*(_unit(video, device) for video in (clip, other)))
            results.append(metric_set.result())
        return metric_set.aggregate(results)
    if isinstance(reference, Tensor) or isinstance(reconstruction, Tensor):
        raise UserError("give two tensors or two files")
    with closing(open_media(reference)) as ref, closing(open_media(reconstruction)) as rec:
        if ref.info.num_frames != rec.info.num_frames:
            raise UserError(
                f"{reference} has {ref.info.num_frames} frames and {reconstruction} has {rec.info.num_frames}"
            )
        for start in range(0, ref.info.num_frames, FRAMES):
            chunk = range(start, min(start + FRAMES, ref.info.num_frames))
            metric_set.update(*(as_unit(read_resized(reader, chunk), device) for reader in (ref, rec)))
        return metric_set.aggregate([metric_set.result()])


def _unit(clip: Tensor, device: torch.device | str) -> Tensor:
    """[3, T, H, W] in [-1, 1] -> [T, 3, H, W] in [0, 1]."""
    return (clip.transpose(0, 1).to(device).float() / 2 + 0.5).clamp(0, 1)
