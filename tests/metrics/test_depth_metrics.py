from __future__ import annotations

import pytest
import torch

from vae3d.metrics import MetricError
from vae3d.metrics.depth import depth_errors

REF = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
REC = torch.tensor([[1.1, 1.0], [4.0, 9.0]])
VALID = torch.tensor([[True, True], [True, False]])


def test_abs_rel_by_hand():
    assert depth_errors(REF, REC, VALID)["abs_rel"] == pytest.approx((0.1 + 0.5 + 0.0) / 3, abs=1e-7)


def test_delta1_by_hand():
    assert depth_errors(REF, REC, VALID)["delta1"] == pytest.approx(2 / 3)  # 1.1 and 1 are below 1.25, 2 / 1 is not


def test_a_ratio_of_exactly_a_quarter_is_too_much_either_way():
    ones, valid = torch.ones(2), torch.ones(2, dtype=torch.bool)
    near = torch.tensor([1.25, 0.8125])  # 0.8125 is within: its ratio is 1.23
    assert depth_errors(ones, near, valid)["delta1"] == 0.5
    assert depth_errors(torch.tensor([1.25, 1.25]), ones, valid)["delta1"] == 0.0


def test_nothing_to_compare_and_other_shapes_are_refused():
    with pytest.raises(MetricError, match=r"no pixel .* is valid"):
        depth_errors(REF, REC, torch.zeros_like(VALID))
    with pytest.raises(MetricError, match=r"different shapes: \(2, 2\), \(2,\), \(2, 2\)"):
        depth_errors(REF, REC[0], VALID)
