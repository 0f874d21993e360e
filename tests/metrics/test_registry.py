from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.metrics.clips import pair, result
from vae3d.metric_names import PRESET_METRICS
from vae3d.metrics import METRICS, PRESETS, MetricError, build_metrics
from vae3d.metrics.registry import resolve
from vae3d.pretrained.weights import FILES, WeightsMissing


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    for variable in ("VAE3D_WEIGHTS", "TORCH_HOME", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_metrics_come_in_the_given_order_and_once():
    metrics = build_metrics(["ssim", "psnr", "ssim", "flicker"])
    assert [metric.name for metric in metrics] == ["ssim", "psnr", "flicker"]


def test_all_metrics_can_be_built_and_have_their_files(quick):
    metrics = build_metrics(list(METRICS))
    assert [metric.name for metric in metrics] == list(METRICS)
    assert metrics.skipped == {}
    for name, entry in METRICS.items():
        assert len(metrics.files.get(name, [])) == len(entry.files)
    assert [f.name for f in metrics.files["flolpips"]] == ["alexnet-owt-7be5be79.pth", "network-default.pytorch"]


def test_published_files_say_which_metrics_they_are_for():
    needed = {name: {file for alternatives in entry.files for file in alternatives} for name, entry in METRICS.items()}
    for name, files in needed.items():
        assert files == {file for file, known in FILES.items() if name in known.used_for}, name


def test_unknown_metrics_are_named_with_the_known_ones():
    with pytest.raises(MetricError, match=r"metric .* vmaf, fvd; .* psnr, ssim, .*, rfvd, lpips$"):
        build_metrics(["psnr", "vmaf", "fvd"])


def test_unknown_presets_are_named_with_the_known_ones():
    with pytest.raises(MetricError, match=r"preset .* opensora; .* default, opensora12, vidtok"):
        build_metrics(["psnr"], preset="opensora")


@pytest.mark.parametrize("preset", PRESETS)
def test_lpips_is_the_one_that_the_preset_uses(preset):
    net = "lpips_vgg" if preset in ("vidtok", "tokenbench") else "lpips_alex"
    assert resolve(["lpips", "psnr", net], preset) == [net, "psnr"]


def test_presets_choose_metrics_that_need_no_weights():
    """They are computed by default, also on machines without weights."""
    assert PRESET_METRICS["panorama"] == ("ws_psnr", "ws_ssim", "seam", "polar", "cube")
    for names in PRESET_METRICS.values():
        assert not any(METRICS[name].files for name in names)


def test_settings_go_to_their_metric_over_the_presets():
    (metric,) = build_metrics(
        ["ssim"], preset="vidtok", settings={"ssim": {"formula": "uniform"}, "rfid": {"stride": 4}}
    )
    assert metric.formula == "uniform"


def test_all_missing_files_are_named_together(no_weights):
    with pytest.raises(WeightsMissing) as error:
        build_metrics(["psnr", "lpips_vgg", "flolpips", "tlp", "rfvd"])
    message = str(error.value)
    assert message.startswith("weights of lpips_vgg, flolpips, tlp, rfvd are missing; without them: psnr\n")
    for file in ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth", "network-default.pytorch", "i3d_torchscript.pt"):
        assert message.count(f"fetch-weights {file}") == 1


def test_nothing_is_promised_where_nothing_is_left(no_weights):
    with pytest.raises(WeightsMissing, match=r"^weights of lpips_alex are missing\n"):
        build_metrics(["lpips"])


def test_metrics_without_weights_are_skipped_on_request(no_weights):
    metrics = build_metrics(["rfid", "psnr"], on_missing="skip")
    assert [metric.name for metric in metrics] == ["psnr"]
    assert metrics.skipped.keys() == {"rfid"}
    assert metrics.skipped["rfid"].startswith("weights-inception-2015-12-05-6726825d.pth (95,628,359 bytes")
    assert "\n" not in metrics.skipped["rfid"]
    assert "rfid" not in result(metrics, *pair(2)).features


def test_a_metric_of_which_one_file_is_missing_loads_none(trunks, no_weights):
    (no_weights / "alexnet-owt-7be5be79.pth").symlink_to(trunks / "alexnet-owt-7be5be79.pth")
    metrics = build_metrics(["lpips", "flolpips"], on_missing="skip")
    assert [metric.name for metric in metrics] == ["lpips_alex"]
    assert metrics.files == {"lpips_alex": [no_weights / "alexnet-owt-7be5be79.pth"]}
    assert metrics.skipped["flolpips"].startswith("network-default.pytorch")


def test_metrics_share_their_networks(all_weights):
    alex, flolpips, tlp = build_metrics(["lpips_alex", "flolpips", "tlp"])
    assert alex.network is flolpips.network is tlp.network


def test_networks_are_on_the_given_device(trunks):
    (metric,) = build_metrics(["lpips_alex"], torch.device("cpu"))
    assert {p.device.type for p in metric.network.parameters()} == {"cpu"}


def test_psnr_imports_no_package_that_only_others_need_and_lpips_can_then_be_described_on_the_meta_device():
    """In one new process, which takes seconds to start. Importing torchvision 0.21 fails under the meta device."""
    heavy = "lpips", "torchvision", "cv2", "scipy", "huggingface_hub"
    code = (
        "import sys, torch, vae3d.metrics as m\n"
        "m.build_metrics(['psnr', 'flicker', 'ws_psnr'])\n"
        f"print([n for n in {heavy} if n in sys.modules])\n"
        "from vae3d.pretrained.lpips import LPIPSNet\n"
        "with torch.device('meta'):\n"
        "    print({p.device.type for p in LPIPSNet('alex').parameters()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "{'meta'}"]
