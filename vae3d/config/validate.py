"""Every error of a configuration in one list, before data, weights or a GPU are touched.

First what needs no torch (keys, missing values, `_target_` signatures, values, paths), then what only the model can
tell: it is built on the meta device, without memory, and takes one training step there.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vae3d.checkpoints.location import exists, hub_hint
from vae3d.config.ranges import (
    CHOICES,
    COMPARE_CHOICES,
    COMPARE_RANGES,
    EXAMPLES,
    INFER_CHOICES,
    INFER_RANGES,
    MODEL_NEEDS,
    RANGES,
)
from vae3d.config.schema import CompareConfig, InferConfig, TrainConfig
from vae3d.config.targets import nearest, target_errors
from vae3d.data.dataset_rows import how_to_download
from vae3d.errors import UserError

MISSING = "???"
CHECKPOINT_KEYS = ("checkpoint", "teacher.path", "vae", "vae.path")


class ConfigError(UserError):
    """All errors of a configuration."""

    def __init__(self, errors: list[str]) -> None:
        self.errors = errors
        count = f"{len(errors)} error" + ("s" if len(errors) > 1 else "")
        super().__init__(f"the configuration has {count}:\n" + "\n".join(f"  {error}" for error in errors))


def check_training(cfg: DictConfig) -> TrainConfig:
    """The configuration as typed objects; raises ConfigError naming every error."""
    errors, tree = _keys(cfg, TrainConfig)
    config = _object(TrainConfig, tree)
    errors = _without_repeats(errors, [*_values(config, CHOICES, RANGES), *_training_rules(config, os.environ)])
    if not any(error.startswith(MODEL_NEEDS) for error in errors):
        from vae3d.commands import dry_run

        errors += dry_run.errors(config)
    if errors:
        raise ConfigError(errors)
    return config


def check_inference(cfg: DictConfig) -> InferConfig:
    """As check_training, for infer.py."""
    config, errors = typed(cfg, InferConfig, INFER_CHOICES, INFER_RANGES)
    errors += _inference_rules(config)
    if errors:
        raise ConfigError(errors)
    return config


def check_comparison(cfg: DictConfig) -> CompareConfig:
    """As check_training, for scripts/compare.py."""
    config, errors = typed(cfg, CompareConfig, COMPARE_CHOICES, COMPARE_RANGES)
    errors += _inference_rules(config)
    if config.tile is not None:
        errors.append(f"tile={config.tile}: networks are compared on whole frames; leave it out")
    if config.sample:
        errors.append("sample=true: networks are compared by the mode of the latents; leave it out")
    errors += path_errors({"teacher.path": config.teacher.path})
    if errors:
        raise ConfigError(errors)
    return config


def _inference_rules(config: InferConfig) -> list[str]:
    errors = []
    if (config.height is None) != (config.width is None):
        errors.append("height and width go together; set both, or neither")
    if config.tile is None and config.tile_overlap is not None:
        errors.append(f"tile_overlap={config.tile_overlap} needs the tiles' size; set tile")
    for key in ("compile", "cost"):
        if config.tile is not None and getattr(config, key):
            errors.append(f"{key}=true is of whole frames; leave out tile={config.tile}")
    return errors + path_errors({name: getattr(config, name) for name in ("checkpoint", "source", "root")})


def typed(
    cfg: DictConfig,
    schema: type,
    choices: Mapping[str, tuple],
    ranges: Mapping[str, tuple[Callable[[Any], bool], str]],
) -> tuple[Any, list[str]]:
    """The configuration as typed objects, and the errors of its keys and values."""
    errors, tree = _keys(cfg, schema)
    config = _object(schema, tree)
    return config, _without_repeats(errors, _values(config, choices, ranges))


def _without_repeats(errors: list[str], more: Iterable[str]) -> list[str]:
    """Both, without those of `more` whose key has an error already."""
    reported = {_key_of(error) for error in errors}
    return [*errors, *(error for error in more if _key_of(error) not in reported)]


def _key_of(error: str) -> str:
    return re.split(r"[ =\[]", error)[0]


def path_errors(given: Mapping[str, Any]) -> list[str]:
    """Of the files and folders that settings name."""
    told = {name: value for name, value in given.items() if isinstance(value, str) and value != MISSING}
    return [
        f"{name}={value}: no such file or folder{_hint(name, value)}"
        for name, value in told.items()
        if not _exists(value)
    ]


def _hint(key: str, path: str) -> str:
    """How to download what is not here, if it may be of the Hugging Face hub."""
    if key in CHECKPOINT_KEYS or key.startswith("stage.init_from"):
        return hub_hint(path)
    return how_to_download(path) if key == "data.source.path" else ""


def _keys(cfg: DictConfig, schema: type) -> tuple[list[str], dict[str, Any]]:
    """Errors of keys, missing values, interpolations and targets; and the resolved tree without unknown keys.

    What is missing or cannot be resolved is `???` in the tree.
    """
    errors: list[str] = []
    tree = _resolve(cfg, OmegaConf.to_container(cfg, resolve=False), "", errors)
    errors += _unknown_keys(tree, schema, "")
    errors += target_errors(tree, "")
    errors += number_errors(tree)
    return errors, tree


def number_errors(node: Any, key: str = "") -> list[str]:
    """Of every number at any depth: it must be finite, fit into 64 bits and, if it is called seed, not be negative."""
    if isinstance(node, dict):
        inner = [(value, f"{key}.{name}".lstrip(".")) for name, value in node.items()]
    elif isinstance(node, list):
        inner = [(value, f"{key}[{index}]") for index, value in enumerate(node)]
    else:
        inner = []
        if isinstance(node, float) and not math.isfinite(node):
            return [f"{key}={node} must be a finite number"]
        if isinstance(node, int) and not -(2**63) <= node < 2**63:
            return [f"{key}={node} must fit into 64 bits"]
        if isinstance(node, int) and node < 0 and key.split(".")[-1] == "seed":
            return [f"{key}={node} must be 0 or more"]
    return [error for value, name in inner for error in number_errors(value, name)]


def _resolve(cfg: DictConfig, node: Any, key: str, errors: list[str]) -> Any:
    if isinstance(node, dict):
        return {name: _resolve(cfg, value, f"{key}.{name}".lstrip("."), errors) for name, value in node.items()}
    if isinstance(node, list):
        return [_resolve(cfg, value, f"{key}[{index}]", errors) for index, value in enumerate(node)]
    if node == MISSING:
        errors.append(f"{key} is required; set {EXAMPLES.get(key, f'{key}=VALUE')}")
    if isinstance(node, str) and "${" in node:
        try:
            return OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:
            errors.append(f"{key}={node} cannot be resolved: {str(error).splitlines()[0]}")
            return MISSING
    return node


def _unknown_keys(tree: dict[str, Any], schema: type, prefix: str) -> list[str]:
    """Report and delete keys that the schema does not have."""
    errors = []
    fields = {field.name: field for field in dataclasses.fields(schema)}
    types = typing.get_type_hints(schema)
    for key in list(tree):
        if key not in fields:
            errors.append(f"{prefix}{key} is not a setting{nearest(key, fields, prefix)}")
            del tree[key]
        elif isinstance(tree[key], dict):
            for inner, path, kind in _nested(tree[key], f"{prefix}{key}.", types[key]):
                errors += _unknown_keys(inner, kind, path)
    return errors


def _nested(node: dict[str, Any], path: str, kind: Any) -> Iterator[tuple[dict[str, Any], str, type]]:
    if dataclasses.is_dataclass(kind):
        yield node, path, kind
    elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
        for name, inner in node.items():
            if isinstance(inner, dict):
                yield inner, f"{path}{name}.", typing.get_args(kind)[1]


def _object(kind: Any, value: Any) -> Any:
    """Typed objects of a tree; `???` stays where it stands, so that all other values can still be checked."""
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        types = typing.get_type_hints(kind)
        return kind(**{key: _object(types[key], inner) for key, inner in value.items()})
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {key: _object(typing.get_args(kind)[1], inner) for key, inner in value.items()}
    return value


def _get(config: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def _values(
    config: Any, choices: Mapping[str, tuple], ranges: Mapping[str, tuple[Callable[[Any], bool], str]]
) -> list[str]:
    errors = []
    for key, allowed in choices.items():
        value = _get(config, key)
        if value != MISSING and value not in allowed:
            named = ", ".join("null" if choice is None else choice for choice in allowed)
            errors.append(f"{key}={value} is unknown; use one of {named}")
    for key, (holds, rule) in ranges.items():
        value = _get(config, key)
        if value != MISSING and not holds(value):
            errors.append(f"{key}={value} must be {rule}")
    return errors


def _training_rules(config: TrainConfig, environment: Mapping[str, str]) -> list[str]:
    data, trainer, loss, optim = config.data, config.trainer, config.loss, config.optim
    errors = []
    largest = max([side for side in (data.height, data.width) if side != MISSING], default=0)
    if data.short_side is not None and data.short_side < largest:
        errors.append(f"data.short_side={data.short_side} is smaller than the crop; use at least {largest}, or null")
    if data.frames.max < data.frames.min:
        errors.append(f"data.frames.max={data.frames.max} is below data.frames.min={data.frames.min}; raise it")
    errors += _clip_rules(config)

    if optim.decay_start is not None and optim.decay_start < optim.warmup_steps:
        errors.append(
            f"optim.decay_start={optim.decay_start} is before the end of optim.warmup_steps={optim.warmup_steps}; "
            "raise it, or null"
        )

    world = int(environment.get("WORLD_SIZE", config.launcher.nproc if config.launcher.name == "torchrun" else 1))
    share = world * trainer.accumulate
    if trainer.accumulate >= 1 and data.batch_size % share:
        above = -(-data.batch_size // share) * share
        errors.append(
            f"data.batch_size={data.batch_size} does not divide over {world} ranks x trainer.accumulate="
            f"{trainer.accumulate}; use a multiple of {share}, such as {above}"
        )

    if loss.logvar is not None and trainer.spike.factor is not None:
        errors.append(
            f"trainer.spike.factor={trainer.spike.factor} compares losses above 0, and with loss.logvar={loss.logvar} "
            "the loss falls below; use null for either"
        )

    if isinstance(loss.terms, dict):
        for name, term in loss.terms.items():
            if term.weight < 0:
                errors.append(f"loss.terms.{name}.weight={term.weight} must be 0 or more")
            if len(term.ramp) != 2 or not 0 <= term.ramp[0] <= term.ramp[1]:
                errors.append(f"loss.terms.{name}.ramp={term.ramp} must be [first step, last step]")
            if term.reduction not in (None, *CHOICES["loss.reduction"]):
                errors.append(f"loss.terms.{name}.reduction={term.reduction} is unknown; use one of null, sum, mean")
        if not any(term.weight > 0 for term in loss.terms.values()):
            errors.append("loss.terms has no term with a weight above 0; there is nothing to train on")

    if isinstance(config.stage.train, dict):
        for part, scale in config.stage.train.items():
            if not scale > 0:
                errors.append(f"stage.train.{part}={scale} must be above 0; leave a part out to freeze it")
    errors += [*_validation_rules(config), *_strategy_rules(config), *_adversary_rules(config)]
    errors += [*_missing_files(config), *resume_errors(config.run.resume_from)]
    if not trainer.save_every:
        alone = ["prefix", "final_model"] + ["measure_scale"] * (trainer.best is None)
        for key in alone:
            if getattr(trainer.publish, key):
                errors.append(f"trainer.publish.{key} is written with checkpoints, and trainer.save_every=0 makes none")
    launched = environment.get("ACCELERATE_MIXED_PRECISION")
    if launched not in (None, "no", trainer.precision):  # "no" is also what accelerate launch says unasked
        errors.append(
            f"trainer.precision={trainer.precision}, but accelerate launch says {launched}; "
            f"give it --mixed_precision={trainer.precision.replace('fp32', 'no')}, or change trainer.precision"
        )
    return errors


def _validation_rules(config: TrainConfig) -> Iterator[str]:
    validation = config.validation
    if validation.every and validation.slow_metrics_every % validation.every:
        yield (
            f"validation.slow_metrics_every={validation.slow_metrics_every} is not a multiple of validation.every="
            f"{validation.every}; use one, or 0 for the last step only"
        )
    for key, value in (("validation.slow_metrics", validation.slow_metrics), ("trainer.best", config.trainer.best)):
        if value and not validation.every:
            yield f"{key}={value} is of validations, and validation.every=0 makes none"


def _strategy_rules(config: TrainConfig) -> Iterator[str]:
    """What a compiler cannot see; and what DeepSpeed cannot do, since it averages gradients and steps in one go."""
    strategy = config.trainer.strategy
    if config.trainer.compile and config.teacher.features:
        yield "trainer.compile=true hides the features inside of blocks, which teacher.features reads; use false"
    if strategy.name != "deepspeed":
        return
    if not isinstance(strategy.deepspeed, dict):
        yield "trainer.strategy.deepspeed is empty; use trainer/strategy=deepspeed_zero2 or deepspeed_zero2_offload"
    if config.trainer.precision == "fp16":
        yield "trainer.precision=fp16 needs a loss scaler, which DeepSpeed does not share; use bf16 or fp32"
    if config.trainer.spike.factor is not None:
        yield f"trainer.spike.factor={config.trainer.spike.factor}: DeepSpeed cannot take a step back; use null"
    if config.loss.logvar is not None:
        yield f"loss.logvar={config.loss.logvar} is no parameter of the model, and DeepSpeed averages those; use null"
    if config.optim.proximal:
        yield f"optim.proximal={config.optim.proximal} edits gradients, which DeepSpeed keeps to itself; use 0"


def _adversary_rules(config: TrainConfig) -> Iterator[str]:
    """What an adversary cannot do under a strategy, or in a precision."""
    adversary = config.adversary if isinstance(config.adversary, dict) else {}
    deepspeed, fp16 = config.trainer.strategy.name == "deepspeed", config.trainer.precision == "fp16"
    if adversary.get("adaptive") and deepspeed:
        yield (
            "adversary.adaptive=true: ranks exchange gradients in the middle of a step, where DeepSpeed exchanges its "
            "own; use adversary.adaptive=false, or trainer/strategy=replicated"
        )
    if adversary.get("adaptive") and fp16:
        yield (
            "adversary.adaptive=true takes gradients that no loss scaler has scaled, and that fp16 cannot hold; use "
            "trainer.precision=bf16, or adversary.adaptive=false"
        )
    if adversary.get("alternate") and config.trainer.ema.every > 1:
        yield (
            f"adversary.alternate=true leaves every second step to the discriminator, which trainer.ema.every="
            f"{config.trainer.ema.every} may pick alone; use 1"
        )
    if adversary.get("alternate") and deepspeed:
        yield (
            "adversary.alternate=true has steps without a generator, in which DeepSpeed would wait for its gradients; "
            "use adversary.alternate=false, or trainer/strategy=replicated"
        )


def resume_errors(path: str | None) -> list[str]:
    """Of a path; names of checkpoints are looked up in the run's folder, once that is known."""
    if path in (None, "latest") or re.fullmatch(r"(step|checkpoint)-\d+", Path(path).name) or Path(path).is_file():
        return []
    if not Path(path).is_dir():
        return [f"run.resume_from={path}: no such file or folder"]
    if Path(path, "run.json").is_file() or Path(path, "checkpoints").is_dir():
        return []
    return [f"run.resume_from={path} is no checkpoint; give RUN/checkpoints/step-..., a run or a training state's .pt"]


