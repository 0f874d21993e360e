"""CUDA graphs of the steps that streams repeat: one launch per chunk, instead of one per kernel.

Worth it where a chunk's kernels are short: small frames, small networks, chunks of one latent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vae3d.errors import UserError
from vae3d.models.interface import VideoAutoencoder
from vae3d.transfer import map_tensors, tensors_of

WARM_UP = 3  # runs before the capture, in which torch.compile compiles and cuDNN chooses its algorithms
MAX_GRAPHS = 8  # per step, one for each shape; the oldest is dropped

Step = Callable[[Tensor, Any], tuple[Any, Any]]  # (chunk, cache) -> (result, cache)
Capture = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]  # run -> (its result's buffers, replay)


def graph_steps(model: VideoAutoencoder, capture: Capture | None = None) -> None:
    """Replay encode_chunk and decode_chunk of a model on a GPU as CUDA graphs, from a stream's second chunk on.

    After compile_steps, if both are wanted. The weights may change in place, but not move: do not call `to` afterwards.
    capture: by default capture_cuda.
    Raises UserError for a model that is not on a GPU, or that has no such steps.
    """
    if not model.cached_steps:
        raise UserError(f"a {type(model).__name__} has no cache from chunk to chunk, and so no CUDA graphs of a chunk")
    if capture is None:
        device = next(model.parameters()).device
        if device.type != "cuda":
            raise UserError(f"CUDA graphs need a GPU, and the model is on {device}")
        capture = partial(capture_cuda, device=device, pool=torch.cuda.graph_pool_handle())
    model.encode_chunk = GraphedStep(model.encode_chunk, capture)
    model.decode_chunk = GraphedStep(model.decode_chunk, capture)
    model.fixed_chunks = True


class GraphedStep:
    """A step of a stream, replayed as one graph for each shape of chunk and cache.

    Inputs are copied into the graph's own memory, and results out of it, so that caches stay valid however streams
    alternate. The first chunk (no cache), and calls that build a graph for gradients, run as they are.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self.step = step
        self.capture = capture
        self.graphs: dict[tuple, tuple[Any, Any, Callable[[], None]]] = {}  # inputs, outputs, replay

    def __call__(self, x: Tensor, cache: Any) -> tuple[Any, Any]:
        if cache is None or torch.is_grad_enabled():
            return self.step(x, cache)
        given = (x, cache if isinstance(cache, tuple) else tuple(cache))
        key = _key(given)
        if key not in self.graphs:
            if len(self.graphs) == MAX_GRAPHS:
                self.graphs.pop(next(iter(self.graphs)))
            with torch.inference_mode(False), torch.no_grad():  # else they could only be written in inference mode
                inputs = map_tensors(Tensor.clone, given)
            self.graphs[key] = (inputs, *self.capture(lambda: self.step(*inputs)))
        inputs, outputs, replay = self.graphs[key]
        for buffer, tensor in zip(tensors_of(inputs), tensors_of(given), strict=True):
            buffer.copy_(tensor)
        if isinstance(cache, list):  # as the step does: memory holds one cache
            cache[:] = [None] * len(cache)
        del given
        replay()
        result, new_cache = map_tensors(Tensor.clone, outputs)
        return result, new_cache


def capture_cuda(run: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Callable[[], None]]:
    """Record what `run` launches on the GPU: (the tensors that it fills, replay). pool: memory that graphs share."""
    with torch.cuda.device(device):
        outputs, graph = _capture(run, pool)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return outputs, replay


def _capture(run: Callable[[], Any], pool: Any) -> tuple[Any, torch.cuda.CUDAGraph]:
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cast weight in it would be freed after this, and the graph read it
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # others may load data meanwhile
            outputs = run()
    finally:
        torch.set_autocast_cache_enabled(cached)
    return outputs, graph


def rerun(run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """A Capture for machines without a GPU, to test what surrounds it: replay runs again, into the same tensors."""
    outputs = run()

    def replay() -> None:
        results = run()
        with torch.inference_mode():  # where outputs of both kinds of no-gradient modes can be written
            for buffer, tensor in zip(tensors_of(outputs), tensors_of(results), strict=True):
                buffer.copy_(tensor)

    return outputs, replay


def _key(inputs: tuple[Tensor, Any]) -> tuple:
    """What a graph depends on: shapes and dtypes of its inputs, and autocast."""
    device = inputs[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return autocast, tuple((tuple(t.shape), t.dtype) for t in tensors_of(inputs))
