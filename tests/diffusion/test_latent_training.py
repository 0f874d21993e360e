"""Training on latents: of a cache and on the fly, killed and resumed, by one rank and two; and what it refuses."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vae3d
from tests import tiny
from tests.device_stub import check_two_waits
from tests.diffusion import latent_runs, rank_training
from tests.stream_stub import check_input_copies
from vae3d.checkpoints import state
from vae3d.commands import launch, train_diffusion
from vae3d.commands.latent_data import build_latent_data
from vae3d.config.issues import ConfigError
from vae3d.data.batches.selection import is_held_out
from vae3d.data.media import DataError
from vae3d.data.table.rows import file_hashes
from vae3d.diffusion import data
from vae3d.diffusion import export as diffusion_export
from vae3d.diffusion.base import Sampling
from vae3d.diffusion.quality import sliced_wasserstein
from vae3d.diffusion.sampling import sample_latents
from vae3d.errors import UserError
from vae3d.io import FileError
from vae3d.latents.cache import CacheError
from vae3d.latents.clips import Transform, items_of
from vae3d.latents.scale import ScaleError
from vae3d.training import diffusion_trainer
from vae3d.training.failures import SaveError, TooManyFailures

sys.path.insert(0, str(tiny.ROOT / "scripts"))
FOUR = "model.channels=[8,8,8]"  # 4 x 4
EIGHT = "model.channels=[8,8,8,8]"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return latent_runs.pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def vae(pictures, tmp_path_factory):
    return latent_runs.vae("spatial", tmp_path_factory.mktemp("vae") / "four", pictures / "images.csv", FOUR)


@pytest.fixture(scope="module")
def cached(pictures, vae, tmp_path_factory):
    """What trains on the cache of the pictures, with their classes."""
    cache = latent_runs.cache(pictures / "images.csv", tmp_path_factory.mktemp("cached") / "cache", vae, flip=True)
    return [f"vae.path={vae}", f"cache={cache}", "labels=auto"]


@pytest.fixture(scope="module")
def encoded(pictures, vae):
    """What encodes the same pictures as they are needed."""
    return [f"vae.path={vae}", f"data.source.path={pictures}", "data.height=64", "data.width=64", "labels=folder"]


def losses(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.mark.parametrize("data", ["cached", "encoded"])
def test_a_step_waits_for_the_device_twice(data, request, tmp_path):
    """With classes, learned variances and weights by SNR from a cache; with rectified flow and noise on the fly."""
    process = ["process=flow"] if data == "encoded" else ["process=ddpm_learned_sigma", "process.min_snr=5"]
    t = latent_runs.trainer(tmp_path, *request.getfixturevalue(data), *process, "label_dropout=0.1")
    t.setup(None)
    check_two_waits(t, steps=2)


@pytest.mark.parametrize("data", ["cached", "encoded"])
def test_micro_batches_are_copied_ahead(data, request, tmp_path):
    t = latent_runs.trainer(tmp_path, *request.getfixturevalue(data), "trainer.accumulate=2", "trainer.save_every=0")
    check_input_copies(t, steps=2, tensors=2)  # values and labels


# ---- what is trained on


@pytest.mark.parametrize(("channels", "size", "stride", "precision"), [(FOUR, 64, 4, "fp32"), (EIGHT, 128, 8, "bf16")])
def test_factors_are_derived(channels, size, stride, precision, tmp_path):
    source = latent_runs.pictures(tmp_path / "pictures", count=3, size=size)
    vae = latent_runs.vae("spatial", tmp_path / "vae", source / "images.csv", channels, size=size)
    told = [f"vae.path={vae}", f"data.source.path={source}", f"data.height={size}", f"data.width={size}"]
    trainer = latent_runs.trainer(tmp_path / "run", *told, f"trainer.precision={precision}", "trainer.max_steps=2")
    assert trainer.data.latent_shape == (4, 1, 16, 16)
    assert trainer.data.codec.space_stride == stride
    assert trainer.fit()
    latent_runs.sample(f"checkpoint={tmp_path / 'run'}", f"out={tmp_path / 'out'}", "count=2")
    with Image.open(tmp_path / "out/000001.png") as picture:
        assert picture.size == (size, size)


def test_a_cache_and_encoding_as_needed_give_the_same(cached, encoded, tmp_path):
    every = "validation.every=2"
    of_cache = latent_runs.trainer(tmp_path / "cache", *cached, "data.flip=false", every).data
    of_clips = latent_runs.trainer(tmp_path / "clips", *encoded, "data.flip=false", every).data
    assert of_cache.classes == of_clips.classes == ["cat", "dog"]
    assert len(of_cache.held_out) == 2
    batches = [[*data.batches(0, 2), *data.held_out] for data in (of_cache, of_clips)]
    for ours, theirs in zip(*batches, strict=True):
        assert ours.positions == theirs.positions
        assert torch.equal(ours.labels, theirs.labels)
        z = [data.latents(batch, torch.device("cpu")) for data, batch in ((of_cache, ours), (of_clips, theirs))]
        assert torch.allclose(*z, atol=2e-5)


def test_mirrored_entries_are_trained_on_and_never_held_out(cached, tmp_path):
    plain, both = (
        latent_runs.trainer(tmp_path / flip, *cached, f"data.flip={flip}", "validation.every=2").data
        for flip in ("false", "true")
    )
    assert (len(plain.dataset.indices), len(both.dataset.indices)) == (10, 20)
    assert len(plain.held_out) == len(both.held_out) == 2


def test_a_file_in_place_of_a_broken_one_has_its_own_label(encoded, pictures, tmp_path):
    source = tmp_path / "pictures"
    shutil.copytree(pictures, source)
    (source / "train/cat/3.png").write_bytes(b"no picture")
    told = [setting for setting in encoded if "source" not in setting]
    data = latent_runs.trainer(tmp_path / "run", *told, f"data.source.path={source}", "data.max_broken=0.5").data
    rows = {draw.position: draw for step in range(5) for draws in data.schedule.step(step) for draw in draws}
    replaced = 0
    for batch in data.batches(0, 5):
        for position, label in zip(batch.positions, batch.labels.tolist(), strict=True):
            broken = data.dataset.datasets[0].table.path(rows[position].row).endswith("cat/3.png")
            sample = data.dataset[rows[position]]
            assert label == int("dog" in sample.path)
            replaced += broken and "dog" in sample.path
    assert replaced


# ---- the run


@pytest.mark.smoke
def test_a_killed_run_goes_on_to_the_same_bits(cached, tmp_path):
    told = [*cached, "validation.every=2", "process=ddpm_learned_sigma", "trainer.accumulate=2", "label_dropout=0.5"]
    whole = latent_runs.trainer(tmp_path / "whole", *told)
    assert whole.fit()
    first = latent_runs.trainer(tmp_path / "killed", *told)
    batches = first.data.batches(0, 4)
    for _ in range(3):  # the third step is lost
        result = first.train_step([next(batches), next(batches)])
        assert not result.status.stop
        first.log_validate_save(result)
    first.log.close()
    second = latent_runs.trainer(tmp_path / "killed", *told)
    assert second.step == 2
    assert second.fit()
    states = [state.load_state(tmp_path / name / "checkpoints/step-0000004") for name in ("whole", "killed")]
    for part in ("model", "ema"):
        ours, theirs = (state.flatten(saved[part]) for saved in states)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert (tmp_path / "whole/exports/step-0000004/model.safetensors").read_bytes() == (
        tmp_path / "killed/exports/step-0000004/model.safetensors"
    ).read_bytes()


def test_checkpoints_that_cannot_be_written_are_borne_until_patience_ends(cached, tmp_path, monkeypatch, caplog):
    told = [*cached, "trainer.save_every=1", "trainer.robust.save_failures=2"]
    trainer = latent_runs.trainer(tmp_path, *told)
    write, write_export = state.write, diffusion_trainer.write_export

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", lambda *args: (full if trainer.step == 2 else write)(*args))
    monkeypatch.setattr(
        diffusion_trainer, "write_export", lambda *args: (full if trainer.step == 3 else write_export)(*args)
    )
    with pytest.raises(
        TooManyFailures, match=r"2 checkpoints in a row could not be written .*trainer.robust.save_failures is"
    ):
        trainer.fit()
    assert "no checkpoint of step 2: rank 0: OSError: [Errno 28]" in caplog.text
    assert "step-0000003 is complete, but its outputs are not: rank 0: OSError" in caplog.text
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-0000001", "step-0000003"]
    monkeypatch.undo()
    assert latent_runs.trainer(tmp_path, *told).fit()


def test_a_last_save_that_fails_is_an_error_that_says_what_is_lost(cached, tmp_path, monkeypatch, caplog):
    trainer = latent_runs.trainer(tmp_path, *cached)
    write = state.write

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state, "write", lambda *args: (full if trainer.step == 4 else write)(*args))
    with pytest.raises(SaveError, match=r"no checkpoint of step 4: .*the steps after step 2 are lost"):
        trainer.fit()
    assert "training goes on" not in caplog.text


def test_an_export_that_a_kill_left_out_is_written_at_the_next_start(cached, tmp_path, monkeypatch):
    assert latent_runs.trainer(tmp_path / "whole", *cached).fit()
    first = latent_runs.trainer(tmp_path / "killed", *cached)
    with monkeypatch.context() as patch:
        patch.setattr(diffusion_trainer, "write_export", lambda *_: 1 / 0)  # as good as a kill
        with pytest.raises(ZeroDivisionError):
            first.fit()
    while not (tmp_path / "killed/exports/step-0000004").is_dir():
        assert latent_runs.trainer(tmp_path / "killed", *cached).fit()
    names = ("model.safetensors", "diffusion.yaml")
    whole, killed = (
        [(tmp_path / run / "exports/step-0000004" / name).read_bytes() for name in names] for run in ("whole", "killed")
    )
    assert whole == killed


def test_steps_that_are_never_finite_stop_a_run_without_a_limit_of_failures(cached, tmp_path):
    told = [*cached, "trainer.max_steps=40", "trainer.save_every=0", "validation.every=0"]
    trainer = latent_runs.trainer(tmp_path, *told, "trainer.robust.max_consecutive_failures=0")
    next(trainer.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(TooManyFailures, match="20 steps in a row were skipped"):
        trainer.fit()


@pytest.mark.parametrize("ends", ["signal", "data", "ruined"])
def test_what_is_finished_is_saved_before_a_run_stops_but_not_while_steps_are_skipped(cached, tmp_path, ends):
    told = [
        *cached,
        "trainer.max_steps=9",
        "trainer.save_every=3",
        "trainer.robust.max_consecutive_failures=3",
        "trainer.keep=1",
    ]
    trainer = latent_runs.trainer(tmp_path, *told)
    step, batches = trainer.train_step, trainer.data.batches

    def dying(*span):
        yield from itertools.islice(batches(*span), 5)
        raise DataError("a worker was killed")

    def at_step_5(*args):
        if trainer.step == 4 and ends == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        if trainer.step == 4 and ends == "ruined":
            trainer.config.optim.lr = 1e30
        return step(*args)

    trainer.train_step = at_step_5
    if ends == "signal":
        assert launch.fit(trainer) == signal.SIGINT
    elif ends == "data":
        object.__setattr__(trainer.data, "batches", dying)  # which is frozen
        with pytest.raises(DataError, match=r"(?s)a worker was killed.*all 5 finished steps are saved"):
            trainer.fit()
    else:
        with pytest.raises(TooManyFailures, match="3 steps in a row were skipped"):
            trainer.fit()
    newest = {"signal": 6, "data": 5, "ruined": 3}[ends]
    assert state.latest_state(tmp_path / "checkpoints").name == f"step-000000{newest}"


def test_two_ranks_train_and_sample_as_one(cached, tmp_path):
    told = [*cached, "optim.eps=0.01"]  # else Adam enlarges what rounding leaves of gradients that are 0
    alone = rank_training.trained(tmp_path / "alone", told)
    (tmp_path / "settings.json").write_text(json.dumps(told))
    for said in tiny.two_ranks("tests.diffusion.rank_training", tmp_path):
        refusals = [line for line in said.splitlines() if " on rank 0, " in line]
        assert refusals == ["  seed: 0 on rank 0, 1 on rank 1", "  optim.lr: 0.001 on rank 0, 0.002 on rank 1"]
    together = state.load_state(tmp_path / "together/checkpoints/step-0000004")
    for name, tensor in alone["model"].items():
        assert torch.allclose(together["model"][name], tensor, atol=2e-5), name
    assert together["latents"]["scale"]["count"] == alone["latents"]["scale"]["count"]
    assert np.allclose(together["latents"]["scale"]["std"], alone["latents"]["scale"]["std"])
    for name in ("loss", "val/loss", "val/sliced_wasserstein"):
        one, two = (losses(tmp_path / run, name) for run in ("alone", "together"))
        assert list(one) == ([2, 4] if name == "loss" else [0, 2, 4])
        assert two == pytest.approx(one, rel=1e-3), name
    against = rank_training.against(told)
    latent_runs.sample(f"checkpoint={tmp_path}/together", f"out={tmp_path}/of_one", *rank_training.THREE, against)
    files = {"000000_dog.png", "000001_cat.png", "000002_dog.png", "grid.png", "samples_3x64x64x3.npz"}
    files |= {"data.png", "distances.json", "command.json", ".lock"}
    for folder in ("of_one", "of_two"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == files
    assert all((tmp_path / "of_one" / name).read_bytes() == (tmp_path / "of_two" / name).read_bytes() for name in files)


def test_samples_come_near_the_data(tmp_path):
    """By a distance at which a network that learned nothing stays: its samples are noise."""
    source = latent_runs.pictures(tmp_path / "pictures", size=16)
    vae = latent_runs.vae("spatial", tmp_path / "vae", source / "images.csv", FOUR, size=16)
    cache = latent_runs.cache(source / "images.csv", tmp_path / "cache", vae, size=16)
    told = [f"vae.path={vae}", f"cache={cache}", "optim.lr=4e-3", "trainer.max_steps=90", "trainer.save_every=0"]
    trainer = latent_runs.trainer(tmp_path / "run", *told, "data.batch_size=16")
    real = torch.cat([trainer.data.latents(batch, trainer.device) for batch in trainer.data.batches(0, 4)])

    def distance():
        with trainer.ema.applied():
            args = trainer.network, trainer.process, trainer.data.latent_shape, Sampling(10)
            return sliced_wasserstein(sample_latents(*args, seed=1, indices=range(64), batch_size=64), real)

    before = distance()
    assert trainer.fit()
    assert distance() < 0.65 * before


# ---- what is refused


@pytest.mark.parametrize(("from_cache", "sample"), [(True, True), (False, True), (False, False)])
def test_latents_of_another_scale_are_refused_until_they_are_mended(
    from_cache, sample, pictures, tmp_path, capsys, caplog
):
    vae = latent_runs.vae("spatial", tmp_path / "the vae", pictures, FOUR, scaled=False)
    model = vae3d.load(vae)
    model.module.quant_conv.bias.data[4:] = 0.0  # the deviations of samples are far from those of means
    vae3d.save(model, vae)
    told = [f"vae.path={vae}", "data.flip=false", f"vae.sample={sample}"]
    if from_cache:
        told.append(f"cache={latent_runs.cache(pictures / 'images.csv', tmp_path / 'the cache', vae)}")
    else:
        told += [f"data.source.path={pictures}", "data.height=64", "data.width=64"]
    with pytest.raises(ScaleError, match=r"over 64 latents, per channel\n  mean .*\n  std ") as why:
        latent_runs.trainer(tmp_path / "run", *told)
    as_they_are = latent_runs.trainer(tmp_path / "as they are", *told, "trainer.any_scale=true")
    assert as_they_are.latents.scale["std"][0] != pytest.approx(1, abs=0.1)
    assert str(why.value) in caplog.text
    assert tiny.status(*shlex.split(re.search(r"into the autoencoder: vae3d (.*)", str(why.value))[1])) == 0
    with caplog.at_level("INFO"):
        assert latent_runs.trainer(tmp_path / "run", *told).latents.scale["count"] == 64
    assert "64 latents (trainer.scale_samples)" in caplog.text  # said before, as encoding them may take minutes
    assert "64 latents, per channel" in caplog.text
    capsys.readouterr()


def test_classes_that_no_export_can_hold_are_named_before_the_first_step(pictures, vae, tmp_path, monkeypatch):
    table = pd.read_csv(pictures / "images.csv")
    table["path"] = str(pictures) + "/" + table["path"]
    table.replace({"label": {"cat": "a ${b}"}}).to_csv(tmp_path / "images.csv", index=False)
    told = [f"vae.path={vae}", f"data.source.path={tmp_path}/images.csv", "labels=column"]
    told += ["data.height=64", "data.width=64"]
    with pytest.raises(FileError, match=r"classes\[0\]: 'a \$\{b\}'"):
        latent_runs.trainer(tmp_path / "run", *told)
    monkeypatch.setattr(diffusion_export, "MAX_CONFIG_BYTES", 1000)
    with pytest.raises(FileError, match="2 classes; the maximum is 1000"):
        latent_runs.trainer(tmp_path / "run", *told)


def test_tensorboard_has_the_same_groups_and_captioned_samples(cached, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vae3d.inference import pictures

    captions, write = [], pictures._write
    monkeypatch.setattr(pictures, "_write", lambda *args: (captions.append(args[3]), write(*args)))

    settings = ["logger=tensorboard", "validation.every=2", "trainer.max_steps=2", "validation.samples=3"]
    t = latent_runs.trainer(tmp_path, *cached, *settings)
    t.fit()
    tags = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tags()
    assert {"1_validation/loss", "2_loss/total", "2_loss/mse", "4_optimizer/lr", "5_speed/clips_per_second"} <= {
        *tags["scalars"]
    }
    assert not [tag for tag in tags["scalars"] if tag.startswith("9_other")]
    assert tags["images"] == ["1_validation_samples/samples", "1_validation_samples/reconstructions"]
    classes = t.data.classes
    samples = [classes[t.data.trained_classes[i % len(t.data.trained_classes)]] for i in range(3)]
    assert [text for text in captions if text in classes] == samples * 2  # before the first step, and at the last
    assert "9_run/parameters/text_summary" in tags["tensors"]


def test_one_batch_can_be_overfitted(cached, tmp_path):
    plain, one = (
        latent_runs.trainer(tmp_path / mode, *cached, f"data.overfit={mode}", "data.batch_size=2")
        for mode in ("false", "true")
    )
    assert one.latents.scale == plain.latents.scale
    assert [batch.positions for batch in one.data.batches(0, 2)] == [[0, 1], [0, 1]]


def test_profile_is_of_the_same_steps_as_that_of_an_autoencoder(cached, tmp_path):
    trainer = latent_runs.trainer(tmp_path, *cached, "debug=profile", "debug.steps=1")
    with trainer.profiler() as step_is_done:
        for _ in range(3):
            step_is_done()
    assert (tmp_path / "profile.txt").is_file()
    assert (tmp_path / "profile.json").is_file()


def test_a_cache_of_another_autoencoder_is_refused(cached, pictures, tmp_path):
    other = latent_runs.vae("spatial", tmp_path / "other", pictures, FOUR, seed=1)
    with pytest.raises(CacheError, match="holds latents of another autoencoder"):
        latent_runs.trainer(tmp_path / "run", *cached, f"vae.path={other}")


def test_missing_labels_are_refused(vae, pictures, tmp_path):
    (tmp_path / "some.csv").write_text("path,label\n" + "".join(
        f"{pictures}/train/{name}/{i}.png,{'cat' if i > 1 else ''}\n" for name in ("cat", "dog") for i in range(1, 6)
    ))  # fmt: skip
    told = [f"vae.path={vae}", f"data.source.path={tmp_path}/some.csv", "data.height=64", "data.width=64"]
    with pytest.raises(DataError, match="2 of 10 files have no label"):
        latent_runs.trainer(tmp_path / "run", *told, "labels=column")
    with pytest.raises(ConfigError, match=r"denoiser.num_classes=5: "):
        latent_runs.trainer(tmp_path / "run", *told, "denoiser.num_classes=5")


def test_other_classes_do_not_go_on(pictures, vae, tmp_path):
    """Which have the numbers of those before: a class would be learned under the name of another one."""
    source = tmp_path / "pictures"
    shutil.copytree(pictures, source)
    told = [f"vae.path={vae}", f"data.source.path={source}", "data.height=64", "data.width=64", "labels=folder"]
    assert latent_runs.trainer(tmp_path / "run", *told, "trainer.max_steps=2").fit()
    for split in ("train", "val"):
        (source / split / "cat").rename(source / split / "zebra")
    with pytest.raises(state.ResumeError, match="other classes: not in the data now: cat; new: zebra"):
        latent_runs.trainer(tmp_path / "run", *told)


def test_a_checkpoint_of_an_autoencoder_does_not_go_on(cached, tmp_path):
    state.begin(tmp_path / "of_vae")
    state.write(tmp_path / "of_vae", {"step": 1, "model": {}, "optimizer": {}}, {"model": {}})
    with pytest.raises(state.ResumeError, match="not of a diffusion model"):
        latent_runs.trainer(tmp_path / "run", *cached, f"run.resume_from={tmp_path}/of_vae/{state.STATE}")


def test_samples_are_of_classes_that_were_trained_on(vae, pictures, tmp_path, monkeypatch):
    """Not of those that the network could have, nor of a 0 before labels that begin with 1."""
    (tmp_path / "numbers.csv").write_text("path,label\n" + "".join(
        f"{pictures}/train/{name}/{i}.png,{label}\n" for name, label in (("cat", 1), ("dog", 3)) for i in range(1, 6)
    ))  # fmt: skip
    asked = []
    draw = diffusion_trainer.sample_latents
    monkeypatch.setattr(
        diffusion_trainer, "sample_latents", lambda *a, labels, **k: asked.extend(labels) or draw(*a, **k)
    )
    told = [f"vae.path={vae}", f"data.source.path={tmp_path}/numbers.csv", "data.height=64", "data.width=64"]
    told += ["labels=column", "denoiser.num_classes=7", "trainer.max_steps=1", "validation.every=1"]
    assert latent_runs.trainer(tmp_path / "run", *told, "validation.samples=5").fit()
    assert asked == 2 * [1, 3, 1, 3, 1]  # before and after the step
    latent_runs.sample(f"checkpoint={tmp_path}/run", f"out={tmp_path}/out", "count=2", "write=[files]")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == ["000000_1.png", "000001_3.png"]
    with pytest.raises(UserError, match=r"classes=0: .* 1, 3"):
        latent_runs.sample(f"checkpoint={tmp_path}/run", f"out={tmp_path}/out", "classes=[0]")


def test_another_network_or_process_does_not_go_on(cached, tmp_path):
    assert latent_runs.trainer(tmp_path, *cached, "trainer.max_steps=2").fit()
    with pytest.raises(UserError, match=r"denoiser.width: 16 in the checkpoint, 32 now"):
        latent_runs.trainer(tmp_path, *cached, "denoiser.width=32")
    with pytest.raises(UserError, match=r"process._target_: '.*RectifiedFlow' in the checkpoint"):
        latent_runs.trainer(tmp_path, *cached, "process=ddpm")
    changed = ["denoiser.gradient_checkpointing=true", "optim.betas=[0.5,0.6]", "optim.weight_decay=0.3"]
    again = latent_runs.trainer(tmp_path, *cached, *changed)
    assert again.step == 2
    group = again.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.3)


@pytest.mark.parametrize("splits", [["val"] * 5 + ["train"] * 30, ["train"] * 35], ids=["told", "by hash"])
def test_entries_of_split_test_are_neither_trained_on_nor_held_out(splits):
    keys = [f"{i}.png" for i in range(40)]
    index = pd.DataFrame({"key": keys, "source": keys, "split": [*splits, *["test"] * 5], "flip": False})
    train, held_out = data.split_cache(index, num_val_files=3)
    assert sorted([*train, *held_out]) == list(range(35))
    assert len(held_out) == (5 if "val" in splits else 3)


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("folder", ["", "./", "s3://bucket/a/"])
def test_a_cache_holds_out_the_files_that_its_clips_would(count, folder):
    """Also where a file has several rows, and the cache windows and mirrored entries of each."""
    names = [f"{folder}{i}.mp4" for i in range(count)]
    rows = pd.DataFrame(
        [(f"/videos/{name}", name, start, start + 1e-5) for name in names for start in (np.nan, 2.0)],
        columns=["path", "name", "start", "end"],
    )
    expected = set(rows["path"][is_held_out(file_hashes(rows), num_val_files=3)])
    assert len(expected) == {1: 0, 5: 1, 40: 3}[count]
    rows = rows.assign(split=None, text=None, error=None, row=range(len(rows)))
    items, _ = items_of(rows, Transform(16, 16), labels="none")
    entries = [(item.key + end, item.path, "#" in end) for item in items for end in ("[0:9]", "[0:9]#flip")]
    index = pd.DataFrame(entries, columns=["key", "source", "flip"]).assign(split="")
    train, held_out = data.split_cache(index, num_val_files=3)
    assert set(index["source"][held_out]) == expected
    assert set(index["source"][train]) == set(rows["path"]) - expected


def test_labels_of_a_cache_are_its_own(cached):
    with pytest.raises(ConfigError, match="labels=folder: "):
        latent_runs.config(*cached, "labels=folder")


def test_clips_are_validated_and_sampled_as_long_as_the_longest_that_is_trained_on(vae, tmp_path):
    for i in range(4):
        tiny.write_video(tmp_path / f"{i}.mp4", tiny.frames(6, 64, 64, seed=i))
    (tmp_path / "videos.csv").write_text("path\n" + "".join(f"{i}.mp4\n" for i in range(4)))
    told = [f"vae.path={vae}", "data=video_csv", f"data.source.path={tmp_path / 'videos.csv'}", "validation.every=1"]
    told += ["data.height=64", "data.width=64", "data.frames.min=2", "data.frames.max=5", "data.num_val_files=1"]
    config = latent_runs.config(*told)
    codec = train_diffusion.codec_of(config, torch.device("cpu"))
    data = build_latent_data(config, codec, 0, 1)
    assert (data.size, data.latent_shape, data.latent_shapes[-1][1]) == ((5, 64, 64), (4, 5, 16, 16), 5)
    assert data.held_out[0].values.shape[2] == 5
    asked = build_latent_data(latent_runs.config(*told, "validation.frames=3"), codec, 0, 1)
    assert (asked.size, asked.held_out[0].values.shape[2]) == ((3, 64, 64), 3)


def test_files_that_are_too_small_are_listed(vae, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "set")
    Image.new("RGB", (40, 64)).save(tmp_path / "set/train/cat/9.png")
    config = [f"vae.path={vae}", f"data.source.path={tmp_path / 'set'}", "data.height=64", "data.width=64"]
    trainer = latent_runs.trainer(tmp_path / "run", *config, "data.min_side=50")
    trainer.log.close()
    listed = [json.loads(line) for line in (tmp_path / "run/data_errors.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in listed] == [str(tmp_path / "set/train/cat/9.png")]
    assert "data.min_side=50" in listed[0]["reason"]


def test_rows_of_one_held_out_file_keep_their_own_classes(vae, pictures, tmp_path):
    rows = ["path,label,split", "0.png,cat,train", "1.png,dog,train", "0.png,cat,val", "0.png,dog,val", "1.png,cat,val"]
    for i in range(2):
        shutil.copy(pictures / f"train/cat/{i + 1}.png", tmp_path / f"{i}.png")
    (tmp_path / "images.csv").write_text("\n".join(rows))
    told = [f"vae.path={vae}", "data=video_csv", f"data.source.path={tmp_path / 'images.csv'}", "labels=column"]
    told += ["data.height=64", "data.width=64", "data.frames.min=1", "data.frames.max=1", "validation.every=1"]
    config = latent_runs.config(*told)
    codec = train_diffusion.codec_of(config, torch.device("cpu"))
    ranks = [build_latent_data(config, codec, rank, 2) for rank in range(2)]
    labels = {batch.positions[0]: batch.labels.tolist() for data in ranks for batch in data.held_out}
    assert [ranks[0].classes[label] for number in range(3) for label in labels[number]] == ["cat", "dog", "cat"]


def test_a_class_whose_files_are_all_held_out_is_named(vae, tmp_path, caplog):
    rows = ["path,label,split"]
    for i, (label, split) in enumerate([("cat", "train"), ("cat", "val"), ("dog", "train"), ("owl", "val")]):
        Image.fromarray(tiny.frames(1, 64, 64, seed=i)[0]).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{label},{split}")
    (tmp_path / "images.csv").write_text("\n".join(rows))
    told = [f"vae.path={vae}", "data=video_csv", f"data.source.path={tmp_path / 'images.csv'}", "labels=column"]
    told += ["data.height=64", "data.width=64", "data.frames.min=1", "data.frames.max=1"]
    config = latent_runs.config(*told, "validation.every=1")
    found = build_latent_data(config, train_diffusion.codec_of(config, torch.device("cpu")), 0, 1)
    assert [found.classes[index] for index in found.trained_classes] == ["cat", "dog"]
    (warning,) = [record.message for record in caplog.records if "never be trained" in record.message]
    assert ": owl;" in warning
    assert "data.num_val_files=0" in warning
    caplog.clear()
    data.warn_of_untrained(["cat", "gap", "owl"], [0, 2, data.NO_LABEL], [2, data.NO_LABEL])
    assert not caplog.records


def test_errors_are_told_together(vae, pictures, tmp_path):
    with pytest.raises(ConfigError) as why:
        latent_runs.config(
            "vae.path=nowhere", "labels=all", "data.batch_size=0", "trainer.ema.decay=0.9", "optim.prox=1"
        )
    assert len(why.value.issues) == 6  # and the missing source
    with pytest.raises(ConfigError, match=r"validation.guidance=2.0: .*label_dropout"):
        latent_runs.config(f"vae.path={vae}", f"data.source.path={pictures}", "labels=folder", "label_dropout=0",
                           "validation.guidance=2")  # fmt: skip
    told = [f"vae.path={vae}", f"data.source.path={pictures}", "data.height=64", "data.width=64"]
    with pytest.raises(ConfigError) as why:  # by the rules of `vae3d train` on clips
        latent_runs.config(*told, "data.roll=true", "data.sampling=strided", "data.stride=2", "data.short_side=32")
    assert [issue.key for issue in why.value.issues] == ["data.short_side", "data.roll", "data.stride"]
    config = latent_runs.config(*told, "denoiser.width=3", "process.logit_std=0", "data.frames.max=2")
    clips = build_latent_data(latent_runs.config(*told), train_diffusion.codec_of(config, torch.device("cpu")), 0, 1)
    with pytest.raises(ConfigError) as why:
        train_diffusion.complete(config, clips)
    assert [issue.key for issue in why.value.issues] == ["process", "denoiser"]
    longer = replace(clips, size=(5, 64, 64))
    with pytest.raises(ConfigError, match=r"5 latent frames.* 1;"):
        train_diffusion.complete(latent_runs.config(*told, network="video_transformer"), longer)
    with pytest.raises(ConfigError, match=r"denoiser.learned_sigma=true: .*False"):
        train_diffusion.complete(latent_runs.config(*told, "denoiser.learned_sigma=true"), clips)
    clips.codec.model.circular = True
    with pytest.raises(ConfigError, match="data: clips of 64x63: the width is 63"):
        train_diffusion.complete(latent_runs.config(*told), replace(clips, stream_sizes=[(64, 63)]))


@pytest.mark.parametrize(
    "file", sorted((tiny.ROOT / "conf/latent_experiment").glob("*.yaml")), ids=lambda file: file.stem
)
def test_latent_experiments_are_sound(file, tmp_path):
    from vae3d.config.diffusion import check_diffusion

    overrides = [f"latent_experiment={file.stem}", f"vae.path={tmp_path}", f"cache={tmp_path}"]
    config = check_diffusion(tiny.compose(*overrides, config="diffusion"))
    assert config.run.root == ("demo/runs" if file.stem.endswith("_tiny") else "runs")
