"""Typed schema of train.py and infer.py. docs/reference.md is generated from it.

Nodes typed Any hold a `_target_` (model, loss term, adversary, data source, logger): their arguments are those of that
class. All other keys are closed. `???` (MISSING) marks what only the user can give.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pydantic import Field
from pydantic.dataclasses import dataclass

from vae3d.config.fields import (
    STRICT,
    Betas,
    Float,
    FolderName,
    Int,
    PathPrefix,
    Precision,
    Ramp,
    Reader,
    Split,
    Strings,
)
from vae3d.config.issues import MISSING

CONF = Path(__file__).parents[1] / "conf"  # the project's conf/, which an installed package carries inside


@dataclass(config=STRICT)
class Run:
    """The run's folder, and how it resumes."""

    name: FolderName = Field(MISSING, description="Folder under `run.root`. The same name resumes.")
    root: str = Field("runs", description="Folder of all runs.")
    sweep: str = Field("sweep", description="Folder under `run.root` for the jobs of a multirun.")
    seed: Int = Field(0, ge=0, description="Seed of weights, data order, crops and noise.")
    resume: bool = Field(True, description="false: stop if the folder already holds checkpoints.")
    resume_from: str | None = Field(
        None,
        description="latest, checkpoint-5500, RUN/checkpoint-5500, a run, a step folder or a state file. "
        "null: the newest checkpoint, if there is one.",
    )


@dataclass(config=STRICT)
class Stage:
    """Which parts train, and from which weights they start."""

    name: str = Field(MISSING, description="Name of the stage, for logs.")
    train: dict[str, Annotated[Float, Field(gt=0)]] = Field(
        MISSING,
        description="Part of the model -> its multiple of `optim.lr`. All other parts are frozen, in eval mode.",
    )
    init_from: Any = Field(MISSING, description="random, a checkpoint, or {submodule: checkpoint}.")
    no_micro_batching: bool = Field(
        False, description="Train on whole clips where the model would otherwise split them into chunks."
    )
    latent_noise: Float = Field(
        0.0,
        ge=0,
        description="Maximum noise added to the decoder's input in training, in standard deviations of the "
        "clip's latents. 0: off.",
    )


@dataclass(config=STRICT)
class LossTerm:
    """One term of the loss."""

    term: Any = Field(MISSING, description="The term, a `_target_` node.")
    weight: Float = Field(1.0, ge=0, description="Weight of the term.")
    ramp: Ramp = Field(
        default_factory=lambda: [0, 0],
        description="[first step, last step] over which the weight rises linearly from 0.",
    )
    log: bool = Field(False, description="Compute and log the term even at weight 0.")
    reduction: Literal["sum", "mean"] | None = Field(None, description="As `loss.reduction`, which null means.")


@dataclass(config=STRICT)
class Loss:
    """Weighted sum of terms."""

    reduction: Literal["sum", "mean"] = Field(
        MISSING, description="sum: over the elements of a frame (KL: of a clip); mean: over elements."
    )
    terms: dict[str, LossTerm] = Field(MISSING, description="Name, as in the logs -> term.")
    pixel_weight: Any = Field(
        None, description="Weight of each pixel row in the pixel terms, a `_target_` node such as ErpCosine. null: 1."
    )
    logvar: Float | None = Field(
        None, description="Initial log-variance of the pixel terms, which is then learned. null: fixed at 0."
    )
    logvar_lr: Float = Field(1.0, gt=0, description="Multiple of `optim.lr` for the log-variance.")


@dataclass(config=STRICT)
class Frames:
    """Frames per clip, drawn once per step: min, min + step, ... max, all equally likely."""

    min: Int = Field(17, ge=1, description="Fewest frames.")
    max: Int = Field(17, description="Most frames.")
    step: Int = Field(1, ge=1, description="Distance between the frame counts.")
    images: Float = Field(0.0, ge=0, le=1, description="Probability of a step on single frames.")
    fit: bool = Field(False, description="Take the largest count that all clips of the step have instead of a draw.")


@dataclass(config=STRICT)
class Depth:
    """16-bit depth maps instead of colours, where `mapping` is not null."""

    mapping: Literal["log", "inverse"] | None = Field(None, description="Mapping of metres to [-1, 1]. null: colours.")
    bounds: Literal["fixed", "percentiles"] = Field(
        "fixed", description="fixed: `near` and `far`; percentiles: the 2nd and 98th of each clip."
    )
    near: Float = Field(0.1, gt=0, description="Metres.")
    far: Float = Field(20.0, description="Metres.")
    unit: Float = Field(1000.0, gt=0, description="Stored value of one metre. The stored value 0 is invalid.")


