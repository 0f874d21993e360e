"""A UNet on the latents of images: diffusers' UNet2DModel with the settings of ADM (arXiv 2105.05233).

Settings follow openai/guided-diffusion (MIT), script_util.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from vae3d.arguments import Classes, Depth, Flags, Range, Size, Width, check_arguments
from vae3d.diffusion.layers import class_ids, from_diffusers, zero_module
from vae3d.models.layers.frames import pad_space

# Shorter side of the latents -> channel multiplier of each level: from 64 on as guided-diffusion's create_model, below
# so that the lowest level is 4 x 4.
MULTIPLIERS = {
    1: (1,),
    8: (1, 2),
    16: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
MAX_ATTENTION_SIDE = 16  # levels with a shorter side of at most this have attention, as in guided-diffusion


class LatentUNet(nn.Module):
    """Latents [B, C, 1, h, w], timesteps [B] in [0, 1000] and labels -> [B, C, 1, h, w].

    channels: of the latents. learned_sigma doubles the output channels; the second half are variances.
    width: channels of a level with multiplier 1. multipliers, attention: per level, channels / width, and whether to
    attend. blocks: residual blocks per level. head_channels: channels per attention head.
    num_classes: 0, or the number of classes; labels=None selects the null class.
    resblock_updown: resample in residual blocks, as ADM's best models do, instead of in convolutions.
    The output is zero at initialisation, as is that of every residual block and attention.
    Sides that are not a multiple of 2^(levels - 1) are padded by repeating the edge; the output is cropped.
    Raises ValueError for settings that do not fit each other, UserError without diffusers.
    """

    @check_arguments
    def __init__(
        self,
        channels: Width,
        multipliers: Annotated[Sequence[Annotated[float, Range(0.01, 64)]], Size(1, 10)],
        attention: Flags,
        *,
        learned_sigma: bool = False,
        num_classes: Classes = 0,
        width: Width = 128,
        blocks: Depth = 2,
        head_channels: Width = 64,
        dropout: Annotated[float, Range(0, 0.99)] = 0.0,
        resblock_updown: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if len(attention) != len(multipliers):
            raise ValueError(f"attention has {len(attention)} entries for {len(multipliers)} multipliers; use as many")
        widths = [int(width * m) for m in multipliers]
        for channels_of_level in [*(w for w, attends in zip(widths, attention, strict=True) if attends), widths[-1]]:
            if channels_of_level % head_channels:
                raise ValueError(
                    f"head_channels is {head_channels}, which does not divide the {channels_of_level} of a level"
                )
        self.channels, self.learned_sigma, self.num_classes = channels, learned_sigma, num_classes
        self.stride = 2 ** (len(widths) - 1)
        if resblock_updown:
            plain_blocks, resampling = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "resnet"
        else:
            plain_blocks, resampling = ("DownBlock2D", "UpBlock2D"), "conv"
        block_types = [("AttnDownBlock2D", "AttnUpBlock2D") if attends else plain_blocks for attends in attention]
        groups = math.gcd(32, *widths)
        self.unet = from_diffusers("UNet2DModel")(
            in_channels=channels,
            out_channels=channels * (2 if learned_sigma else 1),
            block_out_channels=tuple(widths),
            down_block_types=tuple(down for down, _ in block_types),
            up_block_types=tuple(up for _, up in reversed(block_types)),
            layers_per_block=blocks,
            downsample_type=resampling,
            upsample_type=resampling,
            attention_head_dim=head_channels,
            norm_num_groups=groups,
            attn_norm_num_groups=groups,
            resnet_time_scale_shift="scale_shift",
            dropout=dropout,
            num_class_embeds=num_classes + 1 if num_classes else None,
        )
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        _zero_outputs(self.unet)

    @staticmethod
    def infer_defaults(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
        """Fill in `multipliers` and `attention`, if the configuration has none, for latents (C, t, h, w)."""
        shorter = min(latent_shape[2:])
        multipliers, attention = config.get("multipliers"), config.get("attention")
        if multipliers is None:
            multipliers = MULTIPLIERS[max(size for size in MULTIPLIERS if size <= shorter)]
        if attention is None:
            attention = [shorter // 2**level <= MAX_ATTENTION_SIDE for level in range(len(multipliers))]
        return {**config, "multipliers": list(multipliers), "attention": list(attention)}

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        """Raises ValueError for latents of videos, and as class_ids does."""
        if z.shape[2] != 1:
            raise ValueError(
                f"got latents of {z.shape[2]} frames; the UNet takes one, denoiser=video_transformer any number"
            )
        ids = class_ids(labels, len(z), self.num_classes, z.device)
        height, width = z.shape[-2:]
        output = self.unet(pad_space(z, self.stride).squeeze(2), time, ids, return_dict=False)[0]
        return output[..., :height, :width].unsqueeze(2)


def _zero_outputs(unet: nn.Module) -> None:
    """Zero the layers that guided-diffusion wraps in zero_module, which diffusers does not."""
    block = from_diffusers("ResnetBlock2D", "diffusers.models.resnet")
    attention = from_diffusers("Attention", "diffusers.models.attention_processor")
    layers = [unet.conv_out]
    layers += [module.conv2 for module in unet.modules() if isinstance(module, block)]
    layers += [module.to_out[0] for module in unet.modules() if isinstance(module, attention)]
    for layer in layers:
        zero_module(layer)
