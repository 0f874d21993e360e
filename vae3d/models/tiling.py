"""Tiled coding of frames that do not fit into memory: exact or blended, also across a panorama's seam.

`VideoAutoencoder.set_tiles` sets a model's `tiling`, through which its encoder and decoder then pass their input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise, product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from vae3d.errors import UserError
from vae3d.types import Delta, Posterior

Model = Any  # a VideoAutoencoder, which imports this module
Cache = Any  # of a step: what it needs of earlier chunks; None before the first
Step = Callable[[Tensor, Cache], tuple[Tensor, Cache]]
PARTS = ("encoder", "decoder")
PROBE = 8  # side of the latents on which the reach is measured


class Runner(Protocol):
    """What models call. exact: whether the layers that see whole frames are kept out of tiles."""

    exact: bool

    def __call__(
        self, part: str, step: Step, x: Tensor, caches: list[Cache] | None, unit_in: int, unit_out: int
    ) -> tuple[Tensor, list[Cache]]:
        """step on every tile of x [..., H, W]; returns their blend and the caches, one per tile.

        part: encoder or decoder. unit_in, unit_out: positions of x and of the result per latent, along a side. A list
        of caches is emptied on the way, so that old frames are freed before new ones are kept.
        """


@dataclass(frozen=True)
class Span:
    """A tile along one axis: positions low..high - 1, beyond the ends of a circular axis, and their blend weights."""

    low: int
    high: int
    weight: Tensor


@dataclass(frozen=True)
class Tiling:
    """Tiles of `tile` x `tile` pixels; a Runner.

    overlap: None is exact, each tile is read with a margin as wide as the layers that run on it reach, and cropped. A
    number of pixels: tiles overlap by it and are blended linearly.
    stride: pixels per latent. reach: of exact tiles, the margins in latents of encoder and decoder. circular: tiles
    continue across the seam of the width.
    """

    tile: int
    overlap: int | None
    stride: int
    reach: dict[str, int]
    circular: bool = False

    @property
    def exact(self) -> bool:
        return self.overlap is None

    def __str__(self) -> str:
        if self.exact:
            return f"exact tiles of {self.tile} x {self.tile}"
        return f"blended tiles of {self.tile} x {self.tile}, overlapping by {self.overlap}"

    def margin(self, part: str) -> int:
        """Latents that a tile is read with on each side."""
        return self.reach[part] if self.overlap is None else self.overlap // (2 * self.stride)

    def largest(self, height: int, width: int) -> tuple[int, int]:
        """Size in pixels of the largest piece of a frame that the decoder runs on, with its margins."""
        side = self.tile + 2 * self.margin("decoder") * self.stride
        return min(height, side), min(width, side)

    def __call__(
        self, part: str, step: Step, x: Tensor, caches: list[Cache] | None, unit_in: int, unit_out: int
    ) -> tuple[Tensor, list[Cache]]:
        height, width = (side // unit_in for side in x.shape[-2:])
        margin = self.margin(part)
        rows = self.spans(height, margin, False, unit_out)
        columns = self.spans(width, margin, self.circular, unit_out)
        out, new_caches = None, []
        for i, (row, column) in enumerate(product(rows, columns)):
            tile = _take(_take(x, -2, row, unit_in), -1, column, unit_in)
            cache = None if caches is None else caches[i]
            if caches is not None:
                caches[i] = None
            y, cache = step(tile, cache)
            new_caches.append(cache)
            if len(rows) == len(columns) == 1:
                return y, new_caches
            if out is None:
                out = _zeros(y, (height * unit_out, width * unit_out), self.exact)
            _add(out, y, row, column, unit_out)
        return out.to(y.dtype), new_caches

    def spans(self, length: int, margin: int, circular: bool, unit: int) -> list[Span]:
        """Tiles of about equal size along an axis of `length` latents. unit: output positions per latent."""
        tile = self.tile // self.stride
        if tile + 2 * margin >= length:
            return [Span(0, length, torch.ones(length * unit))]
        count = math.ceil(length / tile)
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


def make_tiling(model: Model, tile: int, overlap: int | None) -> Tiling:
    """Raises UserError for sizes that are no multiples of the model's stride, for a model that does not use `tiling`,
    and for exact tiles of a model whose results depend on whole frames."""
    stride = model.spec.space_stride
    where = f"tile={tile}" if overlap is None else f"tile={tile}, tile_overlap={overlap}"
    if tile < stride or tile % stride:
        raise UserError(f"{where}: tile must be a multiple of the model's space stride {stride}")
    if overlap is not None and (overlap < 2 * stride or overlap % (2 * stride) or 2 * overlap > tile):
        raise UserError(f"{where}: tile_overlap must be a multiple of {2 * stride} of at most half the tile's {tile}")
    reach, why = model.tile_reach()
    if whole := [part for part in PARTS if part not in reach]:
        raise UserError(
            f"{where}: {model.kind_of_network} does not pass its {' and '.join(whole)} through `tiling`, so it would "
            "code whole frames; leave out tile"
        )
    if overlap is not None:
        return Tiling(tile, overlap, stride, {}, model.circular)
    if why := model.whole_frames or why:
        fitting = tile // 4 // (2 * stride) * 2 * stride or 2 * stride
        tiles = f"tile={tile} " if tile >= 2 * fitting else f"tile={2 * fitting} "
        raise UserError(
            f"{where}: a {model.kind_of_network} cannot be coded in exact tiles, because of its {why}; "
            f"{tiles}tile_overlap={fitting} blends tiles, which changes the result"
        )
    return Tiling(tile, None, stride, reach, model.circular)


def code_in_tiles(
    tiling: Runner,
    encode: Callable[[Tensor, Cache], tuple[Posterior | Delta, Cache]],
    x: Tensor,
    caches: list[Cache] | None,
    unit_in: int,
) -> tuple[Posterior | Delta, list[Cache]]:
    """An encoder that returns posteriors, on tiles; means and log-variances are blended."""
    kind: type[Posterior | Delta] = Posterior

    def step(tile: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        nonlocal kind
        coded, cache = encode(tile, cache)
        kind = type(coded)
        return torch.cat(list(vars(coded).values()), 1), cache

    moments, caches = tiling("encoder", step, x, caches, unit_in, 1)
    return kind(*moments.chunk(len(fields(kind)), 1)), caches


def _take(x: Tensor, dim: int, span: Span, unit: int) -> Tensor:
    """Slice of x along `dim`. unit: positions per latent."""
    low, high = span.low * unit, span.high * unit
    if low >= 0 and high <= x.shape[dim]:
        return x.narrow(dim, low, high - low)
    return x.index_select(dim, torch.arange(low, high, device=x.device) % x.shape[dim])


def _zeros(like: Tensor, size: tuple[int, int], exact: bool) -> Tensor:
    """[..., *size] in the memory format of a tile, in fp32 or better for a sum of weighted tiles."""
    dtype = like.dtype if exact else torch.promote_types(like.dtype, torch.float32)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(like.ndim)
    zeros = like.new_zeros((*like.shape[:-2], *size), dtype=dtype)
    return zeros.contiguous(memory_format=last) if last and like.is_contiguous(memory_format=last) else zeros


def _add(out: Tensor, tile: Tensor, row: Span, column: Span, unit: int) -> None:
    """Add a tile, times its blend weights, to `out` in place."""
    weight_rows, weight_columns = (span.weight.to(out) for span in (row, column))
    top, bottom = (int(edge) for edge in row.weight.nonzero().flatten()[[0, -1]])
    left, right = (int(edge) for edge in column.weight.nonzero().flatten()[[0, -1]])
    tile = tile[..., top : bottom + 1, left : right + 1]
    tile = tile * weight_rows[top : bottom + 1, None] * weight_columns[left : right + 1]
    first = row.low * unit
    columns = torch.arange(left, right + 1, device=out.device) + column.low * unit
    out[..., first + top : first + bottom + 1, :].index_add_(-1, columns % out.shape[-1], tile)


# ---- the reach of layers


@torch.inference_mode(False)  # in which operations do not reach the probe one by one
@torch.no_grad()
def measure_reach(model: Model) -> tuple[dict[str, int], str]:
    """Latents on each side that encoder and decoder must see beside those that a result belongs to, and "".

    From the convolutions that a pass on the meta device runs, so for any configuration. An upper bound, as every one of
    them counts, also of branches that run side by side. The second value says what makes results depend on whole
    frames, if there is something. A part that does not pass through the model's `tiling` is missing in the first.
    """
    probe = _Probe()
    frames = next(n for n in range(1, 65) if model.frames_valid(n) and model.latent_frames(n) > 1)
    side = PROBE * model.spec.space_stride
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    video = torch.empty(1, model.pixel_channels, frames, side, side, dtype=dtype, device="meta")
    tensors = {
        f"model.{name}": torch.empty_like(tensor, device="meta")
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    model.tiling = probe
    try:
        functional_call(_Autoencode(model), tensors, (video,))
    finally:
        model.tiling = None
    return probe.reach, ", ".join(dict.fromkeys(probe.found))


class _Autoencode(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, video: Tensor) -> Tensor:
        return self.model.decode(self.model.encode(video).mode())


class _Probe:
    """A Runner that runs every step on whole frames and measures its reach."""

    exact = True

    def __init__(self) -> None:
        self.reach: dict[str, int] = {}
        self.found: list[str] = []

    def __call__(
        self, part: str, step: Step, x: Tensor, caches: list[Cache] | None, unit_in: int, unit_out: int
    ) -> tuple[Tensor, list[Cache]]:
        with _Convolutions(x.shape[-2] // unit_in) as seen:
            y, cache = step(x, None if caches is None else caches[0])
        self.reach[part] = max(self.reach.get(part, 0), math.ceil(seen.reach))
        self.found += seen.found
        return y, [cache]


class _Convolutions(TorchDispatchMode):
    """Sums up, in `reach`, how many latents the convolutions reach beyond each side of what they compute.

    A convolution of kernel k at positions of size s (in latents) reaches (k - 1) / 2 * s; one with a stride, k - stride
    of its input's positions at most, whatever its padding; a transposed one, (k - stride) / (2 * stride) of them,
    rounded up. Upsampling to nearest neighbours and shuffling of pixels stay within a latent, to which the sum is
    rounded up. found: operations that see whole frames.
    latents: along a side.
    """

    WHOLE = {
        "native_group_norm": "GroupNorm",
        "bmm": "attention",
        "_softmax": "attention",
        "upsample_bilinear2d": "bilinear interpolation",
        "upsample_bicubic2d": "bicubic interpolation",
        "randn_like": "noise",
        "randn": "noise",
        "normal_": "noise",
    }

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.latents = latents
        self.reach = 0.0
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.WHOLE or "scaled_dot_product" in name:
            self.found.append(self.WHOLE.get(name, "attention"))
        if name == "convolution":
            self._convolution(out, *args)
        return out

    def _convolution(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        *_: Any,
    ) -> None:
        """The rows count; all these networks treat columns the same."""
        kernel = weight.shape[-2:]
        if max(kernel) == 1 or (list(kernel) == list(stride) and not transposed):  # no pixel sees its neighbours
            return
        if transposed and kernel[0] == kernel[1] and out.shape[-2] % (stride[-1] * self.latents) == 0:
            beyond = math.ceil((kernel[-1] - stride[-1]) / 2 / stride[-1])
            self.reach += beyond * self.latents * stride[-1] / out.shape[-2]
            return
        rows = next((n for n in (out.shape[-2], x.shape[-2] // stride[-1]) if n % self.latents == 0), None)
        if weight.ndim < 4 or transposed or kernel[0] != kernel[1] or rows is None:
            self.found.append("convolutions that are not square or change the size otherwise")
            return
        span, step = dilation[-1] * (kernel[-1] - 1), stride[-1]
        beyond = math.ceil(span / 2) if step == 1 else max(0, span + 1 - step)
        self.reach += beyond * self.latents / rows / step
