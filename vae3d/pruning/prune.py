"""Structured pruning: fill a smaller autoencoder with the channels and blocks of a larger one that matter most.

    prune(teacher, student, video)

The student is any model built from its configuration; its shapes say how many channels and blocks each layer keeps.
Which channels belong together (a residual stream, the halves of a concatenation, the frames of a TGrow) is found by
tracing: two layers share a channel if the input of one depends on the output of the other with no layer between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from vae3d.models.interface import VideoAutoencoder, latent_space
from vae3d.precision import no_tf32
from vae3d.pruning.choose import IMPORTANCE, choose_channels
from vae3d.pruning.layers import PruningError, owns
from vae3d.pruning.match import match_layers, rank_blocks
from vae3d.pruning.trace import channel_classes
from vae3d.pruning.write import copy_channels, refit_layers


@no_tf32()
def prune(
    source: VideoAutoencoder,
    student: VideoAutoencoder,
    video: Tensor,
    *,
    importance: str = "activation",
    refit: bool = True,
    seed: int = 0,
) -> list[str]:
    """Fill `student` with channels and blocks of `source`, in place. Returns lines that say what was kept.

    video: clips [B, 3, T, H, W] in [-1, 1] on which importance is measured, on the models' device.
    importance: of channels. weight: norm of the weights that read them. activation: their power times that of these
    weights. sensitivity: also times the effect of what they change on the video. redundancy: of this, what the other
    channels cannot replace. Channels that are zero, or twice there, go first. The weights that read a removed channel
    are added to those of the kept channels that predict it best, so this changes nothing.
    refit: then fit each layer, in the order in which they run, to the source's outputs by least squares.
    seed: of random numbers.
    Raises PruningError if the student is no smaller version of the source, or its layers cannot be traced.
    """
    if importance not in IMPORTANCE:
        raise PruningError(f"importance is {importance!r}; use one of {', '.join(IMPORTANCE)}")
    if (source.spec.channels, source.spec.time_stride, source.spec.space_stride) != (
        student.spec.channels, student.spec.time_stride, student.spec.space_stride
    ) or latent_space(source) != latent_space(student):  # fmt: skip
        raise PruningError("the model to prune and the smaller one must share their latents: channels, strides, scale")
    with ExitStack() as stack:
        for model in (source, student):
            stack.enter_context(_prepared(model))
        pairs, dropped = match_layers(source, student, lambda runs: rank_blocks(source, video, runs))
        changed = _changed_parts(source, student)
        layers = {
            name: layer
            for name, layer in source.named_modules()
            if owns(layer) and not any(layer.children()) and _within(name, changed)
        }
        classes = channel_classes(source, layers) if changed else []
        kept, statistics, lines = choose_channels(source, student, pairs, classes, video, importance, layers)
        copy_channels(source, student, pairs, kept, statistics)
        if refit and changed:
            refit_layers(source, student, pairs, kept, video, layers, seed)
    parameters = [sum(p.numel() for p in model.parameters()) for model in (source, student)]
    dropped_lines = [f"dropped {', '.join(dropped)}"] if dropped else []
    return [f"pruned from {parameters[0]:,} to {parameters[1]:,} parameters", *dropped_lines, *lines]


@contextmanager
def _prepared(model: VideoAutoencoder) -> Iterator[None]:
    """Eval mode, no gradients of parameters, whole clips at once and no checkpointing; restored afterwards."""
    mode, grads = model.training, [p.requires_grad for p in model.parameters()]
    changed = []
    for module in model.modules():
        for name, value in (
            ("frame_batch", None),
            ("gradient_checkpointing", False),
            ("chunk_latents", None),
            ("fitted_latents", None),
        ):
            if name in vars(module):
                changed.append((module, name, getattr(module, name)))
                setattr(module, name, value)
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        model.train(mode)
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            parameter.requires_grad_(grad)


def _changed_parts(source: VideoAutoencoder, student: VideoAutoencoder) -> set[str]:
    """Modules of the model's trainable parts (encoder, decoder, ...) with layers of other shapes or dropped blocks."""
    parts = {id(module) for modules in student.trainable_parts().values() for module in modules}
    changed = set()
    for name, module in student.named_modules():
        if id(module) in parts:
            shapes = [[tuple(p.shape) for p in part.parameters()] for part in (source.get_submodule(name), module)]
            if shapes[0] != shapes[1]:
                changed.add(name)
    return changed


def _within(name: str, parts: set[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)
