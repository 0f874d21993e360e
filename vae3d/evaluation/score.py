"""Score pairs: each is decoded once for all metrics, a few frames at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from vae3d.data.media import MediaError
from vae3d.evaluation.pairs import Pair, PairError, PairInfo, PairReader, Protocol, first_lines, inspect
from vae3d.evaluation.store import Store, VideoScore, pair_key
from vae3d.metrics import MetricError, MetricSet, VideoResult

SUSPICIOUS_PSNR = 10.0  # dB; below it the videos are probably not a pair
MISALIGN_RATIO = 0.8  # if a shift by one frame reduces the error below this fraction, the videos are misaligned
SCORE_ERRORS = (PairError, MediaError, MetricError)


@dataclass
class ScoringJob:
    """A pair that can be scored. key: see store.pair_key."""

    pair: Pair
    protocol: Protocol
    info: PairInfo
    key: str


def plan(
    pairs: Sequence[Pair], protocol: Protocol, metrics: MetricSet, on_error: str = "stop"
) -> tuple[list[ScoringJob], list[str]]:
    """Check the headers of all pairs: jobs for those that can be scored, and errors of the others.

    Raises PairError with all errors, unless on_error is `skip` and at least one pair can be scored.
    """

    def check(pair: Pair) -> ScoringJob | str:
        try:
            info = inspect(pair, protocol)
            if reasons := metrics.reasons(info.frames, info.height, info.width, 4 if info.alpha else 3):
                return f"{pair.name}: {'; '.join(reasons.values())}"
            return ScoringJob(pair, protocol, info, pair_key(pair, protocol))
        except (PairError, MediaError) as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(check, pairs))
    errors = [item for item in found if isinstance(item, str)]
    jobs = [item for item in found if not isinstance(item, str)]
    if errors and (on_error == "stop" or not jobs):
        listed = "\n  ".join(first_lines(errors, 20))
        skip = "\n  --on_error skip scores the others" if jobs else ""
        raise PairError(f"{len(errors)} of {len(pairs)} pairs cannot be scored:\n  {listed}{skip}")
    return jobs, errors


def score_jobs(jobs: Iterable[ScoringJob], store: Store, device: torch.device, on_error: str) -> list[str]:
    """Score the pairs by the metrics that the store does not have yet. Returns errors, if on_error is `skip`.

    Raises PairError, MediaError or MetricError, which name the pair.
    """
    errors = []
    for job in jobs:
        metrics = MetricSet(store.missing(job.key))
        try:
            result, warnings = score_pair(job.pair, metrics, job.protocol, device)
            store.append(job.key, job.pair.name, result, metrics.metrics, warnings)
        except SCORE_ERRORS as error:
            if on_error == "stop":
                error.on_every_rank = False
                raise
            errors.append(str(error))
    return errors


@torch.inference_mode()
def score_pair(
    pair: Pair, metrics: MetricSet, protocol: Protocol, device: torch.device | str = "cpu"
) -> tuple[VideoResult, list[str]]:
    """Scores of one pair, and warnings. Raises MediaError, and MetricError, which names the pair."""
    alignment = Alignment()
    try:
        with PairReader(pair, protocol, device) as reader:
            result = metrics.score(alignment.watch(reader.chunks()))
    except MetricError as error:
        raise MetricError(f"{pair.name}: {error}") from None
    psnr = result.scores["psnr"].frames if "psnr" in result.scores else []
    warnings = alignment.warnings()
    if sum(value < SUSPICIOUS_PSNR for value in psnr) > len(psnr) / 2:
        warnings.append(f"PSNR is below {SUSPICIOUS_PSNR:g} dB on most frames; are the videos a pair?")
    return result, [f"{pair.name}: {warning}" for warning in warnings]


class Alignment:
    """Detects a reconstruction that fits the original better one frame earlier or later, on every fourth pixel."""

    def __init__(self) -> None:
        self.errors = {"early": [0.0, 0.0], "late": [0.0, 0.0]}  # summed error with the shift, and without it
        self.last: tuple[Tensor, Tensor] | None = None

    def watch(self, chunks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the chunks, and see each once it was used."""
        for ref, rec in chunks:
            yield ref, rec
            self.update(ref, rec)

    def update(self, ref: Tensor, rec: Tensor) -> None:
        ref, rec = ref[..., ::4, ::4], rec[..., ::4, ::4]
        if self.last is not None:
            ref, rec = torch.cat([self.last[0], ref]), torch.cat([self.last[1], rec])
        self.last = ref[-1:], rec[-1:]
        aligned = _errors(ref, rec)
        early, late = _errors(ref[1:], rec[:-1]), _errors(ref[:-1], rec[1:])
        for shift, error, same in (("early", early, aligned[:-1]), ("late", late, aligned[1:])):
            self.errors[shift][0] += float(error.sum())
            self.errors[shift][1] += float(same.sum())

    def warnings(self) -> list[str]:
        return [
            f"the reconstruction fits the original better one frame {shift}; check alignment and pairing"
            for shift, (shifted, aligned) in self.errors.items()
            if shifted < MISALIGN_RATIO * aligned
        ]


def _errors(ref: Tensor, rec: Tensor) -> Tensor:
    """Mean square error of each frame."""
    return (ref - rec).square().mean((1, 2, 3)).double()


def collect(jobs: Sequence[ScoringJob], store: Store) -> list[VideoScore]:
    """All finished pairs of all ranks, sorted by name."""
    store.read()
    done = [job for job in jobs if not store.missing(job.key)]
    return [store.score(job.pair.name, job.key, job.info) for job in sorted(done, key=lambda job: job.pair.name)]
