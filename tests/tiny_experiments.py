"""Every experiment at tiny size: the overrides that shrink it, and the files that it starts from."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import OmegaConf

from tests import tiny
from vae3d import loading
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.config.adapter import adapter_issues
from vae3d.config.schema import CONF

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SMALL = [
    "data.batch_size=2", "data.height=32", "data.width=32", "data.frames.max=3", "data.workers=0",
    "trainer.precision=fp32", "trainer.log_every=1", "validation.frames=3", "validation.every=2", "validation.on_start=false", "logger=none",
]  # fmt: skip
TEACHERS = {
    "wan": ["model.channels=4", "model.multipliers=[1,1,1,1]", "model.downsample=[false,true,true]", "model.layers=2",
            "model.latents_mean=null", "model.latents_std=null"],
    "opensora_v1_2": [*tiny.MODEL["opensora_v1_2"], "model.spatial.channels=[8,8,8,8]"],
}  # fmt: skip
NINE_FRAMES = [f"data.frames.{bound}=9" for bound in ("min", "max")]
TINY_OF = {
    "SpatialVAE": "spatial",
    "OpenSoraVAE": "temporal_vae",
    "WanVAE": "wan",
    "TAEHV": "taehv",
    "TAESD": "taesd",
    "DiffusersVAE": "diffusers",
}
PRUNED = ["model.variant=taesd", "model.decoder_channels=[5,4,4,3]"]
LARGER = ["model.variant=taesd", "model.decoder_channels=[6,4,4,4]"]


def overrides(experiment: str, folder: Path, videos: Path, rooms: Path, images: Path) -> list[str]:
    """Overrides of train.py; writes first weights, and a teacher where the experiment has one, to `folder`."""
    full = tiny.compose(f"experiment={experiment}")
    name = TINY_OF[full.model._target_.rpartition(".")[2]]
    if "TAESD" in full.model.get("spatial", {}).get("_target_", ""):
        name = "temporal_taef2"
    made = [f"experiment={experiment}", *tiny.MODEL[name], *SMALL, f"data.width={64 if full.data.panorama else 32}"]
    if "context_channels" in full.adversary:
        made.append("adversary.channels=[8,8,8,8]")
    elif "channels" in full.adversary:
        made += [*tiny.GAN[1:], "adversary.ramp=0", "adversary.discriminator_start=null"]
    if full.trainer.accumulate > 2:
        made.append("trainer.accumulate=2")
    if "rfid" in full.validation.slow_metrics:
        made.append("validation.slow_metrics=[]")  # its network takes longer than all the rest
    lpips = full.loss.terms.get("lpips")
    if experiment != "demo" and lpips and lpips.weight and lpips.term.net == "vgg":
        made.append("loss.terms.lpips.term.net=alex")  # VGG takes longer than all the rest
    if full.model.get("shortcuts"):
        made += ["model.multipliers=[1,1]"]
    if name == "taesd":  # a pruned TAESD
        _export(loading.model_config("taesd", *LARGER), folder / "teacher")
        made += [*PRUNED, f"teacher.path={folder / 'teacher'}", f"teacher.cache={folder / 'cache'}"]
    elif OmegaConf.is_missing(full.teacher, "path") or full.teacher.path is not None:
        made += [*_teacher(full.model.variant, folder), *NINE_FRAMES]
    composed = tiny.compose(*made)
    if "prune" in (OmegaConf.to_container(composed.stage)["init_from"] or {}):
        start, first = "stage.init_from.prune", OmegaConf.create(loading.model_config("taesd", *LARGER))
    elif "spatial_vae" in (OmegaConf.to_container(composed.stage)["init_from"] or {}):
        start, first = "stage.init_from.spatial_vae", composed.model.spatial
    else:
        start, first = "stage.init_from", composed.model
    _export(OmegaConf.to_container(first, resolve=True), folder / "start")
    made.append(f"{start}={folder / 'start'}")
    if composed.data.frames.min > 3 and name != "taehv":
        made.append("data.frames.min=1" if name != "wan" else "data.frames.min=3")
    kind = composed.data.source._target_.rpartition(".")[2]
    clips = [{"path": path.name} for path in sorted(Path(videos).parent.glob("*.mp4"))]  # names decide the split
    (folder / "clips.json").write_text(json.dumps(clips))
    source = {
        "Table": f"path={videos}",
        "ErpRooms": f"root={rooms}",
        "JsonClips": f"path={folder / 'clips.json'}",
        "ImageFolder": f"path={images}",
    }[kind]
    if kind == "JsonClips":
        made.append(f"data.source.root={Path(videos).parent}")
    if kind == "ImageFolder":
        made += ["data.frames.max=1", "validation.frames=1"]
    return [*made, f"data.source.{source}"]


def _teacher(variant: str, folder: Path) -> list[str]:
    """A tiny teacher of 4 x 8 x 8 for a TAEHV."""
    name = "opensora_v1_2" if variant == "taeos1_2" else "wan"
    _export(loading.model_config(name, *TEACHERS[name]), folder / "teacher")
    return [f"teacher.path={folder / 'teacher'}", f"model.variant={variant}"]


def _export(config: dict, folder: Path) -> None:
    """Random weights, under torch's current seed."""
    assert not list(adapter_issues(config))
    write_export(Checkpoint(config, loading.instantiate(config).state_dict(), folder, ""), folder)
