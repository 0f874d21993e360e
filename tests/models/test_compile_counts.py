"""How often torch.compile compiles what streams and clips of other lengths run, and CUDA graphs' bookkeeping.

The graphs are run as they are: what a backend makes of them is not this project's.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.models import wan
from vae3d.errors import UserError
from vae3d.models import compiled
from vae3d.models.cuda_graphs import MAX_GRAPHS, GraphedStep, graph_steps, rerun
from vae3d.models.spatial import SpatialVAE
from vae3d.models.taehv import TAEHV
from vae3d.models.temporal import TemporalVAE

WAN = {"channels": 4, "multipliers": [1, 2], "downsample": [True], "layers": 1, "pad_w": "circular"}


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def taehv(variant: str = "taew2_1") -> TAEHV:
    torch.manual_seed(0)
    return TAEHV(variant=variant, channels=4, decoder_channels=[4, 4, 4, 4], decoder_blocks=[1, 1, 1]).eval()


def clip(frames: int, height: int, width: int) -> Tensor:
    return torch.rand(1, 3, frames, height, width, generator=torch.manual_seed(frames)) * 2 - 1


def streamed(model, video: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and latents of a stream."""
    stream = model.stream(*video.shape[-2:])
    start, parts = 0, []
    for length in stream.chunks(video.shape[2]):
        parts.append(stream(video[:, :, start : start + length + stream.lookahead]))
        start += length
    return torch.cat([part.video for part in parts], 2), torch.cat([part.z for part in parts], 2)


def test_streams_compile_each_step_twice_whatever_the_length(monkeypatch, counter):
    """Without a cache and with one; fewer chunks, a shorter last one or a longer video compile nothing new."""
    monkeypatch.setattr(compiled, "BACKEND", counter)
    model = wan.model(**WAN)
    model.chunk_latents = 2
    videos = [clip(frames, 8, 12) for frames in (5, 8, 2)]
    with torch.no_grad():
        expected = [streamed(model, video) for video in videos]
        compiled.compile_steps(model)
        counts = []
        for video, (rec, z) in zip(videos, expected, strict=True):
            found_rec, found_z = streamed(model, video)
            counts.append(counter.frame_count)
            assert wan.relative_error(found_rec, rec) < 5e-5
            assert wan.relative_error(found_z, z) < 5e-5
    assert counts == [4] * len(videos)  # two of encode_chunk and two of decode_chunk; a graph break would add some


