"""Training on buckets of shapes and mixtures of sources: order, resume, validation, preflight and logs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.training import quick
from tests.training.test_trainer import fresh_accelerate, weights  # noqa: F401
from vae3d.checkpoints.state import ResumeError
from vae3d.commands import dry_run, train
from vae3d.commands.closing import closing
from vae3d.commands.summary import data_summary, summary
from vae3d.commands.training_data import build_training_data
from vae3d.config.issues import ConfigError
from vae3d.config.schema import TrainConfig
from vae3d.data.batches.batch_schedule import BatchShape
from vae3d.data.media import DataError
from vae3d.data.table.fingerprint import DataChanges
from vae3d.training.preflight import extremes
from vae3d.training.trainer import Trainer

STEPS, MIDDLE = 12, 5


@pytest.fixture(scope="module")
def whole(mixture, tmp_path_factory) -> tuple[Trainer, list[dict], list]:
    """A run, its metrics, and the shapes of its batches."""
    return run(mixture, tmp_path_factory.mktemp("whole"))


def run(config: TrainConfig, folder: Path, **changes) -> tuple[Trainer, list[dict], list]:
    t = quick.trainer(config, folder, **changes)
    drawn, train_step = [], t.train_step

    def recorded(clips, *rest):
        drawn.append([tuple(clip.video.shape) for clip in clips])
        return train_step(clips, *rest)

    t.train_step = recorded
    t.fit()
    return t, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()], drawn


def test_each_step_has_one_shape_and_the_weights_hold(whole):
    t, _, drawn = whole
    assert [shape[0][0] * shape[0][2] * shape[0][3] * shape[0][4] for shape in drawn] == [
        t.data.shape_at(step).pixels for step in range(STEPS)
    ]
    assert {shape for (shape,) in drawn} >= {(4, 3, 1, 16, 24)}
    assert {shape[3:] for (shape,) in drawn} <= {(16, 24), (24, 40), (24, 32), (32, 32), (40, 24), (32, 24), (24, 48)}
    assert sum(shape == (4, 3, 1, 16, 24) for (shape,) in drawn) == STEPS // 3


def test_counts_of_steps_and_clips_are_logged_and_add_up(whole):
    _, rows, drawn = whole
    for row in rows:
        if "loss" not in row:
            continue
        done = drawn[: row["step"]]
        images = [shape for (shape,) in done if shape[3:] == (16, 24)]
        assert row["data/steps_images"] == len(images)
        assert row["data/clips_images"] == 4 * len(images)
        assert row["data/steps_videos"] + row["data/steps_images"] == row["step"]
        buckets = [value for key, value in row.items() if key.startswith("data/clips_videos_")]
        assert sum(buckets) == row["data/clips_videos"] == sum(shape[0] for (shape,) in done) - 4 * len(images)


def test_a_run_that_was_stopped_in_the_middle_ends_in_the_same_bits(mixture, whole, tmp_path):
    t, rows, drawn = whole
    _, _, before = run(mixture, tmp_path, **{"trainer.max_steps": MIDDLE, "validation.every": 0})
    resumed, again, after = run(mixture, tmp_path)
    assert before + after == drawn
    torch.testing.assert_close(weights(resumed), weights(t), rtol=0, atol=0)
    pure = [{k: v for k, v in row.items() if k.startswith(("loss", "data/", "val"))} for row in (rows[-1], rows[-2])]
    assert [{k: v for k, v in row.items() if k.startswith(("loss", "data/", "val"))} for row in again[-1:-3:-1]] == pure


def test_validation_is_logged_over_all_and_for_each_source_and_size(whole):
    t, rows, _ = whole
    scores = [row for row in rows if "val/psnr" in row][-1]
    assert t.data.val_groups == [("videos", "videos_24x40")] * 2 + [("videos", "videos_40x24")]
    mean = (2 * scores["val_videos_24x40/psnr"] + scores["val_videos_40x24/psnr"]) / 3
    assert scores["val_videos/psnr"] == scores["val/psnr"] == pytest.approx(mean)
    assert scores["val_clips"] == 3


def test_the_start_of_a_run_shows_sources_and_buckets(whole, mixture):
    t, _, _ = whole
    text = "\n".join([*summary(mixture, t.network, 1), *data_summary(mixture, t.data)])
    for part in ("videos: 6 training files", "images: 16 training files", "66.7 % of the steps", "33.3 %", "bucket",
                 "pixels kept", "images: is not validated", "images: 1 frame of 16x24"):  # fmt: skip
        assert part in text, part
    assert "12 steps of 2 to 8 clips" in closing(t, 0, 1.0, []).replace("2 to 6", "2 to 8").replace("2 to 4", "2 to 8")


def test_memory_and_preflight_take_the_largest_and_the_smallest_batches(whole):
    t, _, _ = whole
    largest = max(shape.pixels for shape in t.data.shapes())
    assert t.data.item_bytes == 3 * largest
    tried = extremes(t.data.shapes())
    assert {shape.pixels for shape in tried} >= {largest, min(shape.pixels for shape in t.data.shapes())}
    assert {shape.frames for shape in tried} == {1, 3}
    one = [BatchShape(0, 2, frames, 16, 16) for frames in (1, 2, 5)]
    assert extremes(one) == [one[0], one[2]]


@pytest.mark.parametrize(
    ("key", "overrides"),
    [
        ("loss", ["loss=recon_kl_lpips", "loss.terms.lpips.term.net=alex"]),
        ("validation.slow_metrics", ["loss=recon_kl", "validation.slow_metrics=[lpips_alex]", "validation.every=2"]),
    ],
)
def test_a_bucket_of_the_data_that_is_too_small_is_an_error_before_step_1(shapes, trunks, tmp_path, key, overrides):
    """data.height and data.width are large enough, but the data's aspect ratios are known only once it is read."""
    config = tiny.training(
        "spatial", shapes, "data=buckets", "stage=finetune", "stage.init_from=random", "data.height=32",
        "data.width=32", "data.frames.max=1", "data.buckets.frames=[1]", "data.buckets.multiple=8",
        f"data.source.path={shapes}",
        "validation.frames=1", *overrides, meta_check=True,
    )  # fmt: skip
    for start in (lambda: train.build_trainer(config, tmp_path), lambda: dry_run.describe(config)):
        with pytest.raises(ConfigError, match="24") as error:
            start()
        assert [issue.key for issue in error.value.issues] == [key]
    assert not list(tmp_path.iterdir())


