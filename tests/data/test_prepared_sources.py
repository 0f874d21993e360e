"""Large JSON lists, datasets of Hugging Face, folders and tables at a URL, prepared once, give what small ones give."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from tests import tiny
from tests.data.test_prepared import SETTINGS, assert_same, large, rows  # noqa: F401
from tests.http_server import serve
from vae3d.commands import check_data as check
from vae3d.data.loader import read_tables
from vae3d.data.media import DataError
from vae3d.data.prepared import rows as prepared_rows
from vae3d.data.prepared import selection as prepared_selection
from vae3d.data.prepared import table as prepared
from vae3d.data.sources import dataset_rows, json_clips
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.hugging_face import HuggingFace
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.json_clips import JsonClips
from vae3d.data.sources.table import Table
from vae3d.data.storage import files as storage
from vae3d.data.storage import stores
from vae3d.data.table.probe import Ranks

os.environ.update(HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")  # before the package is imported


def both(make, large, settings=SETTINGS, **changes):  # noqa: F811
    """read_tables of a source as a large one, just prepared and opened again, and as a small one."""
    chosen = {"num_val_files": 3, "max_broken": 0.5, **changes}
    found = []
    for on in (True, True, False):
        large(on)
        found.append(read_tables(make(), settings, **chosen))
    large()
    one, again, other = found
    assert_same(one, other, settings)
    assert_same(again, other, settings)
    return one


def forbid_preparing(monkeypatch):
    for module, name in ((prepared_rows, "_write"), (prepared_selection, "_write")):
        monkeypatch.setattr(module, name, None)


# ---- JSON


def clips(folder, count: int = 60) -> list[dict]:
    """Clips of 20 files, which exist, with what else a clip may have."""
    for i in range(20):
        (folder / f"{i:02}.mp4").touch()
    entries = [{"path": f"{i % 20:02}.mp4", "frames": 20 + i, "fps": 24.0, "note": i} for i in range(count)]
    for i in range(0, count, 3):
        entries[i] |= {"label": i % 5, "text": f"clip {i}"}
    return entries


def write(path, entries):
    if path.name == "c.json":
        path.write_text(json.dumps({"total": 3, "list": entries}))
    else:
        text = "\n\n".join(map(json.dumps, entries))
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("c.jsonl", kind) for kind in ("share", "names", "split", "files", "odd", "one")]
    + [("c.json", "share"), ("c.json", "odd"), ("c.jsonl.gz", "share")],
)
def test_a_large_list_gives_what_a_small_one_gives(tmp_path, large, name, kind):  # noqa: F811
    entries, share = clips(tmp_path), 0.3
    if kind == "names":  # of one file
        for i in range(0, 60, 7):
            entries[i]["path"] = f"{tmp_path}/{i % 20:02}.mp4"
            entries[i + 1]["path"] = f"./{(i + 1) % 20:02}.mp4"
    if kind == "split":
        for i, entry in enumerate(entries):
            entry["split"] = ("val", "train", "train", "test")[i % 4]
    if kind == "files":  # data.num_val_files chooses
        share = None
    if kind == "odd":
        entries[4]["path"], entries[9]["frames"], entries[50]["fps"] = "gone.mp4", "many", None
        entries[20], entries[21], entries[33]["label"] = 7, {"full_path": "00.mp4"}, "cat"
        entries[50]["frames"] = 3.5
    if kind == "one":
        entries = [{**entry, "path": "00.mp4"} for entry in entries]
    file = write(tmp_path / name, entries)
    one = both(lambda: JsonClips(file, val_share=share), large)
    assert len(one.train)
    assert (len(one.val) > 0) == (kind != "one")
    assert any("ignored keys of clips: note" in note for note in one.notes)
    assert len(one.errors) == (5 if kind == "odd" else 0)


@pytest.mark.parametrize(
    "text", ['{"path": "00.mp4"}\n{"path" "01.mp4"}\n', "", "7\n", '{"full_path": "00.mp4"}\n', '{"path": "\xff"}\n']
)
def test_errors_of_a_large_list_are_those_of_a_small_one(tmp_path, large, text):  # noqa: F811
    clips(tmp_path)
    (tmp_path / "c.jsonl").write_text(text, encoding="latin-1")
    messages = []
    for on in (True, False):
        large(on)
        with pytest.raises(DataError) as raised:
            read_tables(JsonClips(tmp_path / "c.jsonl"), SETTINGS, 3, 0.5)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]
    assert "c.jsonl" in messages[0]


def test_a_list_is_read_once_and_by_line(tmp_path, large, monkeypatch):  # noqa: F811
    file = write(tmp_path / "c.jsonl", clips(tmp_path))
    monkeypatch.setattr(json_clips, "read_entries", None)
    first = read_tables(JsonClips(file), SETTINGS, 3, 0.0)
    forbid_preparing(monkeypatch)
    assert_same(read_tables(JsonClips(file), SETTINGS, 3, 0.0), first)
    (folder,) = (path for path in (tmp_path / "cache/tables").iterdir() if path.is_dir())
    assert not list(folder.glob("unsplit*"))


def test_a_file_of_a_list_that_comes_back_is_used(tmp_path, large):  # noqa: F811
    file = write(tmp_path / "c.jsonl", [*clips(tmp_path), {"path": "gone.mp4", "frames": 9, "fps": 24}])
    found = both(lambda: JsonClips(file), large)
    assert found.errors == [(f"row 61 ({tmp_path}/gone.mp4)", "no such file")]
    (tmp_path / "gone.mp4").touch()
    assert both(lambda: JsonClips(file), large).errors == []


def test_a_changed_list_or_share_is_prepared_anew(tmp_path, large):  # noqa: F811
    file = write(tmp_path / "c.jsonl", clips(tmp_path))
    few, many = (len(both(lambda share=share: JsonClips(file, val_share=share), large).val) for share in (0.1, 0.5))
    assert few < many
    write(file, clips(tmp_path, 40))
    both(lambda: JsonClips(file), large)


# ---- datasets of Hugging Face


def images(count: int, first: int = 0, **broken):
    hf = pytest.importorskip("datasets")
    content = [{"bytes": tiny_png(first + i), "path": f"{i}.png"} for i in range(count)]
    for place, value in broken.items():
        content[int(place[1:])] = value
    labels, texts = [i % 4 - 1 for i in range(count)], [f"image {i}" for i in range(count)]
    kinds = hf.Features({"image": hf.Image(), "label": hf.Value("int64"), "caption": hf.Value("string")})
    return hf.Dataset.from_dict({"image": content, "label": labels, "caption": texts}, features=kinds)


def tiny_png(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(tiny.frames(1, 20 + i % 10, 32, seed=i)[0]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def offline(tmp_path, monkeypatch):
    hf = pytest.importorskip("datasets")
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    dataset_rows.open_splits.cache_clear()
    yield hf
    dataset_rows.open_splits.cache_clear()


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet", "files"])
def test_a_large_dataset_gives_what_a_small_one_gives(tmp_path, large, offline, monkeypatch, kind):  # noqa: F811
    folder = tmp_path / "set"
    data = images(30, _3=None)
    if kind == "saved":
        data.save_to_disk(folder, num_shards=3)
    elif kind == "splits":
        splits = {"train": data, "validation": images(5, 40), "test": images(3, 50)}
        offline.DatasetDict(splits).save_to_disk(folder)
    elif kind == "parquet":
        folder.mkdir()
        data.to_parquet(folder / "train.parquet", batch_size=7)
    else:
        (folder / "train/cat").mkdir(parents=True)
        for i in range(30):
            (folder / f"train/cat/{i:02}.png").write_bytes(tiny_png(i))
    settings = replace(SETTINGS, min_side=22)
    one = both(lambda: HuggingFace(folder), large, settings)
    assert len(one.skipped_files) == (10 if kind == "splits" else 6)
    assert [reason for _, reason in one.errors] == ([] if kind == "files" else ["has no image"])
    assert one.train.path(0).endswith("png" if kind == "files" else ".hfimage")
    forbid_preparing(monkeypatch)
    monkeypatch.setattr(HuggingFace, "open", None)
    assert_same(read_tables(HuggingFace(folder), settings, 3, 0.5), one, settings)


def test_videos_of_a_large_dataset_are_probed_and_their_labels_hashed_alike(tmp_path, large, offline):  # noqa: F811
    values = []
    for i in range(16):
        tiny.write_video(tmp_path / "a.mp4", tiny.frames(3 + i, 16, 16, seed=i))
        values.append({"bytes": (tmp_path / "a.mp4").read_bytes(), "path": None})
    kinds = offline.Features({"video": offline.Video(), "label": offline.Value("int64")})
    data = offline.Dataset.from_dict({"video": values, "label": [i - 1 for i in range(16)]}, features=kinds)
    data.save_to_disk(tmp_path / "set")
    found = both(lambda: HuggingFace(tmp_path / "set"), large, num_val_files=1)
    assert sorted([*found.train.numbers("num_frames"), *found.val.numbers("num_frames")]) == [*range(3, 19)]


def test_a_dataset_that_was_written_again_is_prepared_anew(tmp_path, large, offline):  # noqa: F811
    settings = replace(SETTINGS, min_side=22)
    names = []
    for first in (0, 5):
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        dataset_rows.open_splits.cache_clear()
        images(20, first).save_to_disk(tmp_path / "set")
        names.append(both(lambda: HuggingFace(tmp_path / "set"), large, settings).train["name"].tolist())
    assert names[0] != names[1]


def test_a_lost_copy_of_the_library_is_made_again(tmp_path, large, offline):  # noqa: F811
    (tmp_path / "set").mkdir()
    images(20).to_parquet(tmp_path / "set/train.parquet")
    first = read_tables(HuggingFace(tmp_path / "set"), SETTINGS, 3, 0.0)
    shutil.rmtree(tmp_path / "hf_cache")
    dataset_rows.open_splits.cache_clear()
    again = read_tables(HuggingFace(tmp_path / "set"), SETTINGS, 3, 0.0)
    assert_same(again, first)
    assert storage.local_range(again.train.path(0)).read() == tiny_png(int(again.train["name"][0].split("/")[1]))


# ---- folders


@pytest.fixture
def pictures(tmp_path):
    for i in range(24):
        path = tmp_path / f"set/{'train' if i % 4 else 'val'}/{i % 3}/{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(tiny.frames(1, 20 + i % 6, 24, seed=i)[0]).save(path)
    (tmp_path / "set/a.txt").touch()
    return tmp_path / "set"


@pytest.mark.parametrize("source", [Folder, ImageFolder])
def test_a_large_folder_gives_what_a_small_one_gives(pictures, large, source, monkeypatch):  # noqa: F811
    settings = replace(SETTINGS, min_side=22)
    one = both(lambda: source(pictures), large, settings)
    assert len(one.skipped_files)
    assert len(one.val) == (1 if source is Folder else 4)
    (pictures / "train/0/new.png").write_bytes((pictures / "train/2/02.png").read_bytes())
    assert len(both(lambda: source(pictures), large, settings).train) == len(one.train) + 1
    forbid_preparing(monkeypatch)
    read_tables(source(pictures), settings, 3, 0.5)


def test_a_large_folder_is_listed_by_the_main_process_alone(pictures, large, monkeypatch):  # noqa: F811
    listed = []
    original = Folder.listing
    monkeypatch.setattr(Folder, "listing", lambda self: listed.append(1) or original(self))
    main, _ = prepared.find_large(Folder(pictures), Ranks())
    table = prepared.prepare(main)

    def on_another_rank():
        other, listing = prepared.find_large(Folder(pictures), Ranks(1, 2, lambda mine: [main.folder.name, mine]))
        assert (listing, other.folder) == (None, main.folder)
        return prepared.prepare(other)

    assert on_another_rank().to_pandas().equals(table.to_pandas())
    assert len(listed) == 1
    shutil.rmtree(main.folder)  # as on another machine, with a cache of its own
    assert on_another_rank().to_pandas().equals(table.to_pandas())
    shutil.rmtree(main.folder)
    (pictures / "new.png").touch()
    with pytest.raises(DataError, match=f"{pictures} does not hold the same on all machines"):
        on_another_rank()
    with pytest.raises(DataError, match="gone"):  # of the main process, on all
        prepared.find_large(Folder(pictures), Ranks(1, 2, lambda mine: [DataError("gone"), mine]))


# ---- tables at a URL


def test_a_large_table_at_a_url_gives_what_a_small_one_gives(tmp_path, large, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    (tmp_path / "site").mkdir()
    lines = rows().to_csv(index=False)
    (tmp_path / "site/t.csv").write_text(lines)
    with serve(tmp_path / "site") as store:
        stores.forget_versions()
        make = lambda: Table(f"{store.url}/t.csv")  # noqa: E731
        one = both(make, large)
        assert one.train.path(0).startswith(f"{store.url}/videos/")
        forbid = pytest.MonkeyPatch()
        forbid_preparing(forbid)
        assert_same(read_tables(make(), SETTINGS, 3, 0.5), one)
        forbid.undo()
        (tmp_path / "site/t.csv").write_text(lines + "videos/new.mp4,9,20,20,24,cat,new\n")
        stores.forget_versions()
        assert len(both(make, large).train) == len(one.train) + 1
        with pytest.raises(DataError, match=f"{store.url}/none.csv"):
            read_tables(Table(f"{store.url}/none.csv"), SETTINGS, 3, 0.5)


# ---- checking


def test_check_hands_out_some_files_at_a_time(pictures, monkeypatch, capsys):
    monkeypatch.setattr(check, "AT_A_TIME", 10)
    (pictures / "val/2/20.png").write_bytes(b"junk")
    assert check.main(check.parse([str(pictures), "--workers", "1"])) == 1
    out = capsys.readouterr().out
    assert f"row 24: {pictures}/val/2/20.png: " in out
    assert "23 of 24 rows are good, 1 bad" in out
