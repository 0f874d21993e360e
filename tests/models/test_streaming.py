"""Streams: results of the whole video, in memory independent of its length."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vae3d
from tests.models import wan
from vae3d.models.interface import Stream
from vae3d.models.streaming import CausalStream, IndependentChunks, chunk_lengths


@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_pieces_have_whole_latents_but_for_the_last(stride, chunk):
    for frames in (1, 2, 4, 5, 17, 22, 100):
        lengths = chunk_lengths(frames, chunk, stride)
        assert sum(lengths) == frames
        assert lengths[0] == min(frames, 1 + (chunk - 1) * stride)
        assert all(length == chunk * stride for length in lengths[1:-1])
        assert all(0 < length <= chunk * stride for length in lengths)


def test_pieces_by_hand():
    assert chunk_lengths(17, 1, 4) == [1, 4, 4, 4, 4]
    assert chunk_lengths(23, 2, 4) == [5, 8, 8, 2]
    assert chunk_lengths(3, 2, 4) == [3]


@pytest.mark.parametrize("style", wan.STYLES)
@pytest.mark.parametrize("chunk_latents", [1, 2, 4])
def test_a_stream_gives_what_the_whole_video_gives(style, chunk_latents):
    """Also for sizes and lengths that need padding."""
    ours = wan.model(style)
    ours.chunk_latents = chunk_latents
    video = wan.clip(ours, 23, 1, 1, beyond=5)
    stream = ours.stream(*video.shape[-2:])
    assert isinstance(stream, CausalStream)
    with torch.no_grad():
        pieces = [stream(piece) for piece in video.split(stream.chunks(23), 2)]
        ours.chunk_latents = None
        whole = ours(video, sample=False)
    torch.testing.assert_close(torch.cat([p.video for p in pieces], 2), whole.video, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([p.z for p in pieces], 2), whole.z, rtol=0, atol=1e-5)


def test_drawn_latents_are_those_of_the_generator():
    ours = wan.model()
    video = wan.clip(ours, 5)

    def draw(seed: int) -> torch.Tensor:
        stream = CausalStream(ours, 1)
        rng = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            return torch.cat([stream(p, sample=True, generator=rng).z for p in video.split([1, 4], 2)], 2)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def cached(cache: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(cache) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("style", wan.STYLES)
def test_the_cache_does_not_grow(style):
    """Its shapes are the same from the first chunk on. It must not be a view, which would keep the whole chunk alive."""
    ours = wan.model(style, multipliers=[1, 1], downsample=[True], layers=1)
    seen, shapes = [], set()
    encoder = decoder = None
    with torch.no_grad():
        for number in range(50):
            posterior, encoder = ours.encode_chunk(wan.clip(ours, 2 if number else 1, seed=number), encoder)
            _, decoder = ours.decode_chunk(posterior.mean, decoder)
            tensors = cached(encoder) + cached(decoder)
            seen.append(sum(t.untyped_storage().nbytes() for t in tensors))
            assert sum(t.nbytes for t in tensors) == seen[-1]
            shapes.add(tuple((t.shape, t.stride(), t.dtype) for t in tensors))
    assert len(set(seen)) == len(shapes) == 1


def test_a_list_is_emptied_while_it_is_read_and_a_tuple_is_not():
    ours = wan.model(multipliers=[1, 1], downsample=[True], layers=1)
    pieces = [wan.clip(ours, 2, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        _, cache = ours.encode_chunk(wan.clip(ours, 1), None)
        kept = tuple(cache)
        first, _ = ours.encode_chunk(pieces[0], kept)
        ours.encode_chunk(pieces[1], kept)
        again, _ = ours.encode_chunk(pieces[0], kept)
        assert torch.equal(first.mean, again.mean)
        ours.encode_chunk(pieces[0], cache)
    assert isinstance(cache, list)
    assert cached(cache) == []
    assert cached(kept) != []


class PeakMemory(TorchDispatchMode):
    """Peak bytes of live storages, without the model's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = weakref.WeakSet(t.untyped_storage() for t in (*model.parameters(), *model.buffers()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize(("name", "latents", "size"), [("wan", 3, 64), ("wan22", 1, 128)])
def test_the_memory_of_a_chunk_is_estimated(name, latents, size):
    """Within 15 % of the memory counted with fake tensors for a chunk in the middle of a stream, with the cache."""
    with FakeTensorMode(), torch.no_grad():
        model = vae3d.build(name)
        z = torch.empty(1, *model.latent_shape(1 + (latents - 1) * 4, size, size))
        counted = PeakMemory(model)
        with counted:
            _, cache = model.decode_chunk(z.clone(), None)
            counted.peak = 0
            out = model.decode_chunk(z.clone(), cache)
    del out
    assert counted.peak == pytest.approx(model.chunk_memory(latents, size, size), rel=0.15)


def test_chunks_are_as_long_as_memory_allows():
    ours = wan.model()
    needs = {k: ours.chunk_memory(k, 64, 128) / 2**30 for k in range(1, 9)}
    for latents in (1, 2, 5, 8):
        assert ours.stream(64, 128, needs[latents]).chunk_latents == latents
    assert ours.stream(64, 128, 1e-9).chunk_latents == 1
    assert ours.stream(64, 128, 1e9).chunk_latents == 8  # longer chunks are not faster
    assert ours.stream(64, 128).chunk_latents == 8
    ours.chunk_latents = 3
    assert ours.stream(64, 128, 1e-9).chunk_latents == 3  # as set


def test_other_models_code_pieces_apart():
    stream: Stream = IndependentChunks(None, 4)
    assert stream.chunks(10) == [4, 4, 2]
    assert IndependentChunks(None, None).chunks(10) == [10]