def _clip_rules(config: TrainConfig) -> Iterator[str]:
    """What does not go together of panoramas, sampling and depth."""
    data = config.data
    if data.roll and not data.panorama:
        yield "data.roll=true turns panoramas; set data.panorama=true, or data.roll=false"
    if config.validation.roll and not data.panorama:
        yield "validation.roll=true turns panoramas; set data.panorama=true, or validation.roll=false"
    if data.panorama:
        if MISSING not in (data.height, data.width) and data.width != 2 * data.height:
            yield f"data.width={data.width} must be twice data.height={data.height}, for data.panorama=true"
        if data.crop == "random":
            yield "data.crop=random cuts panoramas, which data.panorama=true shows whole; use center"
        if data.short_side is not None:
            yield f"data.short_side={data.short_side} cuts panoramas, which data.panorama=true shows whole; use null"
    if data.sampling == "strided":
        for key, neutral in (("stride", 1), ("fps", None)):
            if getattr(data, key) != neutral:
                value, named = getattr(data, key), "null" if neutral is None else neutral
                yield f"data.{key}={value}, but data.sampling=strided takes the largest stride that fits; use {named}"
    if data.depth.far <= data.depth.near:
        yield f"data.depth.far={data.depth.far} must be beyond data.depth.near={data.depth.near}"


def _exists(path: str) -> bool:
    """A `*` stands for any characters: numbered images; `::` divides a checkpoint from its part."""
    return exists(path) or ("*" in path and any(glob.iglob(glob.escape(path).replace("[*]", "*"))))


def _missing_files(config: TrainConfig) -> list[str]:
    init = config.stage.init_from
    teacher = config.teacher.path
    paths = {"teacher.path": teacher} if teacher not in (None, "") else {}
    paths |= (
        {"stage.init_from": init} if isinstance(init, str) else {f"stage.init_from.{k}": v for k, v in init.items()}
    )
    if isinstance(config.data.source, dict):
        given = {f"data.source.{key}": config.data.source.get(key) for key in ("path", "root")}
        paths |= {key: path for key, path in given.items() if isinstance(path, str)}
    return [
        f"{key}={path}: no such file or folder{_hint(key, path)}"
        for key, path in paths.items()
        if path not in (MISSING, "random") and not _exists(path)
    ]
