"""The numbers that a configuration amounts to, logged when a run starts."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vae3d.commands.training_data import clip_sizes
from vae3d.config.sources import sources_of
from vae3d.data.batches.bucket_streams import bucket_rows, pixels_kept
from vae3d.data.batches.clips import Stream
from vae3d.data.batches.streaming import StreamingData
from vae3d.data.loader import TrainingData
from vae3d.data.media import DataError
from vae3d.errors import escape
from vae3d.models.diffusers_vae import DiffusersVAE
from vae3d.report import text_table
from vae3d.text import epoch_text, plural
from vae3d.training.freeze import ALL

if TYPE_CHECKING:
    from vae3d.config.schema import Loss, LossTerm, TrainConfig

SHOWN_FILES = 4  # held-out files that are named
LATENTS = {"teacher": "the teacher's", "own": "its own", "mixed": "the teacher's or its own"}  # of teacher.decode


def summary(config: TrainConfig, model: nn.Module, ranks: int) -> list[str]:
    """Parts, parameters, latent shapes, losses and batches of a run. The model's parts must be frozen already."""
    data, trainer = config.data, config.trainer
    kind = f" ({model.kind})" if isinstance(model, DiffusersVAE) else ""
    lines = [f"{type(model).__name__}{kind}: {millions(model.parameters())} parameters"]
    parts = model.trainable_parts()
    for part, scale in config.stage.train.items():
        trained = millions(p for module in ({**parts, ALL: [model]})[part] for p in module.parameters())
        lines.append(f"  trains {part}: {trained}, learning rate x {scale:g}")
    for part, modules in parts.items():
        parameters = [p for module in modules for p in module.parameters()]
        if ALL in config.stage.train:
            lines.append(f"    {part}: {millions(parameters)}")
        elif not any(p.requires_grad for p in parameters):
            lines.append(f"  frozen {part}: {millions(parameters)}")
    sources = sources_of(data)
    sizes = [(name, size) for name, own in sources.items() for size in dict.fromkeys(ends(clip_sizes(own)))]
    for name, size in sizes:
        latent = "x".join(map(str, model.latent_shape(*size)))
        of = f"{name}: " if name else ""
        lines.append(f"  {of}{plural(size[0], 'frame')} of {size[1]}x{size[2]} -> latent {latent}")
    lines.append(loss_summary(config.loss))
    if config.teacher.path is not None:
        teacher = config.teacher
        decoded = LATENTS[teacher.decode]
        lines.append(f"teacher: {teacher.path} in {teacher.precision}; the model decodes {decoded} latents")
    steps = f"{plural(trainer.max_steps, 'step')} at learning rate {config.optim.lr:g}, {trainer.precision}"
    batches = []
    for name, own in sources.items():
        of = f"{name}: " if name else ""
        kind = (
            "" if own.buckets is None else f", of {own.frames.max} frames of {own.height}x{own.width}; see the buckets"
        )
        batches.append(f"{of}{batch_summary(own.batch_size, ranks, trainer.accumulate)}{kind}")
    if len(batches) == 1 and "" in sources:
        return [*lines, f"{batches[0]}; {steps}"]
    return [*lines, *batches, steps]


def loss_summary(loss: Loss) -> str:
    """Terms with their weights, and whether they are sums or means."""

    def written(name: str, term: LossTerm) -> str:
        differs = term.reduction not in (None, loss.reduction)
        return f"{term.weight:g} {name}{f' ({term.reduction})' if differs else ''}"

    terms = " + ".join(written(name, term) for name, term in loss.terms.items() if term.weight)
    reduced = {"sum": "summed over the elements of a frame (KL: of a clip)", "mean": "means over elements"}
    return f"loss: {terms}; {reduced[loss.reduction]}. Logged per element, with each term's share of the loss"


def never_reached(config: TrainConfig) -> list[str]:
    """Settings that would begin after the last step, such as a GAN of a run that was made shorter; for a warning."""
    starts = {"optim.warmup_steps": config.optim.warmup_steps}
    if not config.optim.schedule.startswith("constant"):
        starts["optim.decay_start"] = config.optim.decay_start or 0
    starts |= {f"loss.terms.{name}.ramp": term.ramp[0] for name, term in config.loss.terms.items() if term.weight}
    if isinstance(config.adversary, dict):
        starts["adversary.start"] = config.adversary.get("start") or 0
    last = config.trainer.max_steps
    return [
        f"{key}={step}: the run ends before, at trainer.max_steps={last}"
        for key, step in starts.items()
        if step >= last
    ]


def ends(values: Sequence[Any]) -> tuple[Any, Any]:
    return values[0], values[-1]


