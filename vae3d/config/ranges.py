"""What the settings of train.py and infer.py may be, one by one; what goes together is in check.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vae3d.schedules import SCHEDULES

EXAMPLES = {
    "data.source.path": "data.source.path=/path/to/videos.csv",
    "data.source.root": "data.source.root=/path/to/areas (ROOT/AREA/ROOM/output/panorama_0000.png)",
    "stage.init_from": "stage.init_from=CHECKPOINT (a run folder, an export, published weights) or random",
    "stage.init_from.spatial_vae": "stage.init_from.spatial_vae=/path/to/2D-VAE (diffusers folder, LDM file or export)",
    "model.variant": "model.variant=taew2_1 (or taehv, taecvx, taew2_2, ...; see conf/model/taehv.yaml)",
    "teacher.path": "teacher.path=PATH (a run folder, an export, published weights, diffusers' folder) or teacher=none",
    "checkpoint": "checkpoint=PATH (a run folder, an export, published weights)",
    "source": "source=PATH (a CSV, parquet or JSON file, a folder, or one video)",
    "cache": "cache=FOLDER of the latents (the same command goes on with it)",
    "save_dir": "save_dir=PREFIX of the folders PREFIX_ori, PREFIX_rec, PREFIX_spatial",
}
# The model is built and tried only if these are sound.
MODEL_NEEDS = ("model", "loss", "teacher", "adversary", "stage.train", "data.frames", "data.height", "data.width")
CHOICES = {
    "loss.reduction": ("sum", "mean"),
    "data.crop": ("center", "random"),
    "data.reader": ("auto", "pyav", "decord"),
    "data.sampling": ("contiguous", "first_last_random", "strided"),
    "data.depth.mapping": (None, "log", "inverse"),
    "data.depth.bounds": ("fixed", "percentiles"),
    "optim.schedule": SCHEDULES,
    "trainer.precision": ("bf16", "fp16", "fp32"),
    "trainer.ema.device": ("model", "cpu"),
    "trainer.strategy.name": ("replicated", "deepspeed"),
    "teacher.precision": ("bf16", "fp16", "fp32"),
    "teacher.decode": ("teacher", "own", "mixed"),
    "launcher.name": ("local", "torchrun"),
    "debug.mode": (None, "dry", "profile"),
}
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "stage.latent_noise": (lambda v: v >= 0, "0 (off) or more"),
    "loss.logvar_lr": (lambda v: v > 0, "positive"),
    "data.height": (lambda v: v >= 1, "at least 1"),
    "data.width": (lambda v: v >= 1, "at least 1"),
    "data.frames.min": (lambda v: v >= 1, "at least 1"),
    "data.frames.step": (lambda v: v >= 1, "at least 1"),
    "data.frames.images": (lambda v: 0 <= v <= 1, "a probability, 0 to 1"),
    "data.stride": (lambda v: v >= 1, "at least 1"),
    "data.min_side": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "data.fps": (lambda v: v is None or v > 0, "positive, or null"),
    "data.depth.near": (lambda v: v > 0, "positive"),
    "data.depth.unit": (lambda v: v > 0, "positive"),
    "data.batch_size": (lambda v: v >= 1, "at least 1"),
    "data.workers": (lambda v: v >= 0, "0 or more"),
    "data.prefetch": (lambda v: v >= 1, "at least 1"),
    "data.timeout": (lambda v: v >= 0, "0 (for ever) or more"),
    "data.num_val_files": (lambda v: v >= 0, "0 or more"),
    "data.max_broken": (lambda v: 0 <= v < 1, "a share, from 0 to less than 1"),
    "optim.lr": (lambda v: v > 0, "positive"),
    "optim.betas": (lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers from 0 to less than 1"),
    "optim.eps": (lambda v: v > 0, "positive"),
    "optim.weight_decay": (lambda v: v >= 0, "0 or more"),
    "optim.min_lr": (lambda v: v >= 0, "0 or more"),
    "optim.cycles": (lambda v: v >= 1, "at least 1"),
    "optim.power": (lambda v: v > 0, "positive"),
    "optim.warmup_steps": (lambda v: v >= 0, "0 or more"),
    "optim.proximal": (lambda v: v >= 0, "0 (off) or more"),
    "optim.grad_clip": (lambda v: v > 0, "positive"),
    "trainer.max_steps": (lambda v: v >= 1, "at least 1"),
    "trainer.accumulate": (lambda v: v >= 1, "at least 1"),
    "trainer.log_every": (lambda v: v >= 1, "at least 1"),
    "trainer.save_every": (lambda v: v >= 0, "0 (never) or more"),
    "trainer.keep": (lambda v: v >= 0, "0 (all) or more"),
    "trainer.ema.decay": (lambda v: 0 <= v < 1, "0 (off) to less than 1"),
    "trainer.ema.every": (lambda v: v >= 1, "at least 1"),
    "trainer.spike.factor": (lambda v: v is None or v > 1, "more than 1, or null"),
    "trainer.spike.warmup": (lambda v: v >= 0, "0 or more"),
    "trainer.spike.max_consecutive_skips": (lambda v: v >= 1, "at least 1"),
    "trainer.robust.max_consecutive_failures": (lambda v: v >= 0, "0 (for ever) or more"),
    "trainer.robust.zero_gradient": (lambda v: v >= 0, "0 (for ever) or more"),
    "trainer.robust.save_failures": (lambda v: v >= 0, "0 (for ever) or more"),
    "trainer.robust.compact_gib": (lambda v: v is None or v >= 0, "0 or more, or null"),
    "trainer.publish.prefix": (lambda v: v is None or (v and "/" not in v), "how file names begin, without /, or null"),
    "trainer.publish.measure_scale": (lambda v: v >= 0, "0 (not measured) or more"),
    "validation.every": (lambda v: v >= 0, "0 (never) or more"),
    "validation.slow_metrics_every": (lambda v: v >= 0, "0 (only after the last step) or more"),
    "validation.videos": (lambda v: v >= 0, "0 (none) or more"),
    "validation.clips": (lambda v: v >= 1, "at least 1"),
    "validation.frames": (lambda v: v >= 1, "at least 1"),
    "debug.steps": (lambda v: v >= 1, "at least 1"),
    "launcher.nproc": (lambda v: v >= 1, "at least 1"),
    "run.name": (lambda v: "/" not in v and v not in ("", ".", ".."), "the name of a folder, without /"),
}
INFER_CHOICES = {
    "codec": ("lossless", "h264"),
    "precision": ("bf16", "fp16", "fp32"),
    "on_error": ("stop", "skip"),
    "reader": ("auto", "pyav", "decord"),
    "split": (None, "train", "val", "test"),
}
INFER_RANGES = {
    "height": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "width": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "save_dir": (
        lambda v: Path(v).name not in ("", ".", "..") and not v.endswith("/"),
        "a prefix, without / at its end",
    ),
    "start": (lambda v: v >= 0, "0 or more"),
    "stride": (lambda v: v >= 1, "at least 1"),
    "num_frames": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "num_samples": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "frame_batch": (lambda v: v >= 1, "at least 1"),
    "tile": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "tile_overlap": (lambda v: v is None or v >= 0, "0 or more, or null"),
    "memory_gib": (lambda v: v is None or v > 0, "positive, or null"),
    "fps": (lambda v: v is None or v > 0, "positive, or null"),
}
COMPARE_CHOICES = {**INFER_CHOICES, "teacher.precision": ("bf16", "fp16", "fp32")}
COMPARE_RANGES = {**INFER_RANGES, "strip": (lambda v: v >= 1, "at least 1")}
