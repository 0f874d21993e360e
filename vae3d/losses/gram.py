"""Gram loss: correlations of VGG features, which say how a texture looks and not where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae3d.arguments import Count, Range
from vae3d.losses.objective import NetworkTerm, PixelTerm
from vae3d.models.layers.checkpointing import maybe_checkpoint
from vae3d.models.layers.frames import clips_of, frames_of
from vae3d.pixels import as_rgb
from vae3d.pretrained.lpips import LPIPSNet, weight_at_size
from vae3d.types import ClipBatch


@dataclass(frozen=True)
class Recipe:
    """A published Gram loss.

    every_layer: after each ReLU and pooling of VGG16, or after the last ReLU of each of its five blocks. weights: of
    these layers. per_clip: one matrix of all frames of a clip, or one of each frame. by_channels: divide matrices by
    the number of channels too. size: sides to which frames are resized; None: their own.
    """

    every_layer: bool
    weights: tuple[float, ...]
    per_clip: bool
    by_channels: bool
    size: int | None


RECIPES = {
    # Its ReLUs work in place on the listed features of the convolutions, which are counted again: hence the twos.
    "vrae": Recipe(True, (*(2, 2, 1) * 2, *(2, 2, 2, 1) * 3), per_clip=False, by_channels=True, size=224),
    "cosmos": Recipe(
        False, (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5), per_clip=True, by_channels=False, size=None
    ),
}


@dataclass(kw_only=True, eq=False)
class Gram(NetworkTerm, PixelTerm):
    """Mean squared difference of Gram matrices F F^T / n of VGG16's features F [C, n], summed over layers.

    recipe: vrae (V-RAE `recon_training/losses.py: PerceptualGramLoss`; weight 100 beside L1 in [0, 1] and LPIPS) or
    cosmos (nvidia-cosmos/cosmos-predict1 `tokenizer/training/losses/continuous.py: PerceptualLoss`; weight 0.062 beside
    L1 in [-1, 1], at the end of training). size: sides that frames are resized to, without antialiasing as published;
    null: the recipe's, which is 224 for vrae and the clip's own for cosmos.
    path: the trunk's file, by default found by its name. frame_batch: frames at a time. gradient_checkpointing:
    recompute the trunk's activations in backward. The trunk is frozen and runs in fp32.
    The clip's weight applies to each position's share of a matrix. Raises ValueError for invalid arguments, and for
    frames that VGG cannot halve often enough: below 32 pixels for vrae, 16 for cosmos.
    """

    recipe: Literal["vrae", "cosmos"] = "vrae"
    size: Annotated[int, Range(16, 4096)] | None = None
    path: str | Path | None = None
    frame_batch: Count = 4
    gradient_checkpointing: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.published = RECIPES[self.recipe]
        self.network = LPIPSNet("vgg")

    def errors(self, rec: Tensor, batch: ClipBatch) -> Tensor:
        clips, _, frames, height, width = batch.video.shape
        size = self.size or self.published.size
        least = 32 if self.published.every_layer else 16
        if min(shown := (size or height, size or width)) < least:
            raise ValueError(
                f"the Gram loss with recipe={self.recipe} needs frames of at least {least} pixels; these are "
                f"{shown[0]}x{shown[1]}: set its `size`"
            )
        tensors = [frames_of(as_rgb(batch.video)), frames_of(as_rgb(rec))]
        if batch.weight is not None:
            tensors.append(frames_of(batch.weight.expand(clips, 1, frames, -1, -1)))
        recompute = self.gradient_checkpointing and rec.requires_grad
        values = [
            maybe_checkpoint(self._compare, size, *parts, enabled=recompute)
            for parts in zip(*(tensor.split(self.frame_batch) for tensor in tensors), strict=True)
        ]
        if not self.published.per_clip:
            return clips_of(torch.cat(values)[:, None, None, None], clips)
        layers = [torch.cat(parts).unflatten(0, (clips, frames)).mean(1) for parts in zip(*values, strict=True)]
        return self._squared(layers).view(-1, 1, 1, 1, 1)

    def _compare(
        self, size: int | None, ori: Tensor, rec: Tensor, weight: Tensor | None = None
    ) -> Tensor | list[Tensor]:
        """Of frames [N, 3, H, W]: distances [N] or, for one matrix per clip, differences of matrices [N, C, C]."""
        if size is not None:
            ori, rec = (F.interpolate(x, (size, size), mode="bilinear", align_corners=False) for x in (ori, rec))
            weight = None if weight is None else F.interpolate(weight, (size, size), mode="bilinear")
        with torch.no_grad():
            target = [self._gram(x, weight) for x in self._features(ori)]
        differences = [self._gram(x, weight) - y for x, y in zip(self._features(rec), target, strict=True)]
        return differences if self.published.per_clip else self._squared(differences)

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        if not self.published.every_layer:
            yield from self.network.features(x)
            return
        x = (x - self.network.shift) / self.network.scale
        for layer in (layer for part in self.network.slices for layer in part):
            x = layer(x)
            if not isinstance(layer, nn.Conv2d):
                yield x
        yield F.max_pool2d(x, 2)  # the trunk of LPIPS ends before it

    def _gram(self, features: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            features = features * weight_at_size(weight, features.shape[-2:]).sqrt()
        flat = features.flatten(2)
        count = flat.shape[2] * (flat.shape[1] if self.published.by_channels else 1)
        return flat @ flat.transpose(1, 2) / count

    def _squared(self, differences: list[Tensor]) -> Tensor:
        """[N] from differences of matrices of every layer, [N, C, C]."""
        values = [difference.square().mean((1, 2)) for difference in differences]
        return sum(w * value for w, value in zip(self.published.weights, values, strict=True))
