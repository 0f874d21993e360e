"""What every model of conf/model does in the same way."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


@pytest.mark.parametrize("name", tiny.MODEL)
def test_a_number_of_frames_that_does_not_fit_the_latents_is_refused(name):
    model = tiny.model(name)
    z = torch.zeros(1, model.spec.channels, 1, 2, 2)
    for frames in (-1, 0, 40):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, which does not fit 1 latent frame"):
            model.decode(z, frames)


@pytest.mark.parametrize("name", tiny.MODEL)
def test_chunks_of_any_number_of_frames_can_be_asked_for_and_change_no_result(name):
    """frame_batch of networks of single frames, latents of others. Open-Sora 1.3's chunks are part of its results."""
    model = tiny.model(name).eval()
    video = torch.rand(1, model.pixel_channels, 6, 16, 16, generator=torch.manual_seed(0)) * 2 - 1
    with torch.no_grad():
        whole = model(video, sample=False).video
        if name == "opensora_v1_3":
            with pytest.raises(ValueError, match="OpenSoraV13VAE cannot code clips in chunks"):
                model.set_chunk_frames(1)
            return
        model.set_chunk_frames(1)
        frames_only = getattr(model, "spatial_vae", model)
        assert (model.chunk_latents if model.cached_steps else frames_only.frame_batch) == 1
        torch.testing.assert_close(model(video, sample=False).video, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "taehv"])
def test_clips_are_coded_in_the_chunks_of_a_stream_of_their_size_unless_chunks_are_set(name):
    model = tiny.model(name)
    assert model.clip_latents is None
    for side in (64, 2048):
        model.fit_chunks(side, side)
        assert model.clip_latents == model.stream(side, side).chunk_latents
    model.chunk_latents = 3
    model.fit_chunks(64, 64)
    assert model.clip_latents == 3


@pytest.mark.parametrize("name", tiny.MODEL)
def test_a_stream_runs_every_step_that_compile_compiles(name, monkeypatch):
    model = tiny.model(name).eval()
    seen, steps = set(), model.chunk_steps()
    for key in steps:
        call = getattr(*key)

        def run(*args, key=key, call=call, **kwargs):
            seen.add(key)
            return call(*args, **kwargs)

        monkeypatch.setattr(*key, run)
    stream, video = model.stream(16, 16), torch.zeros(1, model.pixel_channels, 1, 16, 16)
    stream.chunks(1)
    with torch.no_grad():
        stream(video)
    assert seen == set(steps)


def test_frames_in_one_pass_are_of_networks_of_single_frames_alone():
    found = {name: tiny.model(name).set_frame_batch(1) for name in tiny.MODEL}
    assert [name for name, has in found.items() if not has] == ["wan", "wan22", "opensora_v1_3", "taehv"]