def batch_summary(batch_size: int, world_size: int, accumulate: int) -> str:
    share = batch_size // (world_size * accumulate)
    shares = plural(world_size, "rank"), plural(accumulate, "micro-batch"), plural(share, "clip")
    return f"batch of {plural(batch_size, 'clip')} = {' x '.join(shares)}"


def data_summary(config: TrainConfig, data: TrainingData | StreamingData) -> list[str]:
    """Training files, epochs and buckets of each source, and the files that are skipped."""
    if isinstance(data, StreamingData):
        return [f"  {line}" for line in [*held_out_lines(data), *data.notes]]
    by_source: dict[str, list[tuple[Stream, float]]] = {}
    for stream, share in zip(data.streams, data.schedule.shares(), strict=True):
        by_source.setdefault(stream.source, []).append((stream, share))
    lines = [line for streams in by_source.values() for line in _files_and_buckets(config, streams)]
    lines += [f"  {line}" for line in [*held_out_lines(data), *data.notes]]
    return [*lines, *(line for stream in data.streams if stream.bucket is None for line in _too_short(stream))]


def _files_and_buckets(config: TrainConfig, streams: Sequence[tuple[Stream, float]]) -> list[str]:
    """Of a source. streams: with their shares of all steps."""
    steps, first = config.trainer.max_steps, streams[0][0]
    own = sources_of(config.data)[first.source]
    clips = sum(steps * share * stream.schedule.batch_size for stream, share in streams)
    rows = [stream.schedule.rows for stream, _ in streams]
    files = len(first.schedule.lengths) if first.bucket is None else len(np.unique(np.concatenate(rows)))
    used = files if first.bucket is not None else len(first.schedule.with_at_least(first.schedule.frames.all()[0]))
    epochs = clips / (used * own.clips_per_file)
    line = f"{plural(used, 'training file')}, {epoch_text(epochs)}"
    if first.source:
        line = f"{first.source}: {line}, {100 * sum(share for _, share in streams):.3g} % of the steps"
    if first.bucket is None:
        return [line]
    kept, kept_in_one = pixels_kept(*zip(*streams, strict=True), (own.height, own.width))
    table = text_table(*bucket_rows(*zip(*streams, strict=True)))
    return [
        f"{line}, in {plural(len(streams), 'bucket')}",
        *(f"  {row}" for row in table.splitlines()),
        f"  pixels kept: {100 * kept:.1f} %; {100 * kept_in_one:.1f} % if all clips were {own.height}x{own.width}",
    ]


def _too_short(stream: Stream) -> list[str]:
    """Files that are not used, or in some steps only."""
    lengths, counts = stream.schedule.lengths, stream.schedule.frames.all()
    of, lines = f"{stream.source}: " if stream.source else "", []
    unused = len(lengths) - len(stream.schedule.with_at_least(counts[0]))
    if unused:
        lines.append(f"  {of}skipped: {plural(unused, 'file')} with fewer than {plural(counts[0], 'frame')}")
    short = len(lengths) - len(stream.schedule.with_at_least(counts[-1])) - unused
    if short:
        fewer = f"{plural(short, 'file')} with fewer than {plural(counts[-1], 'frame')}"
        lines.append(f"  {of}used in shorter steps only: {fewer}")
    return lines


def held_out_lines(data: TrainingData | StreamingData) -> list[str]:
    held_out = [path for clip in data.held_out for path in clip.paths]
    lines = []
    if held_out:
        names = ", ".join(map(escape, held_out[:SHOWN_FILES])) + (", ..." if len(held_out) > SHOWN_FILES else "")
        lines.append(f"held out on this rank: {names}")
    if data.errors:
        lines.append(f"skipped: {plural(len(data.errors), 'file')} that cannot be read")
    return lines


def first_batch(batches: Iterator[Any], lengths: np.ndarray) -> list[str]:
    """Reads the first batch. Lines: how many frames there are, and how long the batch took.

    lengths: frames that each training file can give; of a stream none. Raises DataError if no file of the batch can
    be read.
    """
    start = time.perf_counter()
    batch = next(batches)
    seconds = time.perf_counter() - start
    pixels = getattr(batch, "video", getattr(batch, "values", None))
    is_video = lengths.max(initial=0) > 1
    lines = [f"  {plural(lengths.sum(), 'frame')}, {lengths.mean():.1f} per file"] if is_video else []
    if pixels is None:
        reasons = "\n".join(f"  {path}: {reason}" for path, reason in batch.errors)
        raise DataError(f"no file of the first batch can be read:\n{reasons}")
    shape = "x".join(map(str, pixels.shape))
    return [*lines, f"  the first batch, {shape}, took {seconds:.2f} s to read, with the start of the workers"]


def millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{sum(p.numel() for p in parameters) / 1e6:.2f} M"
