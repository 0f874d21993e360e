"""PWC-Net (Sun et al., CVPR 2018, arXiv 1709.02371): optical flow for FloLPIPS.

Implemented from the paper, without CUDA or CuPy. The published weights are CC BY-NC-SA 4.0: not for commercial use.
Frames are RGB, as in FloLPIPS, although the weights were trained on BGR. Flow is in pixels, (x, y).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.precision import autocast_off
from vae3d.pretrained import weights

FILES = ("network-default.pytorch", "pwc_net.pth.tar")  # of sniklaus/pytorch-pwc and of NVlabs/PWC-Net
# Every convolution's name here, in sniklaus/pytorch-pwc (where each part has a prefix), and in NVlabs/PWC-Net.
NAMES = Path(__file__).with_name("pwcnet_names.json")
WARPS = ("flolpips", "exact")
CHANNELS = (16, 32, 64, 96, 128, 196)  # of the pyramid's levels, from 1/2 to 1/64 of the frame's size
DENSE = (128, 128, 96, 64, 32)
CONTEXT = ((128, 1), (128, 2), (128, 4), (96, 8), (64, 16), (32, 1))  # channels and dilation
RADIUS = 4
SHIFTS = 2 * RADIUS + 1
TILE = 8
STRIDE = 64  # of the coarsest level
FLOW_SCALE = 20  # the network predicts flow in units of 20 pixels
INSIDE = 0.999  # minimum weight of pixels inside the frame in a warped pixel


class PWCNet(nn.Module):
    """Frozen network, on the meta device until `load`.

    warp: `exact`, or `flolpips`, as in danier97/flolpips and Open-Sora 1.2, which warp too far by w / (w - 1) in a
    level of width w, and likewise in height. Raises ValueError for another name.
    """

    def __init__(self, warp: str = "flolpips") -> None:
        super().__init__()
        if warp not in WARPS:
            raise ValueError(f"warp is {warp!r}; use one of {', '.join(WARPS)}")
        with torch.device("meta"):
            self.extractor = nn.ModuleList(_level(a, b) for a, b in zip((3, *CHANNELS), CHANNELS, strict=False))
            self.decoders = nn.ModuleList(Decoder(level, warp) for level in range(2, 7))
            self.refiner = _context(self.decoders[0].width)
        self.eval().requires_grad_(False)

    def load(self, path: str | Path | None = None) -> PWCNet:
        """Load sniklaus's or NVlabs's file, or either's tensors as .safetensors, from `path` or weights.find.

        Raises WeightsMissing if it is missing or has any other tensor.
        """
        file = weights.find(*FILES, path=path)
        shapes = {key: tensor.shape for key, tensor in self.state_dict().items()}
        weights.assign(self, _to_own_names(weights.read(file), shapes, file), file)
        return self

    def pyramid(self, frames: Tensor) -> list[Tensor]:
        """Features of frames [N, 3, H, W] in [0, 1], levels 2 to 6: 1/4 to 1/64 of H and W rounded up to 64."""
        size = [-(-side // STRIDE) * STRIDE for side in frames.shape[-2:]]
        with autocast_off(frames.device):
            x = _resize(frames.float(), size)
            levels = []
            for layers in self.extractor:
                x = layers(x)
                levels.append(x)
        return levels[1:]

    def forward(self, frames: Tensor) -> Tensor:
        """Flow from each frame of [T, 3, H, W] in [0, 1] to the next, [T-1, 2, H, W] in pixels."""
        levels = self.pyramid(frames)
        return self._decode([x[:-1] for x in levels], [x[1:] for x in levels], frames.shape[-2:])

    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """Flow from `first` to `second`, frames [N, 3, H, W] in [0, 1]; [N, 2, H, W] in pixels."""
        return self._decode(self.pyramid(first), self.pyramid(second), first.shape[-2:])

    def _decode(self, first: list[Tensor], second: list[Tensor], size: torch.Size) -> Tensor:
        flow = features = None
        with autocast_off(first[0].device):
            for decoder, a, b in zip(reversed(self.decoders), reversed(first), reversed(second), strict=True):
                flow, features = decoder(a, b, flow, features)
            flow = flow + self.refiner(features)
            scale = [FLOW_SCALE * n / (4 * m) for n, m in zip(size, flow.shape[-2:], strict=True)]
            return _resize(flow, size) * flow.new_tensor(scale).flip(0)[:, None, None]


class Decoder(nn.Module):
    """Flow of one level from its cost volume and the flow of the level above; densely connected."""

    def __init__(self, level: int, warp: str) -> None:
        super().__init__()
        self.warp = warp
        self.pixels = FLOW_SCALE / 2**level  # of this level, per unit of flow
        channels = _inputs(level)
        if level < len(CHANNELS):
            self.upflow = nn.ConvTranspose2d(2, 2, 4, 2, 1)
            self.upfeat = nn.ConvTranspose2d(_inputs(level + 1) + sum(DENSE), 2, 4, 2, 1)
        self.dense = nn.ModuleList()
        for width in DENSE:
            self.dense.append(nn.Conv2d(channels, width, 3, padding=1))
            channels += width
        self.predict = nn.Conv2d(channels, 2, 3, padding=1)
        self.width = channels

    def forward(
        self, first: Tensor, second: Tensor, flow: Tensor | None, features: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Flow [N, 2, h, w] and features [N, width, h, w] of one level.

        first, second: features of two frames, [N, C, h, w]. flow, features: of the level above; None for the coarsest.
        """
        if flow is None:
            x = _leaky(correlation(first, second))
        else:
            flow, features = self.upflow(flow), self.upfeat(features)
            second = warp_back(second, flow * self.pixels, self.warp)
            x = torch.cat([_leaky(correlation(first, second)), first, flow, features], 1)
        for layer in self.dense:
            x = torch.cat([_leaky(layer(x)), x], 1)
        return self.predict(x), x


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Cost volume [B, 81, H, W] of two [B, C, H, W], for dx and dy from -4 to 4.

    Channel 9 * (dy + 4) + dx + 4 is the mean over C of first at (y, x) times second at (y + dy, x + dx), which is zero
    outside. One batched matrix product multiplies each tile of `first` with its window of `second`; the 9 x 9
    neighbours of each pixel are then a strided view of the result.
    """
    b, c, h, w = first.shape
    rows, columns = -(-h // TILE), -(-w // TILE)
    below, right = rows * TILE - h, columns * TILE - w
    window = TILE + 2 * RADIUS
    first = F.pad(first / c, (0, right, 0, below)).unfold(2, TILE, TILE).unfold(3, TILE, TILE)
    second = F.pad(second, (RADIUS, RADIUS + right, RADIUS, RADIUS + below))
    second = second.unfold(2, window, TILE).unfold(3, window, TILE)
    tiles = first.permute(0, 2, 3, 4, 5, 1).reshape(-1, TILE**2, c)
    windows = second.permute(0, 2, 3, 1, 4, 5).reshape(-1, c, window**2)
    products = torch.bmm(tiles, windows)
    tile = TILE**2 * window**2
    volume = products.as_strided(  # one pixel further in the tile is one further in its window as well
        (b, rows, columns, SHIFTS, SHIFTS, TILE, TILE),
        (rows * columns * tile, columns * tile, tile, window, 1, TILE * window**2 + window, window**2 + 1),
    )
    volume = volume.permute(0, 3, 4, 1, 5, 2, 6).reshape(b, SHIFTS**2, rows * TILE, columns * TILE)
    return volume[..., :h, :w]


def warp_back(x: Tensor, flow: Tensor, warp: str) -> Tensor:
    """Sample x [N, C, h, w] bilinearly at each pixel plus flow [N, 2, h, w] in pixels; zero outside."""
    size = flow.new_tensor([x.shape[-1], x.shape[-2]])
    step = 2 / (size - 1 if warp == "flolpips" else size)
    ys, xs = ((torch.arange(n, dtype=flow.dtype, device=flow.device) * 2 + 1) / n - 1 for n in x.shape[-2:])
    centres = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1)
    grid = centres + flow.permute(0, 2, 3, 1) * step
    inside = F.grid_sample(torch.ones_like(x[:, :1]), grid, align_corners=False) > INSIDE
    return F.grid_sample(x, grid, align_corners=False) * inside


def _level(channels: int, width: int) -> nn.Sequential:
    layers = [nn.Conv2d(channels, width, 3, 2, 1), nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.LeakyReLU(0.1))))


def _context(channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, dilation in CONTEXT:
        layers += [nn.Conv2d(channels, width, 3, padding=dilation, dilation=dilation), nn.LeakyReLU(0.1)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 2, 3, padding=1))


def _inputs(level: int) -> int:
    """Input channels of a level's decoder: costs and, but for the coarsest level, features of the first frame, flow and
    features of the level above."""
    return SHIFTS**2 + (CHANNELS[level - 1] + 2 + 2 if level < len(CHANNELS) else 0)


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def _resize(x: Tensor, size: list[int] | torch.Size) -> Tensor:
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def published_layouts() -> list[dict[str, str]]:
    """For each published layout, its tensor names -> ours."""
    layouts: list[dict[str, str]] = [{}, {}, {}]
    for own, sniklaus, nvlabs in json.loads(NAMES.read_text()):
        parts = sniklaus.split(".")
        prefixed = [".".join(p if p.isdigit() else prefix + p for p in parts) for prefix in ("module", "net")]
        for layout, name in zip(layouts, (*prefixed, nvlabs), strict=True):
            layout |= {f"{name}.{kind}": f"{own}.{kind}" for kind in ("weight", "bias")}
    return layouts


def _to_own_names(state: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], file: Path) -> dict[str, Tensor]:
    """Rename tensors to ours. Raises WeightsMissing if they are not those of PWC-Net."""
    names = max(published_layouts(), key=lambda layout: len(layout.keys() & state.keys()))
    # NVlabs's network has a last deconvolution that it never uses.
    foreign = [key for key in state if key not in names and not key.startswith("deconv2.")]
    errors = weights.shape_errors(state, {key: shapes[own] for key, own in names.items()})
    weights.require_no_errors([*errors, *(f"{key} does not belong to it" for key in foreign)], file, "PWC-Net")
    return {own: state[key] for key, own in names.items()}
