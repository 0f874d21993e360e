"""infer.py killed and resumed, beside another one, and with sources that were replaced."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from tests import tiny
from tests.inference.test_infer import run
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError
from vae3d.errors import UserError
from vae3d.inference import files as files_command
from vae3d.inference.video import VideoWriter, write_image, write_video
from vae3d.io import FileError
from vae3d.loading import model_config
from vae3d.metrics import build_metrics, registry
from vae3d.metrics.base import frame_pairs
from vae3d.metrics.distribution import Features
from vae3d.result_folder import FolderError, locked

SIZE = ["height=16", "width=16"]
SETTINGS = ["metrics=[psnr,ssim]", *SIZE]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    for i, name in enumerate(("a0", "b${1}", "a2")):
        tiny.write_video(tmp_path / f"source/{name}.mp4", tiny.frames(3, seed=i))
    return tmp_path / "source"


def files(folder: Path) -> dict[str, bytes]:
    """Of out_ori, out_rec and out_spatial, hidden ones too; the lock is always empty."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.inference.test_resume_infer import SETTINGS, run

left = iter(range({when}))

def counted(inner):
    def replace(*args):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*args)
    return replace

os.replace, Path.replace = counted(os.replace), counted(Path.replace)
run(Path({export!r}), Path({source!r}), Path({prefix!r}), *SETTINGS)
"""


def killed(when: int, export, source, prefix) -> bool:
    """Reconstruct in a process that is killed just before the `when`-th file gets its name. It is forked from one that
    has computed nothing: after a fork torch may wait for threads that are not there."""
    script = source.parent / "killed.py"
    paths = {"export": str(export), "source": str(source), "prefix": str(prefix)}
    script.write_text(KILLED.format(root=str(tiny.ROOT), when=when, **paths))
    return tiny.run(sys.executable, str(script), cwd=source.parent).returncode == -signal.SIGKILL


@pytest.fixture
def whole(export, source, tmp_path):
    run(export, source, tmp_path / "whole/out", *SETTINGS)
    return files(tmp_path / "whole")


@pytest.mark.parametrize("when", [0, 1, 2, 4, 5, 8, 11])
def test_a_killed_command_resumes_to_the_same_bytes(when, export, source, whole, tmp_path):
    assert killed(when, export, source, tmp_path / "killed/out")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "killed").rglob("*.json") if ".done" in str(file)}
    run(export, source, tmp_path / "killed/out", *SETTINGS)
    assert files(tmp_path / "killed") == whole
    assert all(file.stat().st_mtime_ns == time for file, time in kept.items())


def test_a_finished_command_reconstructs_nothing(export, source, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(VideoWriter, "write", None)
    run(export, source, tmp_path / "whole/out", *SETTINGS)
    assert files(tmp_path / "whole") == whole


def test_a_replaced_source_and_a_lost_output_are_reconstructed_again(export, source, whole, tmp_path, monkeypatch):
    made = []
    close = VideoWriter.close
    monkeypatch.setattr(VideoWriter, "close", lambda self: made.append(self.path.name) or close(self))
    shutil.copy(source / "b${1}.mp4", source / "a0.mp4")
    (tmp_path / "whole/out_ori/000002_a2.mp4").write_bytes(b"half")
    run(export, source, tmp_path / "whole/out", *SETTINGS)
    assert set(made) == {"000001_a0.mp4", "000002_a2.mp4"}
    now = files(tmp_path / "whole")
    assert now["out_rec/000001_a0.mp4"] == now["out_rec/000003_b-1-.mp4"] != whole["out_rec/000001_a0.mp4"]
    assert now["out_ori/000002_a2.mp4"] == whole["out_ori/000002_a2.mp4"]


def test_another_command_is_refused_and_names_what_differs(export, source, whole, tmp_path):
    prefix = tmp_path / "whole/out"
    for changes, named in (
        (["sample=true"], "sample is False there and True here"),
        (["num_samples=2"], "rows of the"),
    ):
        with pytest.raises(FolderError, match=rf"save_dir=.*{named}.*overwrite=true"):
            run(export, source, prefix, *SETTINGS, *changes)
    other = tmp_path / "other"
    shutil.copytree(export, other)
    from safetensors.torch import load_file, save_file

    (weights,) = other.glob("*.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(FolderError, match="weights of checkpoint is"):
        run(other, source, prefix, *SETTINGS)
    assert files(tmp_path / "whole") == whole
    shutil.copytree(export, tmp_path / "moved")  # the same weights elsewhere are the same command
    run(tmp_path / "moved", source, prefix, *SETTINGS)


def test_two_commands_do_not_write_into_one_place(export, source, whole, tmp_path):
    with (
        FileLock(tmp_path / "whole/out_rec/.lock"),
        pytest.raises(FolderError, match=r"save_dir=.*out: another process is writing there"),
    ):
        run(export, source, tmp_path / "whole/out", *SETTINGS, "overwrite=true")
    assert files(tmp_path / "whole") == whole


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file/out_rec: cannot be written"), locked(tmp_path / "file/out_rec", "x"):
        pass


def test_a_damaged_record_is_one_message(export, source, whole, tmp_path):
    record = tmp_path / "whole/out_rec/.done/000001_a0.json"
    finished = json.loads(record.read_text())
    for content in (
        "",
        "[]",
        "{}",
        json.dumps(finished | {"file": {"id": 3}}),
        json.dumps(finished | {"outputs": [[1]]}),
    ):
        record.write_text(content)
        with pytest.raises(FileError, match=r"000001_a0\.json: .*(damaged|is not JSON)"):
            run(export, source, tmp_path / "whole/out", *SETTINGS)


def test_a_disk_that_refuses_is_an_error_that_names_the_file(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # stands for a full disk
    try:
        with pytest.raises(FileError, match=r"a\.mp4: cannot be written: File too large"):
            write_video(tmp_path / "a.mp4", tiny.frames(3), 8)
        with pytest.raises(FileError, match=r"a\.png: cannot be written: File too large"):
            write_image(tmp_path / "a.png", tiny.frames(1)[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_model_makes_nan_of_fails_with_its_name(source, tmp_path):
    """NaN in 8 bits would be black, which scores as badly as it looks, with exit status 0."""
    model = tiny.model("spatial")
    torch.nn.init.constant_(model.module.decoder.conv_out.bias, float("nan"))
    config = model_config("spatial", *tiny.MODEL["spatial"])
    write_export(Checkpoint(config, model.state_dict(), tmp_path, ""), tmp_path / "broken")
    with pytest.raises(MediaError, match=r"a0\.mp4: .* NaN or infinite, the first in frame 0; computed in fp32"):
        run(tmp_path / "broken", source, tmp_path / "stop/out")
    with pytest.raises(UserError, match=r"(?s)3 of 3 files .*a0\.mp4.*a2\.mp4.*b\$\{1\}\.mp4"):
        run(tmp_path / "broken", source, tmp_path / "skip/out", "on_error=skip")
    assert not [path for path in tmp_path.glob("s*/out_*/*") if path.suffix in (".mp4", ".png")]


class Colours(nn.Module):
    """Stands for Inception: features of a frame are the means of its quarters."""

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(frames, 2).flatten(1)


@pytest.fixture
def quick_rfid(monkeypatch):
    monkeypatch.setattr(registry, "find_files", lambda _: ({}, {}))
    monkeypatch.setattr(registry.Networks, "inception", lambda _: Colours())


def test_features_are_read_one_by_one_from_files_and_never_sent(
    export, source, tmp_path, monkeypatch, quick_rfid, caplog
):
    sent = []
    monkeypatch.setattr(files_command, "gather_to_main", lambda item: sent.append(item) or [item])
    run(export, source, tmp_path / "out", "metrics=[psnr,rfid]", *SIZE)
    assert not any(isinstance(part, Features) for part in everything(sent))
    read = [
        [open_media(path).read(range(3)) for path in sorted((tmp_path / f"out_{kind}").glob("*.mp4"))]
        for kind in ("ori", "rec")
    ]
    metrics = build_metrics(["rfid"])
    expected = metrics.aggregate([metrics.score(frame_pairs(*pair)) for pair in zip(*read, strict=True)])["rfid"]
    assert json.loads((tmp_path / "out_rec/metrics.json").read_text())["rfid"] == pytest.approx(expected)
    assert "rfid of N=9 samples is not comparable" in caplog.text


def test_a_file_whose_features_were_lost_is_reconstructed_again(export, source, tmp_path, quick_rfid):
    run(export, source, tmp_path / "out", "metrics=[rfid]", *SIZE)
    before = files(tmp_path / "out_rec")
    [lost, *_] = sorted((tmp_path / "out_rec/.done").glob("*.npz"))
    lost.unlink()
    run(export, source, tmp_path / "out", "metrics=[rfid]", *SIZE)
    assert files(tmp_path / "out_rec") == before


def everything(tree):
    """The objects within lists, tuples, dicts and dataclasses."""
    if is_dataclass(tree):
        tree = vars(tree)
    if isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from everything(part)
    yield tree
