"""Numbers of a training step, kept on the device until they are needed."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class StepMetrics:
    """Means over micro-batches; a name that appears in fewer of them is averaged over those."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach().float())

    def worst(self, name: str) -> Tensor:
        """The largest value of any micro-batch, NaN if one is."""
        return torch.stack(self._values[name]).max()

    def pack(self, extra: dict[str, float], device: torch.device) -> tuple[list[str], Tensor]:
        """Names and one tensor of means, so that one all-reduce and one transfer serve them all."""
        means = {name: torch.stack(values).mean() for name, values in self._values.items()}
        means |= {name: torch.tensor(float(value), device=device) for name, value in extra.items()}
        return list(means), torch.stack(list(means.values()))


class Window:
    """Averages of the step metrics between two log lines."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._values = defaultdict(list, state)

    def flush(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means
