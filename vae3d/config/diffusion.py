"""Typed schema and checks of scripts/train_latent_diffusion.py and sample_latent_diffusion.py. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from vae3d.config.ranges import CHOICES, RANGES
from vae3d.config.schema import Data, Debug, Launcher, Optim, Run
from vae3d.config.validate import ConfigError, path_errors, resume_errors, typed


@dataclass
class Vae:
    """The frozen autoencoder whose latents are learned."""

    path: str = MISSING  # as vae3d.load takes it
    precision: str = "fp32"  # fp32, bf16, fp16: autocast over fp32 weights
    chunk_frames: int | None = None  # coded at once; null: what the model's stream takes
    sample: bool = True  # draw latents from the posterior, anew in every epoch; false: take its mean


@dataclass
class Averages:
    """Exponential moving averages of the weights: of the first rate are validation, samples and exports, which keep
    those of the others beside."""

    rates: list[float] = field(default_factory=lambda: [0.9999])
    warmup: bool = True
    every: int = 1
    device: str = "model"  # where they lie: model (beside the weights), cpu (pinned host memory)


@dataclass
class Training:
    max_steps: int = 100_000
    accumulate: int = 1  # micro-batches per optimizer step
    precision: str = "bf16"  # bf16, fp32: autocast over fp32 weights
    ema: Averages = field(default_factory=Averages)
    max_consecutive_skips: int = 10  # steps in a row that are skipped before the run stops
    scale_samples: int = 1000  # training latents whose mean and deviation are measured before the first step
    log_every: int = 10
    save_every: int = 1000
    save_failures: int = 3  # checkpoints in a row that cannot be written before the run stops
    keep: int = 3  # newest checkpoints and exports kept, two at least; 0 keeps all


@dataclass
class DiffusionValidation:
    every: int = 1000  # 0 turns validation off
    clips: int = 64  # held-out latents whose loss is measured
    draws: int = 8  # of time and noise for each, the same at every validation
    frames: int | None = None  # of held-out clips and of samples; null: data.frames.max; of a cache: its own
    samples: int = 16
    steps: int = 50
    method: str | None = None  # ddpm, ddim; euler of flow; null: the first of them
    guidance: float = 1.0
    shift: float = 1.0  # of flow's times: above 1 for more steps where there is much noise


@dataclass
class DiffusionConfig:
    """Train a diffusion model on the latents of an autoencoder, from a cache or encoded as they are needed."""

    run: Run = field(default_factory=Run)
    vae: Vae = field(default_factory=Vae)
    cache: str | None = None  # latents of scripts/encode_latents.py; null: encode the clips of `data`, batch by batch
    labels: str = "none"  # column (`label`), folder (its name), auto: column or else folder; of a cache: its own
    label_dropout: float = 0.1  # share of labels left out, for classifier-free guidance
    data: Data = field(default_factory=Data)  # cache: batch_size, workers, prefetch, flip, num_val_files, overfit
    denoiser: Any = MISSING  # kind, and settings of that network that are not its defaults: diffusion/build.py
    process: Any = MISSING  # kind, and settings of that process
    optim: Optim = field(default_factory=Optim)
    trainer: Training = field(default_factory=Training)
    validation: DiffusionValidation = field(default_factory=DiffusionValidation)
    logger: Any = MISSING
    launcher: Launcher = field(default_factory=Launcher)
    debug: Debug = field(default_factory=Debug)


@dataclass
class SampleConfig:
    """Draw samples of a latent diffusion model."""

    checkpoint: str = MISSING  # a run, or one of its exports
    out: str = MISSING  # folder
    vae: str | None = None  # the autoencoder, if it is no longer where the run found it
    ema: float | None = None  # rate of the averaged weights; null: the run's first
    count: int = 16
    classes: Any = field(default_factory=list)  # a name, or several, in turn; []: all classes in turn
    seed: int = 0
    num_frames: int | None = None  # null: as in the run's own samples
    height: int | None = None
    width: int | None = None
    method: str | None = None  # ddpm, ddim; euler of flow; null: the first of them
    steps: int = 50
    guidance: float = 1.0
    interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # noise levels with guidance
    clip: float | None = None  # bound of predicted latents, in standard deviations
    eta: float = 0.0  # noise of ddim
    shift: float = 1.0  # of flow's times
    write: list[str] = field(default_factory=lambda: ["grid", "files", "npz"])  # grid: of the first 100; npz: of images
    overwrite: bool = False  # samples that `out` holds
    against: str | None = None  # a cache of latents: how far the samples are from them, and a grid of theirs
    fps: float = 8.0
    batch_size: int = 16
    precision: str = "fp32"  # fp32, bf16: autocast over fp32 weights, of network and autoencoder
    device: str | None = None  # null: cuda if there is one


def _positive(value: Any) -> bool:
    return value is None or value > 0


def _share(value: float) -> bool:
    return 0 <= value < 1


TRAIN_CHOICES = {
    **{key: CHOICES[key] for key in CHOICES if key.startswith(("data.", "optim.", "launcher."))},
    "vae.precision": ("fp32", "bf16", "fp16"),
    "labels": ("none", "auto", "column", "folder"),
    "trainer.precision": ("bf16", "fp32"),
    "trainer.ema.device": ("model", "cpu"),
    "validation.method": (None, "ddpm", "ddim", "euler"),
    "debug.mode": (None, "dry"),
}
SHARED = ("data.", "optim.", "launcher.", "run.", "trainer.max", "trainer.acc", "trainer.log", "trainer.save")
TRAIN_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{key: RANGES[key] for key in RANGES if key.startswith(SHARED)},
    "vae.chunk_frames": (_positive, "at least 1, or null"),
    "label_dropout": (_share, "a share, from 0 to less than 1"),
    "trainer.keep": RANGES["trainer.keep"],
    "trainer.ema.rates": (
        lambda v: len(v) > 0 and all(0 < d < 1 for d in v) and len(set(v)) == len(v),
        "one rate or more, between 0 and 1, each once",
    ),
    "trainer.ema.every": RANGES["trainer.ema.every"],
    "trainer.max_consecutive_skips": RANGES["trainer.robust.max_consecutive_failures"],
    "trainer.save_failures": RANGES["trainer.robust.save_failures"],
    "trainer.scale_samples": (lambda v: v >= 64, "at least 64"),
    "validation.every": RANGES["validation.every"],
    **dict.fromkeys(
        [f"validation.{name}" for name in ("clips", "draws", "samples", "steps")],
        (lambda v: v >= 1, "at least 1"),
    ),
    "validation.frames": (_positive, "at least 1, or null"),
    "validation.guidance": (lambda v: v >= 0, "0 or more"),
    "validation.shift": (lambda v: v > 0, "positive"),
}
SAMPLE_CHOICES = {"method": TRAIN_CHOICES["validation.method"], "precision": ("fp32", "bf16")}
SAMPLE_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("num_frames", "height", "width", "clip"), (_positive, "positive, or null")),
    **dict.fromkeys(("count", "steps", "batch_size"), (lambda v: v >= 1, "at least 1")),
    **dict.fromkeys(("fps", "shift"), (lambda v: v > 0, "positive")),
    "guidance": (lambda v: v >= 0, "0 or more"),
    "interval": (lambda v: len(v) == 2 and 0 <= v[0] <= v[1] <= 1, "two noise levels in [0, 1], ascending"),
    "eta": (lambda v: 0 <= v <= 1, "0 (no noise) to 1 (as much as ddpm)"),
    "write": (lambda v: v and set(v) <= {"grid", "files", "npz"}, "a list of grid, files, npz"),
}


def check_diffusion(cfg: DictConfig) -> DiffusionConfig:
    """The configuration as typed objects; raises ConfigError naming every error but those that only the autoencoder
    and the data can tell."""
    cached = OmegaConf.select(cfg, "cache") is not None
    given = OmegaConf.select(cfg, "data.source.path", throw_on_missing=False)
    if cached:
        cfg = OmegaConf.merge(cfg, {"data": {"source": None}})
    config, errors = typed(cfg, DiffusionConfig, TRAIN_CHOICES, TRAIN_RANGES)
    if cached and given is not None:
        errors.append(f"cache={config.cache} and data.source.path={given}: latents come from one of them")
    errors += _rules(config, os.environ)
    paths = {"vae.path": config.vae.path, "cache": config.cache}
    if isinstance(config.data.source, dict):
        paths |= {f"data.source.{key}": config.data.source.get(key) for key in ("path", "root")}
    errors += [*path_errors(paths), *resume_errors(config.run.resume_from)]
    if errors:
        raise ConfigError(errors)
    return config


def _rules(config: DiffusionConfig, environment: Mapping[str, str]) -> Iterator[str]:
    data, trainer, optim = config.data, config.trainer, config.optim
    for key in ("denoiser", "process"):
        node = getattr(config, key)
        if node != MISSING and not (isinstance(node, dict) and "kind" in node):
            yield f"{key}={node} has no kind; use {key}=NAME of a file in conf/{key}"
    if data.frames.max < data.frames.min:
        yield f"data.frames.max={data.frames.max} is below data.frames.min={data.frames.min}; raise it"
    if data.depth.mapping is not None:
        yield f"data.depth.mapping={data.depth.mapping}: depth maps cannot be encoded here; use null"
    if optim.proximal:
        yield f"optim.proximal={optim.proximal} pulls towards a start, and this network has none; use 0"
    if optim.decay_start is not None and optim.decay_start < optim.warmup_steps:
        yield f"optim.decay_start={optim.decay_start} is before the end of optim.warmup_steps={optim.warmup_steps}"
    world = int(environment.get("WORLD_SIZE", config.launcher.nproc if config.launcher.name == "torchrun" else 1))
    share = world * trainer.accumulate
    if trainer.accumulate >= 1 and data.batch_size % share:
        above = -(-data.batch_size // share) * share
        yield (
            f"data.batch_size={data.batch_size} does not divide over {world} ranks x trainer.accumulate="
            f"{trainer.accumulate}; use a multiple of {share}, such as {above}"
        )
    if config.cache is not None and config.labels in ("column", "folder"):
        yield f"labels={config.labels} is of a source, and a cache has the labels it was encoded with; use auto or none"
    if config.validation.guidance != 1 and config.labels == "none":
        yield f"validation.guidance={config.validation.guidance} needs classes, and labels=none; use 1, or set labels"
    elif config.validation.guidance != 1 and config.label_dropout == 0:
        yield f"validation.guidance={config.validation.guidance} needs a label_dropout above 0; use 1, or set it"


def check_sampling(cfg: DictConfig) -> SampleConfig:
    """As check_diffusion."""
    config, errors = typed(cfg, SampleConfig, SAMPLE_CHOICES, SAMPLE_RANGES)
    if (config.height is None) != (config.width is None):
        errors.append("height and width go together; set both, or neither")
    errors += path_errors({"checkpoint": config.checkpoint, "vae": config.vae, "against": config.against})
    if errors:
        raise ConfigError(errors)
    return config


ConfigStore.instance().store("diffusion_schema", DiffusionConfig)
ConfigStore.instance().store("sample_schema", SampleConfig)
