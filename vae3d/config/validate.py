"""Checks of `vae3d train`, `infer` and `compare`, with the rules between several values. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from packaging.version import Version

from vae3d.config.check import Rule, check, check_all, resume_issues
from vae3d.config.issues import NO_VALUE, ConfigIssue
from vae3d.config.schema import BucketShape, CompareConfig, Data, InferConfig, TrainConfig, world_of
from vae3d.config.sources import of_source, sources_of
from vae3d.text import plural

TRACKIO_SINCE = Version("1.9")  # of accelerate, the first with a TrackioTracker


def _training_paths(config: TrainConfig) -> dict[str, Any]:
    init = config.stage.init_from
    starts = {f"stage.init_from.{name}": path for name, path in init.items()} if isinstance(init, dict) else {}
    starts = starts or {"stage.init_from": init}
    checkpoints = {key: path for key, path in starts.items() if path != "random"}
    return {"teacher.path": config.teacher.path or None, **checkpoints, **source_paths(config.data)}


def _is_hub_stream(source: dict[str, Any]) -> bool:
    """Whether the path of a source is the name of a dataset on the hub, which this run may go to."""
    if source.get("streaming") is not True or os.environ.get("VAE3D_ONLINE") != "1":
        return False
    from vae3d.data.sources.dataset_rows import is_hub_name  # imports pandas

    return is_hub_name(str(source.get("path")))


def source_paths(data: Data) -> dict[str, Any]:
    """Key -> path of every source."""
    found = {}
    for name, own in sources_of(data).items():
        if isinstance(own.source, dict):
            keys = [key for key in ("path", "root", "val_path") if not (key == "path" and _is_hub_stream(own.source))]
            found |= {of_source(name, f"data.source.{key}"): own.source.get(key) for key in keys}
    return found


def batch_issues(config: Any) -> Iterator[ConfigIssue]:
    """The batch must divide over ranks and micro-batches, of every source and of every listed bucket."""
    world, accumulate, sources = world_of(config), config.trainer.accumulate, config.data.sources
    share = world * accumulate
    # Not sources_of, which reads all values: one that is wrong would skip this rule.
    for name, own in sources.items() if sources else [("", config.data)]:
        batches = {"data.batch_size": own.batch_size}
        if own.buckets is not None:
            batches["data.buckets.clips_multiple"] = own.buckets.clips_multiple or share
            for i, shape in enumerate(own.buckets.shapes or []):
                batches[f"data.buckets.shapes[{i}].batch_size"] = shape.batch_size or share
        for key, batch in batches.items():
            if batch % share:
                above = -(-batch // share) * share
                message = f"does not divide over {plural(world, 'rank')} x trainer.accumulate={accumulate}"
                yield ConfigIssue(of_source(name, key), batch, message, f"use a multiple of {share}, such as {above}")


def bucket_issues(config: Any) -> Iterator[ConfigIssue]:
    """Listed buckets that are not consistent, of every source."""
    sources = config.data.sources
    for name, own in sources.items() if sources else [("", config.data)]:
        if own.buckets is None or own.buckets.shapes is None:
            continue
        key, shapes = of_source(name, "data.buckets.shapes"), own.buckets.shapes
        yield from shape_issues(key, shapes)
        for of in ("cost", "weight"):
            given = [getattr(shape, of) is not None for shape in shapes]
            if any(given) and not all(given):
                where = f"{key}[{given.index(False)}].{of}"
                yield ConfigIssue(where, NO_VALUE, f"is missing, and other buckets have a {of}", "give all, or none")
        sizes = [(shape.frames, shape.height, shape.width) for shape in shapes]
        reference = (own.frames.max, own.height, own.width)
        needs_reference = any(shape.cost is not None and shape.batch_size is None for shape in shapes)
        if needs_reference and reference not in sizes:
            message = (
                f"has costs, but none of {'x'.join(map(str, reference))}, of which batch_size is the number of clips"
            )
            keys = ", ".join(of_source(name, f"data.{k}") for k in ("frames.max", "height", "width"))
            yield ConfigIssue(key, NO_VALUE, message, f"set {keys} to those of a bucket, or give each a batch_size")


def shape_issues(key: str, shapes: Sequence[BucketShape]) -> Iterator[ConfigIssue]:
    """An empty list of buckets, and buckets that are listed twice."""
    if not shapes:
        yield ConfigIssue(key, NO_VALUE, "has no buckets", "list some, such as [[33, 256, 256]], or use null")
    sizes = [(shape.frames, shape.height, shape.width) for shape in shapes]
    for i, size in enumerate(sizes):
        if size in sizes[:i]:
            yield ConfigIssue(f"{key}[{i}]", NO_VALUE, f"is the same as {key}[{sizes.index(size)}]", "leave it out")


def precision_issues(config: Any) -> Iterator[ConfigIssue]:
    """Of another precision than `accelerate launch` was given, which would count for nothing."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision = config.trainer.precision
    if launched not in (None, "no", precision):  # accelerate launch sets "no" by default
        hint = f"use --mixed_precision={precision.replace('fp32', 'no')} there, or change trainer.precision"
        yield ConfigIssue("trainer.precision", precision, f"accelerate launch was given {launched}", hint)


