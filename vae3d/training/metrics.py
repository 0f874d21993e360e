"""Metrics of training steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Annotated

import torch
from torch import Tensor

from vae3d import distributed
from vae3d.arguments import Size, check_value


class StepMetrics:
    """Values of one step, kept on the device. A name that only some micro-batches have is averaged over those."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach().float())

    def mean(self, name: str) -> float:
        """Mean over micro-batches; 0 if there is none."""
        values = self._values.get(name)
        return float(torch.stack(values).mean()) if values else 0.0

    def worst(self, name: str) -> float:
        """Largest value of any micro-batch, NaN if one is NaN; 0 if there is none."""
        values = self._values.get(name)
        return float(torch.stack(values).max()) if values else 0.0

    def means(self) -> dict[str, float]:
        return {name: self.mean(name) for name in self._values}

    def reduce(self) -> dict[str, float]:
        """Means over micro-batches and ranks, in one all-reduce and one transfer. All ranks need the same names."""
        packed = torch.stack([torch.stack(values).mean() for values in self._values.values()])
        distributed.all_reduce_mean([packed])
        return dict(zip(self._values, packed.tolist(), strict=True))


class MeanMeter:
    """Means of step metrics between two log lines."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._values[name].append(value)

    def flush(self) -> dict[str, float]:
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        check_value(state, Mapping[str, Annotated[Sequence[Real], Size(1, 10**6)]], "meter")
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})
