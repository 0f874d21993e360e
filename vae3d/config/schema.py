"""Typed schema of `vae3d train` and `vae3d infer`. docs/reference.md is generated from it.

Nodes typed Any hold a `_target_` (model, loss term, adversary, data source): their arguments are those of that
class. All other keys are closed. `???` (MISSING) marks what only the user can give.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.core.config_store import ConfigStore
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from vae3d.config.fields import (
    STRICT,
    Aspects,
    Betas,
    Counts,
    Float,
    Folder,
    FolderName,
    InitFrom,
    Int,
    Name,
    PathPrefix,
    Precision,
    Ramp,
    Reader,
    Split,
    Strings,
    as_buckets,
    defaults_of,
    setting,
)
from vae3d.config.issues import MISSING
from vae3d.data.batches.aspects import AUTO
from vae3d.schedules import Schedule

CONF = Path(__file__).parents[1] / "conf"  # the project's conf/, which an installed package carries inside


@dataclass(config=STRICT)
class Run:
    """The run's folder, and how it resumes."""

    name: FolderName = setting(MISSING, "Folder under `run.root`. The same name resumes.")
    root: Folder = setting("runs", "Folder of all runs.")
    sweep: str = setting("sweep", "Folder under `run.root` for the jobs of a multirun.")
    seed: Int = setting(0, "Seed of weights, data order, crops and noise.", ge=0)
    resume: bool = setting(True, "true: continue from the newest checkpoint. false: an error if the folder has one.")
    resume_from: str | None = setting(
        None, "latest, step-0005500, RUN/checkpoints/step-0005500, RUN or a state file. null: the newest, if any."
    )


@dataclass(config=STRICT)
class Prune:
    """How `stage.init_from={prune: CHECKPOINT}` fills the model with channels and blocks of a larger one."""

    clips: Int = setting(8, "Training clips on which channels are compared and layers fitted.", ge=1)
    importance: Literal["weight", "activation", "sensitivity", "redundancy"] = setting(
        "activation",
        "weight: norm of the weights that read a channel; activation: times the power of activations; sensitivity: "
        "times the effect on pixels; "
        "redundancy: of this, what the kept channels cannot replace.",
    )
    refit: bool = setting(True, "Fit each layer to the larger model's outputs by least squares.")


@dataclass(config=STRICT)
class Stage:
    """Which parts train, and from which weights they start."""

    name: str = setting(MISSING, "Name of the stage, for logs.")
    train: dict[str, Annotated[Float, Field(gt=0)]] = setting(
        MISSING, "Part of the model -> its multiple of `optim.lr`. All other parts are frozen, in eval mode."
    )
    init_from: InitFrom = setting(
        MISSING, "random, a checkpoint, {submodule: checkpoint}, or {prune: checkpoint of a larger model}."
    )
    prune: Prune = Field(default_factory=Prune)
    fit_shortcut: Int = setting(
        0, "Training clips to fit the model's shortcut to, before step 1. 0: it starts as it is.", ge=0
    )
    no_micro_batching: bool = setting(False, "Train on whole clips where the model would otherwise split them.")
    latent_noise: Float = setting(0.0, "Maximum noise on the decoder's input in training, in latent deviations.", ge=0)


@dataclass(config=STRICT)
class LossTerm:
    """One term of the loss."""

    term: Any = setting(MISSING, "The term, a `_target_` node.")
    weight: Float = setting(1.0, "Weight of the term.", ge=0)
    ramp: Ramp = setting(lambda: [0, 0], "[first step, last step] over which the weight rises linearly from 0.")
    log: bool = setting(False, "Compute and log the term even at weight 0.")
    reduction: Literal["sum", "mean"] | None = setting(None, "As `loss.reduction`, which null means.")


@dataclass(config=STRICT)
class Loss:
    """Weighted sum of terms."""

    reduction: Literal["sum", "mean"] = setting(
        MISSING, "sum: over a frame's elements (KL: a clip's); mean: over elements."
    )
    terms: dict[str, LossTerm] = setting(MISSING, "Name, as in the logs -> term and its settings.")
    pixel_weight: Any = setting(None, "Weight of pixel rows in the pixel terms, a node such as ErpCosine. null: 1.")
    logvar: Float | None = setting(None, "Initial log-variance of the pixel terms, then learned. null: fixed at 0.")
    logvar_lr: Float = setting(1.0, "Multiple of `optim.lr` for the log-variance.", gt=0)


