"""Scores on disk: every process appends a line per finished video, so that a killed run loses no finished one and may
go on with another number of processes."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vae3d import __version__
from vae3d.evaluation.pairs import Pair, PairInfo, Protocol
from vae3d.io import FileError, atomic_write, naming
from vae3d.metrics import Metric, MetricSet, Score, VideoResult
from vae3d.metrics.distribution import Features
from vae3d.pretrained import weights


@dataclass
class VideoScore:
    """One video of a report. features: metric -> file."""

    name: str
    info: PairInfo
    scores: dict[str, Score]
    counts: dict[str, int]
    features: dict[str, Path]


def pair_key(pair: Pair, protocol: Protocol) -> str:
    """Changes when one of the files or what is compared of them changes."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in (pair.ref, pair.rec)]
    return _hash([files, pair.start, asdict(protocol)])


def metric_key(metric: Metric, files: Sequence[Path]) -> str:
    """Changes when the metric's formula or its weights change."""
    return _hash([metric.name, metric.settings(), [weights.sha256(file) for file in files], __version__])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Store:
    """The folder of an evaluation. Process `rank` appends to its own file and reads all of them."""

    def __init__(self, folder: Path, rank: int, metrics: MetricSet) -> None:
        self.folder, self.file = folder, folder / f"rank{rank}.jsonl"
        self.metrics = metrics
        self.keys = {metric.name: metric_key(metric, metrics.files.get(metric.name, ())) for metric in metrics}
        (folder / "features").mkdir(parents=True, exist_ok=True)
        if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):  # killed while it wrote a line
            with self.file.open("a") as stream:
                stream.write("\n")

    def read(self) -> dict[str, dict[str, Any]]:
        """Pair key -> what is known of it: its last line's facts, and the scores of every metric as now defined."""
        known: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("rank*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a process was killed while it wrote; the video is scored again
                    continue
                try:
                    entry = known.setdefault(record["pair"], {"metrics": {}, "warnings": []})
                    entry["metrics"] |= {n: m for n, m in record["metrics"].items() if self._is_current(n, m)}
                    entry["warnings"] += [w for w in record["warnings"] if w not in entry["warnings"]]
                except (KeyError, TypeError, AttributeError) as error:
                    raise FileError(f"{file}: is damaged ({error!r}); --fresh scores all pairs again") from None
        return known

    def _is_current(self, metric: str, found: dict[str, Any]) -> bool:
        """Whether scores are of the metric as it is now defined, and its features are there."""
        if found["key"] != self.keys.get(metric):
            return False
        return "features" not in found or (self.folder / "features" / found["features"]).is_file()

    def missing(self, key: str, known: dict[str, dict[str, Any]]) -> list[Metric]:
        """Metrics that this pair has no score of."""
        done = known.get(key, {"metrics": {}})["metrics"]
        return [metric for metric in self.metrics if metric.name not in done]

    def append(self, key: str, name: str, result: VideoResult, metrics: Sequence[Metric], notes: list[str]) -> None:
        record = {"name": name, "pair": key, "warnings": notes, "metrics": {}}
        for metric in metrics:
            entry: dict[str, Any] = {"key": self.keys[metric.name], "scores": {}, "counts": {}}
            for column in metric.columns:
                if column in result.scores:
                    entry["scores"][column] = asdict(result.scores[column])
            entry["counts"] = {k: v for k, v in result.counts.items() if k in metric.count_columns}
            if metric.name in result.features:
                entry["features"] = self._write_features(key, metric.name, result.features[metric.name])
            record["metrics"][metric.name] = entry
        with naming(self.file), self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _write_features(self, key: str, metric: str, features: tuple[Features, Features]) -> str:
        path = self.folder / "features" / f"{metric}-{key}-{self.keys[metric]}.npz"
        with naming(path):
            write_features(path, features)
        return path.name

    def score(self, name: str, key: str, info: PairInfo, known: dict[str, dict[str, Any]]) -> VideoScore:
        """What is known of a finished pair."""
        entry = known[key]
        scores, counts, features = {}, {}, {}
        for metric in self.metrics:
            found = entry["metrics"][metric.name]
            scores |= {column: Score(**score) for column, score in found["scores"].items()}
            counts |= found["counts"]
            if "features" in found:
                features[metric.name] = self.folder / "features" / found["features"]
        info.warnings += [w for w in entry["warnings"] if w not in info.warnings]
        return VideoScore(name, info, scores, counts, features)


def write_features(file: Path, features: tuple[Features, Features]) -> None:
    """Write the features of an original and a reconstruction, whole or not at all."""
    both = zip(("ref", "rec"), features, strict=True)
    with atomic_write(file) as stream:
        np.savez(stream, **{f"{which}_{k}": v for which, f in both for k, v in f.arrays().items()})


def read_features(file: Path) -> tuple[Features, Features]:
    """Inverse of write_features. Raises FileError if the file is damaged."""
    try:
        with np.load(file) as arrays:
            ref, rec = (
                Features.from_arrays({k: arrays[f"{which}_{k}"] for k in ("rows", "count", "mean", "scatter")})
                for which in ("ref", "rec")
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"{file}: is damaged ({error}); delete it, and the same command makes it again") from error
    return ref, rec
