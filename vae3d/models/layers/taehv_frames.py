"""Which frames the TAEHV networks read and show: one small function per family.

The encoder makes a latent of every `stride` raw frames, the decoder `stride` raw frames of every latent. A rule says
what the raw frames are: runs of (lead, frames). At the encoder, `lead` black frames in front of `frames` of the clip,
every run with fresh memory; at the decoder, `lead` frames that are dropped before `frames` that are shown, its memory
running on. `TAEHV.encode_video` and `decode_video` of madebyollin/taehv, `taehv.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Runs = tuple[tuple[int, int], ...]
CHUNK = 17  # frames that MiniMax H3 and Open-Sora 1.2 code at once, to five latents


@dataclass(frozen=True)
class Plan:
    """What a clip becomes.

    frames: what it must be extended to, by repeating its last frame. encoder, decoder: see above; where the encoder
    reads more than `frames`, the last one is repeated for it alone.
    """

    frames: int
    latents: int
    encoder: Runs
    decoder: Runs


@dataclass(frozen=True)
class FrameRule:
    """plan: (frames, stride) -> Plan. frames_of: (latents, stride) -> the most frames that so many latents stand for,
    or None if there is no such clip. looks_ahead: whether a latent may see frames after those that it lets show."""

    plan: Callable[[int, int], Plan]
    frames_of: Callable[[int, int], int | None]
    looks_ahead: bool = False


def trimmed(frames: int, stride: int) -> Plan:
    """1 + n * stride frames; the last is repeated stride - 1 times, and the first stride - 1 shown are dropped."""
    latents = 1 + -(-(frames - 1) // stride)
    shown = stride * (latents - 1) + 1
    return Plan(shown, latents, ((0, stride * latents),), ((stride - 1, shown),))


def cogvideox(frames: int, stride: int) -> Plan:
    """8n or 1 + 8n frames: an even number of latents shows all that it was made of, an odd number is trimmed."""
    even = -(-frames // (2 * stride)) * 2 * stride
    if frames <= even - 2 * stride + 1:
        return trimmed(frames, stride)
    return Plan(even, even // stride, ((0, even),), ((0, even),))


def h3(frames: int, stride: int) -> Plan:
    """5 + 17n frames: chunks of 17 behind three black frames.

    The published code extends the last chunk to 17 and drops the three latents that it adds; the encoder never looks
    back from them, so that they need not be made.
    """
    whole = -(-max(frames - 5, 0) // CHUNK)
    return _chunked(whole * CHUNK + 5, stride)


def opensora(frames: int, stride: int) -> Plan:
    """Any number: chunks of 17 frames, and a rest, behind as many black frames as fill the first latent of each."""
    return _chunked(frames, stride)


def _chunked(frames: int, stride: int) -> Plan:
    lengths = [min(CHUNK, frames - start) for start in range(0, frames, CHUNK)]
    runs = tuple((-length % stride, length) for length in lengths)
    return Plan(frames, sum(map(sum, runs)) // stride, runs, runs)


def _trimmed_frames(latents: int, stride: int) -> int:
    return stride * (latents - 1) + 1


def _cogvideox_frames(latents: int, stride: int) -> int:
    return stride * latents if latents % 2 == 0 else _trimmed_frames(latents, stride)


def _h3_frames(latents: int, stride: int) -> int | None:
    chunks, rest = divmod(latents - 2, 5)
    return None if rest else CHUNK * chunks + 5


def _opensora_frames(latents: int, stride: int) -> int:
    chunks, rest = divmod(latents, 5)
    return CHUNK * chunks + stride * rest


RULES = {
    "trimmed": FrameRule(trimmed, _trimmed_frames, looks_ahead=True),
    "cogvideox": FrameRule(cogvideox, _cogvideox_frames, looks_ahead=True),
    "h3": FrameRule(h3, _h3_frames),
    "opensora": FrameRule(opensora, _opensora_frames),
}


def between(runs: Runs, stride: int, start: int, stop: int) -> Iterator[tuple[bool, int, int]]:
    """(whether a run begins, lead, frames) of the parts of `runs` that belong to the latents start..stop - 1."""
    first = 0
    for lead, frames in runs:
        count = (lead + frames) // stride
        low, high = max(start - first, 0), min(stop - first, count)
        if low < high:
            inside = 0 if low else lead
            yield low == 0, inside, stride * (high - low) - inside
        first += count


def shown(plan: Plan, stride: int, latents: int) -> int:
    """Frames that the first `latents` latents of a clip show."""
    return sum(frames for _, _, frames in between(plan.decoder, stride, 0, latents))
