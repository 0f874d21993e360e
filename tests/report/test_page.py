"""Pages of moving comparisons: clips keep pixels, places and times; pages hold their data whatever the names are."""

from __future__ import annotations

import base64
import errno
import io
import json
import re
from dataclasses import replace

import av
import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from vae3d.io import FileError
from vae3d.report import clip as clips
from vae3d.report import page as pages
from vae3d.report.page import (
    Chapter,
    Difference,
    Metric,
    Picture,
    Report,
    Video,
    clip_ids,
    encode_clip,
    read_clip,
    remove_page,
    take_videos,
    to_json,
    unpack_page,
    worst_first,
    write_clip,
    write_page,
)

SIZE = 36, 52


def smooth(frames: int = 5, height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    """Moving colours without the sharp edges that 4:2:0 cannot keep."""
    t, y, x = np.mgrid[:frames, :height, :width]
    waves = [np.sin((x + 3 * t) / 25 + k) + np.cos((y - t) / 30 + 2 * k) for k in range(3)]
    return np.rint(127.5 + 60 * np.stack(waves, -1)).astype(np.uint8)


def noisy(video: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 6, video.shape[:3])[..., None]
    return np.clip(video + noise, 0, 255).round().astype(np.uint8)


def decoded(media: bytes) -> np.ndarray:
    """[T, H, W, 3] floats, as browsers decode limited-range BT.709 without colour management."""
    frames = []
    with av.open(io.BytesIO(media)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 13, 1)
        for index, frame in enumerate(container.decode(video=0)):
            assert frame.time == pytest.approx(index / float(container.streams.video[0].average_rate))
            planes, height, width = frame.to_ndarray().astype(float), frame.height, frame.width
            assert height % 2 == width % 2 == 0
            luma = (planes[:height] - 16) * 255 / 219
            chroma = (planes[height:].reshape(2, height // 2, width // 2) - 128) * 255 / 224
            blue, red = chroma.repeat(2, 1).repeat(2, 2)
            rgb = luma + 1.5748 * red, luma - 0.1873 * blue - 0.4681 * red, luma + 1.8556 * blue
            frames.append(np.stack(rgb, -1).clip(0, 255))
    return np.stack(frames)


def shown(clip: clips.Clip, frames: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    return {(p.of, p.layer): frames[:, p.y : p.y + p.height, p.x : p.x + p.width] for p in clip.panels}


def grey(difference: np.ndarray) -> np.ndarray:
    return np.abs(difference.astype(float)).mean(-1) / 255


def test_every_panel_shows_the_pixels_of_its_frame():
    original = smooth()
    recs = {"rec": noisy(original), "b": original[:, ::-1].copy()}
    chunks = {name: [video[:1], video[1:]] for name, video in recs.items()}
    clip = encode_clip([original[:2], original[2:]], chunks, 24000 / 1001, {"latents": [255 - original]})
    assert (clip.kind, clip.frames, clip.source, clip.notes) == ("video/mp4", 5, SIZE, [])
    assert clip.fps == pytest.approx(24000 / 1001)
    panels = shown(clip, decoded(clip.media))
    assert [of for of, layer in panels if layer == "picture"] == ["original", "rec", "b", "latents"]
    videos = {"original": original, "latents": 255 - original, **recs}
    for (of, layer), got in panels.items():
        if layer == "picture":
            expected = videos[of]
        elif layer == "error":
            expected = grey(original.astype(int) - recs[of])[..., None] / clip.scale * 255
        else:
            expected = (
                grey(np.diff(videos[of].astype(int), axis=0, prepend=videos[of][:1]))[..., None] / clip.scale * 255
            )
        assert got.shape[:3] == (5, *SIZE)
        error = got - np.minimum(expected, 255)
        assert np.abs(error).mean() < 3, (of, layer)
        assert np.abs(error.mean((0, 1, 2))).max() < 0.8, (of, layer)
        borders = error[:, 0], error[:, -1], error[:, :, 0], error[:, :, -1]
        assert max(np.abs(border.mean((0, 1))).max() for border in borders) < 3.2, (of, layer)


def test_an_error_of_one_grey_value_is_seen():
    """Also after the panel is reduced, where it is a mean of exact errors."""
    original = smooth(2, 1440, 96)
    clip = encode_clip([original], {"rec": [original ^ 1]}, 24)
    assert (clip.panels[0].height, clip.panels[0].width) == (720, 48)
    error = shown(clip, decoded(clip.media))["rec", "error"]
    assert error.mean() == pytest.approx(4, abs=0.7)


def test_panels_share_no_macroblock_and_fit_what_decoders_take():
    for count, size in ((1, (36, 52)), (3, (480, 848)), (7, (2160, 3840)), (2, (96, 6000)), (30, (256, 256))):
        layers = [(str(i), "picture") for i in range(count)]
        (height, width), panels = clips._layout(layers, size)
        assert height <= clips.MAX_SHEET[0]
        assert width <= clips.MAX_SHEET[1]
        taken = np.zeros((height // 16, width // 16), int)
        for p in panels:
            assert p.height <= 720
            taken[p.y // 16 : -(-(p.y + p.height) // 16), p.x // 16 : -(-(p.x + p.width) // 16)] += 1
            assert p.width / p.height == pytest.approx(size[1] / size[0], rel=0.05)
        assert taken.max() == 1


def test_equal_videos_give_equal_bytes_however_they_are_cut_into_chunks():
    video = smooth()
    one = encode_clip([video], {"rec": [video]}, 24)
    assert one == encode_clip([video[:3], video[3:]], {"rec": [video[:1], video[1:]]}, 24)


def test_an_image_is_a_png_with_exact_pixels_and_without_changes():
    image = smooth(1)
    clip = encode_clip([image], {"rec": [image ^ 8]}, 0)
    assert (clip.kind, clip.frames, clip.fps) == ("image/png", 1, 0)
    panels = shown(clip, np.asarray(Image.open(io.BytesIO(clip.media)))[None])
    assert list(panels) == [("original", "picture"), ("rec", "picture"), ("rec", "error")]
    assert np.array_equal(panels["rec", "picture"], image ^ 8)
    assert set(panels["rec", "error"].ravel()) == {32}


def test_frames_beyond_the_limit_are_left_out_with_a_note(monkeypatch):
    monkeypatch.setattr(clips, "MAX_FRAMES", 3)
    video = smooth()
    clip = encode_clip([video], {}, 24)
    assert (clip.frames, len(decoded(clip.media))) == (3, 3)
    assert clip.notes == ["only the first 3 frames are shown; the video is longer"]
    assert encode_clip([video[:3]], {}, 24).notes == []


def test_a_thumbnail_shows_the_middle_frame_of_original_and_first_reconstruction():
    video = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.full((1, 192, 320, 3), 20, np.uint8)
    clip = encode_clip([video], {"rec": [255 - video]}, 24)
    picture = np.asarray(Image.open(io.BytesIO(clip.thumbnail)))
    assert picture.shape == (96, 320, 3)
    assert (int(picture[48, 80, 0]), int(picture[48, 240, 0])) == (80, 175)


@pytest.mark.parametrize(
    ("rec", "fps", "words"),
    [
        (smooth(4), 24, "shorter"),
        (smooth(5, 36, 50), 24, r"rec is \(36, 50, 3\)"),
        (smooth().astype(float), 24, "rec is float64"),
        (smooth(), 0, "frame rate"),
    ],
)
def test_videos_that_do_not_fit_together_are_errors(rec, fps, words):
    with pytest.raises(ValueError, match=words):
        encode_clip([smooth()], {"rec": [rec]}, fps)
    with pytest.raises(ValueError, match="the same name"):
        encode_clip([smooth()], {"original": [smooth()]}, 24)


# ---- files

HOSTILE = [
    "../../etc/passwd",
    "</script><script>alert(1)</script>",
    "A b",
    "a b",
    "a_b",
    "...",
    "ü" * 300,
    "<!--\u2028",
]


@pytest.fixture
def clip():
    return encode_clip([smooth(1)], {"rec": [smooth(1)]}, 0)


def written(folder, clip, names=HOSTILE) -> Report:
    ids = clip_ids(names)
    for id in ids.values():
        write_clip(folder, id, clip, {"rec": {"psnr": [1.23456789, float("nan")]}}, key="k")
    videos = [Video(id, name, scores={"rec": {"psnr": np.float64("inf")}}) for name, id in ids.items()]
    return Report("<title>", [Chapter("<c>", "<b>", videos=videos, pictures=[Picture("p", Markup("<svg/>"))])])


def report_of(folder) -> dict:
    return json.loads(re.search('id="report">(.*?)</script>', (folder / "index.html").read_text(), re.DOTALL)[1])


def test_names_cannot_leave_the_folder_nor_become_markup(tmp_path, clip):
    assert len({id.lower() for id in clip_ids(HOSTILE).values()}) == len(HOSTILE)
    folder = tmp_path / "page"
    write_page(folder, written(folder, clip))
    assert list(tmp_path.iterdir()) == [folder]
    text = (folder / "index.html").read_text()
    assert not [bad for bad in ("<script>alert", "<!--", "\u2028") if bad in text]
    report = report_of(folder)
    assert [video["name"] for video in report["chapters"][0]["videos"]] == HOSTILE
    assert report["chapters"][0]["text"] == "&lt;b&gt;"
    assert report["chapters"][0]["pictures"][0]["html"] == "<svg/>"
    assert report["chapters"][0]["videos"][0]["scores"] == {"rec": {"psnr": None}}
    for bad in ("../x", "", "a/b", ".x"):
        with pytest.raises(ValueError, match="no name of a file"):
            write_clip(folder, bad, clip)


def test_small_clips_are_moved_into_the_page_and_come_out_again(tmp_path, clip, monkeypatch):
    report = written(tmp_path, clip, ["a", "b"])
    script = (tmp_path / "index_clips/a.js").read_text()
    entry = json.loads(script.removeprefix("vae3dClip(").removesuffix(");\n"))
    assert entry["curves"] == {"rec": {"psnr": [1.23457, None]}}
    assert base64.b64decode(entry["media"].removeprefix("data:image/png;base64,")) == clip.media
    write_page(tmp_path, report)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert report_of(tmp_path)["chapters"][0]["videos"][0]["thumb"].startswith("data:image/jpeg;base64,")
    assert (tmp_path / "index.html").read_text().count('class="clip" data-id="a"') == 1
    unpack_page(tmp_path)
    assert (tmp_path / "index_clips/a.js").read_text() == script
    assert read_clip(tmp_path, "b", "k") == clip
    assert read_clip(tmp_path, "b", "other") is read_clip(tmp_path, "c", "k") is None
    monkeypatch.setattr(pages, "SINGLE_FILE_BYTES", 10)
    report.chapters[0].videos = report.chapters[0].videos[:1]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/b.jpg").touch()  # of the user, who wants the page here
    write_page(tmp_path, report)
    assert sorted(path.name for path in (tmp_path / "index_clips").iterdir()) == ["a.jpg", "a.js"]
    assert report_of(tmp_path)["chapters"][0]["videos"][0]["thumb"] == "index_clips/a.jpg"
    remove_page(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["videos", "b.jpg"]


@pytest.mark.parametrize("single", [True, False])
def test_a_page_takes_the_videos_of_another_one(tmp_path, clip, monkeypatch, single):
    """Texts that look like markup stay text; clips keep what they were made of, scores the metrics that are wanted."""
    monkeypatch.setattr(pages, "SINGLE_FILE_BYTES", 10**9 if single else 0)
    scores = {"rec": {"psnr": 30.5, "ssim": 0.5}, "other": {"psnr": None}}
    videos = [
        Video("a", "<b>", scores, {"&": "<"}, {"original": "../ori/a.mp4"}, panorama=True, warnings=["<i>"]),
        Video("none", "none", clip=False, why="no < file"),
    ]
    metrics = {"psnr": Metric("PSNR", "higher", "<", "dB"), "ssim": Metric("SSIM", 1.0)}
    gaps = [Difference("other", "rec", metric, 1.0, 0.5, None, 1, 2) for metric in metrics]
    chapter = Chapter("<Videos>", "text", ["rec", "other"], metrics, videos, "psnr", differences=gaps)
    write_clip(tmp_path / "x/eval", "a", clip, {"rec": {"psnr": [30.0, 31.0], "ssim": [0.5, 0.5]}}, "key")
    write_page(tmp_path / "x/eval", Report("other", [chapter]))
    page = tmp_path / "page"
    taken = take_videos(tmp_path / "x/eval", page, "x-", ["psnr", "lpips"])
    assert taken == Chapter(
        "<Videos>",
        reconstructions=["rec", "other"],
        metrics={"psnr": metrics["psnr"]},
        videos=[
            replace(
                videos[0],
                id="x-a",
                scores={"rec": {"psnr": 30.5}, "other": {"psnr": None}},
                links={"original": "../x/ori/a.mp4"},
            ),
            replace(videos[1], id="x-none", warnings=[]),
        ],
        ranked_by="psnr",
        differences=gaps[:1],
    )
    assert read_clip(page, "x-a", "key") == clip
    write_page(page, Report("all", [taken]))
    assert unpack_page(page) is None
    script = (page / "index_clips/x-a.js").read_text()
    assert json.loads(script.removeprefix("vae3dClip(").removesuffix(");\n"))["curves"] == {
        "rec": {"psnr": [30.0, 31.0]}
    }
    with pytest.raises(FileError, match=r"index\.html"):
        take_videos(tmp_path, page, "", [])
    (tmp_path / "index.html").write_text("<p>")
    with pytest.raises(ValueError, match="not a page"):
        take_videos(tmp_path, page, "", [])


def test_a_quarter_of_the_videos_is_marked_worst_or_best_by_the_mean_over_reconstructions(tmp_path):
    scores = {f"v{i}": {"rec": {"psnr": 30.0 + i}, "other": {"psnr": 40.0 - 3 * i}} for i in range(8)}
    scores |= {"none": {"rec": {"psnr": None}}, "one": {"rec": {"psnr": 10.0}}}
    videos = [Video(id, id, each, clip=False) for id, each in scores.items()]
    for better, marked in (("higher", ["one", "v7", "v1", "v0"]), ("lower", ["v0", "v1", "v7", "one"])):
        chapter = Chapter("c", "", ["rec", "other"], {"psnr": Metric("PSNR", better)}, videos, "psnr")
        write_page(tmp_path, Report("r", [chapter, Chapter("not ranked")]))
        first, second = pages._content((tmp_path / "index.html").read_text())["chapters"]
        assert first["ranks"] == [list(pair) for pair in zip(marked, ["worst"] * 2 + ["best"] * 2, strict=True)]
        assert second["ranks"] == []


@pytest.mark.parametrize(("better", "order"), [("higher", "abc"), ("lower", "cba"), (2.2, "acb")])
def test_videos_are_ordered_by_the_mean_of_what_is_known(better, order):
    values = {"a": [0.0, 1.0], "b": [2.0, None, float("nan")], "c": [3.0], "none": [None]}
    assert worst_first(values, better) == list(order)
    assert worst_first(values, None) == []


def test_a_damaged_clip_is_none(tmp_path, clip):
    write_clip(tmp_path, "a", clip, key="k")
    file = tmp_path / "index_clips/a.js"
    file.write_bytes(file.read_bytes()[:-40])
    assert read_clip(tmp_path, "a", "k") is None


def test_pages_with_missing_clips_or_equal_ids_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"a\.js"):
        write_page(tmp_path, Report("r", [Chapter("c", videos=[Video("a", "a")])]))
    twice = [Video("a", "a", clip=False), Video("a", "b", clip=False)]
    with pytest.raises(ValueError, match="id: a"):
        write_page(tmp_path, Report("r", [Chapter("c", videos=twice)]))


def test_a_full_disk_names_the_file(tmp_path, clip, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_clip(tmp_path, "a", clip)
    monkeypatch.setattr("vae3d.io.os.fsync", full)
    for write in (lambda: write_clip(tmp_path, "b", clip), lambda: write_page(tmp_path, Report("r", []))):
        with pytest.raises(FileError, match=f"{tmp_path}.*No space left"):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["index_clips"]


def test_json_keeps_six_digits_and_refuses_what_is_no_data():
    assert (
        to_json([1 / 3, 1234567.0, np.float32(2.5), np.int64(3), True, None])
        == "[0.333333, 1234570.0, 2.5, 3, true, null]"
    )
    assert to_json({"a": (float("nan"), -float("inf"))}) == '{"a": [null, null]}'
    with pytest.raises(TypeError, match="object"):
        to_json(object())