@dataclass(config=STRICT)
class Frames:
    """Frames per clip, drawn once per step: min, min + step, ... max, all equally likely."""

    min: Int = setting(17, "Fewest frames.", ge=1)
    max: Int = setting(17, "Most frames, at least `min`.")
    step: Int = setting(1, "Distance between the frame counts.", ge=1)
    images: Float = setting(0.0, "Probability of a step on single frames.", ge=0, le=1)
    fit: bool = setting(False, "Take the largest count that all clips of the step have instead of a draw.")


@dataclass(config=STRICT)
class Depth:
    """16-bit depth maps instead of colours, where `mapping` is not null."""

    mapping: Literal["log", "inverse"] | None = setting(None, "Mapping of metres to [-1, 1]. null: colours.")
    bounds: Literal["fixed", "percentiles"] = setting(
        "fixed", "fixed: `near` and `far`; percentiles: the 2nd and 98th percentile of each clip."
    )
    near: Float = setting(0.1, "Nearest depth, in metres.", gt=0)
    far: Float = setting(20.0, "Farthest depth, in metres, above `near`.")
    unit: Float = setting(1000.0, "Stored value of one metre. The stored value 0 is invalid.", gt=0)


@dataclass(config=STRICT)
class BucketShape:
    """A listed bucket. [33, 256, 256] is short for {frames: 33, height: 256, width: 256}."""

    frames: Int = setting(MISSING, "Frames.", ge=1)
    height: Int = setting(MISSING, "Pixels.", ge=1)
    width: Int = setting(MISSING, "Pixels.", ge=1)
    cost: Float | None = setting(None, "Cost of a clip, such as measured seconds; for all or none. null: pixels.", gt=0)
    batch_size: Int | None = setting(None, "Clips per step, over all ranks. null: as many as cost the same.", ge=1)
    weight: Float | None = setting(
        None,
        "Share of the steps, relative to the others; for all or none. null: each file of each bucket equally often.",
        gt=0,
    )


@dataclass(config=STRICT)
class Buckets:
    """Shapes of clips, one per step, at about equal cost per step: `shapes`, or every size with every frame count.
    data.buckets=[...] is short for data.buckets.shapes=[...]. See docs/data.md."""

    shapes: list[BucketShape] | None = setting(None, "The buckets. null: by the rule of the other keys.")
    aspects: Aspects = setting(
        lambda: [AUTO],
        "Aspect ratios such as '16:9'; sizes have the area of `data.height` x `data.width`. auto: the data's own.",
    )
    frames: Counts | None = setting(None, "Frame counts. null: those of `data.frames`.")
    multiple: Int = setting(16, "Height and width of sizes are multiples of this.", ge=1)
    clips_multiple: Int | None = setting(
        None,
        "Clips per step are multiples of this. null: ranks x `trainer.accumulate`. Fix it to resume exactly on "
        "other numbers of ranks.",
        ge=1,
    )


@dataclass(config=STRICT)
class Clips:
    """Which clips are read, and how they are cut."""

    source: Any = setting(MISSING, "Where the files are, a `_target_` node.")
    height: Int = setting(256, "Height of clips, in pixels.", ge=1)
    width: Int = setting(256, "Width of clips, in pixels.", ge=1)
    frames: Frames = Field(default_factory=Frames)
    buckets: Annotated[Buckets | None, BeforeValidator(as_buckets)] = setting(
        None, "Several sizes and frame counts, as data=buckets has them. null: one size, `height` x `width`."
    )
    stride: Int = setting(1, "Take every n-th frame.", ge=1)
    fps: Float | None = setting(None, "Reduce faster videos to this frame rate. null: keep all.", gt=0)
    sampling: Literal["contiguous", "first_last_random", "strided"] = setting(
        "contiguous", "first_last_random: first, last and random frames between; strided: the largest stride that fits."
    )
    short_side: Int | None = setting(
        None, "Shorter side before cropping, at least the crop's. null: as the crop needs it."
    )
    min_side: Int | None = setting(None, "Skip files whose shorter side has fewer pixels. null: enlarge them.", ge=1)
    crop: Literal["center", "random"] = setting("center", "Position of the crop.")
    flip: bool = setting(False, "Mirror half of the clips.")
    reader: Reader = setting("auto", "Library that decodes videos.")
    batch_size: Int = setting(
        8,
        "Clips per optimizer step, over all ranks. With buckets: of `data.frames.max` frames of `data.height` x "
        "`data.width`.",
        ge=1,
    )
    clips_per_file: Int = setting(1, "Consecutive clips from each file that is drawn, read in one pass.", ge=1)
    num_val_files: Int = setting(16, "Files held out for validation where the table has no `split` column.", ge=0)


