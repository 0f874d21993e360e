"""A UNet on the latents of images: diffusers' UNet2DModel, set up like ADM's.

Dhariwal and Nichol, arXiv 2105.05233; the settings are those of openai/guided-diffusion (MIT), `script_util.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from vae3d.arguments import Classes, Depth, Flags, Range, Size, Width, check_arguments
from vae3d.diffusion.conditioning import class_ids
from vae3d.diffusion.layers import zeroed
from vae3d.diffusion.library import from_diffusers
from vae3d.models.layers.frames import pad_space

# Multiples of the width at each level, by the shorter side: 64 and above as in guided-diffusion's create_model, below
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
ATTENDED = 16  # levels whose shorter side is at most this have attention, as in guided-diffusion's defaults


class LatentUNet(nn.Module):
    """Latents [B, C, 1, h, w], times [B] in [0, 1000] and labels -> [B, C, 1, h, w].

    channels: of the latents; learned_sigma doubles those of the output, the second half being variances.
    multipliers, attention: of each level, how many times `width` its channels are, and whether it attends.
    blocks: residual blocks per level. head_channels: of an attention head.
    num_classes: 0, or the number of classes, beside which there is the null class: labels=None.
    resblock_updown: change resolution by residual blocks, as ADM's best models do, instead of by convolutions.
    The output is zero at the start, as is that of every residual block and attention.
    Sides that are no multiple of 2^(levels - 1) are extended by repeating their edge, and the output is cut back.
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
            raise ValueError(f"attention has {len(attention)} entries for {len(multipliers)} multipliers; give as many")
        widths = [int(width * m) for m in multipliers]
        for wide in [*(w for w, attends in zip(widths, attention, strict=True) if attends), widths[-1]]:
            if wide % head_channels:
                raise ValueError(f"head_channels is {head_channels}, which does not divide the {wide} of a level")
        self.channels, self.learned_sigma, self.num_classes = channels, learned_sigma, num_classes
        self.stride = 2 ** (len(widths) - 1)
        plain = (
            ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resblock_updown else ("DownBlock2D", "UpBlock2D")
        )
        kinds = [("AttnDownBlock2D", "AttnUpBlock2D") if attends else plain for attends in attention]
        change = "resnet" if resblock_updown else "conv"
        groups = math.gcd(32, *widths)
        self.unet = from_diffusers("UNet2DModel")(
            in_channels=channels,
            out_channels=channels * (2 if learned_sigma else 1),
            block_out_channels=tuple(widths),
            down_block_types=tuple(down for down, _ in kinds),
            up_block_types=tuple(up for _, up in reversed(kinds)),
            layers_per_block=blocks,
            downsample_type=change,
            upsample_type=change,
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


def fitted(config: Mapping[str, Any], latent_shape: Sequence[int]) -> dict[str, Any]:
    """The configuration with multipliers and attention chosen for latents [C, t, h, w], where it leaves them open."""
    shorter = min(latent_shape[2:])
    multipliers = config.get("multipliers") or MULTIPLIERS[max(size for size in MULTIPLIERS if size <= shorter)]
    attention = config.get("attention") or [shorter // 2**level <= ATTENDED for level in range(len(multipliers))]
    return {**config, "multipliers": list(multipliers), "attention": list(attention)}


def _zero_outputs(unet: nn.Module) -> None:
    """As guided-diffusion's zero_module; diffusers zeroes none of them."""
    block = from_diffusers("ResnetBlock2D", "diffusers.models.resnet")
    attention = from_diffusers("Attention", "diffusers.models.attention_processor")
    last = [unet.conv_out]
    last += [module.conv2 for module in unet.modules() if isinstance(module, block)]
    last += [module.to_out[0] for module in unet.modules() if isinstance(module, attention)]
    for layer in last:
        zeroed(layer)
