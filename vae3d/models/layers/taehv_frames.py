"""Frame rules of the TAEHV networks, one function per family: which frames they read and show.

The encoder turns `stride` raw frames into a latent, the decoder a latent into `stride` raw frames. A FramePlan lists
runs of raw frames, (lead, frames). In the encoder a run is `lead` black frames followed by `frames` of the clip, and
starts with an empty cache. In the decoder it is `lead` frames to drop and `frames` to show; the cache runs on.
See `TAEHV.encode_video` and `decode_video` in `taehv.py` of madebyollin/taehv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Runs = tuple[tuple[int, int], ...]
CHUNK = 17  # frames that MiniMax H3 and Open-Sora 1.2 code at once, to five latents


@dataclass(frozen=True)
class FramePlan:
    """How a clip is coded.

    frames: length to which the clip is extended by repeating its last frame. Where the encoder reads more frames than
    that, it repeats the last one again.
    """

    frames: int
    latents: int
    encoder: Runs
    decoder: Runs


def trimmed(frames: int, stride: int) -> FramePlan:
    """1 + n * stride frames. The last is repeated stride - 1 times; the decoder drops its first stride - 1 frames."""
    latents = 1 + -(-(frames - 1) // stride)
    shown = stride * (latents - 1) + 1
    return FramePlan(shown, latents, ((0, stride * latents),), ((stride - 1, shown),))


def cogvideox(frames: int, stride: int) -> FramePlan:
    """8n or 1 + 8n frames: an even number of latents shows all of its frames, an odd number is trimmed."""
    even = -(-frames // (2 * stride)) * 2 * stride
    if frames <= even - 2 * stride + 1:
        return trimmed(frames, stride)
    return FramePlan(even, even // stride, ((0, even),), ((0, even),))


def h3(frames: int, stride: int) -> FramePlan:
    """5 + 17n frames: chunks of 17 behind three black frames.

    The published code extends the last chunk to 17 frames and drops the three latents that this adds. No earlier latent
    depends on them, so they are not computed here.
    """
    whole = -(-max(frames - 5, 0) // CHUNK)
    return opensora(whole * CHUNK + 5, stride)


def opensora(frames: int, stride: int) -> FramePlan:
    """Any number: chunks of 17 frames and a rest, each behind the black frames that fill its first latent."""
    lengths = [min(CHUNK, frames - start) for start in range(0, frames, CHUNK)]
    runs = tuple((-length % stride, length) for length in lengths)
    return FramePlan(frames, sum(map(sum, runs)) // stride, runs, runs)


RULES = {"trimmed": trimmed, "cogvideox": cogvideox, "h3": h3, "opensora": opensora}
LOOK_AHEAD = ("trimmed", "cogvideox")  # a latent may depend on frames after those that it is decoded to


def longest_clip(rule: Callable[[int, int], FramePlan], latents: int, stride: int) -> int | None:
    """Frames of the longest clip with so many latents, or None."""
    return next((n for n in range(stride * latents, 0, -1) if rule(n, stride).latents == latents), None)


def split_runs(runs: Runs, stride: int, start: int, stop: int) -> Iterator[tuple[bool, int, int]]:
    """The parts of `runs` that belong to the latents start..stop - 1: (whether a run begins, lead, frames)."""
    first = 0
    for lead, frames in runs:
        count = (lead + frames) // stride
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            part_lead = 0 if low else lead
            yield low == 0, part_lead, stride * (high - low) - part_lead
        first += count


def count_frames(runs: Runs, stride: int, start: int, stop: int) -> int:
    """Frames of the clip that `runs` has for the latents start..stop - 1, without leads."""
    return sum(frames for _, _, frames in split_runs(runs, stride, start, stop))