@dataclass(config=STRICT)
class Data:
    """Which clips are read, and how they are cut."""

    source: Any = Field(MISSING, description="Where the files are, a `_target_` node.")
    height: Int = Field(256, ge=1, description="Pixels.")
    width: Int = Field(256, ge=1, description="Pixels.")
    frames: Frames = Field(default_factory=Frames)
    stride: Int = Field(1, ge=1, description="Take every n-th frame.")
    fps: Float | None = Field(
        None, gt=0, description="Reduce faster videos to this frame rate. Slower ones keep theirs. null: keep all."
    )
    sampling: Literal["contiguous", "first_last_random", "strided"] = Field(
        "contiguous",
        description="Which frames of a file a clip takes. first_last_random: the first, the last and a random "
        "draw between; strided: the largest stride that fits.",
    )
    short_side: Int | None = Field(
        None, description="Resize the shorter side to this before cropping. null: the smallest size the crop fits in."
    )
    min_side: Int | None = Field(
        None, ge=1, description="Skip files whose shorter side has fewer pixels. null: enlarge them."
    )
    crop: Literal["center", "random"] = Field("center", description="Position of the crop.")
    flip: bool = Field(False, description="Mirror half of the clips.")
    panorama: bool = Field(False, description="Files are equirectangular panoramas (2:1), never cropped.")
    roll: bool = Field(False, description="Rotate panoramas by a random number of columns.")
    depth: Depth = Field(default_factory=Depth)
    reader: Reader = Field("auto", description="Library that decodes videos.")
    batch_size: Int = Field(8, ge=1, description="Clips per optimizer step, over all ranks.")
    workers: Int = Field(4, ge=0, description="Reader processes per rank. 0: read in the training process.")
    prefetch: Int = Field(2, ge=1, description="Batches each worker reads ahead.")
    timeout: Float = Field(
        900.0, ge=0, description="Seconds without a batch from the workers after which the run stops. 0: never."
    )
    num_val_files: Int = Field(
        16, ge=0, description="Files held out for validation where the table has no `split` column."
    )
    max_broken: Float = Field(0.2, ge=0, lt=1, description="Stop when a larger share of reads fails.")
    overfit: bool = Field(False, description="Train on the first step's clips only.")


@dataclass(config=STRICT)
class Optim:
    """AdamW and its learning rate."""

    lr: Float = Field(1e-5, gt=0, description="Learning rate.")
    betas: Betas = Field(default_factory=lambda: [0.9, 0.999], description="Of AdamW.")
    eps: Float = Field(1e-8, gt=0, description="Of AdamW.")
    weight_decay: Float = Field(0.0, ge=0, description="Of AdamW.")
    warmup_steps: Int = Field(0, ge=0, description="Steps over which the rate rises linearly from 0, in all schedules.")
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"] = (
        Field("constant", description="Learning rate after the warm-up.")
    )
    decay_start: Int | None = Field(None, description="First step of the decay. null: right after the warm-up.")
    min_lr: Float = Field(0.0, ge=0, description="Learning rate at the end of the decay.")
    cycles: Int = Field(1, ge=1, description="Number of decays of cosine_with_restarts.")
    power: Float = Field(1.0, gt=0, description="Exponent of polynomial.")
    grad_clip: Float = Field(1.0, gt=0, description="Maximum norm of the gradient.")
    proximal: Float = Field(
        0.0, ge=0, description="lambda of lambda * sum (theta - theta0)^2, theta0 being the initial weights. 0: off."
    )


@dataclass(config=STRICT)
class Ema:
    """Exponential moving average of the weights."""

    decay: Float = Field(0.999, ge=0, lt=1, description="0: no EMA.")
    warmup: bool = Field(True, description="Limit the decay to (1 + step) / (10 + step).")
    every: Int = Field(1, ge=1, description="Steps between updates.")
    device: Literal["model", "cpu"] = Field(
        "model", description="model: on the weights' device; cpu: in pinned host memory."
    )


@dataclass(config=STRICT)
class Spike:
    """Skips steps whose loss is too large."""

    factor: Float | None = Field(
        None, gt=1, description="Skip a step whose loss is above this multiple of the running mean. null: off."
    )
    warmup: Int = Field(100, ge=0, description="Steps taken before the first one may be skipped.")
    max_consecutive_skips: Int = Field(
        20,
        ge=1,
        description="After so many skips in a row a finite loss becomes the new mean; one that is not finite "
        "stops the run.",
    )


