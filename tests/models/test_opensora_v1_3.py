"""Open-Sora 1.3's VAE: the published code's results, frames, chunks, streams, files, and as a teacher."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import vae3d
from tests import tiny
from vae3d.models.interface import share_frames
from vae3d.models.opensora_v1_3 import OpenSoraV13VAE

KEYS = json.loads((tiny.ROOT / "tests/keys/opensora_v1_3.json").read_text())
NAME = "opensora_v1_3"
# Of the published code (opensora/v1.3 of hpcaitech/Open-Sora) in fp64, with the weights and the clip of `expected`:
# means of latents at one position, pixels at one, and mean squares of means, log variances and pixels.
PUBLISHED = {
    None: (
        [0.117806, 0.512805, 0.332366, 0.264597, -0.67856, -0.164957, -0.308135, -0.213738, -0.15029, -0.366711],
        [0.056873, 0.46507, 0.291805, 0.727015, 0.858608, 0.289536, 0.302242, 1.103887, 0.25359],
        (0.137163, 0.209691, 0.236019),
    ),
    5: (
        [0.045612, 0.632869, 0.274723, 0.298141, 0.386375, 0.843007,
         -0.176004, -0.424563, 0.394981, -0.206566, 0.281288, -0.342534],
        [-0.223488, 0.228992, 0.224371, 1.121743, 0.995029, 0.345301, 0.438333, 0.906039, 0.66315],
        (0.138649, 0.125328, 0.22101),
    ),
}  # fmt: skip


def test_keys_and_shapes_are_the_published_ones():
    with torch.device("meta"):
        model = vae3d.build(NAME)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == KEYS
    assert (model.spec.channels, model.spec.time_stride, model.spec.space_stride) == (16, 4, 8)


@pytest.mark.parametrize("micro_frames", PUBLISHED)
def test_results_are_those_of_the_published_code(micro_frames):
    model = OpenSoraV13VAE(
        channels=32, multipliers=(1, 1, 2), downsample=(False, True), layers=1, latent_channels=2,
        micro_frames=micro_frames,
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            scale = 1 / p[0].numel() ** 0.5 if p.dim() > 1 else 0.1
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale)
            p += float(name.endswith("weight") and p.dim() == 1)
        video = torch.rand(1, 3, 9, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
        posterior = model.encode(video)
        rec = model.decode(posterior.mean)
    latents, pixels, squares = PUBLISHED[micro_frames]
    assert posterior.mean[0, :, :, 0, 1].flatten().tolist() == pytest.approx(latents, abs=2e-6)
    assert rec[0, 1, :, 3, 5].tolist() == pytest.approx(pixels, abs=2e-6)
    found = [tensor.square().mean().item() for tensor in (posterior.mean, posterior.logvar, rec)]
    assert found == pytest.approx(squares, abs=2e-6)


@pytest.mark.parametrize("micro_frames", [5, None])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6, 9, 12])
def test_as_many_frames_come_out_as_went_in_and_a_stream_is_equal(frames, micro_frames):
    model = tiny.model(NAME)
    model.micro_frames = micro_frames
    video = torch.rand(1, 3, frames, 7, 10) * 2 - 1
    stream = model.stream(7, 10)
    with torch.no_grad():
        out = model(video, sample=False)
        assert out.video.shape == video.shape
        assert out.z.shape[1:] == model.latent_shape(frames, 7, 10)
        parts, start = [], 0
        for length in stream.chunks(frames):
            parts.append(stream(video[:, :, start : start + length + stream.lookahead]))
            start += length
        assert start == frames
        torch.testing.assert_close(torch.cat([part.video for part in parts], 2), out.video, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.cat([part.z for part in parts], 2), out.z, rtol=0, atol=1e-6)


def test_latents_of_published_chunks_and_of_whole_clips():
    with torch.device("meta"):
        model = vae3d.build(NAME)
    assert [model.latent_frames(n) for n in (1, 16, 17, 18, 33, 49)] == [1, 5, 5, 7, 10, 15]
    model.micro_frames = None
    assert [model.latent_frames(n) for n in (1, 16, 17, 18, 33, 49)] == [1, 5, 5, 6, 9, 13]


def test_frames_that_do_not_fit_the_latents_and_chunks_that_do_not_fit_the_stride_are_refused():
    model = tiny.model(NAME)
    with pytest.raises(ValueError, match="num_frames is 9"):
        model.decode(torch.zeros(1, 4, 3, 4, 4), 9)
    with pytest.raises(ValueError, match="micro_frames is 4"):
        OpenSoraV13VAE(micro_frames=4)


def test_checkpointed_gradients_are_equal():
    grads = []
    for recompute in ("false", "true"):
        model = tiny.model(NAME, f"model.gradient_checkpointing={recompute}")
        video = torch.rand(1, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
        model(video, sample=False).video.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("latents", [16, 4])
def test_published_files_are_recognised(tmp_path, latents):
    torch.manual_seed(0)
    saved = OpenSoraV13VAE(channels=32, multipliers=(1, 2), downsample=(True,), layers=1, latent_channels=latents)
    save_file(saved.state_dict(), tmp_path / "model.safetensors")
    model = vae3d.load(tmp_path / "model.safetensors", micro_frames=9)
    torch.testing.assert_close(dict(model.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)
    assert model.micro_frames == 9
    assert (model.spec.latents_mean[0] == -0.190169) == (latents == 16)


def test_it_teaches_its_tiny_autoencoder_clips_of_17_frames_and_whole_clips():
    with torch.device("meta"):
        teacher, student = vae3d.build(NAME), vae3d.build("taehv", "model.variant=taeos1_3")
    assert share_frames(teacher, student, 17, 64, 64)
    assert not share_frames(teacher, student, 33, 64, 64)
    teacher.micro_frames = None
    assert share_frames(teacher, student, 33, 64, 64)
