"""Errors of data.buckets and data.sources, and what they expand to."""

from __future__ import annotations

import pytest

from tests import tiny
from vae3d.commands.training_data import clip_sizes
from vae3d.config.issues import ConfigError
from vae3d.config.schema import CONF
from vae3d.config.sources import sources_of
from vae3d.config.validate import training_issues

SOURCE = "{_target_: vae3d.data.sources.table.Table, path: /}"
A = f"data.sources.a={{source: {SOURCE}, weight: 2}}"
BASE = ["data=folder", "data.source.path=/"]


def issues(*overrides: str) -> dict[str, str]:
    """Key -> error."""
    start = ["model=spatial", "stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    return {issue.key: str(issue) for issue in training_issues(tiny.compose(*start, *overrides))[1]}


def test_a_source_has_the_settings_of_data_where_it_gives_none():
    given = f"data.sources.b={{source: {SOURCE}, frames: {{max: 9}}, batch_size: 32, crop: random}}"
    config, found = training_issues(
        tiny.compose(A, given, "data.height=64", "data.frames.min=5", "data.frames.max=17", "data.overfit=true")
    )
    assert [issue.key for issue in found if issue.key.startswith("data")] == []
    a, b = sources_of(config.data).values()
    assert (a.height, a.frames.min, a.frames.max, a.batch_size, a.crop) == (64, 5, 17, 8, "center")
    assert (b.height, b.frames.min, b.frames.max, b.batch_size, b.crop) == (64, 5, 9, 32, "random")
    assert a.overfit
    assert [source.weight for source in config.data.sources.values()] == [2.0, 1.0]
    assert config.data.source is None
    alone = training_issues(tiny.compose(*BASE))[0].data
    assert sources_of(alone) == {"": alone}


@pytest.mark.parametrize(
    ("overrides", "key", "told"),
    [
        ([A, "data.source.path=/"], "data.source", "data.sources"),
        ([A, "data.sources.a.hieght=3"], "data.sources.a.hieght", "data.sources.a.height"),
        ([A, "data.sources.a.workers=3"], "data.sources.a.workers", "unknown key"),
        ([A, "data.sources.a.weight=0"], "data.sources.a.weight", "above 0"),
        ([A, "data.sources.a.weight=-1"], "data.sources.a.weight", "above 0"),
        ([A, "data.sources.a.frames.min=40"], "data.sources.a.frames.max", "data.frames.min=40"),
        ([A, "data.sources.a.batch_size=7", "trainer.accumulate=3"], "data.sources.a.batch_size", "multiple of 3"),
        ([A, "data.sources.a.source.path=/nowhere"], "data.sources.a.source.path", "no such file"),
        ([A, "data.sources.a.short_side=9"], "data.sources.a.short_side", "256x256"),
        ([A, "data.sources.a.buckets.frames=[0]"], "data.sources.a.buckets.frames[0]", "at least 1"),
        ([A, "data.sources.b.weight=1"], "data.sources.b.source", "required"),
        (["data=mixture", "data.sources.vidoes.source.path=/"], "data.sources.vidoes.source", "data.sources.videos?"),
        ([A, "data.sources.b.source=/"], "data.sources.b.source", "_target_"),
        (["data.source=/"], "data.source", "data.source.path"),
        (["data=mixture"], "data.sources.videos.source.path", "required"),
        (["data=mixture", "~data.sources.videos", "~data.sources.images"], "data.source", "data.sources"),
        ([*BASE, "data.buckets=[[33,256]]"], "data.buckets", "[frames, height, width]"),
        ([*BASE, "data.buckets=[]"], "data.buckets.shapes", "no buckets"),
        ([*BASE, "data.buckets=3"], "data.buckets", "shapes"),
        ([*BASE, "data.buckets=[{frames: 33, height: 256}]"], "data.buckets.shapes[0].width", "required"),
        ([*BASE, "data.buckets=[[33,256,0]]"], "data.buckets.shapes[0].width", "at least 1"),
        ([*BASE, "data.buckets=[[9,64,64],[9,64,64]]"], "data.buckets.shapes[1]", "data.buckets.shapes[0]"),
        (
            [*BASE, "data.buckets=[[9,64,64],{frames: 1, height: 64, width: 64, cost: 2}]"],
            "data.buckets.shapes[0].cost",
            "missing",
        ),
        ([*BASE, "data.buckets=[{frames: 1, height: 64, width: 64, cost: 2}]"], "data.buckets.shapes", "17x256x256"),
        (
            [*BASE, "data.buckets=[{frames: 1, height: 64, width: 64, batch_size: 3}]", "trainer.accumulate=2"],
            "data.buckets.shapes[0].batch_size",
            "multiple of 2",
        ),
        ([*BASE, "data.buckets.clips_multiple=3", "trainer.accumulate=2"], "data.buckets.clips_multiple", "of 2"),
        ([*BASE, "data.buckets.aspects=[wide]"], "data.buckets.aspects", "16:9"),
        ([*BASE, "data.buckets.aspects=[auto,16:9]"], "data.buckets.aspects", "alone"),
        ([*BASE, "data.buckets.aspekts=[auto]"], "data.buckets.aspekts", "data.buckets.aspects"),
        ([*BASE, "data.buckets.frames=[1,17]", "data.frames.images=0.2"], "data.frames.images", "data.buckets.frames"),
        ([*BASE, "data.buckets.frames=[1,17]", "data.frames.images=0.2"], "data.frames.images", "data=mixture"),
        ([*BASE, "data.buckets.frames=[1,17]", "data.frames.fit=true"], "data.frames.fit", "false"),
        ([*BASE, "data.buckets.frames=[1,17]", "data.short_side=300"], "data.short_side", "null"),
        ([*BASE, "data.buckets.frames=[1,17]", "data.panorama=true", "data.width=512"], "data.buckets", "null"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_be_right(overrides, key, told):
    assert told in issues(*overrides)[key]


def test_an_error_of_data_is_not_repeated_for_each_source():
    assert [key for key in issues(A, "data.height=x") if key.startswith("data")] == ["data.height"]


@pytest.mark.parametrize("preset", ["buckets", "mixture"])
def test_the_presets_are_complete_but_for_their_paths(preset):
    paths = {"buckets": ["data.source.path=/"]}.get(preset) or [
        f"data.sources.{name}.source.path=/" for name in ("videos", "images")
    ]
    assert (CONF / f"data/{preset}.yaml").is_file()
    assert [key for key in issues(f"data={preset}", *paths) if key.startswith("data")] == []


def test_a_list_of_shapes_is_short_for_their_keys():
    config = training_issues(tiny.compose(*BASE, "data.buckets=[[33,256,256],{frames: 1, height: 512, width: 512}]"))[0]
    assert clip_sizes(config.data) == [(1, 512, 512), (33, 256, 256)]
    config = training_issues(tiny.compose(*BASE, "data.buckets.aspects=[16:9,1:1]", "data.frames.min=33"))[0]
    assert clip_sizes(config.data) == [(33, 192, 336), (33, 256, 256)]


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["data.buckets.multiple=7"], "data.buckets.multiple=7"),
        (["data.buckets=[[1,16,18],[1,16,15]]"], r"data.buckets.shapes\[1\].width=15"),
        (["data.buckets=[[1,32,32],[1,32,48]]", *tiny.SERAENA], "data.buckets: Seraena"),
        (["data.buckets.multiple=16", *tiny.SERAENA], "data.buckets: Seraena"),
    ],
)
def test_sizes_must_fit_the_model_and_the_adversary(videos, overrides, key):
    frames = ["data.frames.min=1", "data.frames.max=1", "stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    with pytest.raises(ConfigError, match=key):
        tiny.training("spatial", videos, *frames, "data.height=32", "data.width=32", *overrides, meta_check=True)
