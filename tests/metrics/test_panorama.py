from __future__ import annotations

import math

import pytest
import torch

from tests.metrics.clips import levels, pair, result, value
from tests.metrics.test_ssim import published_ssim
from vae3d.metrics import ssim
from vae3d.metrics.frame import Psnr
from vae3d.metrics.panorama import Cube, CubeLpips, Polar, Seam, WsPsnr, WsSsim
from vae3d.panorama import cube_faces, roll


def test_ws_psnr_by_hand():
    ref = torch.zeros(1, 3, 4, 5)
    rec = ref.clone()
    rec[:, :, 0] = 0.1
    pole, equator = math.cos(3 * math.pi / 8), math.cos(math.pi / 8)
    mse = 0.01 * pole / (2 * pole + 2 * equator)
    assert value(WsPsnr(), ref, rec) == pytest.approx(-10 * math.log10(mse), abs=1e-5)


def test_ws_psnr_of_two_rows_is_psnr():
    ref, rec = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2, 4)
    rec[:, 1, 0, 2] = 0.3
    assert value(WsPsnr(), ref, rec) == pytest.approx(value(Psnr(), ref, rec, "psnr"), abs=1e-6)


def test_ws_psnr_forgives_errors_at_the_poles():
    ref = 0.8 * pair(1, 48, 96)[0]
    pole, equator = ref.clone(), ref.clone()
    pole[:, :, :8] += 0.1
    equator[:, :, 20:28] += 0.1
    assert value(WsPsnr(), ref, pole) > value(Psnr(), ref, pole, "psnr") + 3
    assert value(WsPsnr(), ref, equator) < value(Psnr(), ref, equator, "psnr") - 1


def test_ws_psnr_is_capped_like_psnr():
    assert value(WsPsnr(), levels(0.5), levels(0.5)) == 100
    assert value(WsPsnr(), levels(0.5), levels(0.5 + 5e-6)) == 100


def test_ws_ssim_by_hand():
    """Windows wrap around the seam; each row of windows weighs the latitude of its centre."""
    ref, rec = pair(1, 16, 24)
    wrapped = [torch.cat([x[..., -5:], x, x[..., :5]], -1) for x in (ref, rec)]
    rows = [published_ssim(*(x[0, :, i : i + 11].numpy() for x in wrapped)) for i in range(6)]
    weights = [math.cos((j + 0.5 - 8) * math.pi / 16) for j in range(5, 11)]
    expected = sum(w * r for w, r in zip(weights, rows, strict=True)) / sum(weights)
    assert value(WsSsim(), ref, rec) == pytest.approx(expected, abs=1e-12)


def test_an_error_at_the_seam_counts_as_much_as_elsewhere():
    ref = 0.8 * pair(1, 32, 1)[0].expand(-1, -1, -1, 64)  # the same at every longitude
    at_seam, inside = ref.clone(), ref.clone()
    at_seam[:, :, 12:20, :2] += 0.2
    inside[:, :, 12:20, 30:32] += 0.2
    assert value(WsSsim(), ref, at_seam) == pytest.approx(value(WsSsim(), ref, inside), abs=1e-12)
    assert ssim.ssim_gaussian(ref, at_seam).item() > ssim.ssim_gaussian(ref, inside).item() + 1e-3


def test_a_rotated_panorama_has_the_same_ws_ssim():
    ref, rec = pair(1, 24, 40)
    for columns in (1, 20):
        turned = value(WsSsim(), ref.roll(columns, -1), rec.roll(columns, -1))
        assert turned == pytest.approx(value(WsSsim(), ref, rec), abs=1e-12)


def test_seam_gradient_is_the_edge_that_was_added():
    ref = torch.full((2, 3, 40, 80), 0.5)
    rec = ref.clone()
    rec[..., 0] += 0.25
    rec[..., -1] -= 0.125
    assert value(Seam(), ref, rec, "seam_gradient") == pytest.approx(0.375)
    ref[..., 0] += 0.25  # an edge that the original has too
    assert value(Seam(), ref, rec, "seam_gradient") == pytest.approx(0.125)


def test_seam_ratio_compares_the_16_columns_at_either_side_with_the_rest():
    for width, near in ((256, 16), (128, 16), (80, 10)):  # an eighth of narrow ones
        ref = torch.full((1, 3, 20, width), 0.5)
        rec = ref + 0.1
        rec[..., :near] += 0.1
        rec[..., -near:] += 0.1
        assert value(Seam(), ref, rec, "seam_ratio") == pytest.approx(4, rel=1e-5)


