"""Train a small decoder from a video and its latents, without the autoencoder that made them.

The decoder is TAEHV's. It starts from TAESD's, which knows pictures but not these latents: --image-decoder.
The left two thirds of the frames train, the right third scores.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

import vae3d
from vae3d.models.layers.frames import frames_of
from vae3d.models.layers.taehv_blocks import TGrow
from vae3d.pretrained.lpips import LPIPSNet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("video", help="the video that was encoded")
parser.add_argument("latents", help="its latents, a tensor [1, C, t, h, w] in a .pt file")
parser.add_argument("out", help="folder for the trained model, and for right_third.mp4")
parser.add_argument("--variant", default="taecvx", help="of TAEHV, for these latents (taecvx: CogVideoX)")
parser.add_argument("--image-decoder", help="weights of TAESD, such as taesd_3.safetensors; without: random weights")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--crop", type=int, default=12, help="side of a crop, in latents")
parser.add_argument("--latent-frames", type=int, default=5, help="of a crop; of CogVideoX an odd number")
parser.add_argument("--lr", type=float, default=5e-4)
parser.add_argument("--lpips", type=float, default=0.0, help="weight of LPIPS (AlexNet) beside the absolute error")
args = parser.parse_args()

# %% Video [1, 3, T, H, W] in [-1, 1], latents [1, C, t, h, w], and a decoder with random weights
torch.manual_seed(0)
model = vae3d.build("taehv", f"model.variant={args.variant}", "model.decoder_channels=[64,64,64,64]").train()
video, fps = vae3d.read_video(args.video)
latents = torch.load(args.latents, map_location="cpu", weights_only=True).float()
stride, frame_stride = model.spec.space_stride, model.spec.time_stride
frames, crop_frames = video.shape[2], 1 + frame_stride * (args.latent_frames - 1)
height, width = latents.shape[3:]
if latents.shape[1] != model.spec.channels or video.shape[3:] != (height * stride, width * stride):
    raise SystemExit(f"latents {list(latents.shape)} are not {args.variant}'s of a video {list(video.shape)}")
train_width = width * 2 // 3


# %% Start from an image decoder
@torch.no_grad()
def start_from_image_decoder(image_model: vae3d.VideoAutoencoder) -> None:
    """Copy TAESD's layers. TAEHV's blocks read the frame before too, with weights of 0 at first; frames are repeated.

    TAEHV has no block at full resolution. The first layer reads other latents here: least squares give it the outputs
    that TAESD's has for the same frames.
    """
    ours = [layer for layer in model.decoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    growing = {layer.conv: layer.stride for layer in model.decoder.modules() if isinstance(layer, TGrow)}
    theirs = [layer for layer in image_model.decoder.modules() if isinstance(layer, torch.nn.Conv2d)]
    theirs = theirs[:-4] + theirs[-1:]
    for layer, copies in growing.items():
        layer.weight.copy_(torch.eye(layer.in_channels).repeat(copies, 1)[:, :, None, None])
    for layer, source in list(zip([layer for layer in ours if layer not in growing], theirs, strict=True))[1:]:
        layer.weight.zero_()[:, : source.in_channels] = source.weight
        if layer.bias is not None:
            layer.bias.copy_(source.bias)

    shown = video[:, :, :crop_frames, :, : train_width * stride]
    wanted = image_model.decoder[:2](frames_of(image_model.encode(shown).mode()))
    wanted = torch.cat([wanted[:1], wanted[1:].unflatten(0, (-1, frame_stride)).mean(1)])  # one per latent frame
    given = model.decoder[0](frames_of(latents[:, :, : args.latent_frames, :, :train_width]))
    patches = F.pad(F.unfold(given, 3, padding=1), (0, 0, 0, 1), value=1.0)  # the last one is for the bias
    solution = torch.linalg.lstsq(patches.mT.flatten(0, 1), wanted.flatten(2).mT.flatten(0, 1)).solution
    ours[0].weight.copy_(solution[:-1].mT.unflatten(1, ours[0].weight.shape[1:]))
    ours[0].bias.copy_(solution[-1])


if args.image_decoder:
    start_from_image_decoder(vae3d.load(args.image_decoder))


# %% Score: the right third, decoded from its latents
@torch.no_grad()
def decode_right_third() -> tuple[torch.Tensor, torch.Tensor]:
    """(original, decoded), both [1, 3, T, H, W] in [-1, 1]."""
    decoded = model.eval().decode(latents[..., train_width:], frames).clamp(-1, 1)
    model.train()
    return video[..., train_width * stride :], decoded


def print_scores(step: int) -> None:
    scores = vae3d.score(*decode_right_third())
    print(f"step {step}  psnr {scores['psnr']:.2f}  ssim {scores['ssim']:.4f}", flush=True)


# %% Train
lpips = LPIPSNet("alex").load() if args.lpips else None
optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=max(0.05, 2 / args.steps))
print_scores(0)
for step in range(1, args.steps + 1):
    t = int(torch.randint(latents.shape[2] - args.latent_frames + 1, ()))
    y = int(torch.randint(height - args.crop + 1, ()))
    x = int(torch.randint(train_width - args.crop + 1, ()))
    z = latents[:, :, t : t + args.latent_frames, y : y + args.crop, x : x + args.crop]
    # The decoder shows one frame of a crop's first latent: of the latent's frames the last, number 4 t.
    first, top, left, side = t * frame_stride, y * stride, x * stride, args.crop * stride
    clip = video[:, :, first : first + crop_frames, top : top + side, left : left + side]
    decoded = model.decode(z, crop_frames)
    loss = (decoded - clip).abs().mean()
    if lpips:
        loss = loss + args.lpips * lpips(frames_of(clip), frames_of(decoded)).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.decoder.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % max(1, args.steps // 10) == 0:
        print_scores(step)

# %% Save. vae3d.load(out) opens it.
vae3d.save(model.eval(), args.out)
vae3d.write_video(f"{args.out}/right_third.mp4", torch.cat(decode_right_third(), 4), fps)
