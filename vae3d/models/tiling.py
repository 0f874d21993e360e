"""Coding frames that do not fit into memory tile by tile, exactly or blended, also across a panorama's seam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from vae3d.models.layers.wan_blocks import Conv, Downsample, Head, Past, ResidualBlock, Upsample, run_chain
from vae3d.models.layers.wan_shortcuts import DownBlock, UpBlock
from vae3d.models.streaming import CausalStream
from vae3d.models.wan import Cache, WanVAE
from vae3d.types import LatentSpec, Posterior


@dataclass(frozen=True)
class Span:
    """Places low..high - 1 of an axis, which may lie beyond its ends where it is circular, and what each counts."""

    low: int
    high: int
    weight: Tensor


class Tiled:
    """A WanVAE that codes the frames of a clip or a stream in tiles of `tile` x `tile` pixels.

    overlap None: exact. Everything above the lowest resolution is convolutions, whose tiles are read with as many
    pixels around them as they can see; the lowest resolution, where attention looks at the whole frame, is a few per
    cent of the work and is not cut. overlap in pixels: the whole network in tiles that share so many pixels, blended
    linearly, as diffusers does: cheaper where tiles are small, but attention sees one tile only, so results differ.
    Where the model's width is circular, tiles go on across the seam.

    Raises ValueError for sizes that the model's strides do not divide, and for pad_h=pole, whose first rows need
    columns from the other side of the panorama.
    """

    def __init__(self, model: WanVAE, tile: int, overlap: int | None = None) -> None:
        stride = model.spec.space_stride
        if tile < stride or tile % stride:
            raise ValueError(f"tile is {tile}; use a multiple of the model's space stride {stride}")
        if overlap is not None and (overlap < 2 * stride or overlap % (2 * stride) or 2 * overlap > tile):
            raise ValueError(f"overlap is {overlap}; use a multiple of {2 * stride} of at most half the tile's {tile}")
        if model.borders.height == "pole":
            raise ValueError("pad_h=pole cannot be coded in tiles; use pad_h=zeros, or whole frames")
        self.model, self.tile, self.overlap = model, tile // stride, overlap
        self.circular = model.borders.width == "circular"
        encoder, decoder = model.encoder.chain(), model.decoder.chain()
        low = 1 + max(i for i, layer in enumerate(encoder) if _resamples(layer))
        first = min(i for i, layer in enumerate(decoder) if _resamples(layer))
        if overlap is None:
            self._encoder, self._decoder = (encoder[:low], encoder[low:]), (decoder[first:], decoder[:first])
        else:
            self._encoder, self._decoder = (encoder, []), (decoder, [])

    @property
    def spec(self) -> LatentSpec:
        return self.model.spec

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> CausalStream:
        """As WanVAE.stream. The cache is that of whole frames; only what is in work is as small as a tile."""
        self.model.require_closed_seam(width)
        chunk = self.model.stream(min(height, self.pixels), min(width, self.pixels), memory_gib).chunk_latents
        return CausalStream(self, chunk)

    @property
    def pixels(self) -> int:
        """Side of what is in work at once."""
        return (self.tile + 2 * self._margin(self._decoder[0])) * self.spec.space_stride

    @torch.no_grad()
    def encode_chunk(self, video: Tensor, cache: Cache | None, keep: bool = True) -> tuple[Posterior, Cache]:
        """As WanVAE.encode_chunk; keep=False for a whole clip."""
        outer, inner = self._encoder
        tiled, whole = cache or (None, None)
        x = self.model.to_patches(video)
        x, tiled = self._in_tiles(outer, x, tiled, keep, self.spec.space_stride // self.model.patch, down=True)
        x, whole = run_chain(inner, x, whole, keep)
        return Posterior.from_moments(self.model.to_moments(x)), (tiled, list(whole))

    @torch.no_grad()
    def decode_chunk(self, z: Tensor, cache: Cache | None, keep: bool = True) -> tuple[Tensor, Cache]:
        """As WanVAE.decode_chunk; keep=False for a whole clip."""
        outer, inner = self._decoder
        tiled, whole = cache or (None, None)
        x, whole = run_chain(inner, self.model.from_latents(z), whole, keep)
        x, tiled = self._in_tiles(outer, x, tiled, keep, self.spec.space_stride // self.model.patch, down=False)
        return self.model.from_patches(x), (tiled, list(whole))

    def _in_tiles(
        self, layers: Sequence[nn.Module], x: Tensor, caches: list[Past] | None, keep: bool, stride: int, down: bool
    ) -> tuple[Tensor, list[Past]]:
        """run_chain on every tile of x, put together again. caches: of every tile."""
        unit_in, unit_out = (stride, 1) if down else (1, stride)
        height, width = (side // unit_in for side in x.shape[-2:])
        margin = self._margin(layers)
        rows = self._spans(height, margin, False, unit_out)
        columns = self._spans(width, margin, self.circular, unit_out)
        out, remembered = None, []
        for number, (row, column) in enumerate(product(rows, columns)):
            piece = _take(_take(x, -2, row, unit_in), -1, column, unit_in)
            y, past = run_chain(layers, piece, None if caches is None else caches[number], keep)
            remembered.append(list(past) if keep else None)
            if out is None:
                out = y.new_zeros((*y.shape[:3], height * unit_out, width * unit_out))
            _add(out, y, row, column, unit_out)
        return out, remembered

    def _margin(self, layers: Sequence[nn.Module]) -> int:
        """Latents around a tile."""
        if self.overlap is not None:
            return self.overlap // (2 * self.spec.space_stride)
        reach = _reach(layers)
        down = any(isinstance(layer, Downsample | DownBlock) for layer in layers)
        return math.ceil(reach / (self.spec.space_stride // self.model.patch)) if down else reach

    def _spans(self, length: int, margin: int, circular: bool, unit: int) -> list[Span]:
        """Tiles along an axis of `length` latents, of about equal size."""
        if self.tile + 2 * margin >= length:
            return [Span(0, length, torch.ones(length * unit))]
        count = math.ceil(length / self.tile)
        edges = [number * length // count for number in range(count + 1)]
        spans = []
        for start, stop in pairwise(edges):
            low, high = start - margin, stop + margin
            if not circular:
                low, high = max(low, 0), min(high, length)
            weight = torch.ones((high - low) * unit)
            if circular or start > 0:
                weight *= self._rise(start, low, high, margin, unit)
            if circular or stop < length:
                weight *= 1 - self._rise(stop, low, high, margin, unit)
            spans.append(Span(low, high, weight))
        return spans

    def _rise(self, edge: int, low: int, high: int, margin: int, unit: int) -> Tensor:
        """0 before and 1 behind an edge between tiles; a step, or a line over what they share."""
        distance = torch.arange(low * unit, high * unit) + 0.5 - edge * unit
        if self.overlap is None:
            return (distance > 0).float()
        return (distance / (2 * margin * unit) + 0.5).clamp(0, 1)


def _take(x: Tensor, dim: int, span: Span, unit: int) -> Tensor:
    """The places of a span, in latents of `unit` places each."""
    low, high = span.low * unit, span.high * unit
    if low >= 0 and high <= x.shape[dim]:
        return x.narrow(dim, low, high - low)
    return x.index_select(dim, torch.arange(low, high, device=x.device) % x.shape[dim])


def _add(out: Tensor, tile: Tensor, row: Span, column: Span, unit: int) -> None:
    """Add what counts of a tile to the whole, in place."""
    weight_rows, weight_columns = (span.weight.to(tile) for span in (row, column))
    top, bottom = (int(edge) for edge in row.weight.nonzero().flatten()[[0, -1]])
    left, right = (int(edge) for edge in column.weight.nonzero().flatten()[[0, -1]])
    tile = tile[..., top : bottom + 1, left : right + 1]
    tile = tile * weight_rows[top : bottom + 1, None] * weight_columns[left : right + 1]
    place = row.low * unit
    columns = torch.arange(left, right + 1, device=out.device) + column.low * unit
    out[..., place + top : place + bottom + 1, :].index_add_(-1, columns % out.shape[-1], tile)


def _resamples(layer: nn.Module) -> bool:
    """Whether a layer of a chain changes the resolution."""
    if isinstance(layer, DownBlock):
        return layer.space > 1
    return isinstance(layer, Downsample | Upsample) or (isinstance(layer, UpBlock) and layer.up)


def _reach(layers: Sequence[nn.Module], behind: int = 0) -> int:
    """How many pixels of its input an output pixel sees to each side, `behind` being that of what follows."""
    for layer in reversed(layers):
        if isinstance(layer, DownBlock | UpBlock):
            inner = layer.downsamples if isinstance(layer, DownBlock) else layer.upsamples
            behind = _reach(inner, behind)
        elif isinstance(layer, Downsample):
            behind = 2 * behind + 2
        elif isinstance(layer, Upsample):
            behind = (behind + 2) // 2
        else:
            behind += {Conv: 1, Head: 1, ResidualBlock: 2}[type(layer)]
    return behind
