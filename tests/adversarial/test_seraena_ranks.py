"""Two ranks with clips of their own train one discriminator."""

from __future__ import annotations

import torch

from tests import tiny
from tests.adversarial import toy


def test_two_ranks_go_on_with_equal_discriminators_and_buffers_of_their_own(tmp_path):
    tiny.two_ranks("tests.adversarial.seraena_ranks", tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["losses"] != second["losses"]
    assert toy.same(first["before"], second["before"])
    assert toy.same(first["state"], second["state"])
    assert first["state"]["skipped"] == 1
    moved = {name for name, t in first["before"].items() if not torch.equal(t, first["state"]["discriminator"][name])}
    assert moved == first["before"].keys()
    assert len(first["own"]["images"]) == len(second["own"]["images"]) == 10
    assert not torch.equal(first["own"]["images"][0], second["own"]["images"][0])
