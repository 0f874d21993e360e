"""A teacher's targets from a folder are those of the teacher, bit for bit."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny, warm
from tests.device_stub import check_two_waits
from tests.training.test_trainer import fresh_accelerate, weights  # noqa: F401
from vae3d import distributed, loading
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import train
from vae3d.config.issues import ConfigError
from vae3d.models.taesd import TAESD
from vae3d.training import teacher_cache
from vae3d.training.teacher import Distillation
from vae3d.types import ClipBatch

SHAPE = ["model.decoder_channels=[6,5,4,4]", "model.decoder_blocks=[2,1,1,1]"]
SETTINGS = [
    "model.decoder_channels=[4,5,4,3]", "model.decoder_blocks=[1,1,1,1]", "model.frame_batch=null", "data.frames.min=1",
    "data.frames.max=1", "data.batch_size=4", "data.crop=center", "data.flip=false", "stage=decoder_only", "loss=decoder_pixels", "teacher=vae",
    "loss.terms.features.weight=0.1", "teacher.features={decoder.3: decoder.4}", "trainer.max_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A folder with the export of a small TAESD."""
    folder = tmp_path_factory.mktemp("larger")
    config = loading.model_config("taesd", "model.variant=taesd", *SHAPE)
    torch.manual_seed(3)
    write_export(Checkpoint(config, loading.instantiate(config).state_dict(), folder, "export"), folder)
    return folder


def settings(larger, *overrides: str) -> list[str]:
    return [*SETTINGS, f"teacher.path={larger}", *(overrides or [f"stage.init_from={{prune: {larger}}}"])]


def test_a_cached_teacher_trains_as_the_teacher_itself_through_a_stop_and_a_kill_halfway_through_a_file(
    videos, larger, tmp_path
):
    config = tiny.training("taesd", videos, *settings(larger, f"stage.init_from={{encoder: {larger}}}"))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = (sys.executable, "-m", "tests.training.cache_ranks", str(tmp_path))

    codes, printed = tiny.run_ranks(*command, "compare", cwd=tiny.ROOT)
    assert codes == [0, 0], "\n".join(printed)
    clips = 2  # of a rank in a step
    assert all(f"equal {4 * clips}" in text for text in printed)  # every clip of the third run was in the cache

    kill_in_the_middle_of_a_write([*command, "stall", str(2 * clips + clips)], tmp_path)  # of the third step
    cached = list((tmp_path / "cache_killed").rglob("*.safetensors"))
    halves = list((tmp_path / "cache_killed").rglob(".*.tmp"))  # of two ranks, the other may write at that time too
    assert cached
    assert halves
    assert all(load_file(file) for file in cached)

    aged = time.time() - 2 * teacher_cache.STALE
    for half in halves:
        os.utime(half, (aged, aged))
    codes, printed = tiny.run_ranks(*command, "resume", cwd=tiny.ROOT)
    assert codes == [0, 0], "\n".join(printed)
    assert all("equal 2 " in text for text in printed)
    assert not any(half.exists() for half in halves)


def kill_in_the_middle_of_a_write(command: list[str], folder) -> None:
    with (folder / "log.txt").open("wb") as log:
        job = warm.Job(command, tiny.ROOT, tiny.rank_environments(2), [log.fileno()] * 2)
        deadline = time.monotonic() + 100
        while not (folder / "stalled").exists():
            assert job.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()  # noqa: PT018
            time.sleep(0.02)
        job.signal(signal.SIGKILL)
        assert job.wait() == [-signal.SIGKILL] * 2


def batch(*seeds: int) -> ClipBatch:
    videos = [torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in seeds]
    return ClipBatch(torch.stack(videos), torch.zeros(len(seeds), dtype=torch.long), [""] * len(seeds))


def toy(seed: int) -> TAESD:
    torch.manual_seed(seed)
    return TAESD(variant="taesd", decoder_channels=[4, 4, 4, 4], decoder_blocks=[1, 0, 0, 0])