@dataclass(config=STRICT)
class MixedSource(Clips):
    """A source of a mixture. A key that is not given has the value of `data`."""

    weight: Float = setting(
        1.0, "Share of the steps, relative to the other sources: 2 and 1 are two thirds and one third.", gt=0
    )


@dataclass(config=STRICT)
class Data(Clips):
    """Which clips are read, and how they are cut."""

    panorama: bool = setting(False, "Files are equirectangular panoramas (2:1), never cropped.")
    roll: bool = setting(False, "Rotate panoramas by a random number of columns.")
    depth: Depth = Field(default_factory=Depth)
    workers: Int = setting(4, "Reader processes per rank. 0: read in the training process.", ge=0)
    prefetch: Int = setting(2, "Batches each worker reads ahead.", ge=1)
    timeout: Float = setting(900.0, "Seconds without a batch after which the run stops. 0: never.", ge=0)
    max_broken: Float = setting(0.2, "Stop when a larger share of reads fails.", ge=0, lt=1)
    overfit: bool = setting(False, "Train on the first step's clips only.")
    sources: dict[Name, MixedSource] = setting(
        dict, "Several sources instead of `source`, by name. A step takes its clips from one of them."
    )


@dataclass(config=STRICT)
class Optim:
    """AdamW and its learning rate."""

    lr: Float = setting(1e-5, "Learning rate.", gt=0)
    betas: Betas = setting(lambda: [0.9, 0.999], "Betas of AdamW.")
    eps: Float = setting(1e-8, "Epsilon of AdamW.", gt=0)
    weight_decay: Float = setting(0.0, "Weight decay of AdamW.", ge=0)
    warmup_steps: Int = setting(0, "Steps over which the rate rises linearly from 0, in all schedules.", ge=0)
    schedule: Schedule = setting("constant", "Learning rate after the warm-up.")
    decay_start: Int | None = setting(
        None, "First step of the decay, not before the end of the warm-up, where null begins."
    )
    min_lr: Float = setting(0.0, "Learning rate at the end of the decay.", ge=0)
    cycles: Int = setting(1, "Number of decays of cosine_with_restarts.", ge=1)
    power: Float = setting(1.0, "Exponent of polynomial.", gt=0)
    grad_clip: Float | None = setting(1.0, "Maximum norm of the gradient. null: no limit.", gt=0)
    proximal: Float = setting(0.0, "Factor of sum (theta - theta0)^2, theta0 being the initial weights. 0: off.", ge=0)


@dataclass(config=STRICT)
class Ema:
    """Exponential moving average of the weights."""

    decay: Float = setting(0.999, "Share of the average that an update keeps. 0: no EMA.", ge=0, lt=1)
    warmup: bool = setting(True, "Limit the decay to (1 + step) / (10 + step).")
    every: Int = setting(1, "Steps between updates.", ge=1)
    device: Literal["model", "cpu"] = setting("model", "model: on the weights' device; cpu: in pinned host memory.")


@dataclass(config=STRICT)
class Spike:
    """Skips steps whose loss is too large."""

    factor: Float | None = setting(None, "Skip losses above this multiple of the running mean. null: off.", gt=1)
    warmup: Int = setting(100, "Steps taken before the first one may be skipped.", ge=0)
    max_consecutive_skips: Int = setting(
        20, "Skips in a row after which a finite loss is the new mean, and one that is not finite stops the run.", ge=1
    )


@dataclass(config=STRICT)
class Validation:
    """Metrics on held-out files."""

    every: Int = setting(1000, "Steps between validations. 0: no validation.", ge=0)
    on_start: bool = setting(True, "Also validate before the first step. A resume does not repeat it.")
    clips: Int = setting(16, "Held-out clips.", ge=1)
    frames: Int = setting(17, "Frames of each clip.", ge=1)
    metrics: Strings = setting(lambda: ["psnr", "ssim"], "Scores of the held-out clips; docs/score.md lists them.")
    slow_metrics: Strings = setting(list, "Metrics computed less often, such as rfid.")
    slow_metrics_every: Int = setting(
        0, "Steps between `slow_metrics`, a multiple of `every`. 0: after the last step only.", ge=0
    )
    videos: Int = setting(4, "Clips shown in the logger: original, 2D VAE alone, reconstruction, latent, errors.", ge=0)
    roll: bool = setting(False, "Also compare the reconstruction of a rotated panorama to the rotated reconstruction.")


