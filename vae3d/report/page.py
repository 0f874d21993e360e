"""A page that compares reconstructions: what it holds, and how it is written.

A page is a folder that opens from disk without a server, and requests nothing from a network:

    index.html            the page, its style and scripts, and the report as JSON
    index_clips/ID.js     one clip: its moving pictures and its curves over frames, loaded when it is looked at
    index_clips/ID.jpg    its thumbnail

or, if all clips together are small, index.html alone, which holds them too. Clips are scripts, since browsers let a
page from disk neither read JSON beside it nor draw its videos where pixels can be read.

    videos = []
    for name, pair in pairs:
        clip = encode_clip(pair.original, {"rec": pair.rec}, pair.fps)
        write_clip(folder, name, clip, curves={"rec": {"psnr": [...]}})
        videos.append(Video(name, name, scores={"rec": {"psnr": 31.2}}, clip=True))
    write_page(folder, Report("Reconstruction quality", [Chapter("Videos", videos=videos, ...)]))
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from vae3d.io import FileError, atomic_write, naming, remove, remove_empty, write_text
from vae3d.report.clip import Clip, Panel
from vae3d.report.clip import encode_clip as encode_clip
from vae3d.report.html import data_uri

# Not `videos`, which a user may have where a page is written; clips of earlier pages are deleted.
PAGE, CLIPS = "index.html", "index_clips"
SINGLE_FILE_BYTES = 24_000_000  # of all clips and thumbnails
MAX_ID = 60  # characters
MAX_MARKED = 3  # videos on each side, worst and best
DIGITS = 6  # of floats: SSIM near 1 needs them
CALL = "vae3dClip("  # the start of a clip's script
REPORT_TAG = '<script type="application/json" id="report">'
CLIP_TAG = '<script type="application/json" class="clip" data-id="([^"]+)">'

FOLDER = Path(__file__).parent  # of the template, and of the styles and scripts that it includes
_environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FileSystemLoader(FOLDER))


@dataclass(frozen=True)
class Metric:
    """A column of scores.

    better: "higher", "lower", the best value, or None if there is neither better nor worse. meaning: one or two
    sentences.
    """

    label: str
    better: Literal["higher", "lower"] | float | None
    meaning: str = ""
    unit: str = ""


@dataclass
class Video:
    """A row of a chapter's table. id: part of a file name, unique within a page. name: any text.

    scores: reconstruction -> metric -> value. links: label -> path, relative to the page. clip: whether it has one;
    else `why` says why not. panorama: equirectangular, so that it can be looked at from inside.
    """

    id: str
    name: str
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    clip: bool = True
    why: str = ""
    panorama: bool = False
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Table:
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """Lines, such as of a training. series: label -> points (x, y)."""

    title: str
    x: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    y: str = ""
    log: bool = False


@dataclass(frozen=True)
class Difference:
    """A paired difference of the means of two reconstructions, `name` minus `against`, with its 95 % interval."""

    name: str
    against: str
    metric: str
    difference: float
    low: float | None
    high: float | None
    better_on: int | None
    videos: int


@dataclass(frozen=True)
class Picture:
    """A still picture: PNG, JPEG or SVG."""

    title: str
    html: Markup
    note: str = ""


@dataclass
class Chapter:
    """One comparison. reconstructions: names in the order in which they are shown, the base first. metrics: by name, in
    the order of the columns. ranked_by: the metric that says which videos are worst and best. text: what the
    chapter shows; plain text is escaped."""

    title: str
    text: str | Markup = ""
    reconstructions: Sequence[str] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    videos: Sequence[Video] = ()
    ranked_by: str | None = None
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pictures: Sequence[Picture] = ()
    differences: Sequence[Difference] = ()
    commands: str = ""
    warnings: Sequence[str] = ()


@dataclass
class Report:
    """A page. facts: label -> text, such as preset, versions, hashes. commands: to copy. links: label -> path."""

    title: str
    chapters: Sequence[Chapter]
    text: str | Markup = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def worst_first(
    values: Mapping[str, Sequence[float | None]], better: Literal["higher", "lower"] | float | None
) -> list[str]:
    """Ids of videos from the worst to the best, by the mean over what is known of each one's values, such as those of
    several reconstructions. Without videos of which nothing is known; empty if there is no better and worse."""
    known = {id: [v for v in each if v is not None and math.isfinite(v)] for id, each in values.items()}
    means = {id: fmean(each) for id, each in known.items() if each}
    if better is None:
        return []
    if better in ("higher", "lower"):
        return sorted(means, key=means.get, reverse=better == "lower")
    return sorted(means, key=lambda id: abs(means[id] - better), reverse=True)


def _ranks(chapter: Chapter) -> list[tuple[str, str]]:
    """Ids of the worst and the best videos with "worst" or "best", the worst first, by the metric that ranks: a quarter
    of all on each side, but at least one and at most MAX_MARKED."""
    by = chapter.ranked_by
    if by not in chapter.metrics:
        return []
    values = {
        video.id: [video.scores.get(rec, {}).get(by) for rec in chapter.reconstructions] for video in chapter.videos
    }
    order = worst_first(values, chapter.metrics[by].better)
    count = min(max(len(order) // 4, 1), MAX_MARKED) if len(order) > 1 else 0
    return [(id, "worst") for id in order[:count]] + [(id, "best") for id in order[len(order) - count :]]


HTML = {(Chapter, "text"), (Report, "text"), (Picture, "html")}  # fields that may be Markup


def write_clip(
    folder: Path,
    id: str,
    clip: Clip,
    curves: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    key: str = "",
) -> None:
    """Write index_clips/ID.js and .jpg, atomically. curves: reconstruction -> metric -> value of each frame. key:
    see read_clip. Raises FileError, and ValueError for an id that is none of a file's name.
    """
    entry = {"key": key, "id": id, "panels": clip.panels, "fps": clip.fps, "frames": clip.frames, "scale": clip.scale}
    entry |= {"source": clip.source, "notes": clip.notes, "curves": curves or {}}
    media = f'"media": "{data_uri(clip.media, clip.kind)}"'
    _write_clip(folder, id, f"{to_json(entry)[:-1]}, {media}}}", clip.thumbnail)


def read_clip(folder: Path, id: str, key: str) -> Clip | None:
    """What write_clip wrote with this key, which stands for all that the clip was made of; else None."""
    script, thumbnail = _clip_files(folder, id)
    start = f'{CALL}{{"key": {json.dumps(key)}, '.encode()
    try:
        with script.open("rb") as stream:
            if stream.read(len(start)) != start:
                return None
            entry = json.loads(script.read_bytes()[len(CALL) : -len(");\n")])
        kind, media = re.fullmatch("data:(.*);base64,(.*)", entry["media"]).groups()
        panels = [Panel(**panel) for panel in entry["panels"]]
        shared = {name: entry[name] for name in ("fps", "frames", "scale", "notes")}
        return Clip(
            base64.b64decode(media), kind, thumbnail.read_bytes(), panels, source=tuple(entry["source"]), **shared
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, or damaged: encode it again
        return None


def write_page(folder: Path, report: Report, single: bool = False) -> None:
    """Write index.html; clips of at most SINGLE_FILE_BYTES together, or with `single` all, are moved into it.

    Raises FileError, and ValueError if two videos have the same id or if a video's clip was not written.
    """
    videos = [video for chapter in report.chapters for video in chapter.videos]
    ids = [video.id for video in videos]
    if len({*ids}) < len(ids):
        raise ValueError(f"two videos of a page have the same id: {max(ids, key=ids.count)}")
    shown = {video.id: _clip_files(folder, video.id) for video in videos if video.clip}
    if absent := [file for files in shown.values() for file in files if not file.is_file()]:
        raise ValueError(f"{absent[0]} was not written")
    single = single or sum(file.stat().st_size for files in shown.values() for file in files) <= SINGLE_FILE_BYTES
    content = _plain(report)
    for chapter, given in zip(content["chapters"], report.chapters, strict=True):
        chapter["ranks"] = _ranks(given)
        for video in chapter["videos"]:
            _, thumbnail = shown.get(video["id"], (None, None))
            video["thumb"] = thumbnail and (
                data_uri(thumbnail.read_bytes(), "image/jpeg") if single else f"{CLIPS}/{thumbnail.name}"
            )
    clips = {id: _read_clip(folder, id)[0] for id in shown} if single else {}
    page = _environment.get_template("index.html").render(
        title=report.title,
        report=Markup(to_json(content)),
        clips={id: Markup(clip) for id, clip in clips.items()},
        source=lambda path: Markup((FOLDER / path).read_text("utf-8")),
    )
    write_text(folder / PAGE, page)
    _remove_others(folder / CLIPS, set() if single else {file.name for files in shown.values() for file in files})
    remove_empty(folder / CLIPS)


def check_replaceable(folder: Path) -> None:
    """Raises FileError if index.html in the folder is another program's, which a page would replace."""
    file = folder / PAGE
    with naming(file):
        if file.is_file() and REPORT_TAG not in file.read_text("utf-8", errors="replace"):
            raise FileError(f"{file} is no page of vae3d, and would be replaced; choose another folder, or delete it")


