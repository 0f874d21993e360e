"""Tiled coding of frames that do not fit into memory: exact or blended, also across a panorama's seam."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from vae3d.errors import UserError
from vae3d.models.layers.wan_blocks import (
    Conv,
    DownBlock,
    Downsample,
    Head,
    ResidualBlock,
    UpBlock,
    Upsample,
    pointwise,
    run_chain,
)
from vae3d.models.streaming import CausalStream
from vae3d.models.wan import Cache, WanVAE
from vae3d.types import LatentSpec, Posterior


@dataclass(frozen=True)
class Span:
    """A tile along one axis: positions low..high - 1, beyond the ends of a circular axis, and their blend weights."""

    low: int
    high: int
    weight: Tensor


class Tiled:
    """Runs a WanVAE on tiles of `tile` x `tile` pixels.

    overlap: None is exact. The convolutions above the lowest resolution run on tiles with a margin as wide as their
    receptive field. The lowest resolution, where attention sees the whole frame, is a few per cent of the work and is
    not tiled. A number of pixels runs the whole network on tiles that overlap by it, blended linearly, as in diffusers:
    cheaper for small tiles, but attention sees one tile only, so results differ.
    With a circular width, tiles continue across the seam.

    Raises UserError for sizes that are no multiples of the model's strides, and for pad_h=pole, whose first rows need
    columns from the other side of the panorama.
    """

    def __init__(self, model: WanVAE, tile: int, overlap: int | None = None) -> None:
        stride, where = model.spec.space_stride, f"tile={tile}, tile_overlap={overlap}"
        if tile < stride or tile % stride:
            raise UserError(f"{where}: tile is {tile}; use a multiple of the model's space stride {stride}")
        if overlap is not None and (overlap < 2 * stride or overlap % (2 * stride) or 2 * overlap > tile):
            raise UserError(
                f"{where}: overlap is {overlap}; use a multiple of {2 * stride} of at most half the tile's {tile}"
            )
        if model.borders.height == "pole":
            raise UserError(f"{where}: pad_h=pole cannot be coded in tiles; use pad_h=zeros, or whole frames")
        self.model = model
        self.tile = tile // stride  # latents
        self.overlap = overlap
        self.circular = model.borders.width == "circular"
        encoder, decoder = model.encoder.chain(), model.decoder.chain()
        # (layers that run on tiles, layers that run on whole frames)
        self._encoder = encoder, []
        self._decoder = decoder, []
        if overlap is None:
            last_down = max(i for i, layer in enumerate(encoder) if _resamples(layer))
            first_up = min(i for i, layer in enumerate(decoder) if _resamples(layer))
            self._encoder = encoder[: last_down + 1], encoder[last_down + 1 :]
            self._decoder = decoder[first_up:], decoder[:first_up]

    @property
    def spec(self) -> LatentSpec:
        return self.model.spec

    def stream(self, height: int, width: int, memory_gib: float | None = None) -> CausalStream:
        """As WanVAE.stream. Activations are those of one tile; the cache is that of whole frames."""
        self.model.require_closed_seam(width)
        chunk = self.model.stream(min(height, self.pixels), min(width, self.pixels), memory_gib).chunk_latents
        return CausalStream(self, chunk)

    @property
    def pixels(self) -> int:
        """Side of a tile with its margins."""
        return (self.tile + 2 * self._margin(self._decoder[0])) * self.spec.space_stride

    @torch.no_grad()
    def encode_chunk(self, video: Tensor, cache: Cache | None, return_cache: bool = True) -> tuple[Posterior, Cache]:
        """As WanVAE.encode_chunk; return_cache=False for a whole clip."""
        tiled_layers, whole_layers = self._encoder
        tiles_cache, cache = cache or (None, None)
        x = self.model.to_patches(video)
        x, tiles_cache = self._run_tiles(tiled_layers, x, tiles_cache, return_cache, down=True)
        x, cache = run_chain(whole_layers, x, cache, return_cache)
        return Posterior.from_moments(pointwise(self.model.conv1, x)), (tiles_cache, list(cache))

    @torch.no_grad()
    def decode_chunk(self, z: Tensor, cache: Cache | None, return_cache: bool = True) -> tuple[Tensor, Cache]:
        """As WanVAE.decode_chunk; return_cache=False for a whole clip."""
        tiled_layers, whole_layers = self._decoder
        tiles_cache, cache = cache or (None, None)
        conv = self.model.conv2
        x, cache = run_chain(whole_layers, pointwise(conv, z.to(conv.weight.dtype)), cache, return_cache)
        x, tiles_cache = self._run_tiles(tiled_layers, x, tiles_cache, return_cache, down=False)
        return self.model.from_patches(x), (tiles_cache, list(cache))

    def _run_tiles(
        self, layers: Sequence[nn.Module], x: Tensor, caches: list[Cache] | None, return_cache: bool, *, down: bool
    ) -> tuple[Tensor, list[Cache]]:
        """run_chain on every tile of x, and their blend. caches: one per tile. down: layers of the encoder."""
        stride = self.spec.space_stride // self.model.patch
        unit_in, unit_out = (stride, 1) if down else (1, stride)  # positions per latent
        height, width = (side // unit_in for side in x.shape[-2:])
        margin = self._margin(layers)
        rows = self._spans(height, margin, False, unit_out)
        columns = self._spans(width, margin, self.circular, unit_out)
        out = None
        new_caches = []
        for i, (row, column) in enumerate(product(rows, columns)):
            tile = _take(_take(x, -2, row, unit_in), -1, column, unit_in)
            y, new_cache = run_chain(layers, tile, None if caches is None else caches[i], return_cache)
            new_caches.append(list(new_cache) if return_cache else None)
            if out is None:
                out = y.new_zeros((*y.shape[:3], height * unit_out, width * unit_out))
            _add(out, y, row, column, unit_out)
        return out, new_caches

    def _margin(self, layers: Sequence[nn.Module]) -> int:
        """Latents that a tile is read with on each side."""
        if self.overlap is not None:
            return self.overlap // (2 * self.spec.space_stride)
        reach = _reach(layers)
        down = any(isinstance(layer, Downsample | DownBlock) for layer in layers)
        return math.ceil(reach / (self.spec.space_stride // self.model.patch)) if down else reach

    def _spans(self, length: int, margin: int, circular: bool, unit: int) -> list[Span]:
        """Tiles of about equal size along an axis of `length` latents. unit: output positions per latent."""
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
        """Blend weights that rise from 0 to 1 at an edge between tiles: a step, or a ramp over the overlap."""
        distance = torch.arange(low * unit, high * unit) + 0.5 - edge * unit
        if self.overlap is None:
            return (distance > 0).float()
        return (distance / (2 * margin * unit) + 0.5).clamp(0, 1)


def _take(x: Tensor, dim: int, span: Span, unit: int) -> Tensor:
    """Slice of x along `dim`. unit: positions per latent."""
    low, high = span.low * unit, span.high * unit
    if low >= 0 and high <= x.shape[dim]:
        return x.narrow(dim, low, high - low)
    return x.index_select(dim, torch.arange(low, high, device=x.device) % x.shape[dim])


def _add(out: Tensor, tile: Tensor, row: Span, column: Span, unit: int) -> None:
    """Add a tile, times its blend weights, to `out` in place."""
    weight_rows, weight_columns = (span.weight.to(tile) for span in (row, column))
    top, bottom = (int(edge) for edge in row.weight.nonzero().flatten()[[0, -1]])
    left, right = (int(edge) for edge in column.weight.nonzero().flatten()[[0, -1]])
    tile = tile[..., top : bottom + 1, left : right + 1]
    tile = tile * weight_rows[top : bottom + 1, None] * weight_columns[left : right + 1]
    first = row.low * unit
    columns = torch.arange(left, right + 1, device=out.device) + column.low * unit
    out[..., first + top : first + bottom + 1, :].index_add_(-1, columns % out.shape[-1], tile)


def _resamples(layer: nn.Module) -> bool:
    """Whether a layer of a chain changes the resolution."""
    if isinstance(layer, DownBlock):
        return layer.space > 1
    return isinstance(layer, Downsample | Upsample) or (isinstance(layer, UpBlock) and layer.up)


def _reach(layers: Sequence[nn.Module], behind: int = 0) -> int:
    """Pixels of the input on each side on which an output pixel depends. behind: the same for the layers after."""
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