@dataclass(config=STRICT)
class Publish:
    """Checkpoints under the names that other programs expect, in the run's folder: <prefix>_step<N>.pt (training
    state), <prefix>_ema_step<N>.pt and <prefix>_final_ema.pt (averaged weights)."""

    prefix: FolderName | None = setting(None, "Start of their names. null: no such files.")
    layout: str = setting("videox_fun", "Key layout of averaged weights: native, videox_fun or diffusers.")
    measure_scale: Int = setting(0, "Training clips to measure the exports' latent scale on. 0: the model's own.", ge=0)
    final_model: bool = setting(False, "TAEHV: write final_model.pth, final_model.safetensors, model.json at the end.")


@dataclass(config=STRICT)
class Limits:
    """Failures in a row after which the run stops. 0: no limit."""

    max_consecutive_failures: Int = setting(10, "Steps that run out of memory or lack a file.", ge=0)
    save_failures: Int = setting(3, "Checkpoints that cannot be written.", ge=0)


@dataclass(config=STRICT)
class Robust(Limits):
    """Fault tolerance. The first three are limits: failures in a row after which the run stops, 0: no limit."""

    zero_gradient: Int = setting(10, "Steps with a gradient of zero.", ge=0)
    compact_gib: Float | None = setting(None, "Release cached GPU memory when more GiB are unused. null: never.", ge=0)
    preflight: bool = setting(True, "Try the shortest and the longest clip, with every loss on, before the first step.")


@dataclass(config=STRICT)
class Strategy:
    """How ranks share the work."""

    name: Literal["replicated", "deepspeed"] = setting(
        "replicated", "replicated: every rank holds the whole model; deepspeed: ZeRO-2."
    )
    deepspeed: Any = setting(None, "DeepSpeed's own configuration.")


@dataclass(config=STRICT)
class Teacher:
    """A frozen autoencoder whose latents the model learns to encode to and to decode from."""

    path: str | None = setting(MISSING, "Checkpoint, as `vae3d.load` takes it. null: no teacher.")
    precision: Precision = setting("fp32", "Precision of its weights and computations.")
    sample: bool = setting(False, "Sample its latents instead of taking the mode.")
    decode: Literal["teacher", "own", "mixed"] = setting(
        "teacher", "Latents that the student decodes. mixed: one or the other at random, each step."
    )
    features: dict[str, str] = setting(dict, "Module of the student -> module of the teacher whose output it learns.")
    cache: Folder | None = setting(
        None, "Folder that keeps its latents and features of every clip, for clips that come again. null: none."
    )
    cache_gib: Float = setting(50.0, "GiB of the folder's disk, by all ranks, after which nothing is added.", gt=0)


@dataclass(config=STRICT)
class Steps:
    """Steps and checkpoints."""

    max_steps: Int = setting(100_000, "Optimizer steps.", ge=1)
    accumulate: Int = setting(1, "Micro-batches per optimizer step.", ge=1)
    log_every: Int = setting(10, "Steps between log lines.", ge=1)
    save_every: Int = setting(1000, "Steps between checkpoints. 0: none.", ge=0)
    keep: Int = setting(
        3, "Newest checkpoints, exports and files of `publish` that are kept; 1 keeps two. 0: all.", ge=0
    )
    async_mode: Literal["disabled", "async"] = setting(
        "disabled", "async: checkpoints are copied to host memory, and written while training goes on."
    )
    reduce_dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "Type in which gradients are summed over ranks; clipping and the optimizer stay in fp32."
    )


@dataclass(config=STRICT)
class Trainer(Steps):
    """Steps, precision, checkpoints."""

    precision: Precision = setting("bf16", "Autocast over fp32 weights.")
    ema: Ema = Field(default_factory=Ema)
    spike: Spike = Field(default_factory=Spike)
    robust: Robust = Field(default_factory=Robust)
    strategy: Strategy = Field(default_factory=Strategy)
    compile: bool = setting(False, "torch.compile the model's blocks, in place.")
    best: str | None = setting(None, "Validation score (lpips_alex, rfid, ...) whose best is kept as exports/best.")
    publish: Publish = Field(default_factory=Publish)


