"""Models of other than three channels of pixels, with the weights of a model of colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vae3d
from tests import tiny
from vae3d.checkpoints.location import CheckpointError
from vae3d.errors import UserError
from vae3d.inference.video import write_image
from vae3d.loading import initialize
from vae3d.losses.objective import Objective, WeightedTerm
from vae3d.losses.perceptual import LPIPS
from vae3d.losses.pixel import L1
from vae3d.models.pixel_channels import fit_channels
from vae3d.pixels import PixelError, as_rgb, displayable
from vae3d.types import ClipBatch

NAMES = ("wan", "wan22", "taehv", "spatial", "taesd", "temporal_vae")


def key(name: str) -> str:
    return "+model.spatial.pixel_channels" if name == "temporal_vae" else "model.pixel_channels"


def models(name: str, channels: int, *overrides: str) -> list[torch.nn.Module]:
    """A model of colours with random weights, and one of other channels with the same."""
    colours = tiny.model(name, *overrides)
    other = tiny.model(name, f"{key(name)}={channels}", *overrides, seed=1)
    state, note = fit_channels(other, colours.state_dict())
    other.load_state_dict(state)
    assert f"from 3 to {channels}" in note
    return [colours, other]


def clip(channels: int, frames: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, channels, frames, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("name", "channels"), [*((name, 4) for name in NAMES), ("taehv", 6)])
def test_more_channels_start_with_the_same_colours_bit_for_bit(name, channels):
    colours, other = models(name, channels)
    video = clip(channels)
    with torch.no_grad():
        before, after = colours(video[:, :3], sample=False), other(video, sample=False)
    assert torch.equal(before.z, after.z)
    assert torch.equal(before.video, after.video[:, :3])
    assert torch.equal(after.video[:, 3], torch.ones_like(after.video[:, 3]))
    assert torch.equal(after.video[:, 4:], torch.zeros_like(after.video[:, 4:]))


@pytest.mark.parametrize("name", NAMES)
def test_one_channel_starts_as_three_equal_ones(name):
    colours, one = models(name, 1)
    video = clip(1)
    with torch.no_grad():
        before, after = colours(video.expand(-1, 3, -1, -1, -1), sample=False), one(video, sample=False)
    torch.testing.assert_close(after.z, before.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.video, before.video.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_a_shortcut_is_changed_too():
    colours, other = models("spatial", 5, "model.shortcut=true")
    with torch.no_grad():
        colours.module.encoder.conv_out.weight.normal_()
    other.load_state_dict(fit_channels(other, colours.state_dict())[0])
    video = clip(5)
    with torch.no_grad():
        before, after = colours(video[:, :3], sample=False), other(video, sample=False)
    torch.testing.assert_close(after.z, before.z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.video[:, :3], before.video, rtol=1e-4, atol=1e-5)
    assert torch.equal(after.video[:, 3], torch.ones_like(after.video[:, 3]))
    assert torch.equal(after.video[:, 4], torch.zeros_like(after.video[:, 4]))


@pytest.mark.parametrize("name", ["wan", "taehv"])
def test_streams_equal_whole_clips(name):
    _, model = models(name, 4, "model.chunk_latents=1")
    model.eval()
    video = clip(4, frames=9)
    stream, done, parts = model.stream(32, 48), 0, []
    with torch.no_grad():
        for length in stream.chunks(9):
            parts.append(stream(video[:, :, done : done + length + stream.lookahead]).video)
            done += length
        torch.testing.assert_close(torch.cat(parts, 2), model(video, sample=False).video, rtol=1e-4, atol=1e-5)


def test_load_and_initialize_change_weights_and_exports_hold_them(tmp_path):
    vae3d.save(tiny.model("taehv"), tmp_path / "colours")
    model = vae3d.load(tmp_path / "colours", pixel_channels=4)
    started = tiny.model("taehv", "model.pixel_channels=4", seed=1)
    lines = initialize(started, str(tmp_path / "colours"))
    assert any("from 3 to 4" in line for line in lines)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), started.parameters(), strict=True))
    vae3d.save(model, tmp_path / "rgba")
    again = vae3d.load(tmp_path / "rgba")
    assert again.pixel_channels == 4
    assert torch.equal(again(clip(4)).video, model(clip(4)).video)
    with pytest.raises(CheckpointError, match="4 channels of pixels"):
        vae3d.save(model, tmp_path / "tae.pth", layout="taehv")


def test_commands_that_read_files_name_a_model_of_channels_that_no_file_has(tmp_path, capsys):
    source, size = tmp_path / "a.png", ("--height=16", "--width=16", f"--out={tmp_path / 'out'}")
    write_image(source, tiny.frames(1)[0])
    grey, rgba = tmp_path / "grey", tmp_path / "rgba"
    vae3d.save(tiny.model("wan", "model.pixel_channels=1"), grey)
    vae3d.save(tiny.model("wan", "model.pixel_channels=4"), rgba)
    for command in (
        ("try", source, grey, size[-1]),
        ("measure-scale", grey, source, *size),
        ("probe-latents", grey, "--source", source, *size),
        ("probe-latents", rgba, "--source", source, *size),
    ):
        assert tiny.status(*command) == 2
        assert f"{grey if grey in command else rgba} takes " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_channels_of_a_two_stage_model_are_changed_by_load(tmp_path):
    vae3d.save(tiny.model("temporal_vae"), tmp_path / "colours")
    model = vae3d.load(tmp_path / "colours", spatial={"pixel_channels": 4})
    assert model(clip(4)).video.shape[1] == model.pixel_channels == 4


def test_what_does_not_fit_is_refused():
    two = tiny.model("taehv", "model.pixel_channels=2")
    with pytest.raises(UserError, match="pixel_channels is 2"):
        fit_channels(two, tiny.model("taehv").state_dict())
    with pytest.raises(UserError, match="pixel_channels=4 needs 3"):
        fit_channels(
            tiny.model("taehv", "model.pixel_channels=4"), tiny.model("taehv", "model.pixel_channels=5").state_dict()
        )
    with pytest.raises(PixelError, match=r"this model takes \[B, 4, T, H, W\]"):
        tiny.model("taehv", "model.pixel_channels=4")(clip(3))


def test_the_new_channels_learn():
    _, model = models("taehv", 4)
    model.train()
    video = clip(4)
    video[:, 3] = -0.5
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    errors = []
    for _ in range(3):
        rec = model(video).video
        errors.append((rec[:, 3] - video[:, 3]).abs().mean().item())
        optimizer.zero_grad()
        (rec - video).abs().mean().backward()
        optimizer.step()
    assert errors[0] == pytest.approx(1.5)
    assert errors[2] < errors[1] < errors[0]
    assert model.encoder[0].weight.grad[:, 3].abs().sum() > 0


# ---- what losses, metrics and pictures see


def test_colours_of_any_number_of_channels():
    one, four, five = clip(1), clip(4), clip(5)
    assert torch.equal(as_rgb(one), one.expand(-1, 3, -1, -1, -1))
    torch.testing.assert_close(as_rgb(four), four[:, :3] * (four[:, 3:] + 1) / 2)
    assert torch.equal(as_rgb(five), five[:, :3])
    with pytest.raises(PixelError, match="2 channels"):
        as_rgb(clip(2))


def test_lpips_sees_colours_through_their_alpha(trunks):
    """Where both are transparent, colours do not matter to LPIPS, and do to L1."""
    video = clip(4)
    video[:, 3] = -1.0
    rec = video.clone()
    rec[:, :3] += 0.5
    batch = ClipBatch(video, torch.zeros(1, dtype=torch.long), [""])
    from vae3d.types import Reconstruction

    for term, value in ((LPIPS(net="alex"), 0.0), (L1(), 0.375)):
        term.load("cpu")
        loss = Objective({"t": WeightedTerm(term, 1.0)}, "mean")(batch, Reconstruction(rec, None, video), 0)[0]
        assert loss.item() == pytest.approx(value, abs=1e-6)


def test_transparent_pixels_show_a_checkerboard():
    frames = np.zeros((1, 16, 16, 4), np.uint8)
    frames[..., 0], frames[:, :, 8:, 3] = 200, 255
    shown = displayable(frames)
    assert shown.shape == (1, 16, 16, 3)
    assert shown[0, 0, 0].tolist() == [153] * 3
    assert shown[0, 8, 0].tolist() == [102] * 3
    assert shown[0, 0, 8].tolist() == [200, 0, 0]
    assert np.array_equal(displayable(frames[..., :1]), frames[..., :1].repeat(3, 3))
