"""What every model of conf/model does in the same way."""

from __future__ import annotations

import pytest
import torch

from tests import tiny


@pytest.mark.parametrize("name", tiny.MODEL)
def test_a_number_of_frames_that_does_not_fit_the_latents_is_refused(name):
    model = tiny.model(name)
    z = torch.zeros(1, model.spec.channels, 1, 2, 2)
    for frames in (-1, 0, 40):
        with pytest.raises(ValueError, match=f"num_frames is {frames}, which does not fit 1 latent frame"):
            model.decode(z, frames)
