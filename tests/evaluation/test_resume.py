"""An evaluation survives being killed, changes its number of processes, and computes nothing twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch import Tensor, nn

from tests import tiny
from tests.evaluation.test_eval_page import content
from tests.scoring import degrade, evaluate, make_pairs, original, report, write_two_sizes
from vae3d.evaluation import score as scoring
from vae3d.evaluation import store as storing
from vae3d.inference.video import write_video
from vae3d.metrics.networks import Networks

METRICS = ("--metric", "psnr", "ssim", "tpsnr")


@pytest.fixture
def folders(tmp_path):
    return make_pairs(tmp_path, 5)


@pytest.fixture
def scored(monkeypatch):
    """Names of the videos and metrics that are scored, as it happens."""
    calls = []
    whole = scoring.score_pair

    def spy(pair, metrics, protocol, device="cpu"):
        calls.append((pair.name, [metric.name for metric in metrics]))
        return whole(pair, metrics, protocol, device)

    monkeypatch.setattr(scoring, "score_pair", spy)
    return calls


def kill_after(monkeypatch, count: int) -> None:
    """The process dies while it writes line `count`: half of it is on disk."""
    whole, written = storing.Store.append, []

    def append(self, *args):
        whole(self, *args)
        written.append(1)
        if len(written) == count:
            content = self.file.read_bytes()
            self.file.write_bytes(content[: len(content) - 40])
            raise KeyboardInterrupt

    monkeypatch.setattr(storing.Store, "append", append)


def test_a_killed_run_goes_on_to_the_identical_summary(tmp_path, folders, monkeypatch, scored, capsys):
    ori, rec = folders
    assert evaluate(ori, rec, *METRICS, "--output", str(tmp_path / "whole")) == 0
    whole = (tmp_path / "whole/summary.json").read_bytes()
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(ori, rec, *METRICS)
    assert not (tmp_path / "x_rec_eval/summary.json").exists()
    (tmp_path / "x_rec_eval/.summary.json.0123abcd.tmp").write_text("half")  # what a kill leaves
    scored.clear()
    capsys.readouterr()
    assert evaluate(ori, rec, *METRICS) == 0
    assert not list((tmp_path / "x_rec_eval").glob("*.tmp"))
    assert len(scored) == 3  # two were whole; the torn one is scored again
    assert "2 of 5 pairs were scored before" in capsys.readouterr().out
    assert (tmp_path / "x_rec_eval/summary.json").read_bytes() == whole


def test_nothing_is_scored_twice_and_new_metrics_are_added(folders, scored):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr") == 0
    scored.clear()
    assert evaluate(ori, rec, "--metric", "psnr", "ssim") == 0
    assert [names for _, names in scored] == [["ssim"]] * 5
    scored.clear()
    assert evaluate(ori, rec, "--metric", "psnr", "ssim") == 0
    assert scored == []
    assert evaluate(ori, rec, "--metric", "psnr", "ssim", "--fresh") == 0
    assert len(scored) == 5


def test_no_file_of_other_scores_stays_beside_new_ones(folders):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "--per_frame") == 0
    folder = rec.with_name(f"{rec.name}_eval")
    (folder / "comparison.json").write_text("{}")
    assert evaluate(ori, rec, "--metric", "psnr", "--num_frames", "2") == 0
    assert sorted(path.name for path in folder.glob("*.*s*")) == ["per_video.csv", "rank0.jsonl", "summary.json"]


def test_changed_files_formulas_and_frames_are_scored_again(folders, scored):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "ssim") == 0
    scored.clear()
    write_video(rec / "v2.mp4", degrade(original(2), 1.0), 24)
    assert evaluate(ori, rec, "--metric", "psnr", "ssim") == 0
    assert scored == [("v2", ["psnr", "ssim"])]
    scored.clear()
    assert evaluate(ori, rec, "--metric", "psnr", "ssim", "--preset", "torchmetrics") == 0
    assert [names for _, names in scored] == [["psnr", "ssim"]] * 5
    scored.clear()
    assert evaluate(ori, rec, "--metric", "psnr", "ssim", "--preset", "opensora12") == 0
    assert scored == []  # it differs from the default only in how the set is averaged
    assert evaluate(ori, rec, "--metric", "psnr", "--num_frames", "3") == 0
    assert len(scored) == 5


def test_other_weights_are_another_metric(folders, all_weights, scored, monkeypatch, tmp_path):
    ori, rec = folders
    assert evaluate(ori, rec, "--metric", "psnr", "lpips") == 0
    scored.clear()
    trunk = (all_weights / "alexnet-owt-7be5be79.pth").read_bytes()
    import torch

    other = torch.load(all_weights / "alexnet-owt-7be5be79.pth", weights_only=True)
    (tmp_path / "w").mkdir()
    torch.save({key: tensor * 1.01 for key, tensor in other.items()}, tmp_path / "w/alexnet-owt-7be5be79.pth")
    assert (tmp_path / "w/alexnet-owt-7be5be79.pth").read_bytes() != trunk
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path / "w"))
    assert evaluate(ori, rec, "--metric", "psnr", "lpips") == 0
    assert [names for _, names in scored] == [["lpips_alex"]] * 5


class Quarters(nn.Module):
    """Stands for Inception, which takes 0.2 s for a frame: the mean colours of the quarters of frames."""

    def forward(self, frames: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(frames, 2).flatten(1)


def test_features_survive_for_distances_between_sets(all_weights, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(Networks, "inception", lambda self: Quarters())
    ori, rec = make_pairs(tmp_path, 3)
    assert evaluate(ori, rec, "--metric", "rfid", "--num_frames", "2", "--output", str(tmp_path / "whole")) == 0
    whole = json.loads((tmp_path / "whole/summary.json").read_text())["metrics"]["rfid"]
    assert (whole["samples"], whole["mean"] > 0) == (6, True)
    (rec / "v2.mp4").rename(rec.parent / "v2.mp4")
    assert evaluate(ori, rec, "--metric", "rfid", "--num_frames", "2", "--allow_unmatched") == 0
    assert report(rec)["metrics"]["rfid"]["samples"] == 4
    scored.clear()
    (rec.parent / "v2.mp4").rename(rec / "v2.mp4")
    assert evaluate(ori, rec, "--metric", "rfid", "--num_frames", "2") == 0
    assert len(scored) == 1
    assert report(rec)["metrics"]["rfid"] == whole


def launch(ori: Path, rec: Path, output: Path) -> tuple[list[int], str]:
    """Exit codes and output of two ranks, started and stopped as torchrun does."""
    words = ["--ref", ori, "--rec", rec, "--output", output, "--device", "cpu", *METRICS]
    codes, printed = tiny.run_ranks(*tiny.script("eval/eval_common_metric.py"), *map(str, words), cwd=output.parent)
    return codes, "".join(printed)


def test_processes_share_the_work_and_another_number_goes_on(tmp_path, folders):
    ori, rec = folders
    assert evaluate(ori, rec, *METRICS, "--output", str(tmp_path / "one")) == 0
    whole = (tmp_path / "one/summary.json").read_bytes()
    codes, printed = launch(ori, rec, tmp_path / "two")
    assert codes == [0, 0], printed
    assert printed.count("mean over videos") == 1
    assert (tmp_path / "two/summary.json").read_bytes() == whole
    lines = {rank: (tmp_path / f"two/rank{rank}.jsonl").read_text().splitlines() for rank in (0, 1)}
    assert sorted(map(len, lines.values())) == [2, 3]
    assert list(content(tmp_path / "two")[1]) == [f"v{i}" for i in range(5)]  # clips of both ranks
    os.remove(tmp_path / "two/summary.json")
    (tmp_path / "two/rank1.jsonl").write_text(lines[1][0] + "\n" + lines[1][1][:50])  # killed there
    assert evaluate(ori, rec, *METRICS, "--output", str(tmp_path / "two")) == 0
    assert (tmp_path / "two/summary.json").read_bytes() == whole


def test_processes_tell_an_error_of_all_once_and_one_of_a_single_one_too(tmp_path, folders):
    ori, rec = folders
    (rec / "v1.mp4").write_bytes(b"")
    codes, printed = launch(ori, rec, tmp_path / "all")
    assert any(codes)
    assert printed.count("v1.mp4: is empty (0 bytes)") == 1
    for folder in folders:  # found only by the process that reads it
        (folder / "v1.mp4").unlink(missing_ok=True)
        write_two_sizes(folder / "v1.ts")
    codes, printed = launch(ori, rec, tmp_path / "single")
    assert any(codes)
    assert printed.count("changes its size at frame 4") == 1


def test_two_evaluations_do_not_write_to_one_folder(folders, capsys):
    from filelock import FileLock

    ori, rec = folders
    folder = rec.with_name("x_rec_eval")
    folder.mkdir()
    with FileLock(folder / ".rank0.lock"):
        assert evaluate(ori, rec, *METRICS) == 2
    assert "x_rec_eval is in use by another evaluation; choose another --output" in capsys.readouterr().err