@dataclass(config=STRICT)
class TensorBoard:
    """TensorBoard, in RUN/tensorboard: `tensorboard --logdir runs`."""

    enabled: bool = setting(False, "Whether to track there; logger=tensorboard sets it.")


@dataclass(config=STRICT)
class WandB:
    """Weights & Biases: `pip install -e '.[wandb]'`, `wandb login`. Local files in RUN/wandb."""

    enabled: bool = setting(False, "Whether to track there; logger=wandb sets it.")
    project: str = setting("vae3d", "Project.")
    entity: str | None = setting(None, "User or team. null: the default of the account.")
    name: str | None = setting(None, "Name of the run. null: that of its folder.")
    group: str | None = setting(None, "Group of runs.")
    tags: Strings = setting(list, "Tags.")
    notes: str | None = setting(None, "Description.")
    mode: Literal["online", "offline", "disabled"] | None = setting(
        None, "offline: upload later with `wandb sync RUN/wandb/offline-run-*`. null: WANDB_MODE, or online."
    )
    id: str | None = setting(None, "W&B run to continue. null: on resume the one of the run's folder, else a new one.")


@dataclass(config=STRICT)
class MLflow:
    """MLflow: `pip install -e '.[mlflow]'`. MLFLOW_EXPERIMENT_NAME and MLFLOW_RUN_ID, if set, replace the settings."""

    enabled: bool = setting(False, "Whether to track there; logger=mlflow sets it.")
    tracking_uri: str | None = setting(
        None, "Server or store. null: MLFLOW_TRACKING_URI, or sqlite:///ROOT/mlflow.db, ROOT being `run.root`."
    )
    experiment: str = setting("vae3d", "Experiment.")
    name: str | None = setting(None, "Name of the run. null: that of its folder.")
    tags: dict[str, str] = setting(dict, "Tag -> value.")
    run_id: str | None = setting(None, "Run to continue. null: on resume the one of the run's folder, else a new one.")


@dataclass(config=STRICT)
class Trackio:
    """trackio, in TRACKIO_DIR: `pip install -e '.[trackio]'`, `trackio show`. Needs accelerate>=1.9."""

    enabled: bool = setting(False, "Whether to track there; logger=trackio sets it.")
    project: str = setting("vae3d", "Project.")
    name: str | None = setting(
        None, "Name of the run. null: that of its folder. An existing name is continued on resume."
    )
    group: str | None = setting(None, "Group of runs.")
    space_id: str | None = setting(None, "Hugging Face Space that stores and shows the run. null: this machine only.")


@dataclass(config=STRICT)
class Logger:
    """Trackers, in addition to metrics.jsonl: logger=wandb, logger=[tensorboard,wandb] or logger=none."""

    tensorboard: TensorBoard = Field(default_factory=TensorBoard)
    wandb: WandB = Field(default_factory=WandB)
    mlflow: MLflow = Field(default_factory=MLflow)
    trackio: Trackio = Field(default_factory=Trackio)
    other: dict[str, Any] = setting(dict, "Your own: name -> `_target_` node of a vae3d.training.loggers.Logger.")


@dataclass(config=STRICT)
class Launcher:
    """Which process starts the ranks."""

    name: Literal["local", "torchrun"] = setting(
        "local", "local: this process is a rank; torchrun: start the ranks with torchrun."
    )
    nproc: Int = setting(1, "Ranks on this machine.", ge=1)
    args: Strings = setting(list, "Further arguments of torchrun.")


def world_of(config: Any) -> int:
    """Ranks of the run: of the launch that this process is part of, or of the one that config.launcher would start."""
    launcher = config.launcher
    return int(os.environ.get("WORLD_SIZE", launcher.nproc if launcher.name == "torchrun" else 1))


@dataclass(config=STRICT)
class Debug:
    """Runs for debugging."""

    mode: Literal["dry", "profile"] | None = setting(
        None, "dry: print what the run would be, and exit; profile: use torch's profiler."
    )
    steps: Int = setting(3, "Steps that are profiled.", ge=1)


@dataclass(config=STRICT)
class TrainConfig:
    """Train a video autoencoder."""

    run: Run = Field(default_factory=Run)
    model: Any = setting(MISSING, "The autoencoder, a `_target_` node.")
    stage: Stage = Field(default_factory=Stage)
    loss: Loss = Field(default_factory=Loss)
    adversary: Any = setting(MISSING, "The discriminator and its losses, a `_target_` node.")
    teacher: Teacher = Field(default_factory=Teacher)
    data: Data = Field(default_factory=Data)
    optim: Optim = Field(default_factory=Optim)
    trainer: Trainer = Field(default_factory=Trainer)
    validation: Validation = Field(default_factory=Validation)
    logger: Logger = Field(default_factory=Logger)
    launcher: Launcher = Field(default_factory=Launcher)
    debug: Debug = Field(default_factory=Debug)