def test_an_error_that_is_the_same_everywhere_has_a_ratio_of_1():
    got = result(Seam(), levels(0.5, 0.2, height=40, width=80), levels(0.5, 0.3, height=40, width=80)).scores
    assert got["seam_ratio"].frames == pytest.approx([1, 1])
    assert got["seam_gradient"].frames == [0, 0]


def test_bands_by_hand():
    """Of 12 rows two lie in each band; errors of 0.1, 0.2, ... in its first row have half of their square for an MSE."""
    ref = torch.zeros(1, 3, 12, 6)
    rec = ref.clone()
    for band in range(6):
        rec[:, :, 2 * band] = 0.1 * (band + 1)
    got = {column: score.value for column, score in result(Polar(), ref, rec).scores.items()}
    mse = [(0.1 * (band + 1)) ** 2 / 2 for band in range(6)]
    bands = ("n60_90", "n30_60", "n0_30", "s0_30", "s30_60", "s60_90")
    expected = {f"psnr_{name}": -10 * math.log10(error) for name, error in zip(bands, mse, strict=True)}
    expected["psnr_polar"] = -10 * math.log10((mse[0] + mse[5]) / 2)
    assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("height", [6, 7, 32])
def test_every_row_belongs_to_one_band_whatever_the_height(height):
    for row in range(height):
        ref = torch.zeros(1, 3, height, 6)
        rec = ref.clone()
        rec[:, :, row] = 0.5
        latitude = 90 - (row + 0.5) * 180 / height
        got = {column for column, score in result(Polar(), ref, rec).scores.items() if score.value < 100}
        band = f"{int(abs(latitude) // 30) * 30}_{int(abs(latitude) // 30) * 30 + 30}"
        assert got - {"psnr_polar"} in [{f"psnr_n{band}"}, {f"psnr_s{band}"}]
        assert (f"psnr_{'n' if latitude > 0 else 's'}{band}" in got) or latitude == 0
        assert ("psnr_polar" in got) == (abs(latitude) > 60)


def test_an_error_above_is_seen_in_the_face_that_looks_up():
    ref = torch.full((2, 3, 32, 64), 0.5)
    rec = ref.clone()
    rec[:, :, :4] += 0.1  # beyond 67 degrees
    got = result(Cube(), ref, rec).scores
    assert got["cube_psnr_down"].frames == got["cube_psnr_sides"].frames == [100, 100]
    assert 20 < got["cube_psnr_up"].value < 30
    six = 10 * math.log10(6)  # the error of one of six faces
    assert got["cube_psnr"].value == pytest.approx(got["cube_psnr_up"].value + six, abs=1e-4)


def test_cube_psnr_is_the_psnr_of_the_faces():
    ref, rec = pair(2, 32, 64)
    faces = [cube_faces(frames) for frames in (ref, rec)]
    expected = [value(Psnr(), *(f[t, 0:4] for f in faces), "psnr_video") for t in range(2)]
    assert result(Cube(), ref, rec).scores["cube_psnr_sides"].frames == pytest.approx(expected, abs=1e-4)


def test_a_panorama_turned_by_quarters_has_the_same_scores_of_faces(networks):
    ref, rec = pair(1, 64, 128)
    rec[:, :, :20] *= 0.9
    for metric in (Polar(), Cube()):
        here, there = (result(metric, *clip).scores for clip in ((ref, rec), (roll(ref, 32), roll(rec, 32))))
        assert {c: s.value for c, s in there.items()} == pytest.approx({c: s.value for c, s in here.items()}, abs=1e-4)


def test_cube_lpips_is_lpips_of_the_faces(networks, monkeypatch):
    ref, rec = pair(2, 64, 128)
    monkeypatch.setattr("vae3d.metrics.networks.MAX_BATCH_PIXELS", 5 * 32 * 32)  # five faces, which end amid a frame
    got = result(CubeLpips(networks), ref, rec).scores
    network = networks.lpips("alex")
    faces = [network(*(cube_faces(x[t : t + 1] * 2 - 1)[0] for x in (ref, rec))).flatten() for t in range(2)]
    for column, part in {"": slice(6), "_sides": slice(4), "_up": 4, "_down": 5}.items():
        expected = [f[part].mean().item() for f in faces]
        assert got[f"cube_lpips{column}"].frames == pytest.approx(expected, rel=1e-4)
