from __future__ import annotations

import pytest
import torch

from vae3d.metrics import MetricError
from vae3d.metrics.depth import abs_rel, delta1

REF = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
REC = torch.tensor([[1.1, 1.0], [4.0, 9.0]])
VALID = torch.tensor([[True, True], [True, False]])


def test_abs_rel_by_hand():
    assert abs_rel(REF, REC, VALID).item() == pytest.approx((0.1 + 0.5 + 0.0) / 3, abs=1e-7)


def test_delta1_by_hand():
    assert delta1(REF, REC, VALID).item() == pytest.approx(2 / 3)  # 1.1 and 1 are below 1.25, 2 / 1 is not


def test_a_ratio_of_exactly_a_quarter_is_too_much_either_way():
    ones, valid = torch.ones(2), torch.ones(2, dtype=torch.bool)
    assert delta1(ones, torch.tensor([1.25, 0.8125]), valid).item() == 0.5  # 0.8125 is within: its ratio is 1.23
    assert delta1(torch.tensor([1.25, 1.25]), ones, valid).item() == 0.0


def test_nothing_to_compare_and_other_shapes_are_refused():
    with pytest.raises(MetricError, match=r"no pixel .* is valid"):
        abs_rel(REF, REC, torch.zeros_like(VALID))
    with pytest.raises(MetricError, match=r"different shapes: \(2, 2\), \(2,\), \(2, 2\)"):
        delta1(REF, REC[0], VALID)
