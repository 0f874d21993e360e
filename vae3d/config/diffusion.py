"""Typed schema and checks of scripts/train_latent_diffusion.py and sample_latent_diffusion.py. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from vae3d.config.check import Rule, check, resume_issues
from vae3d.config.fields import STRICT, Float, Int, Interval, Precision, Rates, Strings, as_list
from vae3d.config.issues import MISSING
from vae3d.config.schema import Data, Debug, Launcher, Optim, Run, register
from vae3d.config.validate import DECAY_RULE, FRAMES_RULE, SIZE_RULE, batch_issues, source_paths

Method = Literal["ddpm", "ddim", "euler"]


@dataclass(config=STRICT)
class Vae:
    """The frozen autoencoder whose latents are learned."""

    path: str = Field(MISSING, description="Checkpoint, as `vae3d.load` takes it.")
    precision: Precision = Field("fp32", description="Autocast over fp32 weights.")
    chunk_frames: Int | None = Field(
        None, ge=1, description="Frames encoded at once. null: as many as the model's stream takes."
    )
    sample: bool = Field(True, description="Sample latents from the posterior, again in every epoch. false: its mean.")


@dataclass(config=STRICT)
class Averages:
    """Exponential moving averages of the weights. Validation, samples and exports use the first rate; exports also keep
    the others."""

    rates: Rates = Field(default_factory=lambda: [0.9999], description="Decays.")
    warmup: bool = Field(True, description="Limit the decays to (1 + step) / (10 + step).")
    every: Int = Field(1, ge=1, description="Steps between updates.")
    device: Literal["model", "cpu"] = Field(
        "model", description="model: on the weights' device; cpu: in pinned host memory."
    )


@dataclass(config=STRICT)
class Training:
    """Steps, precision, checkpoints."""

    max_steps: Int = Field(100_000, ge=1, description="Optimizer steps.")
    accumulate: Int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="Autocast over fp32 weights.")
    ema: Averages = Field(default_factory=Averages)
    max_consecutive_skips: Int = Field(
        10, ge=0, description="Skipped steps in a row before the run stops. 0: no limit."
    )
    scale_samples: Int = Field(
        1000,
        ge=64,
        description="Training latents whose mean and standard deviation are measured before the first step.",
    )
    log_every: Int = Field(10, ge=1, description="Steps between log lines.")
    save_every: Int = Field(1000, ge=0, description="Steps between checkpoints. 0: none.")
    save_failures: Int = Field(
        3, ge=0, description="Checkpoints in a row that cannot be written before the run stops. 0: no limit."
    )
    keep: Int = Field(3, ge=0, description="Newest checkpoints and exports kept, at least two. 0: all.")


@dataclass(config=STRICT)
class DiffusionValidation:
    """Loss of held-out latents, and samples."""

    every: Int = Field(1000, ge=0, description="Steps between validations. 0: no validation.")
    clips: Int = Field(64, ge=1, description="Held-out latents.")
    draws: Int = Field(8, ge=1, description="Times and noises for each latent, the same in every validation.")
    frames: Int | None = Field(
        None, ge=1, description="Frames of held-out clips and of samples. null: data.frames.max. Not used for a cache."
    )
    samples: Int = Field(16, ge=1, description="Samples drawn.")
    steps: Int = Field(50, ge=1, description="Steps of the sampler.")
    method: Method | None = Field(
        None, description="ddpm or ddim for Gaussian diffusion, euler for flow. null: the first."
    )
    guidance: Float = Field(1.0, ge=0, description="Scale of classifier-free guidance. 1: off.")
    shift: Float = Field(1.0, gt=0, description="Of flow's times. Above 1: more steps at high noise.")


@dataclass(config=STRICT)
class DiffusionConfig:
    """Train a diffusion model on the latents of an autoencoder, from a cache or encoded batch by batch."""

    run: Run = Field(default_factory=Run)
    vae: Vae = Field(default_factory=Vae)
    cache: str | None = Field(
        None, description="Latents of scripts/encode_latents.py. null: encode the clips of `data`, batch by batch."
    )
    labels: Literal["none", "auto", "column", "folder"] = Field(
        "none",
        description="Class of a clip: column (`label`) or folder (its name); auto: the column if there is one, "
        "else the folder. A cache has its own.",
    )
    label_dropout: Float = Field(0.1, ge=0, lt=1, description="Share of labels left out, for classifier-free guidance.")
    data: Data = Field(default_factory=Data)
    denoiser: Any = Field(MISSING, description="The network, a `_target_` node.")
    process: Any = Field(MISSING, description="How noise is added and removed, a `_target_` node.")
    optim: Optim = Field(default_factory=Optim)
    trainer: Training = Field(default_factory=Training)
    validation: DiffusionValidation = Field(default_factory=DiffusionValidation)
    logger: Any = Field(MISSING, description="Where metrics go, a `_target_` node.")
    launcher: Launcher = Field(default_factory=Launcher)
    debug: Debug = Field(default_factory=Debug)


@dataclass(config=STRICT)
class SampleConfig:
    """Draw samples from a latent diffusion model."""

    checkpoint: str = Field(MISSING, description="A run, or one of its exports.")
    out: str = Field(MISSING, description="Folder to write.")
    vae: str | None = Field(None, description="The autoencoder, if it is no longer where the run found it.")
    ema: Float | None = Field(None, description="Decay of the averaged weights. null: the run's first.")
    count: Int = Field(16, ge=1, description="Number of samples.")
    classes: Strings = Field(default_factory=list, description="Class names, used in turn. []: all classes.")
    seed: Int = Field(0, ge=0, description="Seed of the samples.")
    num_frames: Int | None = Field(None, ge=1, description="null: as in the run's own samples.")
    height: Int | None = Field(None, ge=1, description="null: as in the run's own samples.")
    width: Int | None = Field(None, ge=1, description="null: as in the run's own samples.")
    method: Method | None = Field(
        None, description="ddpm or ddim for Gaussian diffusion, euler for flow. null: the first."
    )
    steps: Int = Field(50, ge=1, description="Steps of the sampler.")
    guidance: Float = Field(1.0, ge=0, description="Scale of classifier-free guidance. 1: off.")
    interval: Interval = Field(default_factory=lambda: [0.0, 1.0], description="Noise levels with guidance.")
    clip: Float | None = Field(
        None, gt=0, description="Bound of predicted latents, in standard deviations. null: none."
    )
    eta: Float = Field(0.0, ge=0, le=1, description="Noise of ddim. 0: none; 1: as much as ddpm.")
    shift: Float = Field(1.0, gt=0, description="Of flow's times. Above 1: more steps at high noise.")
    write: Annotated[list[Literal["grid", "files", "npz"]], BeforeValidator(as_list)] = Field(
        default_factory=lambda: ["grid", "files", "npz"],
        min_length=1,
        description="grid: of the first 100; files: one per sample; npz: of images only.",
    )
    overwrite: bool = Field(False, description="Replace samples that `out` holds.")
    against: str | None = Field(None, description="Cache of latents to compare the samples with.")
    fps: Float = Field(8.0, gt=0, description="Frame rate of the written videos.")
    batch_size: Int = Field(16, ge=1, description="Samples per forward pass.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Autocast over fp32 weights, of network and autoencoder."
    )
    device: str | None = Field(None, description="null: cuda if there is a GPU.")


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


# fmt: off
TRAINING_RULES = [
    FRAMES_RULE, DECAY_RULE, batch_issues, resume_issues,
    Rule("denoiser", lambda c: not _is_node(c.denoiser), "has no `_target_`", "use a file of conf/denoiser"),
    Rule("process", lambda c: not _is_node(c.process), "has no `_target_`", "use a file of conf/process"),
    Rule("data.depth.mapping", lambda c: c.data.depth.mapping is not None, "depth maps have no latents", "use null"),
    Rule("optim.proximal", lambda c: c.optim.proximal, "the network has no initial weights to stay near", "use 0"),
    Rule("labels", lambda c: c.cache is not None and c.labels in ("column", "folder"),
         "a cache has the labels it was encoded with", "use auto or none"),
    Rule("validation.guidance", lambda c: c.validation.guidance != 1 and c.labels == "none",
         "needs classes, and labels=none", "use 1, or set labels"),
    Rule("validation.guidance",
         lambda c: c.validation.guidance != 1 and c.labels != "none" and c.label_dropout == 0,
         "needs a label_dropout above 0", "use 1, or set it"),
]
# fmt: on


def check_diffusion(cfg: DictConfig) -> DiffusionConfig:
    """The configuration as typed objects. Raises ConfigError with every error, except those of the autoencoder and the
    data."""
    rules = TRAINING_RULES
    if (cache := OmegaConf.select(cfg, "cache")) is not None:
        given = OmegaConf.select(cfg, "data.source.path", throw_on_missing=False)
        cfg = OmegaConf.merge(cfg, {"data": {"source": None}})
        message = f"is not read, since cache={cache}"
        rules = [*rules, Rule("data.source", lambda _: given is not None, message, "use one of them")]
    return check(
        cfg, DiffusionConfig, rules, lambda c: {"vae.path": c.vae.path, "cache": c.cache, **source_paths(c.data.source)}
    )


def check_sampling(cfg: DictConfig) -> SampleConfig:
    """The configuration as typed objects. Raises ConfigError with every error."""
    return check(
        cfg, SampleConfig, [SIZE_RULE], lambda c: {"checkpoint": c.checkpoint, "vae": c.vae, "against": c.against}
    )


register("diffusion_defaults", DiffusionConfig)
register("sample_defaults", SampleConfig)