def test_preflight_finds_what_only_one_source_would(mixture, tmp_path):
    t = quick.trainer(mixture, tmp_path)
    seen, forward_backward = [], t.forward_backward

    def recorded(batches, *rest):
        seen.append(tuple(batches[0].video.shape))
        forward_backward(batches, *rest)

    t.forward_backward = recorded
    t.preflight()
    assert len(seen) == len(set(seen)) >= 2
    assert (4, 3, 1, 16, 24) in seen
    t.log.close()


def test_other_clips_per_step_are_told_and_another_shape_refused(mixture, tmp_path):
    run(mixture, tmp_path, **{"trainer.max_steps": MIDDLE, "validation.every": 0})
    changed = deepcopy(mixture)
    changed.data.sources["videos"].buckets.clips_multiple = 4
    run(changed, tmp_path, **{"trainer.max_steps": MIDDLE + 1})
    launch = json.loads((tmp_path / "launches.jsonl").read_text().splitlines()[-1])
    assert any(key.startswith("clips per step of videos_3x") for key in launch["changed_since_checkpoint"])
    changed.data.sources["images"].height = 24
    with pytest.raises(ResumeError, match=r"data\.sources\.images\.height: 16 in the checkpoint, 24 now"):
        quick.trainer(changed, tmp_path, **{"trainer.max_steps": MIDDLE + 2})
    changed = deepcopy(mixture)
    changed.data.sources["more"] = deepcopy(changed.data.sources["images"])
    run(changed, tmp_path, **{"trainer.max_steps": MIDDLE + 2})  # other data, and the log says which
    assert "more: a new source" in (tmp_path / "launches.jsonl").read_text()


def test_errors_name_their_source(mixture, shapes, tmp_path):
    wrong = deepcopy(mixture)
    (tmp_path / "none.csv").write_text("path,num_frames\nmissing.mp4,\n")
    wrong.data.sources["videos"].source = {**wrong.data.sources["videos"].source, "path": str(tmp_path / "none.csv")}
    with pytest.raises(DataError, match=r"^data\.sources\.videos: .*data\.max_broken"):
        build_training_data(wrong, 0, 1)
    with pytest.raises(DataError, match=r"^data\.sources\.videos: "):
        dry_run.describe_training(wrong)
    wrong = deepcopy(mixture)
    wrong.validation.frames = 9
    with pytest.raises(DataError, match=r"9 frames .*\(7 are held out\).*validation\.frames"):
        build_training_data(wrong, 0, 1)


def test_a_dry_run_describes_a_mixture(mixture, caplog):
    with caplog.at_level("INFO"):
        dry_run.describe_training(mixture)
    for part in ("data.sources.videos: 9 rows", "data.sources.images: 20 rows", "clips of 3 frames of", "pixels kept"):
        assert part in caplog.text, part


def test_a_mixture_and_one_source_are_told_apart_on_resume(whole):
    t, _, _ = whole
    alone = t.data.fingerprint.sources["videos"]
    for now, saved in ((alone, t.data.fingerprint), (t.data.fingerprint, alone)):
        changes = DataChanges(now)
        changes.load_state_dict(saved.state_dict())
        assert len(changes.lines) == 1
        assert "a mixture" in changes.lines[0]
        changes.load_state_dict(now.state_dict())
        assert changes.lines == []
