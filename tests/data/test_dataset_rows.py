"""What of Hugging Face datasets needs no `datasets` package: names, refusals, commands."""

from __future__ import annotations

import io
import sys

import fsspec
import pytest

from tests import tiny
from vae3d.config.issues import ConfigError
from vae3d.data.decoding.readers import is_image, open_media
from vae3d.data.media import DataError, MediaError
from vae3d.data.sources import dataset_rows
from vae3d.data.sources.dataset_rows import how_to_download, member_name, open_splits
from vae3d.data.sources.folder import Folder
from vae3d.data.sources.hugging_face import HuggingFace, HuggingFaceStream
from vae3d.data.sources.image_folder import ImageFolder
from vae3d.data.sources.open_source import holds_dataset, open_source
from vae3d.data.sources.table import Table


def test_a_row_is_a_range_of_a_file(tmp_path):
    assert member_name("train", "image/encoded", 12, "image") == "train/image%2Fencoded/12.hfimage"
    (tmp_path / "a.arrow").write_bytes(b"0" * 10)
    path = f"{tmp_path}/a.arrow@4+9/train/image/12.hfimage"
    assert is_image(path)
    assert not is_image(path.replace("hfimage", "hfvideo"))
    with pytest.raises(MediaError, match=r"a\.arrow ends at byte 10, before this member"):
        open_media(path)


def test_a_name_is_refused_with_the_command_that_downloads_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "hf download clane9/imagenet-100 --repo-type dataset --local-dir imagenet-100"
    for name in ("hf_images", "image_folder"):
        with pytest.raises(ConfigError, match=rf"no such file or folder; .* get it with: {command}"):
            tiny.training(
                "spatial", tmp_path, f"data={name}", "data.source.path=clane9/imagenet-100", "stage=finetune",
                "stage.init_from=random", "loss=recon_kl",
            )  # fmt: skip
    monkeypatch.setattr(dataset_rows, "_library", lambda: sys)
    for source in (HuggingFace, ImageFolder):
        with pytest.raises(DataError, match=command):
            source("clane9/imagenet-100").table()
    assert tiny.status("check-data", "clane9/imagenet-100") == 2
    assert command in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/data/images", "images", "a/b/c", "./images", "data/videos.csv", "data/t.parquet"])
def test_other_paths_are_no_names(path):
    assert how_to_download(path) == ""


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="need the extra `huggingface`"):
        HuggingFace(tmp_path).table()


CONFIGS = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {}\n"
URL = "https://example.org/x.parquet"


@pytest.mark.parametrize("path", [URL, "reference::/data/refs.json"])
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("README.md", "---\nlicense: mit\n{}---\n# Text\n"),
        ("README.md", "\n \n---\n{}---\n"),
        ("README.md", "---\r\n{}\r\n---\r\n"),
        (".huggingface.yaml", "{}"),
    ],
)
def test_data_files_on_the_network_are_refused(tmp_path, monkeypatch, name, form, path):
    monkeypatch.setattr(dataset_rows, "_library", lambda: sys)
    (tmp_path / name).write_bytes(form.format(CONFIGS.format(path)).encode())
    with pytest.raises(DataError, match=rf"are on the network \({path}\)"):
        open_splits(str(tmp_path))


def test_a_damaged_card_is_an_error_that_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_rows, "_library", lambda: sys)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match=str(tmp_path)):
        open_splits(str(tmp_path))


@pytest.mark.parametrize(("split", "splits"), [(None, ["train", "test"]), ("test", ["train", "test"]), (None, ["all"])])
def test_the_split_for_validation_is_not_the_one_for_training(split, splits):
    train = split or splits[0]
    with pytest.raises(DataError, match=rf"data\.source\.val_split={train}"):
        HuggingFace("set", split=split, val_split=train)._roles(splits)


ARCHIVE = "zip://a.mp4::/data/a.zip"


@pytest.mark.parametrize(
    ("path", "online", "folder", "reason"),
    [
        ("a.mp4", False, ".", None),
        (ARCHIVE, False, ".", None),
        ("https://example.org/a.mp4", False, ".", "on the network"),
        ("zip://a.mp4::https://example.org/a.zip", False, ".", "on the network"),
        ("zip://a.mp4::https://example.org/a.zip", True, ".", None),
        ("reference::/data/refs.json", False, ".", "on the network"),
        ("reference::/data/refs.json", True, ".", "not read by that protocol"),
        ("reference::data:application/json,{}", True, "OWNER/NAME", "not read by that protocol"),
        ("hf://datasets/OWNER/NAME/a.mp4", True, "OWNER/NAME", None),
        ("/etc/passwd", True, "OWNER/NAME", "a file of this machine"),
        ("file:///etc/passwd", True, "OWNER/NAME", "a file of this machine"),
        (ARCHIVE, True, "OWNER/NAME", "a file of this machine"),
    ],
)
def test_a_row_of_a_stream_opens_only_what_the_user_allows(monkeypatch, path, online, folder, reason):
    monkeypatch.setenv("VAE3D_ONLINE", "1" if online else "0")
    monkeypatch.setattr(fsspec, "open", lambda *_: io.BytesIO(b"x"))
    item = HuggingFaceStream(folder, "train", "video", "video")._item("0-0", {"bytes": None, "path": path})
    assert (item.error is None) == (reason is None)
    assert (reason or "") in (item.error or "")


@pytest.mark.parametrize("path", ["zip://a::{}/a.zip", "zip://a::::", "tar://a::{}/a.zip", "zip::zip"])
def test_an_archive_that_cannot_be_read_is_an_error_of_its_row(tmp_path, path):
    (tmp_path / "a.zip").write_bytes(b"x")
    stream = HuggingFaceStream(str(tmp_path), "train", "video", "video")
    assert stream._item("0-0", {"bytes": None, "path": path.format(tmp_path)}).error


def test_folders_of_tables_are_datasets_and_folders_of_media_are_not(tmp_path):
    (tmp_path / "data").mkdir()
    assert not holds_dataset(tmp_path)
    (tmp_path / "data/train-00000-of-00001.parquet").write_bytes(b"")
    assert holds_dataset(tmp_path)
    assert isinstance(open_source(tmp_path), HuggingFace)
    tiny.write_video(tmp_path / "a.mp4", tiny.frames(3))
    assert isinstance(open_source(tmp_path), Folder)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    assert holds_dataset(tmp_path / "saved")
    assert isinstance(open_source(tmp_path / "data/train-00000-of-00001.parquet"), Table)
