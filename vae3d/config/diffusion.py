"""Typed schema and checks of `vae3d train-diffusion` and `vae3d sample`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from vae3d.config.check import Rule, check, resume_issues
from vae3d.config.fields import STRICT, Float, Folder, Int, Interval, Precision, Rates, Strings, as_list, setting
from vae3d.config.issues import MISSING, ConfigIssue
from vae3d.config.schema import Buckets, Data, Debug, Launcher, Limits, Logger, Optim, Run, Steps, register
from vae3d.config.validate import (
    BUCKET_RULES,
    CLIP_RULES,
    DECAY_RULE,
    FRAMES_RULE,
    SIZE_RULE,
    TILE_RULE,
    batch_issues,
    logger_issues,
    precision_issues,
    reader_issues,
    source_paths,
)

Method = Literal["ddpm", "ddim", "euler"]


@dataclass(config=STRICT)
class Vae:
    """The frozen autoencoder whose latents are learned."""

    path: str = setting(MISSING, "Checkpoint, as `vae3d.load` takes it.")
    precision: Precision = setting("fp32", "Autocast over fp32 weights.")
    chunk_frames: Int | None = setting(None, "Frames encoded at once. null: as many as the model's stream takes.", ge=1)
    sample: bool = setting(True, "Sample latents from the posterior, again in every epoch. false: its mean.")


@dataclass(config=STRICT)
class Averages:
    """Exponential moving averages of the weights. Validation, samples and exports use the first rate; exports also keep
    the others."""

    rates: Rates = setting(lambda: [0.9999], "Decays of the averages.")
    warmup: bool = setting(True, "Limit the decays to (1 + step) / (10 + step).")
    every: Int = setting(1, "Steps between updates.", ge=1)
    device: Literal["model", "cpu"] = setting("model", "model: on the weights' device; cpu: in pinned host memory.")


@dataclass(config=STRICT)
class Training(Steps):
    """Steps, precision, checkpoints."""

    precision: Literal["bf16", "fp32"] = setting("bf16", "Autocast over fp32 weights.")
    ema: Averages = Field(default_factory=Averages)
    robust: Limits = Field(default_factory=Limits)
    scale_samples: Int = setting(1000, "Training latents measured before the first step: mean and deviation.", ge=64)
    any_scale: bool = setting(False, "Only warn of latents whose mean is not 0 or whose deviation is not 1.")


@dataclass(config=STRICT)
class DiffusionValidation:
    """Loss of held-out latents, and samples."""

    every: Int = setting(1000, "Steps between validations. 0: no validation.", ge=0)
    on_start: bool = setting(True, "Also validate before the first step. A resume does not repeat it.")
    clips: Int = setting(64, "Held-out latents.", ge=1)
    draws: Int = setting(8, "Times and noises for each latent, the same in every validation.", ge=1)
    frames: Int | None = setting(
        None, "Frames of held-out clips and of samples. null: data.frames.max. Not used for a cache.", ge=1
    )
    height: Int | None = setting(None, "Height of samples: a size that is trained on. null: the commonest.", ge=1)
    width: Int | None = setting(None, "Width of samples: a size that is trained on. null: the commonest.", ge=1)
    samples: Int = setting(16, "Samples drawn.", ge=1)
    steps: Int = setting(50, "Steps of the sampler.", ge=1)
    method: Method | None = setting(None, "ddpm or ddim for Gaussian diffusion, euler for flow. null: the first.")
    guidance: Float = setting(1.0, "Scale of classifier-free guidance. 1: off.", ge=0)
    shift: Float = setting(1.0, "Shift of flow's times. Above 1: more steps at high noise.", gt=0)


@dataclass(config=STRICT)
class DiffusionConfig:
    """Train a diffusion model on the latents of an autoencoder, from a cache or encoded batch by batch."""

    run: Run = Field(default_factory=Run)
    vae: Vae = Field(default_factory=Vae)
    cache: str | None = setting(None, "Latents of `vae3d encode`. null: encode the clips of `data`, batch by batch.")
    labels: Literal["none", "auto", "column", "folder"] = setting(
        "none", "column (`label`), folder (its name); auto: column or, without one, folder. A cache has its own."
    )
    label_dropout: Float = setting(0.1, "Share of labels left out, for classifier-free guidance.", ge=0, lt=1)
    data: Data = Field(default_factory=Data)
    denoiser: Any = setting(MISSING, "The network, a `_target_` node.")
    process: Any = setting(MISSING, "How noise is added and removed, a `_target_` node.")
    optim: Optim = Field(default_factory=Optim)
    trainer: Training = Field(default_factory=Training)
    validation: DiffusionValidation = Field(default_factory=DiffusionValidation)
    logger: Logger = Field(default_factory=Logger)
    launcher: Launcher = Field(default_factory=Launcher)
    debug: Debug = Field(default_factory=Debug)


@dataclass(config=STRICT)
class SampleConfig:
    """Draw samples from a latent diffusion model."""

    checkpoint: str = setting(MISSING, "A run, or one of its exports.")
    out: Folder = setting(MISSING, "Folder to write.")
    vae: str | None = setting(None, "The autoencoder, if it is no longer where the run found it.")
    ema: Float | None = setting(None, "Decay of the averaged weights. null: the run's first.")
    count: Int = setting(16, "Number of samples.", ge=1)
    classes: Strings = setting(list, "Class names, used in turn. []: all classes.")
    seed: Int = setting(0, "Seed of the samples.", ge=0)
    num_frames: Int | None = setting(None, "Frames of samples. null: as in the run's own samples.", ge=1)
    height: Int | None = setting(None, "Height of samples. null: as in the run's own samples.", ge=1)
    width: Int | None = setting(None, "Width of samples. null: as in the run's own samples.", ge=1)
    every_size: bool = setting(False, "`count` samples of each size that was trained on, in a folder for each.")
    method: Method | None = setting(None, "ddpm or ddim for Gaussian diffusion, euler for flow. null: the first.")
    steps: Int = setting(50, "Steps of the sampler.", ge=1)
    guidance: Float = setting(1.0, "Scale of classifier-free guidance. 1: off.", ge=0)
    interval: Interval = setting(lambda: [0.0, 1.0], "Noise levels with guidance, from 0, none, to 1, noise alone.")
    clip: Float | None = setting(None, "Bound of predicted latents, in standard deviations. null: none.", gt=0)
    tile: Int | None = setting(None, "Side of tiles that frames are decoded in, in pixels. null: no tiles.", ge=1)
    tile_overlap: Int | None = setting(
        None, "Pixels of overlap, blended linearly. null: exact, for networks that can be.", ge=0
    )
    eta: Float = setting(0.0, "Noise of ddim. 0: none; 1: as much as ddpm.", ge=0, le=1)
    shift: Float = setting(1.0, "Shift of flow's times. Above 1: more steps at high noise.", gt=0)
    write: Annotated[list[Literal["grid", "files", "npz"]], BeforeValidator(as_list), Field(min_length=1)] = setting(
        lambda: ["grid", "files", "npz"], "grid: of the first 100; files: one per sample; npz: of images only."
    )
    overwrite: bool = setting(False, "Replace samples that `out` holds.")
    against: str | None = setting(None, "Cache of latents to compare the samples with.")
    fps: Float = setting(8.0, "Frame rate of the written videos.", gt=0)
    batch_size: Int = setting(16, "Samples per forward pass.", ge=1)
    precision: Literal["fp32", "bf16"] = setting("fp32", "Autocast over fp32 weights, of network and autoencoder.")
    device: str | None = setting(None, "Where to compute. null: cuda if there is a GPU, else cpu.")


def _is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _cache_issues(config: DiffusionConfig) -> Iterator[ConfigIssue]:
    """Keys of data.buckets that a cache does not need: it has the sizes it was encoded with."""
    if config.cache is None or config.data.buckets is None:
        return
    default = Buckets()
    for key in ("shapes", "aspects", "frames", "multiple"):
        if (value := getattr(config.data.buckets, key)) != getattr(default, key):
            message = "a cache has the sizes it was encoded with"
            yield ConfigIssue(f"data.buckets.{key}", value, message, "leave it out; clips_multiple alone counts")


# fmt: off
TRAINING_RULES = [
    FRAMES_RULE, DECAY_RULE, *BUCKET_RULES, *CLIP_RULES, batch_issues, resume_issues, logger_issues, reader_issues,
    precision_issues, _cache_issues,
    Rule("data.source", lambda c: c.cache is None and c.data.source is None and not c.data.sources,
         "is not given, and neither are data.sources or a cache", "set one of them"),
    Rule("validation.height", lambda c: (c.validation.height is None) != (c.validation.width is None),
         "goes together with validation.width", "set both, or neither"),
    Rule("denoiser", lambda c: not _is_node(c.denoiser), "has no `_target_`", "use a file of conf/denoiser"),
    Rule("process", lambda c: not _is_node(c.process), "has no `_target_`", "use a file of conf/process"),
    Rule("data.depth.mapping", lambda c: c.data.depth.mapping is not None, "depth maps have no latents", "use null"),
    Rule("optim.proximal", lambda c: c.optim.proximal, "the network has no initial weights to stay near", "use 0"),
    Rule("data.clips_per_file", lambda c: c.cache is not None and c.data.clips_per_file > 1,
         "is of videos, and a cache is read latent by latent", "use 1"),
    Rule("data.sources", lambda c: c.cache is not None and c.data.sources,
         "are not read, since cache={c.cache}", "use one of them"),
    Rule("labels", lambda c: c.cache is not None and c.labels in ("column", "folder"),
         "a cache has the labels it was encoded with", "use auto or none"),
    Rule("validation.guidance", lambda c: c.validation.guidance != 1 and c.labels == "none",
         "needs classes, and labels=none", "use 1, or set labels"),
    Rule("validation.guidance",
         lambda c: c.validation.guidance != 1 and c.labels != "none" and c.label_dropout == 0,
         "needs a label_dropout above 0", "use 1, or set it"),
]
# fmt: on


def check_diffusion(cfg: DictConfig, issues: Sequence[ConfigIssue] = ()) -> DiffusionConfig:
    """The configuration as typed objects. Raises ConfigError with every error, except those of the autoencoder and the
    data."""
    rules = TRAINING_RULES
    if (cache := OmegaConf.select(cfg, "cache")) is not None:
        given = OmegaConf.select(cfg, "data.source.path", throw_on_missing=False)
        cfg = OmegaConf.merge(cfg, {"data": {"source": None}})
        message = f"is not read, since cache={cache}"
        rules = [*rules, Rule("data.source", lambda _: given is not None, message, "use one of them")]
    return check(cfg, issues, schema=DiffusionConfig, rules=rules, paths=_training_paths)


def _training_paths(config: DiffusionConfig) -> dict[str, Any]:
    return {"vae.path": config.vae.path, "cache": config.cache, **source_paths(config.data)}


check_sampling = partial(
    check,
    schema=SampleConfig,
    rules=[
        SIZE_RULE,
        TILE_RULE,
        Rule(
            "every_size",
            lambda c: c.every_size and (c.num_frames, c.height, c.width) != (None, None, None),
            "takes the sizes of training, and num_frames, height or width is set",
            "use null for them, or false",
        ),
    ],
    paths=lambda c: {"checkpoint": c.checkpoint, "vae": c.vae, "against": c.against},
)
register("diffusion_defaults", DiffusionConfig)
register("sample_defaults", SampleConfig)
