from __future__ import annotations

import argparse
import re
import subprocess
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from tests import tiny
from vae3d import argparse_types
from vae3d.commands.launch import FolderCheck, allow_unknown_keys, read_arguments
from vae3d.config.diffusion import check_diffusion, check_sampling
from vae3d.config.latents import EncodeConfig, check_encoding
from vae3d.config.schema import CONF, InferConfig, TrainConfig
from vae3d.config.validate import ConfigError, check_inference, check_training

FAULTS = {
    "unknown key": (["trainer.max_step=5"], "trainer.max_step is not a setting; did you mean trainer.max_steps?"),
    "unknown group": (["stages=stage1"], "stages is not a setting; did you mean stage?"),
    "unknown key of a term": (["loss.terms.l1.wieght=2"], "loss.terms.l1.wieght is not a setting; did you mean loss.terms.l1.weight?"),
    "missing value": (["data.source.path=???"], "data.source.path is required; set data.source.path=/path/to/videos.csv"),
    "missing checkpoint": (["stage=finetune"], "stage.init_from is required; set stage.init_from=CHECKPOINT"),
    "missing 2D VAE": (["stage=stage1"], "stage.init_from.spatial_vae is required; set stage.init_from.spatial_vae=/path/to/2D-VAE"),
    "absent file": (["data.source.path=/nowhere.csv"], "data.source.path=/nowhere.csv: no such file or folder"),
    "absent checkpoint": (["stage.init_from=/nowhere"], "stage.init_from=/nowhere: no such file or folder"),
    "unknown target": (["model._target_=vae3d.models.nothing.VAE"], "model._target_=vae3d.models.nothing.VAE cannot be imported"),
    "unknown argument": (["model.temporal.chanels=8"], "model.temporal.chanels is not an argument of vae3d.models.temporal.TemporalVAE; did you mean model.temporal.channels?"),
    "missing argument": (["~model.temporal"], "model lacks the argument temporal of vae3d.models.opensora.OpenSoraVAE"),
    "constructor refuses": (["model.temporal.groups=5"], "model or loss cannot be built: ValueError: channels * multipliers are [8, 8, 16]; each must be a multiple of groups=5"),
    "frames upside down": (["data.frames.min=9", "data.frames.max=5"], "data.frames.max=5 is below data.frames.min=9; raise it"),
    "size": (["data.height=17"], "data.height=17 is not a multiple of the model's stride 2; use 16 or 18"),
    "short side": (["data.short_side=8"], "data.short_side=8 is smaller than the crop; use at least 16, or null"),
    "panorama of another shape": (["data.panorama=true", "data.height=16", "data.width=16"], "data.width=16 must be twice data.height=16, for data.panorama=true"),
    "panorama cropped": (["data.panorama=true", "data.width=32", "data.crop=random"], "data.crop=random cuts panoramas, which data.panorama=true shows whole; use center"),
    "panorama scaled": (["data.panorama=true", "data.width=32", "data.short_side=64"], "data.short_side=64 cuts panoramas, which data.panorama=true shows whole; use null"),
    "roll of pictures": (["data.roll=true"], "data.roll=true turns panoramas; set data.panorama=true, or data.roll=false"),
    "sampling": (["data.sampling=random"], "data.sampling=random is unknown; use one of contiguous, first_last_random, strided"),
    "two strides": (["data.sampling=strided", "data.stride=2"], "data.stride=2, but data.sampling=strided takes the largest stride that fits; use 1"),
    "stride and rate": (["data.sampling=strided", "data.fps=8"], "data.fps=8.0, but data.sampling=strided takes the largest stride that fits; use null"),
    "depth": (["data.depth.near=3", "data.depth.far=2"], "data.depth.far=2.0 must be beyond data.depth.near=3.0"),
    "unknown key of depth": (["data.depth.nera=3"], "data.depth.nera is not a setting; did you mean data.depth.near?"),
    "absent rooms": (["data=erp_rooms", "data.source.root=/nowhere", "data.height=16", "data.width=32", "data.batch_size=2"], "data.source.root=/nowhere: no such file or folder"),
    "rooms not given": (["data=erp_rooms", "data.height=16", "data.width=32", "data.batch_size=2"], "data.source.root is required; set data.source.root=/path/to/areas (ROOT/AREA/ROOM/output/panorama_0000.png)"),
    "choice": (["optim.schedule=exp"], "optim.schedule=exp is unknown; use one of constant, constant_with_warmup, linear, cosine"),
    "range": (["data.frames.images=1.5"], "data.frames.images=1.5 must be a probability, 0 to 1"),
    "decay inside the warm-up": (["optim.warmup_steps=200", "optim.decay_start=100"], "optim.decay_start=100 is before the end of optim.warmup_steps=200; raise it, or null"),
    "resume from nothing": (["run.resume_from=/nowhere.pt"], "run.resume_from=/nowhere.pt: no such file or folder"),
    "resume from a folder": (["run.resume_from=/tmp"], "run.resume_from=/tmp is no checkpoint; give RUN/checkpoints/step-..., a run or a training state's .pt"),
    "ema device": (["trainer.ema.device=gpu"], "trainer.ema.device=gpu is unknown; use one of model, cpu"),
    "proximal": (["optim.proximal=-1"], "optim.proximal=-1.0 must be 0 (off) or more"),
    "ramp": (["loss.terms.l1.ramp=[500,200]"], "loss.terms.l1.ramp=[500, 200] must be [first step, last step]"),
    "batch": (["data.batch_size=3", "trainer.accumulate=2"], "data.batch_size=3 does not divide over 1 ranks x trainer.accumulate=2; use a multiple of 2, such as 4"),
    "ranks": (["launcher=torchrun", "launcher.nproc=4", "data.batch_size=2"], "data.batch_size=2 does not divide over 4 ranks x trainer.accumulate=1; use a multiple of 4, such as 4"),
    "unknown part": (["stage.train={temporal_encodr: 1.0}"], "stage.train: OpenSoraVAE has no part temporal_encodr; it has spatial_encoder, spatial_decoder, temporal_encoder"),
    "params_without_grad part": (["loss=latent"], "stage.train: no loss term reaches spatial_decoder, decoder on clips of 1 frames"),
    "frozen and random": (["stage.train={temporal_decoder: 1.0}", "~stage.train.spatial_encoder", "~stage.train.spatial_decoder", "~stage.train.temporal_encoder"], "freezes spatial_encoder, spatial_decoder, temporal_encoder, encoder, decoder with random weights; set stage.init_from"),
    "unknown submodule": (["stage.init_from={spatial: random}"], "stage.init_from.spatial: the model has no such submodule; it has spatial_vae, temporal_vae"),
    "nothing to train on": (["loss.terms.l1.weight=0", "loss.terms.kl.weight=0"], "loss.terms has no term with a weight above 0"),
    "unknown metric": (["validation.metrics=[psnr,vmaf]"], "validation.metrics: no metric is called vmaf; there are psnr, ssim, ms_ssim"),
    "metric for larger frames": (["validation.metrics=[ms_ssim]", "validation.every=1", "data.height=64", "data.width=64"], "validation.metrics: ms_ssim needs at least 161 pixels; data has 64"),
    "metric for longer clips": (["validation.metrics=[rfvd]", "validation.every=1", "validation.frames=9"], "validation.metrics: rfvd needs validation.frames of at least 10"),
    "slow_metrics, but out of turn": (["validation.every=4", "validation.frames=1", "validation.slow_metrics_every=6"], "validation.slow_metrics_every=6 is not a multiple of validation.every=4; use one, or 0 for the last step only"),
    "slow_metrics and never": (["validation.slow_metrics=[psnr]"], "validation.slow_metrics=['psnr'] is of validations, and validation.every=0 makes none"),
    "unknown slow_metrics metric": (["validation.slow_metrics=[fid]", "validation.every=1", "validation.frames=1"], "validation.slow_metrics: no metric is called fid; there are psnr, ssim"),
    "slow_metrics metric for longer clips": (["validation.slow_metrics=[rfvd]", "validation.every=1", "validation.frames=9"], "validation.slow_metrics: rfvd needs validation.frames of at least 10"),
    "best of nothing": (["trainer.best=psnr"], "trainer.best=psnr is of validations, and validation.every=0 makes none"),
    "best of what is not measured": (["trainer.best=rfid", "validation.every=1", "validation.frames=1"], "trainer.best=rfid is no score that can be ranked of validation.metrics and validation.slow_metrics; use one of psnr, psnr_video, ssim, or name its metric there"),
    "best of what has no better": (["trainer.best=flicker_ori", "validation.every=1", "validation.frames=2", "validation.metrics=[flicker]"], "trainer.best=flicker_ori is no score that can be ranked of validation.metrics and validation.slow_metrics; use one of none, for there are no metrics"),
    "NaN for the model": (["model.latents_std=[1,1,nan,1]"], "must be a finite number"),
    "infinity for the model": (["model.spatial.scaling_factor=inf"], "model.spatial.scaling_factor=inf"),
    "no deviation": (["model.latents_std=[1,0,1,1]"], "latents_std[1] is 0; give a finite number from 1e-06 to 1000000"),
    "frames below 1": (["model.micro_frames=0"], "micro_frames is 0; give an integer from 1 to 2147483648 or null"),
    "a fraction of a channel": (["model.temporal.channels=8.5"], "channels is 8.5; give an integer"),
    "broken interpolation": (["data.height=${data.hight}"], "data.height=${data.hight} cannot be resolved: Interpolation key 'data.hight' not found"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_error_is_one_readable_line(videos, name):
    overrides, message = FAULTS[name]
    with pytest.raises(ConfigError) as error:
        tiny.training("temporal_vae", videos, "loss=recon_kl", *overrides, dry_run=True)
    assert len(error.value.errors) == 1, error.value.errors
    assert message in error.value.errors[0]
    assert "\n" not in error.value.errors[0]


@pytest.mark.smoke
def test_all_errors_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        tiny.training(
            "temporal_vae", "/nowhere.csv", "stage=stage1", "trainer.max_step=5", "data.crop=left", "data.batch_size=0",
            "loss.terms.kl.term.beta=2", "data.workers=-1", dry_run=True,
        )  # fmt: skip
    message = str(error.value)
    assert message.startswith("the configuration has 7 errors:\n")
    for key in ("init_from.spatial_vae", "max_step ", "crop", "batch_size", "kl.term.beta", "workers", "nowhere"):
        assert key in message


def test_a_wrong_starting_point_does_not_hide_the_models_errors(videos):
    with pytest.raises(ConfigError) as error:
        tiny.training(
            "temporal_vae", videos, "loss=recon_kl", "stage.init_from=/nowhere", "data.height=17",
            "validation.metrics=[psnrr]", "optim.weight_decay=-1", dry_run=True,
        )  # fmt: skip
    for reason in (
        "stage.init_from=/nowhere: no such",
        "data.height=17 is not",
        "psnrr",
        "optim.weight_decay=-1.0 must be",
    ):
        assert reason in str(error.value)


def test_wrong_frame_counts_name_the_nearest(videos, monkeypatch):
    from vae3d.models.opensora import OpenSoraVAE

    monkeypatch.setattr(OpenSoraVAE, "frames_valid", lambda self, frames: frames % 4 == 1)
    with pytest.raises(ConfigError, match="the model does not take 6 frames; nearest are 1, 5, 9, 13"):
        tiny.training("temporal_vae", videos, "loss=recon_kl", "data.frames.min=6", "data.frames.max=6", dry_run=True)


def test_identity_on_unequal_channels_is_refused(videos, spatial_export):
    with pytest.raises(
        ConfigError, match="the identity loss compares 2D latents of 4 channels with temporal latents of 6"
    ):
        tiny.training(
            "temporal_vae", videos, "stage=stage1", f"stage.init_from.spatial_vae={spatial_export}",
            "model.temporal.latent_channels=6", "model.latents_mean=[0,0,0,0,0,0]", "model.latents_std=[1,1,1,1,1,1]",
            dry_run=True,
        )  # fmt: skip


def test_accelerate_must_not_be_told_another_precision(videos, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch says unasked
    tiny.training("temporal_vae", videos, "loss=recon_kl", "trainer.precision=bf16", dry_run=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"trainer.precision=fp32, but accelerate launch says bf16"):
        tiny.training("temporal_vae", videos, "loss=recon_kl", dry_run=True)


def test_a_sound_configuration_comes_back_typed(videos):
    config = tiny.training("temporal_vae", videos, "loss=recon_kl", "optim.lr=3e-4", "loss.terms.kl.ramp=[5,9]")
    assert config.optim.lr == 3e-4
    assert config.loss.terms["kl"].ramp == [5, 9]
    assert config.stage.name == "stage3"
    assert config.model["micro_frames"] == 17
    assert type(config.model["spatial"]["channels"]) is list


PATHS = [
    "/дом/видео.csv",
    "run=7,lr=1.csv",
    "a (1).mp4",
    "#1.mp4",
    "it's.csv",
    "a&b;c!.csv",
    "end\\'",
    "50%.csv",
    "C:\\x",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_paths_reach_the_configuration_as_they_are_typed(path, plus):
    once = allow_unknown_keys([f"{plus}checkpoint={path}"], InferConfig)
    assert allow_unknown_keys(once, InferConfig) == once  # as under torchrun
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert hydra.compose("infer", once).checkpoint == path


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/дом")
    assert allow_unknown_keys(["source=~/a=b.csv", "hydra.run.dir=~", "~loss.terms.kl"]) == [
        "++source='/home/дом/a=b.csv'", "hydra.run.dir='/home/дом'", "~loss.terms.kl",
    ]  # fmt: skip


def test_one_value_of_a_list_is_a_list_of_it():
    def composed(config, schema, *arguments):
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose(config, allow_unknown_keys(arguments, schema))

    assert composed("infer", InferConfig, "metrics=psnr").metrics == ["psnr"]
    assert composed("infer", InferConfig, "metrics=[psnr,ssim]").metrics == ["psnr", "ssim"]
    assert composed("latents", EncodeConfig, "writers=npy").writers == ["npy"]
    train = ["loss.terms.l1.ramp=5", "validation.metrics='psnr'", "optim.lr=1e-3"]
    cfg = composed("train", TrainConfig, "run.name=x", "stage=stage3", "model=spatial", *train)
    assert (cfg.loss.terms.l1.ramp, cfg.validation.metrics, cfg.optim.lr) == ([5], ["psnr"], 1e-3)
    assert allow_unknown_keys(["metrics=a,b", "metrics=null"], InferConfig) == ["++metrics=a,b", "++metrics=null"]


def test_only_plain_overrides_are_marked():
    arguments = [
        "stage=stage1",
        "trainer.foo=1",
        "+a.b=2",
        "~loss.terms.kl",
        "-m",
        "hydra.sweep.dir=x",
        "hydra/launcher=y",
        "lr",
    ]
    assert allow_unknown_keys(arguments) == ["stage=stage1", "++trainer.foo=1", *arguments[2:]]


INFER_FAULTS = {
    "nothing given": ([], ["checkpoint is required", "save_dir is required", "source is required"]),
    "typo": (["checkpoint=.", "source=.", "save_dir=x", "num_frame=3"], ["num_frame is not a setting; did you mean num_frames?"]),
    "absent": (["checkpoint=/a", "source=/b", "save_dir=x"], ["checkpoint=/a: no such file or folder", "source=/b: no such"]),
    "one side": (["checkpoint=.", "source=.", "save_dir=x", "height=64"], ["height and width go together"]),
    "codec": (["checkpoint=.", "source=.", "save_dir=x", "codec=av1"], ["codec=av1 is unknown; use one of lossless, h264"]),
}  # fmt: skip


@pytest.mark.parametrize("name", INFER_FAULTS)
def test_inference_errors(name):
    overrides, messages = INFER_FAULTS[name]
    with pytest.raises(ConfigError) as error:
        check_inference(tiny.compose(*overrides, config="infer"))
    assert len(error.value.errors) == len(messages)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.smoke
def test_schema_and_check_import_no_torch():
    code = "import sys, vae3d.config.validate, vae3d.commands.launch, vae3d; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=tiny.ROOT).returncode == 0


NUMBERS = {  # no setting may be such a number, at any depth and in nodes with a _target_, too
    "train": {
        "optim.lr": "inf", "optim.eps": "inf", "optim.betas": "[0.9,nan]", "stage.latent_noise": "inf", "run.seed": "-1",
        "loss.terms.l1.weight": "nan", "loss.logvar": "nan", "model.latents_std": "[nan,1,1,1]", "adversary.lr": "inf",
        "stage.train": "{decoder: nan}", "data.fps": "inf", "data.source.val_share": "nan", "validation.videos": "-1",
        "trainer.max_steps": "99999999999999999999", "trainer.spike.factor": "inf", "data.timeout": "nan",
    },
    "infer": {"memory_gib": "inf", "fps": "nan", "seed": "-1", "model.latents_std": "[nan]", "tile_overlap": "-1"},
    "latents": {"max_broken": "nan", "fps": "inf", "seed": "-1", "model.latents_mean": "[inf]"},
    "diffusion": {"optim.lr": "inf", "validation.guidance": "nan", "process.shift": "inf", "run.seed": "-1"},
    "sample": {"guidance": "nan", "shift": "inf", "eta": "nan", "interval": "[0,nan]", "seed": "-1"},
}  # fmt: skip
CHECKS = {
    "train": check_training, "infer": check_inference, "latents": check_encoding, "diffusion": check_diffusion,
    "sample": check_sampling,
}  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_are_not_finite_or_out_of_range_are_refused_wherever_they_stand(name):
    settings = [f"{key}={value}" for key, value in NUMBERS[name].items()]
    model = ["model=temporal_vae", "adversary=patchgan"] if name == "train" else []
    with pytest.raises(ConfigError) as error:
        CHECKS[name](tiny.compose(*model, *settings, config=name))
    for key in NUMBERS[name]:
        named = [reason for reason in error.value.errors if re.match(rf"{re.escape(key)}[.=\[]\S* must ", reason)]
        assert len(named) == 1, (key, error.value.errors)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (argparse_types.positive_int, "1", ["0", "-1", "nan", "1.5", "9" * 30]),
        (argparse_types.non_negative_int, "0", ["-1", "inf", "x"]),
        (argparse_types.finite_float, "-1", ["nan", "inf", "x"]),
        (argparse_types.positive_float, "0.5", ["0", "nan", "inf", "-1", "x"]),
    ],
)
def test_arguments_of_scripts_are_numbers_in_their_range(kind, good, bad):
    assert kind(good) == float(good)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=re.escape(text[:20])):
            kind(text)


@pytest.mark.parametrize("folder", ["scripts", "eval", "vae3d"])
def test_no_argument_is_any_number(folder):
    """argparse takes nan and inf for a float, and -1 for an int."""
    for path in (tiny.ROOT / folder).rglob("*.py"):
        assert not re.search(r"add(_argument)?\(.*[( ]type=(int|float)\b", path.read_text()), path


def test_values_of_a_wrong_type_are_one_error(capsys):
    arguments = ["trainer.max_steps=x", "optim.lr=abc", "validation.metrics=psnr", "run.name=5", "trainer.foo=1"]
    sweeps = ["optim.lr=1e-3,abc", "data=folder", "data.height=${x}", "run.resume_from=null", "optim.betas=[0.9,0.99]"]
    with pytest.raises(SystemExit) as end:
        read_arguments([*arguments, *sweeps], TrainConfig)
    assert end.value.code == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3
    assert told[1].strip() == "trainer.max_steps=x is not an integer"
    assert told[2].strip().startswith("optim.lr=abc")
    valid = [*arguments[2:], *sweeps]
    assert read_arguments(valid, TrainConfig) == allow_unknown_keys(valid, TrainConfig)


def test_a_root_that_cannot_be_made_is_one_message(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        FolderCheck().on_run_start(OmegaConf.create({"run": {"root": str(tmp_path / "file/runs")}}))
    assert end.value.code == 2
    assert f"error: run.root={tmp_path}/file/runs" in capsys.readouterr().err
    FolderCheck().on_run_start(OmegaConf.create({"run": {"root": str(tmp_path / "runs")}}))
    assert (tmp_path / "runs").is_dir()
