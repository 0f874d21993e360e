"""Scores on disk: each process appends a line per finished video, so that a killed evaluation resumes, with any number
of processes."""

from __future__ import annotations

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
from vae3d.hashing import json_hash
from vae3d.io import FileError, atomic_write, naming
from vae3d.metrics import Metric, MetricSet, Score, VideoResult
from vae3d.metrics.distribution import Features
from vae3d.pretrained import weights


@dataclass
class VideoScore:
    """Scores of one video. features: metric -> file."""

    name: str
    info: PairInfo
    scores: dict[str, Score]
    counts: dict[str, int]
    features: dict[str, Path]


def pair_key(pair: Pair, protocol: Protocol) -> str:
    """A hash that changes when one of the files or the protocol changes."""
    files = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in (pair.ref, pair.rec)]
    return json_hash([files, pair.start, asdict(protocol)])


def metric_key(metric: Metric, files: Sequence[Path]) -> str:
    """A hash that changes when the metric's settings, its weights or this package change."""
    return json_hash([metric.name, metric.settings(), [weights.sha256(file) for file in files], __version__])


class Store:
    """The folder of an evaluation. Each rank appends to its own file, and reads all files."""

    def __init__(self, folder: Path, rank: int, metrics: MetricSet) -> None:
        self.folder, self.file = folder, folder / f"rank{rank}.jsonl"
        self.metrics = metrics
        self.keys = {metric.name: metric_key(metric, metrics.files.get(metric.name, ())) for metric in metrics}
        (folder / "features").mkdir(parents=True, exist_ok=True)
        if self.file.is_file() and not self.file.read_bytes().endswith(b"\n"):  # killed while writing a line
            with self.file.open("a") as stream:
                stream.write("\n")
        self.pairs: dict[str, dict[str, Any]] = {}

    def read(self) -> None:
        """Read what all ranks have written: scores and warnings of each pair, without metrics that changed since."""
        self.pairs = {}
        for file in sorted(self.folder.glob("rank*.jsonl")):
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # a process was killed while writing; score the video again
                    continue
                try:
                    pair = self.pairs.setdefault(record["pair"], {"metrics": {}, "warnings": []})
                    pair["metrics"] |= {n: m for n, m in record["metrics"].items() if self._is_current(n, m)}
                    pair["warnings"] += [w for w in record["warnings"] if w not in pair["warnings"]]
                except (KeyError, TypeError, AttributeError) as error:
                    raise FileError(f"{file}: is damaged ({error!r}); --fresh scores all pairs again") from None

    def _is_current(self, metric: str, found: dict[str, Any]) -> bool:
        """Whether the metric has not changed since, and its features exist."""
        if found["key"] != self.keys.get(metric):
            return False
        return "features" not in found or (self.folder / "features" / found["features"]).is_file()

    def missing(self, key: str) -> list[Metric]:
        """Metrics without a score of this pair when the store was last read."""
        done = self.pairs[key]["metrics"] if key in self.pairs else ()
        return [metric for metric in self.metrics if metric.name not in done]

    def append(self, key: str, name: str, result: VideoResult, metrics: Sequence[Metric], warnings: list[str]) -> None:
        """Append the scores of a finished pair, fsynced."""
        record = {"name": name, "pair": key, "warnings": warnings, "metrics": {}}
        for metric in metrics:
            entry = {
                "key": self.keys[metric.name],
                "scores": {
                    column: asdict(result.scores[column]) for column in metric.columns if column in result.scores
                },
                "counts": {k: v for k, v in result.counts.items() if k in metric.count_columns},
            }
            if metric.name in result.features:
                entry["features"] = f"{metric.name}-{key}-{self.keys[metric.name]}.npz"
                write_features(self.folder / "features" / entry["features"], result.features[metric.name])
            record["metrics"][metric.name] = entry
        with naming(self.file), self.file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def score(self, name: str, key: str, info: PairInfo) -> VideoScore:
        """The scores of a finished pair; adds its warnings to `info`."""
        scores, counts, features = {}, {}, {}
        for metric in self.metrics:
            found = self.pairs[key]["metrics"][metric.name]
            scores |= {column: Score(**score) for column, score in found["scores"].items()}
            counts |= found["counts"]
            if "features" in found:
                features[metric.name] = self.folder / "features" / found["features"]
        info.warnings += [w for w in self.pairs[key]["warnings"] if w not in info.warnings]
        return VideoScore(name, info, scores, counts, features)


def write_features(file: Path, features: tuple[Features, Features]) -> None:
    """Write the features of an original and a reconstruction, atomically. Raises FileError."""
    both = zip(("ref", "rec"), features, strict=True)
    with naming(file), atomic_write(file) as stream:
        np.savez(stream, **{f"{which}_{k}": v for which, f in both for k, v in f.arrays().items()})


def read_features(file: Path) -> tuple[Features, Features]:
    """Inverse of write_features. Raises FileError if the file is damaged or not there."""
    try:
        with np.load(file) as arrays:
            ref, rec = (
                Features.from_arrays({k: arrays[f"{which}_{k}"] for k in ("rows", "count", "mean", "scatter")})
                for which in ("ref", "rec")
            )
    except FileNotFoundError as error:
        raise FileError(f"{file}: no such file; all ranks must see the same folder") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise FileError(f"{file}: is damaged ({error}); delete it, and run the same command again") from error
    return ref, rec