@pytest.mark.parametrize("part", ["temporal", "taehv"])
def test_clips_of_any_length_compile_at_most_twice(counter, part):
    """One graph for a dynamic number of frames. Without oneDNN: torch itself compiles again for batches of 16 on CPUs."""
    torch.manual_seed(0)
    if part == "taehv":
        model, channels, height, width = taehv(), 3, 16, 24
    else:
        model = TemporalVAE(channels=8, multipliers=[1, 2], downsample=[True], layers=1, groups=4).eval()
        channels, height, width = 4, 3, 4

    def trip(video: Tensor) -> Tensor:
        return model.decode(model.encode(video).mode(), video.shape[2])

    step = torch.compile(trip, backend=counter, fullgraph=True)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        for frames in (5, 9, 12):
            video = torch.rand(1, channels, frames, height, width)
            torch._dynamo.mark_dynamic(video, 2)
            torch.testing.assert_close(step(video), trip(video), rtol=0, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(("variant", "pieces"), [("taew2_1", 3), ("taecvx", 3), ("taeh3", 1), ("taeos1_2", 1)])
def test_taehv_streams_of_fixed_chunks_give_their_steps_two_shapes(monkeypatch, variant, pieces):
    """Also where the encoder starts again within a video (MiniMax H3, Open-Sora 1.2): it then takes single latents."""
    model = taehv(variant)
    model.chunk_latents, seen = 3, {"encode_chunk": set(), "decode_chunk": set()}
    expected = {frames: streamed(model, clip(frames, 16, 32)) for frames in (1, 9, 30, 39)}
    for name in seen:

        def step(x, cache, name=name):
            seen[name].add((tuple(x.shape), cache is None))
            return getattr(TAEHV, name)(model, x, cache)

        monkeypatch.setattr(model, name, step)
    model.fixed_chunks = True
    for frames, (rec, z) in expected.items():
        found_rec, found_z = streamed(model, clip(frames, 16, 32))
        torch.testing.assert_close(found_rec, rec, rtol=0, atol=1e-5)
        torch.testing.assert_close(found_z, z, rtol=0, atol=1e-5)
    assert [len(shapes) for shapes in seen.values()] == [2, 2]
    assert {shape[2] for shape, _ in seen["encode_chunk"]} == {pieces * model.spec.time_stride}
    assert {shape[2] for shape, _ in seen["decode_chunk"]} == {3}


def test_chunks_of_models_without_a_cache_compile_once_and_once_for_any_rest(monkeypatch, counter):
    monkeypatch.setattr(compiled, "BACKEND", counter)
    model = SpatialVAE([8, 8], layers=1, groups=4, frame_batch=4, attention=False).eval()
    keys = list(model.state_dict())
    compiled.compile_steps(model)
    with torch.no_grad():
        for frames in (4, 7, 8, 6, 13 - 3):
            streamed(model, clip(frames, 8, 8))
    assert counter.frame_count == 4  # encoder and decoder
    assert list(model.state_dict()) == keys


# ---- CUDA graphs


class Recorder:
    """Counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run):
        outputs, again = rerun(run)
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            again()

        return outputs, replay


@pytest.mark.parametrize("name", ["wan", "taehv"])
def test_a_replayed_chunk_gives_what_the_step_gives(name):
    """Two streams that take turns, in both kinds of no-gradient modes, share one graph and keep their own caches."""
    model = wan.model(**WAN) if name == "wan" else taehv()
    model.chunk_latents, model.fixed_chunks = 2, True
    size = (8, 12) if name == "wan" else (16, 24)
    videos = [clip(frames, *size) for frames in (13, 9)]
    with torch.inference_mode():
        expected = [streamed(model, video) for video in videos]
    recorders = Recorder(), Recorder()
    model.encode_chunk = GraphedStep(model.encode_chunk, recorders[0])
    model.decode_chunk = GraphedStep(model.decode_chunk, recorders[1])
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            streams = [model.stream(*size) for _ in videos]
            lengths = [stream.chunks(video.shape[2]) for stream, video in zip(streams, videos, strict=True)]
            parts = [[], []]
            for turn in range(max(map(len, lengths))):
                for i, (stream, video) in enumerate(zip(streams, videos, strict=True)):
                    if turn < len(lengths[i]):
                        start = sum(lengths[i][:turn])
                        parts[i].append(stream(video[:, :, start : start + lengths[i][turn] + stream.lookahead]))
        for (rec, z), part in zip(expected, parts, strict=True):
            assert torch.equal(torch.cat([p.video for p in part], 2), rec)
            assert torch.equal(torch.cat([p.z for p in part], 2), z)
    steady = sum(len(own) - 1 for own in lengths)
    assert [(r.captures, r.replays) for r in recorders] == [(1, 2 * steady)] * 2


def test_first_chunks_and_gradients_are_not_captured_and_old_graphs_are_dropped():
    recorder = Recorder()
    step = GraphedStep(lambda x, cache: (2 * x, (x[:, :, -1:].clone(),)), recorder)
    x = torch.ones(1, 1, 2, 2, 2, requires_grad=True)
    out, cache = step(x, None)
    out.sum().backward()
    assert (x.grad == 2).all()
    step(x, cache)[0].sum().backward()
    assert (x.grad == 4).all()
    assert recorder.captures == 0
    with torch.no_grad():
        for size in range(1, MAX_GRAPHS + 3):
            step(x, None)
            chunk = torch.full((1, 1, 2, 1, size), float(size))
            result, _ = step(chunk, (chunk[:, :, :1],))
            assert torch.equal(result, 2 * chunk)
    assert recorder.captures == MAX_GRAPHS + 2
    assert len(step.graphs) == MAX_GRAPHS


def test_graphs_keep_memory_to_one_cache_and_tell_autocast_apart():
    recorder = Recorder()
    conv = torch.nn.Linear(2, 2)
    step = GraphedStep(lambda x, cache: (conv(x), [x.clone()]), recorder)
    x = torch.ones(1, 1, 1, 2, 2)
    cache = [x.clone()]
    with torch.no_grad():
        fp32, _ = step(x, cache)
        assert cache == [None]
        with torch.autocast("cpu", torch.bfloat16):
            bf16, _ = step(x, [x.clone()])
    assert (fp32.dtype, bf16.dtype, recorder.captures) == (torch.float32, torch.bfloat16, 2)


def test_graphs_need_a_gpu_and_a_cache():
    with pytest.raises(UserError, match=r"GPU.*cpu"):
        graph_steps(wan.model(**WAN))
    with pytest.raises(UserError, match="SpatialVAE"):
        graph_steps(SpatialVAE([8, 8], layers=1, groups=4))
