from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys

import hydra
import pytest
from omegaconf import OmegaConf

from tests import tiny
from vae3d import argparse_types
from vae3d.commands import cli
from vae3d.commands.cli import check_training
from vae3d.commands.launch import RunFolders
from vae3d.config.check import path_issues, read
from vae3d.config.diffusion import DiffusionConfig, SampleConfig, check_diffusion, check_sampling
from vae3d.config.issues import NO_VALUE, ConfigError, close_match, is_within
from vae3d.config.latents import EncodeConfig, check_encoding
from vae3d.config.overrides import FLAGS, allow_unknown_keys, override_issues
from vae3d.config.schema import CONF, InferConfig, TrainConfig
from vae3d.config.targets import signature_of
from vae3d.config.validate import check_inference, training_issues

# Name -> overrides, what the error begins with (key=value), and what it says, too.
FAULTS = {
    "unknown key": (["trainer.max_step=5"], "trainer.max_step", "did you mean trainer.max_steps?"),
    "key of another section": (["optim.max_steps=5"], "optim.max_steps", "did you mean trainer.max_steps?"),
    "key of a section within": (["data.path=a.csv"], "data.path", "did you mean data.source.path?"),
    "key without its section": (["lr=1"], "lr", "did you mean optim.lr?"),
    "key of several sections": (["frames=5"], "frames", "did you mean data.frames or validation.frames?"),
    "keys of an unknown section": (["train.max_steps=5"], "train", "did you mean trainer?"),
    "unknown group": (["stages=stage1"], "stages", "did you mean stage?"),
    "unknown key of a term": (["loss.terms.l1.wieght=2"], "loss.terms.l1.wieght", "did you mean loss.terms.l1.weight?"),
    "missing value": (["data.source.path=???"], "data.source.path", "set data.source.path=/path/to/videos.csv"),
    "missing checkpoint": (["stage=finetune"], "stage.init_from", "set stage.init_from=CHECKPOINT"),
    "missing 2D VAE": (["stage=stage1"], "stage.init_from.spatial_vae", "set stage.init_from.spatial_vae=/path/to/2D-VAE"),
    "absent file": (["data.source.path=/nowhere.csv"], "data.source.path=/nowhere.csv", ""),
    "absent checkpoint": (["stage.init_from=/nowhere"], "stage.init_from=/nowhere", ""),
    "unknown target": (["model._target_=vae3d.models.nothing.VAE"], "model._target_=vae3d.models.nothing.VAE", "cannot be imported"),
    "unknown argument": (["model.temporal.chanels=8"], "model.temporal.chanels", "did you mean model.temporal.channels?"),
    "missing argument": (["~model.temporal"], "model.temporal", "vae3d.models.opensora.OpenSoraVAE"),
    "constructor refuses": (["model.temporal.groups=5"], "model", "[8, 8, 16]; each must be a multiple of groups=5"),
    "frames upside down": (["data.frames.min=9", "data.frames.max=5"], "data.frames.max=5", "data.frames.min=9"),
    "size": (["data.height=17"], "data.height=17", "use 16 or 18"),
    "short side": (["data.short_side=8", "data.width=32"], "data.short_side=8", "16x32"),
    "panorama of another shape": (["data.panorama=true", "data.height=16", "data.width=16"], "data.width=16", "twice data.height=16"),
    "panorama cropped": (["data.panorama=true", "data.width=32", "data.crop=random"], "data.crop=random", "data.panorama=true"),
    "panorama scaled": (["data.panorama=true", "data.width=32", "data.short_side=64"], "data.short_side=64", "data.panorama=true"),
    "roll of pictures": (["data.roll=true"], "data.roll=true", "data.panorama=true"),
    "sampling": (["data.sampling=random"], "data.sampling=random", "contiguous, first_last_random or strided"),
    "two strides": (["data.sampling=strided", "data.stride=2"], "data.stride=2", "data.sampling=strided"),
    "stride and rate": (["data.sampling=strided", "data.fps=8"], "data.fps=8.0", "data.sampling=strided"),
    "depth": (["data.depth.near=3", "data.depth.far=2"], "data.depth.far=2.0", "data.depth.near=3.0"),
    "unknown key of depth": (["data.depth.nera=3"], "data.depth.nera", "did you mean data.depth.near?"),
    "absent rooms": (["data=erp_rooms", "data.source.root=/nowhere", "data.height=16", "data.width=32", "data.batch_size=2"], "data.source.root=/nowhere", ""),
    "rooms not given": (["data=erp_rooms", "data.height=16", "data.width=32", "data.batch_size=2"], "data.source.root", "set data.source.root=/path/to/areas"),
    "choice": (["optim.schedule=exp"], "optim.schedule=exp", "constant, constant_with_warmup, linear, cosine"),
    "range": (["data.frames.images=1.5"], "data.frames.images=1.5", "from 0 to 1"),
    "decay inside the warm-up": (["optim.warmup_steps=200", "optim.decay_start=100"], "optim.decay_start=100", "optim.warmup_steps=200"),
    "resume from nothing": (["run.resume_from=/nowhere.pt"], "run.resume_from=/nowhere.pt", ""),
    "resume from another program's name": (["run.resume_from=/nowhere/checkpoint-5"], "run.resume_from=/nowhere/checkpoint-5", "no such"),
    "resume from a folder": (["run.resume_from=/tmp"], "run.resume_from=/tmp", "RUN/checkpoints/step-"),
    "ema device": (["trainer.ema.device=gpu"], "trainer.ema.device=gpu", "model or cpu"),
    "proximal": (["optim.proximal=-1"], "optim.proximal=-1", "at least 0"),
    "ramp": (["loss.terms.l1.ramp=[500,200]"], "loss.terms.l1.ramp=[500, 200]", "ascending"),
    "batch": (["data.batch_size=3", "trainer.accumulate=2"], "data.batch_size=3", "a multiple of 2, such as 4"),
    "ranks": (["launcher=torchrun", "launcher.nproc=4", "data.batch_size=2"], "data.batch_size=2", "a multiple of 4, such as 4"),
    "unknown part": (["stage.train={temporal_encodr: 1.0}"], "stage.train", "temporal_encodr; it has spatial_encoder, spatial_decoder, temporal_encoder"),
    "params_without_grad part": (["loss=latent"], "stage.train", "spatial_decoder on clips of 1 frame"),
    "frozen and random": (["stage.train={temporal_decoder: 1.0}", "~stage.train.spatial_encoder", "~stage.train.spatial_decoder", "~stage.train.temporal_encoder"], "stage.init_from=random", "spatial_encoder, spatial_decoder, temporal_encoder with"),
    "no starting point": (["stage.init_from=null"], "stage.init_from=null", "random, or a checkpoint"),
    "a list of starting points": (["stage.init_from=[a]"], "stage.init_from=[a]", "random, or a checkpoint"),
    "no starting point of a part": (["stage.init_from={spatial_vae: null}"], "stage.init_from={'spatial_vae': None}", "random, or a checkpoint"),
    "several models to prune": (["stage.init_from={prune: [a, b]}"], "stage.init_from={'prune': ['a', 'b']}", "random, or a checkpoint"),
    "unknown submodule": (["stage.init_from={spatial: random}"], "stage.init_from.spatial", "spatial_vae, temporal_vae"),
    "nothing to train on": (["loss.terms.l1.weight=0", "loss.terms.kl.weight=0"], "loss.terms", "weight above 0"),
    "unknown metric": (["validation.metrics=[psnr,vmaf]"], "validation.metrics=[psnr, vmaf]", "vmaf; there are psnr, ssim, ms_ssim"),
    "metric for larger frames": (["validation.metrics=[ms_ssim]", "validation.every=1", "data.height=64", "data.width=64"], "validation.metrics=[ms_ssim]", "161 pixels; data has 64"),
    "metric for longer clips": (["validation.metrics=[rfvd]", "validation.every=1", "validation.frames=9"], "validation.metrics=[rfvd]", "validation.frames of at least 10"),
    "slow_metrics, but out of turn": (["validation.every=4", "validation.frames=1", "validation.slow_metrics_every=6"], "validation.slow_metrics_every=6", "validation.every=4"),
    "slow_metrics and never": (["validation.slow_metrics=[psnr]"], "validation.slow_metrics=[psnr]", "validation.every=0"),
    "unknown slow_metrics metric": (["validation.slow_metrics=[fid]", "validation.every=1", "validation.frames=1"], "validation.slow_metrics=[fid]", "fid; there are psnr, ssim"),
    "slow_metrics metric for longer clips": (["validation.slow_metrics=[rfvd]", "validation.every=1", "validation.frames=9"], "validation.slow_metrics=[rfvd]", "validation.frames of at least 10"),
    "best of nothing": (["trainer.best=psnr"], "trainer.best=psnr", "validation.every=0"),
    "best of what is not measured": (["trainer.best=rfid", "validation.every=1", "validation.frames=1"], "trainer.best=rfid", "psnr, psnr_video, ssim"),
    "best depth of colours": (["trainer.best=abs_rel", "validation.every=1", "validation.frames=1"], "trainer.best=abs_rel", "use one of psnr, psnr_video, ssim, or add"),
    "best of what has no better": (["trainer.best=flicker_ori", "validation.every=1", "validation.frames=2", "validation.metrics=[flicker]"], "trainer.best=flicker_ori", "validation.metrics"),
    "NaN for the model": (["model.latents_std=[1,1,nan,1]"], "model.latents_std[2]=nan", "finite"),
    "infinity for the model": (["model.spatial.scaling_factor=inf"], "model.spatial.scaling_factor=inf", "finite"),
    "no deviation": (["model.latents_std=[1,0,1,1]"], "model", "latents_std[1] is 0; give a finite number from 1e-06 to 1000000"),
    "frames below 1": (["model.micro_frames=0"], "model", "micro_frames is 0; give an integer from 1 to 2147483648 or null"),
    "a number for a name": (["model.temporal.channels={1: 2}"], "model.temporal.channels", "has the name 1"),
    "a fraction of a channel": (["model.temporal.channels=8.5"], "model", "channels is 8.5; give an integer"),
    "broken interpolation": (["data.height=${data.hight}"], "data.height=${data.hight}", "'data.hight' not found"),
    "a word for a number": (["optim.lr=abc"], "optim.lr=abc", "a number above 0"),
    "a flag for a number": (["trainer.max_steps=true"], "trainer.max_steps=true", "an integer of at least 1"),
    "a number for a group": (["data.frames=17"], "data.frames=17", "min, max, step, images, fit"),
    "a group for a number": (["optim.lr={x: 1}"], "optim.lr={'x': 1}", "a number above 0"),
    "a list of two": (["optim.betas=0.9"], "optim.betas=0.9", "a list of 2;"),
    "an entry of a list": (["optim.betas=[0.9,1]"], "optim.betas[1]=1", "at least 0 and below 1"),
    "a flag": (["trainer.compile=maybe"], "trainer.compile=maybe", "true or false"),
    "a near choice": (["optim.schedule=cosin"], "optim.schedule=cosin", "did you mean cosine?"),
    "a folder's name": (["run.name=a/b"], "run.name=a/b", "without /"),
    "no learning rate of a part": (["stage.train.encoder=0"], "stage.train.encoder=0", "must be a number above 0"),
    "a number for a term": (["loss.terms.l1=5"], "loss.terms.l1=5", "must be a group of the keys term, weight"),
    "a word for frames of buckets": (["data.buckets.frames=[1,x]"], "data.buckets.frames[1]=x", "must be an integer of at least 1"),
    "a number for a bucket": (["data.buckets.shapes=[5]"], "data.buckets.shapes[0]=5", "must be a group of the keys frames"),
    "a size of a bucket": (["data.buckets=[[1,16,-1]]"], "data.buckets.shapes[0].width=-1", "at least 1"),
    "a size of a listed bucket": (["data.buckets.shapes=[[1,16,16],[1,16,-1]]"], "data.buckets.shapes[1].width=-1", "at least 1"),
    "an unknown key of a bucket": (["data.buckets.shapes=[{frames: 1, height: 16, widht: 16}]"], "data.buckets.shapes[0].widht", "did you mean data.buckets.shapes[0].width?"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_error_is_one_readable_line(videos, name):
    overrides, start, fragment = FAULTS[name]
    with pytest.raises(ConfigError) as error:
        tiny.training("temporal_vae", videos, "loss=recon_kl", *overrides, meta_check=True)
    (message,) = map(str, error.value.issues)
    assert message.startswith(f"{start}: ")
    assert fragment in message
    assert "\n" not in message


@pytest.mark.smoke
def test_all_errors_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        tiny.training(
            "temporal_vae", "/nowhere.csv", "stage=stage1", "trainer.max_step=5", "data.crop=left", "data.batch_size=0",
            "loss.terms.kl.term.beta=2", "data.workers=-1", meta_check=True,
        )  # fmt: skip
    message = str(error.value)
    assert message.startswith("the configuration has 7 errors:\n")
    for key in ("init_from.spatial_vae", "max_step: ", "crop", "batch_size", "kl.term.beta", "workers", "nowhere"):
        assert key in message


def test_a_wrong_starting_point_does_not_hide_the_models_errors(videos):
    with pytest.raises(ConfigError) as error:
        tiny.training(
            "temporal_vae", videos, "loss=recon_kl", "stage.init_from=/nowhere", "data.height=17",
            "validation.metrics=[psnrr]", "optim.weight_decay=-1", meta_check=True,
        )  # fmt: skip
    for reason in (
        "stage.init_from=/nowhere: ",
        "data.height=17: ",
        "psnrr",
        "optim.weight_decay=-1: ",
    ):
        assert reason in str(error.value)


def test_wrong_frame_counts_name_the_nearest(videos, monkeypatch):
    from vae3d.models.opensora import OpenSoraVAE

    monkeypatch.setattr(OpenSoraVAE, "frames_valid", lambda self, frames: frames % 4 == 1)
    with pytest.raises(ConfigError, match="the model does not take 6 frames; nearest are 1, 5, 9, 13"):
        tiny.training(
            "temporal_vae", videos, "loss=recon_kl", "data.frames.min=6", "data.frames.max=6", meta_check=True
        )


def test_identity_on_unequal_channels_is_refused(videos, spatial_export):
    with pytest.raises(
        ConfigError, match="the identity loss compares 2D latents of 4 channels with temporal latents of 6"
    ):
        tiny.training(
            "temporal_vae", videos, "stage=stage1", f"stage.init_from.spatial_vae={spatial_export}",
            "model.temporal.latent_channels=6", "model.latents_mean=[0,0,0,0,0,0]", "model.latents_std=[1,1,1,1,1,1]",
            meta_check=True,
        )  # fmt: skip


def test_accelerate_must_not_be_told_another_precision(videos, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what accelerate launch says unasked
    tiny.training("temporal_vae", videos, "loss=recon_kl", "trainer.precision=bf16", meta_check=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match=r"trainer.precision=fp32: .*bf16"):
        tiny.training("temporal_vae", videos, "loss=recon_kl")
    with pytest.raises(ConfigError, match=r"trainer.precision=fp32: .*bf16"):
        check_diffusion(tiny.compose("trainer.precision=fp32", config="diffusion"))


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
    once = allow_unknown_keys([f"{plus}checkpoint={path}"])
    assert allow_unknown_keys(once) == once  # as under torchrun
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        assert hydra.compose("infer", once).checkpoint == path


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/дом")
    assert allow_unknown_keys(["source=~/a=b.csv", "hydra.run.dir=~", "~loss.terms.kl"]) == [
        "++source='/home/дом/a=b.csv'", "hydra.run.dir='/home/дом'", "~loss.terms.kl",
    ]  # fmt: skip


def test_one_value_of_a_list_is_a_list_of_it():
    def typed(config, schema, *arguments):
        return read(tiny.compose(*arguments, config=config), schema)[0]

    assert typed("infer", InferConfig, "metrics=psnr").metrics == ["psnr"]
    assert typed("infer", InferConfig, "metrics=[psnr,ssim]").metrics == ["psnr", "ssim"]
    assert typed("latents", EncodeConfig, "writers=npy").writers == ["npy"]
    assert typed("sample", SampleConfig, "classes=7", "write=grid").classes == ["7"]
    train = typed("train", TrainConfig, "model=spatial", "validation.metrics='psnr'", "optim.lr='1e-3'", "run.name=5")
    assert (train.validation.metrics, train.optim.lr, train.run.name) == (["psnr"], 1e-3, "5")
    assert allow_unknown_keys(["metrics=a,b", "metrics=null"]) == ["++metrics=a,b", "++metrics=null"]


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
    "nothing given": ([], ["checkpoint: ", "save_dir: ", "source: "]),
    "typo": (["checkpoint=.", "source=.", "save_dir=x", "num_frame=3"], ["num_frame: unknown key; did you mean num_frames?"]),
    "absent": (["checkpoint=/a", "source=/b", "save_dir=x"], ["checkpoint=/a: ", "source=/b: "]),
    "one side": (["checkpoint=.", "source=.", "save_dir=x", "height=64"], ["height=64: "]),
    "codec": (["checkpoint=.", "source=.", "save_dir=x", "codec=av1"], ["codec=av1: must be lossless or h264"]),
}  # fmt: skip


@pytest.mark.parametrize("name", INFER_FAULTS)
def test_inference_errors(name):
    overrides, messages = INFER_FAULTS[name]
    with pytest.raises(ConfigError) as error:
        check_inference(tiny.compose(*overrides, config="infer"))
    assert len(error.value.issues) == len(messages)
    for message in messages:
        assert message in str(error.value)


COMMANDS = {
    "train": ["data.source.path=.", "optim.lr=abc"],
    "infer": ["checkpoint=.", "source=.", "save_dir=x"],
    "encode": ["checkpoint=.", "source=.", "cache=x"],
    "train-diffusion": ["vae.path=.", "data.source.path=."],
    "sample": ["checkpoint=.", "out=x"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_key_shows_within_a_second_and_without_torch(name, tmp_path):
    code = (
        "import atexit, runpy, sys, time\n"
        "atexit.register(lambda: print('torch' in sys.modules, time.process_time()))\n"
        f"sys.argv = {['vae3d', name, *COMMANDS[name], 'no_such_key=1']}\n"
        "runpy.run_module('vae3d', run_name='__main__')"
    )
    done = tiny.run(sys.executable, "-c", code, cwd=tmp_path, HYDRA_FULL_ERROR="1")
    assert done.returncode == 2, done.stdout
    assert "no_such_key: unknown key" in done.stdout
    torch_imported, seconds = done.stdout.split()[-2:]
    assert torch_imported == "False"
    assert float(seconds) < 2  # 0.7 on an idle core


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
SCHEMAS = {
    "train": TrainConfig, "infer": InferConfig, "latents": EncodeConfig, "diffusion": DiffusionConfig, "sample": SampleConfig,
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
        assert len([issue for issue in error.value.issues if is_within(issue.key, key)]) == 1, error.value


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


@pytest.mark.parametrize(
    ("argument", "start", "hint"),
    [("model=wna", "model=wna: ", "did you mean wan?"), ("+experiment=wan_tinny", "experiment=wan_tinny: ", "wan_tiny?"),
     ("trainer/strategy=ddp", "trainer/strategy=ddp: ", "replicated"), ("loss=ldm,erpp", "loss=erpp: ", "erp?"),
     ("optim.betas=[0.9,,1]", "optim.betas=[0.9,,1]: ", "quotes"), ("logger=null", "logger=null: ", "none"),
     ("=5", "=5: ", "KEY=VALUE"), ("optim.lr", "optim.lr: ", "KEY=VALUE"), ("--lr", "--lr: ", "KEY=VALUE")],
)  # fmt: skip
def test_what_hydra_would_reject_is_an_error_with_the_nearest_name(argument, start, hint, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "data=folder", argument, "hydra/launcher=joblib", "optim.lr=1e-3,1e-4"])
    assert end.value.code == 2
    _, error, message = ["", *capsys.readouterr().err.splitlines()][-3:]
    assert error.endswith("has 1 error:")
    assert message.strip().startswith(start)
    assert hint in message


def test_an_empty_path_is_not_the_working_directory():
    (issue,) = path_issues({"stage.init_from": "", "teacher.path": None})
    assert (issue.key, issue.value) == ("stage.init_from", "")


def test_a_folder_to_write_is_not_the_working_directory():
    for config, keys in {"train": ["run.root", "teacher.cache"], "latents": ["cache"], "sample": ["out"]}.items():
        issues = read(tiny.compose(*(f"{key}=" for key in keys), config=config), SCHEMAS[config])[1]
        assert [issue.key for issue in issues if issue.message == "must not be empty"] == keys


def test_files_of_ones_own_are_not_checked():
    arguments = ["hydra.searchpath=[file:///mine]", "loss=mine", "--multi", "~debug", "--cfg", "job"]
    assert allow_unknown_keys(arguments) == arguments
    assert override_issues(arguments) == []


def test_the_flags_are_those_of_the_installed_hydra():
    from hydra._internal.utils import get_args_parser  # Hydra has no public list of its flags

    found = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert set(FLAGS) == found, f"hydra-core {hydra.__version__} has other flags: change vae3d.config.overrides.FLAGS"


def test_a_file_of_conf_with_wrong_syntax_is_an_error_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("run:\n  name: [x\n")
    monkeypatch.setattr("vae3d.config.overrides.CONF", tmp_path)
    (issue,) = override_issues(["experiment=mine"])
    assert (issue.key, issue.value) == ("experiment", "mine")
    assert "line 3" in issue.message


@pytest.mark.parametrize("argument", ["run=5", "+run=5", "run=null"])
def test_a_value_for_the_section_that_names_the_folder_is_one_error_of_the_list(argument, tmp_path):
    command = [
        sys.executable,
        "train.py",
        argument,
        "optim.lr=abc",
        "data.source.path=.",
        f"++hydra.run.dir={tmp_path}",
    ]
    done = tiny.run(*command, cwd=tiny.ROOT)
    assert done.returncode == 2
    _, first, *errors = done.stdout.splitlines()
    assert "2 errors" in first
    assert errors[0].strip().startswith(f"run={argument.partition('=')[2]}: must be a group of the keys name, root")
    assert errors[1].strip().startswith("optim.lr=abc: ")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [("wieght", ["term", "weight", "ramp"], "weight"), ("wna", ["wan", "taehv"], "wan"), ("nera", ["near", "far"], "near"),
     ("max_step", ["max_steps", "spike"], "max_steps"), ("lrate", ["lr", "betas", "power"], None),
     ("momentum", ["lr", "betas", "min_lr", "proximal", "warmup_steps"], None), ("clip", ["flip_all", "cycles"], None),
     ("ddp", ["deepspeed_zero2", "replicated"], None)],
)  # fmt: skip
def test_only_near_names_are_proposed(name, options, expected):
    assert close_match(name, options) == expected


@pytest.mark.parametrize("override", ["optim.lr=abc", "optim.lrr=1", "trainer.max_steps=true", "optim.betas=0.9"])
def test_a_wrong_type_does_not_wait_for_the_check_of_the_model(videos, override, monkeypatch):
    from vae3d.commands import meta_check

    monkeypatch.setattr(meta_check, "issues", None)
    with pytest.raises(ConfigError) as error:
        tiny.training("temporal_vae", videos, "loss=recon_kl", override, meta_check=True)
    assert len(error.value.issues) == 1


def test_errors_have_fields():
    config, issues = training_issues(tiny.compose("model=spatial", "optim.lr=abc", "data.crop=centre", "optim.lrr=1"))
    found = {issue.key: issue for issue in issues}
    assert (found["optim.lr"].value, found["optim.lr"].message) == ("abc", "must be a number above 0")
    assert (found["data.crop"].value, found["data.crop"].hint) == ("centre", "did you mean center?")
    assert found["optim.lrr"].malformed
    assert found["data.source.path"].value is NO_VALUE
    assert (config.optim.lr, config.data.crop) == (1e-5, "center")  # defaults, so that the rest can be checked


def test_a_rule_is_skipped_where_a_value_is_wrong_itself():
    def keys(*overrides):
        return {issue.key for issue in training_issues(tiny.compose("model=spatial", *overrides))[1]}

    assert "data.frames.max" in keys("data.frames.min=9", "data.frames.max=5")
    assert "data.frames.max" not in keys("data.frames.min=0", "data.frames.max=-1")


def test_a_number_for_a_network_has_no_shortcut():
    overrides = ("model=temporal_vae", "stage.fit_shortcut=3", "model.temporal=5")
    assert "stage.fit_shortcut" in {issue.key for issue in training_issues(tiny.compose(*overrides))[1]}


def test_reduce_dtype_is_not_for_deepspeed():
    def keys(*overrides):
        return {issue.key for issue in training_issues(tiny.compose("model=spatial", *overrides))[1]}

    assert "trainer.reduce_dtype" in keys("trainer.reduce_dtype=bf16", "trainer/strategy=deepspeed_zero2")
    assert "trainer.reduce_dtype" not in keys("trainer.reduce_dtype=bf16")
    assert "trainer.reduce_dtype" in keys("trainer.reduce_dtype=fp16")


@pytest.mark.parametrize("name", CHECKS)
def test_the_defaults_of_the_schema_are_sound(name):
    """pydantic does not check defaults."""
    for issue in read(tiny.compose("run.name=x", config=name), SCHEMAS[name])[1]:
        assert issue.message == "required" or issue.key == "run", issue
        assert "=VALUE" not in issue.hint, issue  # says what the value is


TARGETS = sorted(
    {target for path in CONF.rglob("*.yaml") for target in re.findall(r"_target_: *(vae3d[\w.]+)", path.read_text())}
)


@pytest.mark.parametrize("target", TARGETS)
def test_a_signature_read_from_the_source_is_that_of_the_class(target):
    module, _, name = target.rpartition(".")
    parameters = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    signature = signature_of(target)
    assert signature.arguments == {key: parameter.default is parameter.empty for key, parameter in parameters.items()}


def test_a_pattern_of_very_many_files_is_not_expanded_where_its_ends_are_missing(tmp_path):
    for name in ("0.tar", "1.tar", "2.tar", "08.tar", "09.tar", "10.tar"):
        (tmp_path / name).touch()
    missing = {
        pattern: len([*path_issues({"data.source.path": f"{tmp_path}/{pattern}.tar"})])
        for pattern in ("{0..2}", "{2..0}", "{08..10}", "{0..2..2}", "{0..3}", "{0..999999999}", "{1,0}", "{08,10..11}")
    }
    assert missing == {
        "{0..2}": 0, "{2..0}": 0, "{08..10}": 0, "{0..2..2}": 0, "{0..3}": 1, "{0..999999999}": 1, "{1,0}": 0,
        "{08,10..11}": 1,
    }  # fmt: skip


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path, capsys):
    def start(root, name="run"):
        folder = tmp_path / root / name
        RunFolders.make(OmegaConf.create({"run": {"root": str(tmp_path / root)}}), folder)
        return folder

    (tmp_path / "file").touch()
    for root, name in (("file/runs", "run"), ("", "file")):  # the root, and the run in a root that is there
        with pytest.raises(SystemExit) as end:
            start(root, name)
        assert end.value.code == 2
        assert f"error: run.root={tmp_path / root}: {tmp_path / root / name}" in capsys.readouterr().err
    assert start("runs").is_dir()