def test_a_step_whose_clips_are_in_the_cache_waits_for_the_device_twice(videos, larger, tmp_path):
    frozen = settings(larger, f"stage.init_from={{encoder: {larger}}}", f"teacher.cache={tmp_path}/cache")
    config = tiny.training("taesd", videos, *frozen, "trainer.save_every=0")
    first = train.build_trainer(config, tmp_path / "first")
    batches = first.load_batches(lambda: False)
    first.train_step([next(batches)])
    assert first.distillation.cache.misses == 4
    again = train.build_trainer(config, tmp_path / "again")
    check_two_waits(again, steps=1)
    assert (again.distillation.cache.hits, again.distillation.cache.misses) == (4, 0)


def test_another_teacher_or_other_features_have_files_of_their_own(tmp_path):
    def distillation(seed: int = 0, **options) -> Distillation:
        return Distillation(toy(seed), toy(9), cache=str(tmp_path), **options)

    first = distillation()
    z = first.compute_targets(batch(1)).targets.z
    assert (first.cache.hits, first.cache.misses) == (0, 1)
    again = distillation()
    assert torch.equal(again.compute_targets(batch(1)).targets.z, z)
    assert (again.cache.hits, again.cache.misses) == (1, 0)
    for other in (distillation(seed=1), distillation(features={"decoder.3": "decoder.3"})):
        other.compute_targets(batch(1))
        assert other.cache.hits == 0


@pytest.mark.parametrize("setting", ["model.pad_w=circular", "model.latents_std=[2,2,2,2]"])
def test_a_teacher_that_differs_in_a_setting_alone_has_files_of_its_own(tmp_path, setting):
    student, teacher, other = tiny.model("wan"), tiny.model("wan"), tiny.model("wan", setting)
    student.latent = "normalized"
    other.load_state_dict(teacher.state_dict())
    for network in (teacher, other):
        Distillation(network, student, cache=str(tmp_path)).compute_targets(batch(1))
    again = Distillation(other, student, cache=str(tmp_path))
    z = again.compute_targets(batch(1)).targets.z
    assert again.cache.hits == 1
    assert torch.equal(z, Distillation(other, student).compute_targets(batch(1)).targets.z)


def test_a_batch_with_a_new_clip_or_a_damaged_file_is_computed(tmp_path):
    given = Distillation(toy(0), toy(9), cache=str(tmp_path))
    z = given.compute_targets(batch(1, 2)).targets.z
    given.compute_targets(batch(2, 3))
    assert given.cache.hits == 0
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])
    assert torch.equal(given.compute_targets(batch(1, 2)).targets.z, z)
    again = Distillation(toy(0), toy(9), cache=str(tmp_path))
    again.compute_targets(batch(1, 2))
    again.compute_targets(batch(1, 2))
    assert torch.equal(again.compute_targets(batch(1, 2)).targets.z, z)
    assert again.cache.hits == 4  # the damaged files have been written again


def test_a_batch_of_another_size_has_files_of_its_own(tmp_path):
    """For a convolution of one clip may differ in its last bits from that of four."""
    given = Distillation(toy(0), toy(9), cache=str(tmp_path))
    given.compute_targets(batch(1, 2))
    given.compute_targets(batch(1))
    assert (given.cache.hits, given.cache.misses) == (0, 3)


def test_a_full_cache_takes_no_more_and_says_so_once(tmp_path, caplog):
    given = Distillation(toy(0), toy(9), cache=str(tmp_path), cache_gib=1e-7)  # 107 bytes; a clip's latents have 64
    for _ in range(2):
        given.compute_targets(batch(1, 2))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert caplog.text.count("teacher.cache_gib=1e-07") == 1


def test_the_ranks_share_the_size_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    limit = 8 * 64 / 2**30  # of 8 clips
    ranks = [Distillation(toy(0), toy(9), cache=str(tmp_path), cache_gib=limit) for _ in range(4)]
    for rank, given in enumerate(ranks):
        given.compute_targets(batch(*range(10 * rank, 10 * rank + 3)))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8