def unpack_page(folder: Path) -> None:
    """Write the clips inside index.html as index_clips/ID.js and .jpg again, where these are missing.

    So read_clip finds those of an earlier page."""
    try:
        for id, script, thumbnail in _clips_inside((folder / PAGE).read_text("utf-8")):
            if not has_clip(folder, id):
                _write_clip(folder, id, script, thumbnail)
    except (OSError, ValueError, KeyError, TypeError):  # no page, or none of ours: encode the clips again
        return


def take_videos(source: Path, folder: Path, prefix: str, metrics: Sequence[str]) -> Chapter:
    """The videos of the first chapter of the page in `source`, with their scores, for a page in `folder`.

    Their clips are copied, and prefix stands before their ids. metrics: those that are kept, if they are there. The
    chapter's text, tables, charts and pictures are left out. Raises FileError if there is no such page, and ValueError
    if it is none of vae3d's.
    """

    def kept(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        return {rec: {m: values[m] for m in metrics if m in values} for rec, values in scores.items()}

    with naming(source / PAGE):
        page = (source / PAGE).read_text("utf-8")
    chapter = _content(page)["chapters"][0]
    inside = {id: (script, thumbnail) for id, script, thumbnail in _clips_inside(page)}
    videos = []
    for found in chapter["videos"]:
        video = Video(**{item.name: found[item.name] for item in fields(Video)})
        if video.clip:
            script, thumbnail = inside.get(video.id) or _read_clip(source, video.id)
            clip = json.loads(script)
            clip |= {"id": prefix + video.id, "curves": kept(clip["curves"])}
            _write_clip(folder, prefix + video.id, to_json(clip), thumbnail)
        links = {label: os.path.relpath(source / path, folder) for label, path in video.links.items()}
        videos.append(replace(video, id=prefix + video.id, scores=kept(video.scores), links=links))
    return Chapter(
        chapter["title"],
        reconstructions=chapter["reconstructions"],
        metrics={m: Metric(**chapter["metrics"][m]) for m in metrics if m in chapter["metrics"]},
        videos=videos,
        ranked_by=chapter["ranked_by"] if chapter["ranked_by"] in metrics else None,
        differences=[Difference(**one) for one in chapter["differences"] if one["metric"] in metrics],
    )


def clip_ids(names: Iterable[str]) -> dict[str, str]:
    """Name -> id, see clip_id; with a number at its end if two would be the same."""
    ids: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        base = id = clip_id(name)
        count = 1
        while id.lower() in taken:  # some disks do not distinguish capitals
            count += 1
            id = f"{base}-{count}"
        taken.add(id.lower())
        ids[name] = id
    return ids


def clip_id(name: str) -> str:
    """Letters, digits, dots and dashes of a name's first MAX_ID characters, which make a safe name of a file."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:MAX_ID] or "video"


def has_clip(folder: Path, id: str) -> bool:
    return all(file.is_file() for file in _clip_files(folder, id))


def remove_page(folder: Path) -> None:
    """Delete index.html and its clips, and nothing else."""
    remove(folder / PAGE)
    _remove_others(folder / CLIPS, set())
    remove_empty(folder / CLIPS)


def to_json(value: Any) -> str:
    """JSON that can stand in a script of a page: ASCII without `<`, floats of DIGITS digits, null for NaN."""
    return json.dumps(_plain(value), allow_nan=False).replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    """Dicts, lists, text and numbers. Text that may be HTML, which only Markup is, is escaped."""
    if isinstance(value, (str, bool)) or value is None:
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if is_dataclass(value):
        entries = {item.name: getattr(value, item.name) for item in fields(value)}
        return {k: str(escape(v)) if (type(value), k) in HTML else _plain(v) for k, v in entries.items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (Sequence, np.ndarray)):
        return [_plain(inner) for inner in value]
    raise TypeError(f"a page cannot hold a {type(value).__name__}")


def _clip_files(folder: Path, id: str) -> tuple[Path, Path]:
    """The script and the thumbnail."""
    _check_id(id)
    return folder / CLIPS / f"{id}.js", folder / CLIPS / f"{id}.jpg"


def _read_clip(folder: Path, id: str) -> tuple[str, bytes]:
    """JSON and thumbnail."""
    script, thumbnail = _clip_files(folder, id)
    with naming(script):
        return script.read_text("utf-8")[len(CALL) : -len(");\n")], thumbnail.read_bytes()


def _write_clip(folder: Path, id: str, clip: str, thumbnail: bytes) -> None:
    """clip: JSON."""
    script, picture = _clip_files(folder, id)
    with naming(script.parent):
        script.parent.mkdir(parents=True, exist_ok=True)
    for file, content in ((picture, thumbnail), (script, f"{CALL}{clip});\n".encode())):
        with naming(file), atomic_write(file) as stream:
            stream.write(content)


def _content(page: str) -> dict[str, Any]:
    """The report inside a page, as JSON. Raises ValueError if there is none."""
    found = re.search(f"{REPORT_TAG}(.*?)</script>", page, re.DOTALL)
    if found is None:
        raise ValueError("not a page of vae3d")
    return json.loads(found[1])


def _clips_inside(page: str) -> Iterator[tuple[str, str, bytes]]:
    """id, JSON and thumbnail of the clips inside a page."""
    thumbs = {
        video["id"]: video["thumb"] or "" for chapter in _content(page)["chapters"] for video in chapter["videos"]
    }
    for id, clip in re.findall(f"{CLIP_TAG}(.*?)</script>", page, re.DOTALL):
        yield id, clip, base64.b64decode(thumbs[id].partition(",")[2])


def _check_id(id: str) -> None:
    if not re.fullmatch("[A-Za-z0-9_-][A-Za-z0-9._-]*", id):
        raise ValueError(f"the id {id!r} is no name of a file; use clip_ids")


def _remove_others(clips: Path, names: set[str]) -> None:
    """Delete clips of an earlier page, which nothing refers to any more."""
    for file in clips.iterdir() if clips.is_dir() else ():
        if file.name not in names and file.suffix in (".js", ".jpg"):
            remove(file)