def reader_issues(config: Any) -> Iterator[ConfigIssue]:
    """Of a reader whose package is not installed."""
    key, reader = ("data.reader", config.data.reader) if hasattr(config, "data") else ("reader", config.reader)
    package = reader.removesuffix("_cuda")
    if package in ("decord", "torchcodec") and importlib.util.find_spec(package) is None:
        hint = f"pip install {package}, or use auto"
        yield ConfigIssue(key, reader, f"needs the package {package}, which is not installed", hint)


def logger_issues(config: Any) -> Iterator[ConfigIssue]:
    """Of trackers whose package is not installed."""
    for name in ("wandb", "mlflow", "trackio"):
        if not getattr(config.logger, name).enabled:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B's own, has no origin
            hint = f"pip install -e '.[{name}]' in the project's folder, or pip install {name}"
            yield ConfigIssue("logger", name, f"needs the package {name}, which is not installed", hint)
        elif name == "trackio" and Version(installed := importlib.metadata.version("accelerate")) < TRACKIO_SINCE:
            message = f"needs accelerate>={TRACKIO_SINCE}, and {installed} is installed"
            yield ConfigIssue("logger", name, message, f"pip install 'accelerate>={TRACKIO_SINCE}'")


def _adversary(config: TrainConfig) -> dict[str, Any]:
    return config.adversary if isinstance(config.adversary, dict) else {}


def _has_shortcut(config: TrainConfig) -> bool:
    """Of the temporal VAE, if there is one."""
    model = config.model if isinstance(config.model, dict) else {}
    coder = model.get("temporal", model)
    return isinstance(coder, dict) and bool(coder.get("shortcut"))


def _deepspeed(config: TrainConfig) -> bool:
    return config.trainer.strategy.name == "deepspeed"


def _no_weight(config: TrainConfig) -> Iterator[ConfigIssue]:
    if not any(term.weight > 0 for term in config.loss.terms.values()):
        yield ConfigIssue("loss.terms", NO_VALUE, "no term has a weight above 0", "set the weight of one")


def _prunes(config: TrainConfig) -> bool:
    return isinstance(config.stage.init_from, dict) and "prune" in config.stage.init_from


def _needs_checkpoints(config: TrainConfig) -> Iterator[ConfigIssue]:
    publish = config.trainer.publish
    if not config.trainer.save_every:
        for key in ("prefix", "final_model") if config.trainer.best else ("prefix", "final_model", "measure_scale"):
            if value := getattr(publish, key):
                message = "is written with checkpoints, and trainer.save_every=0 writes none"
                yield ConfigIssue(f"trainer.publish.{key}", value, message, "set trainer.save_every")


# fmt: off
FRAMES_RULE = Rule("data.frames.max", lambda c: c.data.frames.max < c.data.frames.min,
                   "is below data.frames.min={c.data.frames.min}", "raise it")
DECAY_RULE = Rule("optim.decay_start",
                  lambda c: c.optim.decay_start is not None and c.optim.decay_start < c.optim.warmup_steps,
                  "is before the end of optim.warmup_steps={c.optim.warmup_steps}", "raise it, or use null")
SIZE_RULE = Rule("height", lambda c: (c.height is None) != (c.width is None),
                 "height and width go together", "set both, or neither")