@pytest.mark.parametrize("step", ["save_tensors", "atomic_path"])
def test_a_disk_that_is_full_ends_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog, step):
    given = Distillation(toy(0), toy(9), cache=str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(teacher_cache, step, full)
        z = given.compute_targets(batch(1, 2)).targets.z
        assert torch.equal(z, given.compute_targets(batch(1, 2)).targets.z)
    given.compute_targets(batch(3, 4))
    assert (given.cache.hits, given.cache.misses) == (0, 6)
    assert caplog.text.count("teacher.cache") == 1
    assert not list(tmp_path.rglob("*.*"))


def test_pruning_at_the_start_of_a_run_is_repeatable_and_a_resumed_run_does_not_prune(videos, larger, tmp_path, caplog):
    caplog.set_level("INFO", "vae3d")
    config = tiny.training("taesd", videos, *settings(larger))
    config.model["variant"] = "taesdxl"  # of equal shapes
    first = train.build_trainer(config, tmp_path / "a")
    assert caplog.text.count("decoder.1: 4 of 6 channels kept") == 1
    assert caplog.text.count("model.variant was taesd in") == 1
    assert "does not train" not in caplog.text
    config.stage.train = {"encoder": 1.0}
    train.build_trainer(config, tmp_path / "frozen").log.close()
    assert caplog.text.count("stage.train: the decoder was pruned and does not train") == 1
    config.stage.train = {"decoder": 1.0}
    caplog.clear()
    second = train.build_trainer(config, tmp_path / "b")
    encoders = [model.encoder.state_dict() for model in (first.network, loading.load(larger))]
    torch.testing.assert_close(*map(dict, encoders), rtol=0, atol=0)
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)
    first.fit()
    second.log.close()
    config.trainer.max_steps = 5
    resumed = train.build_trainer(config, tmp_path / "a")
    assert resumed.step == 4
    assert caplog.text.count("decoder.1: 4 of 6 channels kept") == 1  # by the second run
    resumed.log.close()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optim.proximal=1e-4"], "optim.proximal"),
        (["stage.init_from.prune=random"], "stage.init_from.prune"),
        (["stage.init_from.prune=/nowhere"], "/nowhere"),
        (["+stage.init_from.encoder=random"], "stage.init_from"),
        (["model.decoder_blocks=[1,1,1,2]"], "decoder"),
        (["teacher.sample=true", "teacher.cache=x"], "teacher.cache"),
    ],
)
def test_what_cannot_be_pruned_or_cached_is_an_error_before_training(videos, larger, overrides, key):
    with pytest.raises(ConfigError, match=key):
        start = f"stage.init_from={{prune: {larger}}}"
        tiny.training("taesd", videos, *settings(larger, start, *overrides), meta_check=True)


def test_an_encoder_is_distilled_from_cached_latents_while_the_decoder_stays(videos, larger, tmp_path):
    given = [option for option in SETTINGS if not option.startswith(("stage=", "loss", "teacher.features"))]
    given += [f"teacher.path={larger}", "stage=encoder_only"]
    given += ["stage.init_from=random", "loss=distill", "loss.terms.l1.weight=0", f"teacher.cache={tmp_path / 'cache'}"]
    states, cached = [], []
    for name in ("a", "b"):
        t = train.build_trainer(tiny.training("taesd", videos, *given), tmp_path / name)
        before = {key: tensor.clone() for key, tensor in t.network.state_dict().items()}
        calls = []
        hook = t.network.decoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        t.fit()
        hook.remove()
        after = t.network.state_dict()
        changed = {key.split(".")[0] for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert changed == {"encoder"}
        assert not calls  # no pixels are decoded
        states.append(after)
        rows = [json.loads(line) for line in (t.folder / "metrics.jsonl").read_text().splitlines()]
        cached.append(next(row["teacher_cache_hits"] for row in reversed(rows) if "teacher_cache_hits" in row))
    assert cached[0] < 1
    assert cached[1] == 1
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
