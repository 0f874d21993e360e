"""What several files of tests here reconstruct with."""

from __future__ import annotations

import pytest

from tests import tiny
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.loading import model_config


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    config = model_config("temporal_vae", *tiny.MODEL["temporal_vae"])
    write_export(Checkpoint(config, tiny.model("temporal_vae").state_dict(), folder, ""), folder)
    return folder
