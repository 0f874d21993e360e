"""Profiling of a few training steps with torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule


@contextmanager
def profiled(folder: Path, steps: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step. One step is skipped, one warms up, then `steps` are recorded.

    Writes profile.json (for chrome://tracing or Perfetto) and profile.txt (operators by time) to `folder`.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    sort = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"

    def write(recorded: profile) -> None:
        recorded.export_chrome_trace(str(folder / "profile.json"))
        table = recorded.key_averages().table(sort_by=sort, row_limit=30, max_name_column_width=60)
        (folder / "profile.txt").write_text(table + "\n")

    with profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
    ) as recorder:
        yield recorder.step
