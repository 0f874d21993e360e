"""Training on latents of several sizes: the order, killed and resumed, by one rank and two, validated and sampled."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests import tiny
from tests.diffusion import latent_runs
from tests.latents import caches
from vae3d.checkpoints import state
from vae3d.checkpoints.state import ResumeError
from vae3d.commands import dry_run, latent_stats, train_diffusion
from vae3d.commands.flags import parse_latent_stats
from vae3d.commands.latent_data import build_latent_data
from vae3d.config.issues import ConfigError
from vae3d.data.decoding.readers import media_info
from vae3d.diffusion.export import read_export
from vae3d.errors import UserError
from vae3d.latents.cache import LatentCache
from vae3d.loading import open_codec

IMAGE, WIDE, TALL = (1, 12, 12), (3, 8, 16), (3, 16, 8)
SHAPES = [dict(zip(("frames", "height", "width"), size, strict=True)) for size in (IMAGE, WIDE, TALL)]
NETWORK = "video_transformer"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six wide videos, three tall ones and twelve images, of two classes; one of each shape is held out."""
    folder, rows = tmp_path_factory.mktemp("videos"), ["path,label,split"]
    for number, (count, size) in enumerate([(7, (3, 16, 32)), (4, (3, 32, 16)), (13, (1, 24, 24))]):
        for i in range(count):
            name, frames = f"{number}_{i}", tiny.frames(*size, seed=20 * number + i)
            if size[0] == 1:
                Image.fromarray(frames[0]).save(folder / f"{name}.png")
            else:
                tiny.write_video(folder / f"{name}.mp4", frames)
            name += ".png" if size[0] == 1 else ".mp4"
            rows.append(f"{name},{'cat' if i % 2 else 'dog'},{'val' if i == 0 else 'train'}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def cached(videos, tmp_path_factory):
    """A cache of the files in three sizes, by whose statistics the autoencoder is scaled."""
    top = tmp_path_factory.mktemp("cached")
    vae = latent_runs.vae("spatial", top / "vae", videos / "table.csv", scaled=False)
    settings = {"height": None, "width": None, "buckets": {"shapes": SHAPES}, "dtype": "fp32", "shard_size": 5}
    caches.made(videos / "table.csv", top / "cache", open_codec(vae, pixel_range="uint8"), **settings)
    latent_stats.main(parse_latent_stats([str(top / "cache"), "--write", str(vae), "--per_channel"]))
    return [f"vae.path={vae}", f"cache={top / 'cache'}", "labels=auto"]


def data_of(settings, rank=0, world_size=1):
    config = latent_runs.config(*settings, network=NETWORK)
    return build_latent_data(config, train_diffusion.codec_of(config, torch.device("cpu")), rank, world_size)


def keys(data, *steps):
    """Of every micro-batch."""
    return [[data.dataset[index].positions[0] for index in batch] for batch in data.schedule.micro_batches(*steps)]


def losses(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# ---- the order


def test_every_latent_is_drawn_equally_often_in_steps_of_one_size_and_cost(cached):
    data = data_of([*cached, "data.batch_size=3"])
    values = 3 * 4 * 8 * 3  # of three clips of 3 frames, in latents of 4 x 8
    assert data.batch_sizes == [(IMAGE, 8), (WIDE, 3), (TALL, 3)]
    assert data.sizes == [IMAGE, WIDE, TALL]
    assert data.latent_shapes == [(4, 1, 6, 6), (4, 3, 4, 8), (4, 3, 8, 4)]
    steps = 4 * sum(data.schedule.counts)  # a whole number of epochs of each size
    drawn = Counter()
    for batch in data.batches(0, steps):
        assert batch.values.shape[1:] in data.latent_shapes
        assert abs(batch.values[:, 0].numel() / values - 1) < 0.1
        drawn.update(batch.positions)
    assert set(drawn.values()) == {1}  # positions are unique over all sizes
    rows = Counter(index.row for batch in data.schedule.micro_batches(0, steps) for index in batch)
    assert set(rows) == set(range(21))
    assert len(set(rows.values())) == 1
    assert data.schedule.clips_before(steps) == rows.total()


def test_latents_of_a_step_are_those_of_the_cache_at_its_positions(cached):
    data = data_of(cached)
    for batch, indices in zip(data.batches(3, 9), data.schedule.micro_batches(3, 9), strict=True):
        for z, position, index in zip(batch.values, batch.positions, indices, strict=True):
            entry = int(data.dataset.indices[index.row])
            assert torch.equal(z, data.dataset.cache[entry, position].z)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_any_number_of_ranks_draws_the_same_clips(accumulate, cached):
    told = [*cached, "data.batch_size=4", "data.buckets={clips_multiple: 4}", f"trainer.accumulate={accumulate}"]
    alone = data_of([*told, "trainer.accumulate=1"]).schedule
    ranks = [data_of(told, rank, 2).schedule for rank in (0, 1)]
    for step in range(40):
        parts = zip(*(schedule.step(step) for schedule in ranks), strict=True)  # micro-batch by micro-batch
        assert list(chain(*chain(*parts))) == alone.step(step)[0]


def test_one_size_is_drawn_as_ever(cached, videos, tmp_path):
    """The order of a cache of one size is that of its table."""
    vae = cached[0].removeprefix("vae.path=")
    made = latent_runs.cache(videos / "table.csv", tmp_path / "cache", vae, size=16, frames=1)
    data = data_of([cached[0], f"cache={made}"])
    assert len(data.schedule.leaves) == 1
    assert data.schedule.rows is None
    assert data.dataset.indices.tolist() == [i for i, s in enumerate(LatentCache(made).index["split"]) if s == "train"]


# ---- the run


@pytest.fixture(scope="module")
def whole(cached, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert latent_runs.trainer(folder, *cached, *RUN, network=NETWORK).fit()
    return folder


RUN = [
    "validation.every=4",
    "validation.samples=2",
    "validation.draws=1",
    "validation.steps=2",
    "trainer.save_every=4",
    "trainer.max_steps=8",
    "trainer.accumulate=2",
    "label_dropout=0.5",
]


@pytest.mark.smoke
def test_a_killed_run_goes_on_to_the_same_bits(cached, whole, tmp_path):
    first = latent_runs.trainer(tmp_path / "run", *cached, *RUN, network=NETWORK)
    assert len({first.data.schedule.locate(step)[0] for step in range(8)}) == 3
    batches = first.data.batches(0, 8)
    for _ in range(5):  # the fifth step is lost
        result = first.train_step([next(batches), next(batches)])
        first.log_validate_save(result)
    first.log.close()
    second = latent_runs.trainer(tmp_path / "run", *cached, *RUN, network=NETWORK)
    assert second.step == 4
    assert second.fit()
    states = [state.load_state(folder / "checkpoints/step-0000008") for folder in (whole, tmp_path / "run")]
    for part in ("model", "ema"):
        ours, theirs = (state.flatten(saved[part]) for saved in states)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(whole) == losses(tmp_path / "run")


def test_losses_are_validated_by_size_and_samples_have_the_commonest(cached, whole):
    trainer = latent_runs.trainer(whole, *cached, *RUN, network=NETWORK)
    trainer.log.close()
    names = ["x".join(map(str, size)) for size in (IMAGE, WIDE, TALL)]
    mean = sum(losses(whole, f"val_{name}/loss")[8] for name in names) / 3  # one held-out clip of each size
    assert losses(whole, "val/loss")[8] == pytest.approx(mean)
    steps = [losses(whole, f"data/steps_{name}")[8] for name in names]
    assert steps == trainer.data.schedule.steps_before(8)
    assert sum(steps) == 8
    assert losses(whole, "data/clips_3x8x16")[8] == 4 * steps[1]
    assert trainer.data.size == IMAGE
    assert losses(whole, "val/sliced_wasserstein").keys() == {0, 4, 8}
    config = read_export(whole).config
    assert config["size"] == list(IMAGE)
    assert config["sizes"] == [list(size) for size in (IMAGE, WIDE, TALL)]


def test_other_clips_per_step_are_warned_of_at_a_resume(cached, whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "run")
    for batch, expected in ((4, 0), (8, 1)):
        trainer = latent_runs.trainer(tmp_path / "run", *cached, *RUN, f"data.batch_size={batch}", network=NETWORK)
        trainer.log.close()
        assert sum("clips per step than the run had" in line for line in caplog.messages) == expected


def test_the_size_of_samples_is_chosen_and_held_out_clips_take_turns(cached):
    chosen = data_of(
        [*cached, "validation.every=1", "validation.height=16", "validation.width=8", "validation.clips=2"]
    )
    assert (chosen.size, chosen.latent_shape) == (TALL, (4, 3, 8, 4))
    assert [tuple(batch.values.shape[1:]) for batch in chosen.held_out] == [(4, 3, 4, 8), (4, 3, 8, 4)]
    assert chosen.held_out_sizes == [WIDE, TALL]
    with pytest.raises(ConfigError, match=r"validation.height=8: .*width=8.* 8x16, 12x12, 16x8"):
        data_of([*cached, "validation.height=8", "validation.width=8"])


def test_dry_run_lists_the_sizes(cached, caplog, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level("INFO", "vae3d"):
        dry_run.describe(latent_runs.config(*cached, *RUN, network=NETWORK))
    told = "\n".join(caplog.messages)
    for line in ("3 sizes, one in each step (samples: 1x12x12):", "1 frame of 12x12 -> latent 4x1x6x6: 12 rows, ",
                 "3 frames of 16x8 -> latent 4x3x8x4: 3 rows, 4 clips per step", "averaging over ranks "):  # fmt: skip
        assert line in told
    assert "have fewer latents than a step takes, which repeats them: 3x16x8;" in told


# ---- samples


def test_samples_of_every_trained_size(cached, whole, tmp_path):
    given = [f"checkpoint={whole}", "count=2", "steps=1", "write=[files,npz]"]
    latent_runs.sample(*given, f"out={tmp_path / 'all'}", "every_size=true")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["1x12x12", "3x16x8", "3x8x16"]
    files = {path.name for path in (tmp_path / "all/1x12x12").glob("[!.c]*")}
    assert files == {"000000_cat.png", "000001_dog.png", "samples_2x12x12x3.npz"}
    alone = [f"out={tmp_path / 'alone'}", "num_frames=1", "height=12", "width=12"]
    latent_runs.sample(*given, *alone)
    for name in (*files, "command.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "all/1x12x12" / name).read_bytes()
    info = media_info(tmp_path / "all/3x16x8/000000_cat.mp4")
    assert (info.num_frames, info.height, info.width) == TALL
    with pytest.raises(ConfigError, match="every_size=true"):
        latent_runs.sample_config(*given, "out=x", "every_size=true", "num_frames=3")
    with pytest.raises(UserError, match=r"write=\[npz\] is for images, and these samples have 3 frames"):
        latent_runs.sample(*given[:-1], "write=[npz]", f"out={tmp_path / 'npz'}", "every_size=true")
    assert not (tmp_path / "npz").exists()


def test_samples_are_compared_with_latents_of_their_size(cached, whole, tmp_path):
    given = [f"checkpoint={whole}", "count=2", "steps=1", "write=[grid]", cached[1].replace("cache=", "against=")]
    latent_runs.sample(*given, f"out={tmp_path / 'out'}", "classes=[cat,dog]")
    assert (tmp_path / "out/distances.json").is_file()
    with pytest.raises(UserError, match=r"has 2 latents of class cat of this size; two sets of 1 need 2|has 2 latents"):
        latent_runs.sample(*given, f"out={tmp_path / 'tall'}", "num_frames=3", "height=16", "width=8", "count=6")
    with pytest.raises(
        UserError, match=r"has latents of 4 x 1 x 6 x 6, 4 x 3 x 4 x 8, 4 x 3 x 8 x 4, the samples are of"
    ):
        latent_runs.sample(*given, f"out={tmp_path / 'other'}", "num_frames=2")


# ---- errors


class OneSize(nn.Module):
    """A denoiser of the user's own with one learned position for each value of latents of 6 x 6."""

    def __init__(self, channels: int, learned_sigma: bool, num_classes: int) -> None:
        super().__init__()
        self.num_classes, self.positions = num_classes, nn.Parameter(torch.zeros(channels, 1, 6, 6))

    def forward(self, z: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        return z + self.positions


def test_a_denoiser_that_takes_one_size_is_refused_by_name(cached):
    data, config = data_of(cached), latent_runs.config(*cached)
    config.denoiser = {"_target_": f"{__name__}.OneSize"}
    with pytest.raises(ConfigError, match=r"(?s)denoiser=.*OneSize: .*latents, 4x3x4x8, of clips of 3x8x16.*4x3x8x4"):
        train_diffusion.complete(config, data)


def test_the_unet_takes_images_of_several_sizes_and_no_videos(cached):
    with pytest.raises(
        ConfigError, match=r"the UNet is for images, and these latents have 3 frames; .*a cache of frames=1"
    ):
        train_diffusion.complete(latent_runs.config(*cached), data_of(cached))


def test_the_unet_is_chosen_by_the_shortest_side_of_all_sizes(cached, videos):
    told = clips_of(cached, videos, "data.buckets=[[1,64,64],[1,48,96]]")
    data = data_of(told)
    assert [shape[2:] for shape in data.latent_shapes] == [(24, 48), (32, 32)]
    config, _ = train_diffusion.complete(latent_runs.config(*told), data)
    assert config.denoiser["multipliers"] == [1, 2, 2]  # 32 x 32 alone would have one more
    network = train_diffusion.network_of(config)
    for shape in data.latent_shapes:
        assert network(torch.zeros(1, *shape), torch.zeros(1)).shape == (1, *shape)


def test_settings_that_a_cache_has_itself_are_refused(cached):
    for settings, key in [
        (["data.buckets=[[3, 8, 16]]"], "data.buckets.shapes"),
        (["data.buckets={multiple: 8}"], "data.buckets.multiple"),
        (["validation.height=8"], "validation.height"),
    ]:
        with pytest.raises(ConfigError) as error:
            latent_runs.config(*cached, *settings, network=NETWORK)
        assert [issue.key for issue in error.value.issues] == [key]


def test_buckets_of_clips_are_checked_as_in_other_trainings(cached, videos):
    told = clips_of(cached, videos, "data.buckets=[[3,8,16],[3,8,16]]", "data.short_side=20", "data.frames.fit=true")
    with pytest.raises(ConfigError) as error:
        latent_runs.config(*told, network=NETWORK)
    keys = {"data.buckets.shapes[1]", "data.short_side", "data.frames.fit"}
    assert {issue.key for issue in error.value.issues} == keys
    with pytest.raises(ConfigError, match=r"data\.source"):
        latent_runs.config(cached[0], "data.source=null", network=NETWORK)


# ---- clips that are encoded as they are needed


def clips_of(cached, videos, *overrides):
    return [
        *(cached[0], "data=video_csv", f"data.source.path={videos / 'table.csv'}", "labels=column"),
        *("data.height=8", "data.width=16", "data.frames.min=3", "data.frames.max=3", *overrides),
    ]


BUCKETS = f"data.buckets=[{','.join(str(list(size)).replace(' ', '') for size in (IMAGE, WIDE, TALL))}]"


def test_clips_in_buckets_are_validated_and_labelled_by_size(cached, videos):
    told = clips_of(cached, videos, BUCKETS, "validation.every=1")
    data = data_of(told)
    assert data.sizes == [IMAGE, WIDE, TALL]
    assert data.stream_groups == [["1x12x12"], ["3x8x16"], ["3x16x8"]]
    assert data.rows == 21
    assert [tuple(batch.values.shape[2:]) for batch in data.held_out] == [IMAGE, WIDE, TALL]
    assert [batch.labels.tolist() for batch in data.held_out] == [[1]] * 3  # dog
    assert data.held_out_sizes == [IMAGE, WIDE, TALL]
    for batch, indices in zip(data.batches(0, 12), data.schedule.micro_batches(0, 12), strict=True):
        for index, label in zip(indices, batch.labels.tolist(), strict=True):
            path = data.dataset[index].path
            assert label == (0 if int(path.split("_")[-1].split(".")[0]) % 2 else 1)
        assert tuple(batch.values.shape[2:]) in data.sizes
    three = data_of([*told, "validation.frames=3"])
    assert three.held_out_sizes == [WIDE, TALL]
    assert three.size == (3, 12, 12)


def test_a_run_on_clips_in_buckets_goes_on_to_the_same_bits(cached, videos, tmp_path):
    told = [
        *clips_of(cached, videos, BUCKETS),
        *RUN,
        "trainer.max_steps=4",
        "trainer.save_every=2",
        "validation.clips=3",
    ]
    assert latent_runs.trainer(tmp_path / "whole", *told, network=NETWORK).fit()
    first = latent_runs.trainer(tmp_path / "run", *told, network=NETWORK)
    batches = first.data.batches(0, 4)
    for _ in range(2):
        first.log_validate_save(first.train_step([next(batches), next(batches)]))
    first.log.close()
    second = latent_runs.trainer(tmp_path / "run", *told, network=NETWORK)
    assert second.step == 2
    assert second.fit()
    ours, theirs = (state.load_state(tmp_path / run / "checkpoints/step-0000004")["model"] for run in ("whole", "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(tmp_path / "whole", "val_3x8x16/loss").keys() == {0, 4}
    with pytest.raises(ResumeError, match=r"data\.buckets"):
        latent_runs.trainer(tmp_path / "run", *clips_of(cached, videos, *RUN), network=NETWORK)


def test_sources_of_a_mixture_have_their_own_sizes_and_labels(cached, videos):
    images = f"{{source: {{_target_: vae3d.data.sources.table.Table, path: {videos / 'images.csv'}}}, height: 12, width: 12, frames: {{min: 1, max: 1}}, batch_size: 8, weight: 3}}"  # fmt: skip
    clips = f"{{source: {{_target_: vae3d.data.sources.table.Table, path: {videos / 'clips.csv'}}}}}"
    rows = (videos / "table.csv").read_text().splitlines()
    for name, suffix in (("images", ".png"), ("clips", ".mp4")):
        (videos / f"{name}.csv").write_text("\n".join([rows[0], *(row for row in rows if suffix in row)]))
    told = [row for row in clips_of(cached, videos) if "source" not in row]
    told += [f"+data.sources={{images: {images}, clips: {clips}}}", "validation.every=1"]
    data, config = data_of(told), latent_runs.config(*told, network=NETWORK)
    lines = train_diffusion.summary(config, nn.Identity(), data, 1)
    assert "    clips: 3 frames of 8x16 -> latent 4x3x4x8: 9 rows, 4 clips per step, 1 step (25.0%)" in lines
    assert data.rows == 21
    assert str(videos / "images.csv") in train_diffusion.scale_hint(config, data)
    assert data.batch_sizes == [(IMAGE, 8), (WIDE, 4)]
    assert data.stream_groups == [["images"], ["clips"]]
    assert data.schedule.steps_before(4) == [3, 1]
    assert sorted(tuple(batch.values.shape[2:]) for batch in data.held_out) == [IMAGE, WIDE, WIDE]
    for batch, indices in zip(data.batches(0, 4), data.schedule.micro_batches(0, 4), strict=True):
        names = [data.dataset[index].path.split("_")[-1].split(".")[0] for index in indices]
        assert batch.labels.tolist() == [1 - int(name) % 2 for name in names]