NOT_CROPPED = "panoramas (data.panorama=true) are never cropped"
NO_STRIDE = "data.sampling=strided chooses the stride"
NO_VALIDATION = "validation.every=0 turns validation off"
BUCKET_RULES = [
    bucket_issues,
    Rule("data.buckets", lambda c: c.data.buckets is not None and c.data.panorama,
         "panoramas (data.panorama=true) are never cropped, so they have one shape", "use null"),
    Rule("data.short_side", lambda c: c.data.buckets is not None and c.data.short_side is not None,
         "is of one size, and data.buckets has several", "use null"),
    Rule("data.frames.images", lambda c: c.data.buckets is not None and c.data.frames.images,
         "draws frame counts, and with data.buckets these are those of the buckets",
         "use 0, and data.buckets.frames=[1, {c.data.frames.max}]; data=mixture keeps {c.data.frames.images:g} of the "
         "steps for images"),
    Rule("data.frames.fit", lambda c: c.data.buckets is not None and c.data.frames.fit,
         "chooses frame counts, and with data.buckets these are those of the buckets", "use false"),
]
CLIP_RULES = [
    Rule("data.short_side",
         lambda c: c.data.short_side is not None and c.data.short_side < min(c.data.height, c.data.width),
         "is smaller than the crop of {c.data.height}x{c.data.width}", "raise it, or use null"),
    Rule("data.roll", lambda c: c.data.roll and not c.data.panorama,
         "needs data.panorama=true", "set it, or data.roll=false"),
    Rule("data.width", lambda c: c.data.panorama and c.data.width != 2 * c.data.height,
         "must be twice data.height={c.data.height}, for data.panorama=true", "change either"),
    Rule("data.crop", lambda c: c.data.panorama and c.data.crop == "random", NOT_CROPPED, "use center"),
    Rule("data.short_side", lambda c: c.data.panorama and c.data.short_side is not None, NOT_CROPPED, "use null"),
    Rule("data.stride", lambda c: c.data.sampling == "strided" and c.data.stride != 1, NO_STRIDE, "use 1"),
    Rule("data.fps", lambda c: c.data.sampling == "strided" and c.data.fps is not None, NO_STRIDE, "use null"),
]
TRAINING_RULES = [
    FRAMES_RULE, DECAY_RULE, *BUCKET_RULES, batch_issues, resume_issues, logger_issues, reader_issues,
    precision_issues, _no_weight, _needs_checkpoints,
    Rule("stage.fit_shortcut", lambda c: c.stage.fit_shortcut and not _has_shortcut(c),
         "needs a model with a shortcut", "set model.shortcut=true or model.temporal.shortcut=true, or 0"),
    Rule("stage.fit_shortcut", lambda c: c.stage.fit_shortcut and c.optim.proximal,
         "changes the initial weights, towards which optim.proximal pulls", "use 0 for either"),
    Rule("stage.init_from", lambda c: _prunes(c) and len(c.stage.init_from) > 1,
         "prunes one model, so it has no other entries", "leave them out"),
    Rule("stage.init_from.prune", lambda c: _prunes(c) and c.stage.init_from["prune"] == "random",
         "needs the weights of a larger model", "give its checkpoint"),
    Rule("optim.proximal", lambda c: _prunes(c) and c.optim.proximal,
         "pulls towards given weights, which stage.init_from.prune changes", "use 0"),
    Rule("teacher.cache", lambda c: c.teacher.cache is not None and c.teacher.path is None,
         "needs a teacher", "set teacher=vae teacher.path=..., or null"),
    Rule("teacher.cache", lambda c: c.teacher.cache is not None and c.teacher.sample,
         "keeps one result of a clip, and teacher.sample draws another each time", "set teacher.sample=false, or null"),
    # clips
    Rule("data.source", lambda c: c.data.source is None and not c.data.sources,
         "is not given, and neither are data.sources", "set one of them"),
    *CLIP_RULES,
    Rule("validation.roll", lambda c: c.validation.roll and not c.data.panorama,
         "needs data.panorama=true", "set it, or validation.roll=false"),
    Rule("data.depth.far", lambda c: c.data.depth.far <= c.data.depth.near,
         "must be above data.depth.near={c.data.depth.near}", "raise it"),
    # loss and validation
    Rule("trainer.spike.factor", lambda c: c.loss.logvar is not None and c.trainer.spike.factor is not None,
         "needs a positive loss, and with loss.logvar={c.loss.logvar} the loss becomes negative",
         "use null for either"),
    Rule("validation.slow_metrics_every",
         lambda c: c.validation.every and c.validation.slow_metrics_every % c.validation.every,
         "is not a multiple of validation.every={c.validation.every}", "use one, or 0 for the last step only"),
    Rule("validation.slow_metrics", lambda c: c.validation.slow_metrics and not c.validation.every,
         NO_VALIDATION, "use [], or set validation.every"),
    Rule("trainer.best", lambda c: c.trainer.best and not c.validation.every,
         NO_VALIDATION, "use null, or set validation.every"),
    Rule("trainer.compile", lambda c: c.trainer.compile and c.teacher.features,
         "hides the features inside of blocks, which teacher.features reads", "use false"),
    # DeepSpeed, which averages gradients and steps in one call
    Rule("trainer.strategy.deepspeed", lambda c: _deepspeed(c) and not isinstance(c.trainer.strategy.deepspeed, dict),
         "is empty", "use trainer/strategy=deepspeed_zero2 or deepspeed_zero2_offload"),
    Rule("trainer.precision", lambda c: _deepspeed(c) and c.trainer.precision == "fp16",
         "DeepSpeed does not share its loss scaler", "use bf16 or fp32"),
    Rule("trainer.reduce_dtype", lambda c: _deepspeed(c) and c.trainer.reduce_dtype != "fp32",
         "is of trainer/strategy=replicated, and DeepSpeed has its own",
         "use fp32, and set trainer.strategy.deepspeed.communication_data_type"),
    Rule("trainer.spike.factor", lambda c: _deepspeed(c) and c.trainer.spike.factor is not None,
         "DeepSpeed cannot skip a step", "use null"),
    Rule("loss.logvar", lambda c: _deepspeed(c) and c.loss.logvar is not None,
         "is not a parameter of the model, and DeepSpeed averages those only", "use null"),
    Rule("optim.proximal", lambda c: _deepspeed(c) and c.optim.proximal,
         "changes gradients, which DeepSpeed does not expose", "use 0"),
    # adversary
    Rule("adversary.adaptive", lambda c: _adversary(c).get("adaptive") and _deepspeed(c),
         "exchanges gradients in the middle of a step, where DeepSpeed exchanges its own",
         "use false, or trainer/strategy=replicated"),
    Rule("adversary.adaptive", lambda c: _adversary(c).get("adaptive") and c.trainer.precision == "fp16",
         "takes gradients without a loss scaler, which fp16 cannot hold",
         "use trainer.precision=bf16, or adversary.adaptive=false"),
    Rule("adversary.alternate", lambda c: _adversary(c).get("alternate") and _deepspeed(c),
         "has steps without a generator, in which DeepSpeed would wait for its gradients",
         "use false, or trainer/strategy=replicated"),
    Rule("trainer.ema.every", lambda c: _adversary(c).get("alternate") and c.trainer.ema.every > 1,
         "may average only the discriminator's steps, with adversary.alternate=true", "use 1"),
]
TILE_RULE = Rule("tile_overlap", lambda c: c.tile is None and c.tile_overlap is not None, "needs tile", "set tile")
INFERENCE_RULES = [
    SIZE_RULE, TILE_RULE, reader_issues,
    Rule("compile", lambda c: c.compile and c.tile is not None, "needs whole frames", "use tile=null"),
    Rule("cuda_graphs", lambda c: c.cuda_graphs and c.tile is not None, "needs whole frames", "use tile=null"),
]
COMPARISON_RULES = [
    *INFERENCE_RULES[:-2],
    Rule("tile", lambda c: c.tile is not None, "networks are compared on whole frames", "use null"),
    Rule("sample", lambda c: c.sample, "networks are compared by the mode of the latents", "use false"),
]
# fmt: on


def inference_paths(config: InferConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("checkpoint", "source", "root")}


# The configuration as typed objects, and every error that needs no model; vae3d.commands.cli adds those that do.
training_issues = partial(check_all, schema=TrainConfig, rules=TRAINING_RULES, paths=_training_paths)
check_inference = partial(check, schema=InferConfig, rules=INFERENCE_RULES, paths=inference_paths)
check_comparison = partial(
    check,
    schema=CompareConfig,
    rules=COMPARISON_RULES,
    paths=lambda c: {**inference_paths(c), "teacher.path": c.teacher.path},
)