@dataclass(config=STRICT)
class FilesConfig:
    """The autoencoder that a command runs on files, and how it reads them."""

    checkpoint: str = setting(MISSING, "A run folder, an export or published weights.")
    model: dict[str, Any] = setting(dict, "Arguments of the model that differ from the checkpoint's.")
    root: str | None = setting(None, "Folder of relative paths in a table. null: the table's folder.")
    split: Split | None = setting(None, "Only rows of this split. null: all.")
    height: Int | None = setting(None, "Resize and centre-crop to height x width. null: as the file.", ge=1)
    width: Int | None = setting(None, "See `height`.", ge=1)
    stride: Int = setting(1, "Take every n-th frame.", ge=1)
    fps: Float | None = setting(None, "Reduce faster videos to this frame rate. null: keep all.", gt=0)
    reader: Reader = setting("auto", "Library that decodes videos.")
    precision: Precision = setting("fp32", "Autocast over fp32 weights.")
    tile: Int | None = setting(None, "Side of tiles that large frames are coded in, in pixels. null: no tiles.", ge=1)
    tile_overlap: Int | None = setting(
        None, "Pixels of overlap, blended linearly. null: exact, for networks that can be.", ge=0
    )
    device: str | None = setting(None, "Where to compute. null: cuda if there is a GPU, else cpu.")
    seed: Int = setting(0, "Seed of sampled latents.", ge=0)


@dataclass(config=STRICT)
class InferConfig(FilesConfig):
    """Reconstruct videos and images."""

    source: str = setting(MISSING, "A table, a JSON list, a folder or one file.")
    save_dir: PathPrefix = setting(MISSING, "Prefix of the folders PREFIX_ori, _rec, _spatial.")
    frame_batch: Int = setting(4, "Frames in one pass of a 2D network.", ge=1)
    compile: bool = setting(False, "torch.compile: a stream's first chunk and its steady one, for each size of frames.")
    cuda_graphs: bool = setting(False, "Replay a stream's steady chunk as a CUDA graph. See docs/speed.md.")
    memory_gib: Float | None = setting(None, "GiB for streaming, beyond the weights. null: the model's default.", gt=0)
    start: Int = setting(0, "First frame.", ge=0)
    num_frames: Int | None = setting(None, "Frames to take. null: to the end.", ge=1)
    num_samples: Int | None = setting(None, "Only the first rows of the source. null: all.", ge=1)
    sample: bool = setting(False, "Sample the latents, as in training, instead of taking the mode.")
    codec: Literal["lossless", "h264"] = setting(
        "lossless", "lossless: bit-exact, RGB in .mp4, RGBA in .mkv; h264: for viewing."
    )
    metrics: Strings = setting(list, "Scores, computed before the codec; docs/score.md lists them.")
    report: bool = setting(
        False, "Write the page PREFIX_report/index.html: every file, moving, beside its reconstruction."
    )
    cost: bool = setting(False, "Measure speed and memory of encoding and decoding, on the first chunk.")
    on_error: Literal["stop", "skip"] = setting("stop", "What to do with a file that cannot be read.")
    overwrite: bool = setting(False, "Replace results of an earlier command.")


@dataclass(config=STRICT)
class ComparedTeacher:
    """The teacher that the checkpoint is compared with."""

    path: str = setting(MISSING, "Checkpoint, as `vae3d.load` takes it. teacher=PATH is short for it.")
    precision: Precision = setting("fp32", "Precision of its weights and computations.")


@dataclass(config=STRICT)
class CompareConfig(InferConfig):
    """Reconstruct videos with a student and its teacher: every encoder with every decoder."""

    teacher: ComparedTeacher = Field(default_factory=ComparedTeacher)


SCHEMAS: dict[str, type] = {}


def register(name: str, schema: type) -> None:
    """Give Hydra the defaults of a schema under a name for the defaults lists of conf/, and --help its meanings."""
    SCHEMAS[name] = schema
    ConfigStore.instance().store(name, defaults_of(schema))


register("train_defaults", TrainConfig)
register("infer_defaults", InferConfig)
register("compare_defaults", CompareConfig)