@dataclass(config=STRICT)
class Validation:
    """Metrics on held-out files."""

    every: Int = Field(1000, ge=0, description="Steps between validations. 0: no validation.")
    clips: Int = Field(16, ge=1, description="Held-out clips.")
    frames: Int = Field(17, ge=1, description="Frames of each clip.")
    metrics: Strings = Field(default_factory=lambda: ["psnr", "ssim"], description="See docs/score.md.")
    slow_metrics: Strings = Field(default_factory=list, description="Metrics computed less often, such as rfid.")
    slow_metrics_every: Int = Field(
        0, ge=0, description="Steps between these, a multiple of `every`. 0: only after the last step."
    )
    videos: Int = Field(4, ge=0, description="Clips shown in the logger: original, latent, reconstruction.")
    roll: bool = Field(
        False, description="Also compare the reconstruction of a rotated panorama with the rotated reconstruction."
    )


@dataclass(config=STRICT)
class Publish:
    """Checkpoints under the names that other programs expect, in the run's folder: <prefix>_step<N>.pt (training
    state), <prefix>_ema_step<N>.pt and <prefix>_final_ema.pt (averaged weights)."""

    prefix: FolderName | None = Field(None, description="null: no such files.")
    layout: str = Field(
        "videox_fun", description="Key layout of the averaged weights, in FLAT_LAYOUTS of vae3d/checkpoints/export.py."
    )
    measure_scale: Int = Field(
        0, ge=0, description="Training clips on which the latent scale of every export is measured. 0: the model's own."
    )
    final_model: bool = Field(
        False, description="TAEHV: write final_model.pth, final_model.safetensors and model.json at the end."
    )


@dataclass(config=STRICT)
class Robust:
    """Fault-tolerance limits."""

    max_consecutive_failures: Int = Field(
        10,
        ge=0,
        description="Steps in a row that a rank may fail, out of memory or without a readable file, before "
        "the run stops. 0: no limit.",
    )
    zero_gradient: Int = Field(
        10, ge=0, description="Steps in a row with a gradient of zero before the run stops. 0: no limit."
    )
    save_failures: Int = Field(
        3, ge=0, description="Checkpoints in a row that cannot be written before the run stops. 0: no limit."
    )
    compact_gib: Float | None = Field(
        None, ge=0, description="Release cached GPU memory when more of it is unused, in GiB. null: never."
    )
    preflight: bool = Field(
        True, description="Try the shortest and the longest clip, with every loss on, before the first step."
    )


@dataclass(config=STRICT)
class Strategy:
    """How ranks share the work."""

    name: Literal["replicated", "deepspeed"] = Field(
        "replicated", description="replicated: every rank holds the whole model; deepspeed: ZeRO-2."
    )
    deepspeed: Any = Field(None, description="DeepSpeed's own configuration.")


@dataclass(config=STRICT)
class Teacher:
    """A frozen autoencoder whose latents the model learns to encode to and to decode from."""

    path: str | None = Field(MISSING, description="Checkpoint, as `vae3d.load` takes it. null: no teacher.")
    precision: Precision = Field("fp32", description="Of its weights and all its computations.")
    sample: bool = Field(False, description="Sample its latents instead of taking the mode.")
    decode: Literal["teacher", "own", "mixed"] = Field(
        "teacher", description="Latents that the student decodes. mixed: one or the other at random, each step."
    )
    features: dict[str, str] = Field(
        default_factory=dict, description="Module of the student -> module of the teacher whose output it learns."
    )


@dataclass(config=STRICT)
class Trainer:
    """Steps, precision, checkpoints."""

    max_steps: Int = Field(100_000, ge=1, description="Optimizer steps.")
    accumulate: Int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    precision: Precision = Field("bf16", description="Autocast over fp32 weights.")
    ema: Ema = Field(default_factory=Ema)
    spike: Spike = Field(default_factory=Spike)
    robust: Robust = Field(default_factory=Robust)
    strategy: Strategy = Field(default_factory=Strategy)
    compile: bool = Field(False, description="torch.compile the model's blocks, in place.")
    log_every: Int = Field(10, ge=1, description="Steps between log lines.")
    save_every: Int = Field(1000, ge=0, description="Steps between checkpoints. 0: none.")
    keep: Int = Field(3, ge=0, description="Newest checkpoints, exports and named files kept, at least two. 0: all.")
    best: str | None = Field(
        None, description="Score of the validation (lpips_alex, rfid, psnr, ...) whose best is kept as exports/best."
    )
    publish: Publish = Field(default_factory=Publish)


@dataclass(config=STRICT)
class Launcher:
    """Which process starts the ranks."""

    name: Literal["local", "torchrun"] = Field(
        "local", description="local: this process is a rank; torchrun: start the ranks with torchrun."
    )
    nproc: Int = Field(1, ge=1, description="Ranks on this machine.")
    args: Strings = Field(default_factory=list, description="Further arguments of torchrun.")


