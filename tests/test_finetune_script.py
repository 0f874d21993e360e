"""scripts/finetune_wan_erp.sh: every option of finetune_vae_rgb.py, and wrong command lines."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests import tiny
from vae3d.config.schema import TrainConfig

SCRIPT = tiny.ROOT / "scripts/finetune_wan_erp.sh"


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHON"}  # which chose that of .venv
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


def settings(*arguments: str) -> dict[str, Any]:
    """What train.py would be given, as Hydra reads it."""
    done = call("--dry_run", *arguments)
    assert done.returncode == 0, done.stderr
    python, train, *overrides = shlex.split(done.stdout)
    assert (python, train) == ("python", str(tiny.ROOT / "train.py"))
    return {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(overrides)}


RGB = {"experiment": "wan_erp_rgb"}
OPTIONS = {
    "--vae_path /a b/it's=[1],2.pth": {"stage.init_from": "/a b/it's=[1],2.pth"},
    "--data_root ./data": {"data.source.root": "./data"},
    "--output_dir ./results/vae_rgb_finetuned/": {"run.root": "./results", "run.name": "vae_rgb_finetuned"},
    "--output_dir out": {"run.root": ".", "run.name": "out"},
    "--resume_from ./r/vae_rgb_step1000.pt": {"run.resume_from": "./r/vae_rgb_step1000.pt"},
    "--height 128": {"data.height": 128},
    "--width 256": {"data.width": 256},
    "--max_frames 5": {"data.frames.max": 5},
    "--max_frames 20": {"data.frames.max": 17},
    "--max_frames 21": {"data.frames.max": 21},
    "--batch_size 1": {"data.batch_size": 1},
    "--num_workers 4": {"data.workers": 4},
    "--lr 1e-5": {"optim.lr": 1e-5},
    "--max_steps 5000": {"trainer.max_steps": 5000},
    "--warmup_steps 200": {"optim.warmup_steps": 200},
    "--max_grad_norm 0.5": {"optim.grad_clip": 0.5},
    "--max_grad_norm .5": {"optim.grad_clip": 0.5},
    "--mixed_precision bf16": {"trainer.precision": "bf16"},
    "--mixed_precision fp16": {"trainer.precision": "fp16"},
    "--mixed_precision no": {"trainer.precision": "fp32"},
    "--gradient_checkpointing": {"model.gradient_checkpointing": True},
    "--save_steps 500": {"trainer.save_every": 500},
    "--seed 42": {"run.seed": 42},
    "--lambda_l1 1.0": {"loss.terms.l1.weight": 1.0},
    "--lambda_edge 0.5": {"loss.terms.edge.weight": 0.5},
    "--lambda_lpips 0.1": {"loss.terms.lpips.weight": 0.1},
    "--lambda_kl 1e-6": {"loss.terms.kl.weight": 1e-6},
    "--lambda_prox 1e-4": {"optim.proximal": 1e-4},
    "--lpips_warmup_start 100": {"loss.terms.lpips.ramp": [100, 500]},
    "--lpips_warmup_end 600": {"loss.terms.lpips.ramp": [200, 600]},
    "--kl_warmup_start 400": {"loss.terms.kl.ramp": [400, 1000]},
    "--kl_warmup_end 1200": {"loss.terms.kl.ramp": [500, 1200]},
    "--ema_decay 0.9999": {"trainer.ema.decay": 0.9999},
    "--encoder_lr_ratio 0.1": {"stage.train.encoder": 0.1},
    "--spike_threshold 5.0": {"trainer.spike.factor": 5.0},
    "--decoder_only": {"experiment": "wan_erp_decoder"},
}


@pytest.mark.parametrize("line", OPTIONS)
def test_each_option_sets_its_key(line):
    option, _, value = line.partition(" ")
    expected = RGB | OPTIONS[line]
    assert settings(option, *([value] if value else [])) == expected
    if value:
        assert settings(f"{option}={value}") == expected


def test_every_option_of_the_table_is_tested():
    table = re.search(r"TABLE='\n(.*?)'", SCRIPT.read_text(), re.DOTALL)[1]
    assert {line.split()[0] for line in table.splitlines()} == {o.split()[0] for o in OPTIONS} | {"--dry_run"}


def test_keys_of_the_closed_part_of_the_configuration_exist():
    """Models, losses, data sources and stages are named by the experiment; everything else by the schema."""
    keys = {key for found in OPTIONS.values() for key in found if key != "experiment"}
    for key in keys:
        if key.startswith(("model.", "loss.terms.", "data.source.", "stage.")):
            continue
        node: Any = TrainConfig()
        for name in key.split("."):
            assert name in {field.name for field in dataclasses.fields(node)}, key
            node = getattr(node, name)


def test_the_command_line_of_finetune_vae_rgb():
    lines = "--vae_path Wan2.1_VAE.pth --data_root data --output_dir ./results/vae_rgb_finetuned --height 128 --width 256 --batch_size 1 --max_frames 5 --lr 1e-5 --max_steps 5000 --gradient_checkpointing"
    assert settings(*lines.split(), "--decoder_only", "--", "launcher=torchrun") == {
        "experiment": "wan_erp_decoder", "stage.init_from": "Wan2.1_VAE.pth", "data.source.root": "data",
        "run.root": "./results", "run.name": "vae_rgb_finetuned", "data.height": 128, "data.width": 256,
        "data.batch_size": 1, "data.frames.max": 5, "optim.lr": 1e-5, "trainer.max_steps": 5000,
        "model.gradient_checkpointing": True, "launcher": "torchrun",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning_rate 1e-5", "--learning_rate"),
        ("1e-5", "1e-5"),
        ("--lr", "--lr needs a value"),
        ("--lr --height 128", "--lr needs a value"),
        ("--vae_path=", "--vae_path needs a value"),
        ("--lr fast", "--lr fast is not a number"),
        (r"--vae_path a\b.pth", r"--vae_path a\b.pth"),
        ("--max_frames 4", "--max_frames 4 must be a whole number of at least 5"),
        ("--mixed_precision fp8", "--mixed_precision fp8 is unknown; use bf16, fp16 or no"),
        ("--decoder_only=1", "--decoder_only takes no value"),
        ("--lambda_kl 1e-6 --decoder_only --encoder_lr_ratio 0.1", "--lambda_kl --encoder_lr_ratio"),
    ],
)  # fmt: skip
def test_wrong_command_lines_name_the_option(line, message):
    done = call(*line.split())
    assert done.returncode == 2
    error, options = done.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert options.startswith("options: --vae_path --data_root ")
    assert done.stdout == ""


def test_help_names_every_option_and_its_key():
    done = call("--vae_path", "x", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Fine-tune the Wan2.1 VAE on panoramas")
    listed = dict(line.split()[:2] for line in done.stdout.partition("Options:\n")[2].splitlines())
    assert listed.keys() == {o.split()[0] for o in OPTIONS} | {"--dry_run"}
    assert listed["--lr"] == "optim.lr"


def test_without_dry_run_the_command_runs(tmp_path):
    echo = tmp_path / "python"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 7\n')
    echo.chmod(0o755)
    done = subprocess.run(
        [str(SCRIPT), "--seed", "3"], env={"PATH": "/usr/bin:/bin", "PYTHON": str(echo)}, capture_output=True,
        text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 7
    assert done.stdout.splitlines() == [str(tiny.ROOT / "train.py"), "experiment=wan_erp_rgb", "run.seed=3"]
