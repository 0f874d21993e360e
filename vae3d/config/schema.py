"""Typed schema of train.py and infer.py. Imports no torch: configuration errors must show in a second.

Nodes typed Any hold a `_target_` (open sets: model, loss term, adversary, data source, logger); everything else
is closed and checked key by key. `???` (MISSING) is what only the user can know.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

CONF = Path(__file__).parents[1] / "conf"  # the project's conf/, which an installed package carries inside


@dataclass
class Run:
    name: str = MISSING  # folder under root; the same name resumes
    root: str = "runs"
    sweep: str = "sweep"  # folder under root for the jobs of a multirun
    seed: int = 0
    resume: bool = True  # False: refuse a folder that already holds checkpoints
    # latest, checkpoint-5500, RUN/checkpoint-5500, a run, a step folder or a state file; null: the newest, if any
    resume_from: str | None = None


@dataclass
class Stage:
    """Which parts train (part -> learning-rate scale; all others are frozen, in eval mode) and from where."""

    name: str = MISSING
    train: dict[str, float] = MISSING
    init_from: Any = MISSING  # random, a checkpoint, or {submodule: checkpoint}
    no_micro_batching: bool = False  # train on clips as a whole, where the model would cut them into pieces in use
    # most noise, in standard deviations of a clip's latents, that is added to what the decoder gets in training
    latent_noise: float = 0.0


@dataclass
class LossTerm:
    term: Any = MISSING
    weight: float = 1.0
    ramp: list[int] = field(default_factory=lambda: [0, 0])  # weight rises linearly from the first to the second step
    log: bool = False  # compute and log the term even at weight 0
    reduction: str | None = None  # sum, mean; null: the set's


@dataclass
class Loss:
    reduction: str = MISSING  # sum: over a frame's (KL: a clip's) elements; mean: over elements
    terms: dict[str, LossTerm] = MISSING
    pixel_weight: Any = None  # how much each row counts in the terms on pixels, such as ErpCosine; null: all alike
    logvar: float | None = None  # first log-variance of the terms on pixels, which is then learned; null: 0 for ever
    logvar_lr: float = 1.0  # multiple of optim.lr for it


@dataclass
class Frames:
    """Frames per clip, drawn once per step: min, min + step, ... max alike, or 1 with probability `images`."""

    min: int = 17
    max: int = 17
    step: int = 1
    images: float = 0.0
    fit: bool = False  # not drawn, but the largest that all clips of the step have


@dataclass
class Depth:
    """Depth maps of 16 bits instead of colours, where `mapping` is not null; see vae3d/data/depth.py."""

    mapping: str | None = None  # log, inverse
    bounds: str = "fixed"  # fixed: near and far; percentiles: the 2nd and 98th of each clip
    near: float = 0.1  # metres
    far: float = 20.0
    unit: float = 1000.0  # stored value of one metre; 0 is none


@dataclass
class Data:
    source: Any = MISSING
    height: int = 256
    width: int = 256
    frames: Frames = field(default_factory=Frames)
    stride: int = 1  # take every n-th frame
    fps: float | None = None  # thin faster videos out to this rate; slower ones keep theirs
    # contiguous; first_last_random: first and last frame of the file and a random draw between; strided: largest stride
    sampling: str = "contiguous"
    short_side: int | None = None  # scale to this before cropping; null: so that the crop covers the short side
    min_side: int | None = None  # leave out files whose shorter side has fewer pixels; null: enlarge them
    crop: str = "center"  # center, random
    flip: bool = False
    panorama: bool = False  # files are equirectangular (2:1), shown whole
    roll: bool = False  # turn panoramas by a random number of columns
    depth: Depth = field(default_factory=Depth)
    reader: str = "auto"  # auto, pyav, decord
    batch_size: int = 8  # clips per optimizer step over all ranks
    workers: int = 4
    prefetch: int = 2
    timeout: float = 900.0  # seconds without a batch from the workers after which the run stops; 0: never
    num_val_files: int = 16  # videos held out for validation where the table has no `split` column
    max_broken: float = 0.2  # stop when a larger share of reads fails
    overfit: bool = False  # draw the first step's clips again and again


@dataclass
class Optim:
    lr: float = 1e-5
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    # constant or constant_with_warmup (all warm up), linear, cosine, cosine_with_restarts, polynomial
    schedule: str = "constant"
    decay_start: int | None = None  # first step of the descent; null: right after the warm-up
    min_lr: float = 0.0  # what it ends at
    cycles: int = 1  # descents of cosine_with_restarts
    power: float = 1.0  # of polynomial
    grad_clip: float = 1.0
    proximal: float = 0.0  # lambda of the pull lambda * sum (theta - theta0)^2 towards the weights of the start


@dataclass
class Ema:
    decay: float = 0.999  # 0 turns EMA off
    warmup: bool = True
    every: int = 1
    device: str = "model"  # where the averages lie: model (beside the weights), cpu (pinned host memory)


@dataclass
class Spike:
    factor: float | None = None  # skip a step whose loss exceeds this many times the running mean
    warmup: int = 100  # accepted steps before the factor counts
    max_consecutive_skips: int = (
        20  # skipped steps in a row after which finite losses become the new level; others stop the run
    )


@dataclass
class Validation:
    every: int = 1000  # 0 turns validation off
    clips: int = 16
    frames: int = 17
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim"])
    slow_metrics: list[str] = field(default_factory=list)  # further metrics that cost more, such as rfid
    slow_metrics_every: int = 0  # steps between these, a multiple of `every`; 0: only after the last step
    videos: int = 4  # clips shown in the logger: original, latent, reconstruction
    roll: bool = False  # also compare a turned panorama's reconstruction with the turned reconstruction


@dataclass
class Publish:
    """Checkpoints under names that other programs expect, in the run's folder: <prefix>_step<N>.pt (training state),
    <prefix>_ema_step<N>.pt and <prefix>_final_ema.pt (averaged weights)."""

    prefix: str | None = None  # null: none
    layout: str = "videox_fun"  # keys of the averaged weights, a name in vae3d/checkpoints/export.py FLAT_LAYOUTS
    measure_scale: int = 0  # training clips on which every export's latent scale is measured; 0: the model's is kept
    final_model: bool = False  # of a TAEHV: final_model.pth, final_model.safetensors and model.json at the end


@dataclass
class Robust:
    """What a run bears before it stops with the reason, and what it does so that it need not."""

    max_consecutive_failures: int = (
        10  # steps in a row that a rank cannot finish, out of memory or without a readable file
    )
    zero_gradient: int = 10  # steps in a row whose gradient is zero; 0: any number
    save_failures: int = 3  # checkpoints in a row that cannot be written
    compact_gib: float | None = None  # give idle GPU memory back, where there is more of it; null: never
    preflight: bool = True  # try the shortest and the longest clip with every loss before the first step


@dataclass
class Strategy:
    """How ranks share the work: replicated (each has the whole model), or deepspeed (ZeRO, with a full DeepSpeed config)."""

    name: str = "replicated"
    deepspeed: Any = None


@dataclass
class Teacher:
    """A frozen autoencoder whose latents the model is to encode to and decode from."""

    path: str | None = MISSING  # as vae3d.load takes it; null: no teacher
    precision: str = "fp32"  # fp32, bf16, fp16: of its weights and of all it computes
    sample: bool = False  # draw its latents instead of taking the mode
    decode: str = "teacher"  # latents that the student decodes: teacher, own, mixed (one or the other, a coin per step)
    features: dict[str, str] = field(default_factory=dict)  # module of the student -> module of the teacher it imitates


@dataclass
class Trainer:
    max_steps: int = 100_000
    accumulate: int = 1  # micro-batches per optimizer step
    precision: str = "bf16"  # bf16, fp16, fp32: autocast over fp32 weights
    ema: Ema = field(default_factory=Ema)
    spike: Spike = field(default_factory=Spike)
    robust: Robust = field(default_factory=Robust)
    strategy: Strategy = field(default_factory=Strategy)
    compile: bool = False  # torch.compile of the model's blocks, in place
    log_every: int = 10
    save_every: int = 1000
    keep: int = 3  # newest checkpoints, exports and published files kept, two at least; 0 keeps all
    # Score of the validation (lpips_alex, rfid, psnr, ...) whose best is kept as exports/best; null: none
    best: str | None = None
    publish: Publish = field(default_factory=Publish)


@dataclass
class Launcher:
    name: str = "local"  # local: this process is a rank; torchrun: start the ranks
    nproc: int = 1
    args: list[str] = field(default_factory=list)  # further torchrun arguments


@dataclass
class Debug:
    mode: str | None = None  # dry, profile
    steps: int = 3  # steps that profile records


@dataclass
class TrainConfig:
    run: Run = field(default_factory=Run)
    model: Any = MISSING
    stage: Stage = field(default_factory=Stage)
    loss: Loss = field(default_factory=Loss)
    adversary: Any = MISSING
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    trainer: Trainer = field(default_factory=Trainer)
    validation: Validation = field(default_factory=Validation)
    logger: Any = MISSING
    launcher: Launcher = field(default_factory=Launcher)
    debug: Debug = field(default_factory=Debug)


@dataclass
class InferConfig:
    """Reconstruct videos with a checkpoint."""

    checkpoint: str = MISSING
    source: str = MISSING  # a table, a JSON list, a folder or one file
    save_dir: str = MISSING  # prefix of <save_dir>_ori, _rec, _spatial, _compare
    root: str | None = None  # what relative paths in a table are relative to; by default the table's folder
    model: dict[str, Any] = field(default_factory=dict)  # changes to the checkpoint's model: model.micro_frames=null
    frame_batch: int = 4  # frames through a 2D network at once
    tile: int | None = None  # code frames of causal networks in tiles of so many pixels a side; null: whole
    tile_overlap: int | None = None  # pixels that tiles share, blended linearly; null: exact, with halos
    compile: bool = False  # torch.compile, once per shape
    memory_gib: float | None = None  # what a streaming network may take beside its weights; null: its own default
    height: int | None = None  # resize and centre-crop to height x width; null: as the video is
    width: int | None = None
    start: int = 0
    num_frames: int | None = None  # null: to the end
    stride: int = 1
    fps: float | None = None
    num_samples: int | None = None  # the first n rows of the source
    split: str | None = None  # rows of this split only
    sample: bool = False  # draw the latents, as in training, instead of the posterior's mode
    seed: int = 0
    precision: str = "fp32"  # fp32, bf16, fp16: autocast over fp32 weights
    device: str | None = None  # null: cuda if there is one
    codec: str = "lossless"  # lossless (RGB, bit-exact) or h264 (for eyes)
    metrics: list[str] = field(default_factory=list)  # score in memory, before any codec
    cost: bool = False  # also measure speed and memory of encoding and decoding, on the first chunk
    reader: str = "auto"
    on_error: str = "stop"  # stop, skip: what to do with a file that cannot be read
    overwrite: bool = False


@dataclass
class ComparedTeacher:
    path: str = MISSING  # a run, an export or published weights; teacher=PATH is short for teacher.path=PATH
    precision: str = "fp32"  # fp32, bf16, fp16: of its weights and computation


@dataclass
class CompareConfig(InferConfig):
    """Reconstruct videos with a student, and compare it with its teacher."""

    teacher: ComparedTeacher = field(default_factory=ComparedTeacher)
    strip: int = 5  # frames in each file's picture


def register() -> None:
    """Make the schemas known to Hydra as `train_schema`, `infer_schema` and `compare_schema`."""
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("infer_schema", InferConfig)
    store.store("compare_schema", CompareConfig)


def _short_hash(items: list[str]) -> str:
    return hashlib.sha256("\n".join(items).encode()).hexdigest()[:6]


OmegaConf.register_new_resolver("short_hash", _short_hash, replace=True)
register()
