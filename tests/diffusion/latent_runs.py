"""Tiny autoencoders with their measured scale, caches of them, and configurations that train on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests import tiny
from tests.latents import caches
from vae3d import loading
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import sample as sample_command
from vae3d.commands import train_diffusion
from vae3d.config.diffusion import DiffusionConfig, SampleConfig, check_diffusion, check_sampling
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.loader import read_tables
from vae3d.data.sources.open_source import open_source
from vae3d.latents.scale import measure, rescaled, spread_clips
from vae3d.loading import open_codec
from vae3d.training.diffusion_trainer import DiffusionTrainer

SMALL = [
    "data.workers=0",
    "data.batch_size=4",
    "logger=none",
    "trainer.precision=fp32",
    "trainer.max_steps=4",
    "trainer.log_every=2",
    "trainer.save_every=2",
    "trainer.scale_samples=64",
    "trainer.ema.rates=[0.9]",
    "validation.every=0",
    "validation.steps=4",
    "validation.samples=2",
    "optim.lr=1e-3",
]
NETWORKS = {
    "unet": ["denoiser=unet", "denoiser.width=16", "denoiser.blocks=1", "denoiser.head_channels=16"],
    "video_transformer": ["denoiser=video_transformer", *(f"denoiser.{s}" for s in ("width=24", "heads=2", "depth=2"))],
    "wan_transformer": ["denoiser=wan_transformer", *(f"denoiser.{s}" for s in ("width=24", "heads=2", "depth=2"))],
}


def pictures(folder: Path, count: int = 6, size: int = 64) -> Path:
    """Smooth images of two classes, square, in folders train and val, and images.csv."""
    rows = ["path,label,split"]
    for number, name in enumerate(("cat", "dog")):
        for i in range(count):
            split = "val" if i == 0 else "train"
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            path = f"{split}/{name}/{i}.png"
            Image.fromarray(tiny.frames(1, size, size, seed=10 * number + i)[0]).save(folder / path)
            rows.append(f"{path},{name},{split}")
    (folder / "images.csv").write_text("\n".join(rows) + "\n")
    return folder


def vae(
    name: str,
    folder: Path,
    source: Path,
    *overrides: str,
    size: int = 64,
    frames: int = 1,
    seed: int = 0,
    **scaled: Any,
) -> Path:
    """An export of a random autoencoder, of image VAEs with posteriors as narrow as trained ones have; scaled=False
    leaves its factors as they are."""
    config = loading.model_config(name, *tiny.MODEL[name], *overrides)
    torch.manual_seed(seed)
    model = loading.instantiate(config).eval()
    if name == "spatial":
        with torch.no_grad():
            model.module.quant_conv.weight[4:], model.module.quant_conv.bias[4:] = 0.0, -6.0
    checkpoint = Checkpoint(config, model.state_dict(), folder, "export")
    if scaled.get("scaled", True):
        settings = ClipSettings(size, size)
        table = read_tables(open_source(source), settings, num_val_files=0, max_broken=0.0).train
        statistics = measure(model, spread_clips(table, settings, frames, 64, []))
        checkpoint = rescaled(checkpoint, model, statistics, per_channel=True)
    write_export(checkpoint, folder)
    return folder


def cache(source: Path, folder: Path, vae: Path, size: int = 64, **settings: Any) -> Path:
    codec = open_codec(vae, pixel_range="uint8")
    return caches.made(source, folder, codec, height=size, width=size, dtype="fp32", **settings)


def config(*overrides: str, network: str = "unet") -> DiffusionConfig:
    return check_diffusion(tiny.compose(*SMALL, *NETWORKS[network], "run.name=test", *overrides, config="diffusion"))


def trainer(folder: Path, *overrides: str, network: str = "unet") -> DiffusionTrainer:
    return train_diffusion.build_trainer(config(*overrides, network=network), folder)


def sample_config(*overrides: str) -> SampleConfig:
    return check_sampling(tiny.compose("device=cpu", "steps=4", "count=4", *overrides, config="sample"))


def sample(*overrides: str) -> None:
    sample_command.run(sample_config(*overrides))
