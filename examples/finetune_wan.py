"""Fine-tune the decoder of a Wan VAE on your video, and use it in diffusers.

The encoder stays as it is, so the latents do, and every diffusion model of Wan's latents goes on working. For data
sets, better losses and several GPUs: vae3d train experiment=wan_finetune, see docs/wan.md.
"""

from __future__ import annotations

import argparse

import torch

import vae3d

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="Wan2.1_VAE.pth, Wan2.2_VAE.pth, a diffusers folder, or owner/name on the hub")
parser.add_argument("video", help="a video to train on")
parser.add_argument("out", help="folder to write, for AutoencoderKLWan.from_pretrained")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--frames", type=int, default=5, help="of a clip: 1, 5, 9, 13, ...")
parser.add_argument("--size", type=int, default=256, help="height and width of a clip in pixels")
parser.add_argument("--lr", type=float, default=1e-5)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

# %% The model. Only the decoder learns.
model = vae3d.from_pretrained(args.checkpoint).to(device).requires_grad_(False)
weights = [p.requires_grad_() for part in model.trainable_parts()["decoder"] for p in part.parameters()]
optimizer = torch.optim.AdamW(weights, lr=args.lr)
video = vae3d.read_video(args.video, height=args.size, width=args.size).frames

# %% The loop: encode, decode, compare
torch.manual_seed(0)
for step in range(args.steps):
    start = int(torch.randint(video.shape[2] - args.frames + 1, ()))
    clip = video[:, :, start : start + args.frames].to(device)
    rec = model(clip, sample=False).video
    loss = (rec - clip).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 10 == 0:
        print(f"step {step}  loss {loss.item():.4f}")

# %% Save as diffusers' AutoencoderKLWan
vae3d.save(model.cpu(), args.out, layout="diffusers")

# %% In diffusers. A pipeline takes it as vae:
# pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", vae=vae, torch_dtype=torch.bfloat16)
from diffusers import AutoencoderKLWan  # noqa: E402

vae = AutoencoderKLWan.from_pretrained(args.out)
clip = video[:, :, : args.frames]
with torch.inference_mode():
    theirs = vae(clip).sample.clamp(-1, 1)
    ours = vae3d.reconstruct(model, clip)
print(f"largest difference between diffusers and vae3d: {(theirs - ours).abs().max():.1e}")
