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

    @property
    def names(self) -> list[str]:
        return sorted(self._values)

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._values[name].append(value.detach().float())

    def losses(self) -> dict[str, Tensor]:
        """StatusTable.LOSSES: `loss` is a mean over micro-batches, the others are maxima; NaN if one is NaN."""
        losses = {}
        if "loss" in self._values:
            values = torch.stack(self._values["loss"])
            losses = {"loss": values.mean(), "largest": values.max()}
        if "loss_discriminator" in self._values:
            losses["largest_discriminator"] = torch.stack(self._values["loss_discriminator"]).max()
        return losses

    def means(self) -> dict[str, float]:
        """Of this rank."""
        return {name: float(torch.stack(values).mean()) for name, values in self._values.items()}

    def reduce(self, **equal: Tensor) -> dict[str, float]:
        """Means over micro-batches and ranks, in one all-reduce and one transfer. All ranks need the same names.

        equal: further scalars, which are equal on all ranks.
        """
        means = torch.stack([torch.stack(self._values[name]).mean() for name in self.names])
        distributed.all_reduce_mean([means])
        packed = torch.cat([means, *(value.reshape(1).to(means.device) for value in equal.values())])
        values = dict(zip([*self.names, *equal], packed.tolist(), strict=True))
        return {name: values[name] for name in [*self._values, *equal]}


class MeanMeter:
    """Between two log lines: means of the metrics of applied steps, and `skipped`, the number of the other steps."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, metrics: Mapping[str, float], *, applied: bool) -> None:
        self._values["skipped"].append(float(not applied))
        for name, value in metrics.items() if applied else ():
            self._values[name].append(value)

    def flush(self) -> dict[str, float]:
        skipped = sum(self._values.pop("skipped", []))
        means = {name: sum(values) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return {**means, "skipped": skipped}

    def state_dict(self) -> dict[str, list[float]]:
        return dict(self._values)

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        check_value(state, Mapping[str, Annotated[Sequence[Real], Size(1, 10**6)]], "meter")
        self._values = defaultdict(list, {name: list(values) for name, values in state.items()})
