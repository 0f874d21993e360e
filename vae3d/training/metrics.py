"""Numbers of a training step, kept on the device until they are needed."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from vae3d import distributed


class StepMetrics:
    """Means over micro-batches; a name that appears in fewer of them is averaged over those."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach().float())

    def mean(self, name: str) -> float:
        """Mean over micro-batches, 0 if none has the value."""
        values = self._values.get(name)
        return float(torch.stack(values).mean()) if values else 0.0

    def worst(self, name: str) -> float:
        """The largest value of any micro-batch, NaN if one is; 0 if there is none."""
        values = self._values.get(name)
        if not values:
            return 0.0
        return float(torch.stack(values).max())

    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self._values}

    def pack(self) -> tuple[list[str], Tensor]:
        """Names and one tensor of means, so that one all-reduce and one transfer serve them all."""
        means = {name: torch.stack(values).mean() for name, values in self._values.items()}
        return list(means), torch.stack(list(means.values()))

    def averaged(self) -> dict[str, float]:
        """Means over all ranks, which must have the same names, in one all-reduce and one transfer."""
        names, packed = self.pack()
        distributed.all_reduce_mean([packed])
        return dict(zip(names, packed.tolist(), strict=True))


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