@dataclass(config=STRICT)
class Debug:
    """Runs for debugging."""

    mode: Literal["dry", "profile"] | None = Field(
        None, description="dry: print what the run would be, and exit; profile: use torch's profiler."
    )
    steps: Int = Field(3, ge=1, description="Steps that are profiled.")


@dataclass(config=STRICT)
class TrainConfig:
    """Train a video autoencoder."""

    run: Run = Field(default_factory=Run)
    model: Any = Field(MISSING, description="The autoencoder, a `_target_` node.")
    stage: Stage = Field(default_factory=Stage)
    loss: Loss = Field(default_factory=Loss)
    adversary: Any = Field(MISSING, description="The discriminator and its losses, a `_target_` node.")
    teacher: Teacher = Field(default_factory=Teacher)
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    trainer: Trainer = Field(default_factory=Trainer)
    validation: Validation = Field(default_factory=Validation)
    logger: Any = Field(MISSING, description="Where metrics go, a `_target_` node.")
    launcher: Launcher = Field(default_factory=Launcher)
    debug: Debug = Field(default_factory=Debug)


@dataclass(config=STRICT)
class InferConfig:
    """Reconstruct videos and images."""

    checkpoint: str = Field(MISSING, description="A run folder, an export or published weights.")
    source: str = Field(MISSING, description="A table, a JSON list, a folder or one file.")
    save_dir: PathPrefix = Field(MISSING, description="Prefix of the folders PREFIX_ori, _rec, _spatial.")
    root: str | None = Field(None, description="Folder of relative paths in a table. null: the table's folder.")
    model: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of the model that differ from the checkpoint's."
    )
    frame_batch: Int = Field(4, ge=1, description="Frames in one pass of a 2D network.")
    tile: Int | None = Field(None, ge=1, description="Side of the tiles of causal networks, in pixels. null: no tiles.")
    tile_overlap: Int | None = Field(
        None, ge=0, description="Pixels of overlap, blended linearly. null: exact, each tile with all it depends on."
    )
    compile: bool = Field(False, description="torch.compile, once per shape.")
    memory_gib: Float | None = Field(
        None, gt=0, description="GiB that a streaming network may use beyond its weights. null: its default."
    )
    height: Int | None = Field(None, ge=1, description="Resize and centre-crop to height x width. null: as the file.")
    width: Int | None = Field(None, ge=1, description="See `height`.")
    start: Int = Field(0, ge=0, description="First frame.")
    num_frames: Int | None = Field(None, ge=1, description="null: to the end.")
    stride: Int = Field(1, ge=1, description="Take every n-th frame.")
    fps: Float | None = Field(None, gt=0, description="Reduce faster videos to this frame rate. null: keep all.")
    num_samples: Int | None = Field(None, ge=1, description="Only the first rows of the source. null: all.")
    split: Split | None = Field(None, description="Only rows of this split. null: all.")
    sample: bool = Field(False, description="Sample the latents, as in training, instead of taking the mode.")
    seed: Int = Field(0, ge=0, description="Seed of the samples.")
    precision: Precision = Field("fp32", description="Autocast over fp32 weights.")
    device: str | None = Field(None, description="null: cuda if there is a GPU.")
    codec: Literal["lossless", "h264"] = Field("lossless", description="lossless: RGB, bit-exact; h264: for viewing.")
    metrics: Strings = Field(default_factory=list, description="Computed before the codec. See docs/score.md.")
    cost: bool = Field(False, description="Measure speed and memory of encoding and decoding, on the first chunk.")
    reader: Reader = Field("auto", description="Library that decodes videos.")
    on_error: Literal["stop", "skip"] = Field("stop", description="What to do with a file that cannot be read.")
    overwrite: bool = Field(False, description="Replace results of an earlier command.")


@dataclass(config=STRICT)
class ComparedTeacher:
    """The teacher that the checkpoint is compared with."""

    path: str = Field(MISSING, description="Checkpoint, as `vae3d.load` takes it. teacher=PATH is short for it.")
    precision: Precision = Field("fp32", description="Of its weights and all its computations.")


@dataclass(config=STRICT)
class CompareConfig(InferConfig):
    """Reconstruct videos with a student and its teacher: every encoder with every decoder."""

    teacher: ComparedTeacher = Field(default_factory=ComparedTeacher)
    strip: Int = Field(5, ge=1, description="Frames in the picture of each file.")


def register(name: str, schema: type) -> None:
    """Give Hydra the defaults of a schema under a name for the defaults lists of conf/."""
    ConfigStore.instance().store(name, asdict(schema()))


def _short_hash(items: list[str]) -> str:
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:6]


OmegaConf.register_new_resolver("short_hash", _short_hash, replace=True)
register("train_defaults", TrainConfig)
register("infer_defaults", InferConfig)
register("compare_defaults", CompareConfig)
