"""infer.py with a network whose latents see frames after those that they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import tiny
from tests.inference.test_infer import read, run
from tests.inference.test_wan_infer import reconstructed, whole, write
from vae3d.checkpoints.formats import CheckpointError
from vae3d.data.decoding.readers import open_media
from vae3d.data.media import MediaError, Reader


@pytest.mark.parametrize("variant", ["taew2_1", "taecvx"])
def test_pieces_give_what_the_whole_video_gives(videos, tmp_path, monkeypatch, variant):
    """Whatever memory is allowed, with the original in step and no frame read twice."""
    export = write("taehv", tmp_path / "export", f"model.variant={variant}")
    source = videos.parent / "clip3.mp4"  # 15 frames
    expected = whole(export, source)
    kind, asked = type(open_media(source)), []
    original: Reader.read = kind.read
    monkeypatch.setattr(
        kind, "read", lambda self, indices, size: asked.extend(indices) or original(self, indices, size)
    )
    for memory in (1e-6, 2e-3, 1):
        asked.clear()
        run(export, source, tmp_path / str(memory), f"memory_gib={memory}")
        assert asked == list(range(15))
        monkeypatch.undo()
        assert np.array_equal(reconstructed(tmp_path / str(memory)), expected)
        ori = next(tmp_path.glob(f"{memory}_ori/*_clip3.mp4"))
        assert np.array_equal(read(ori), read(source))
        monkeypatch.setattr(
            kind, "read", lambda self, indices, size: asked.extend(indices) or original(self, indices, size)
        )


def test_a_published_file_is_told_its_variant_on_the_command_line(videos, tmp_path):
    source = videos.parent / "clip3.mp4"
    model = tiny.model("taehv")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"model\.variant=taehv"):
        run(tmp_path / "weights.pth", source, tmp_path / "a")
    run(tmp_path / "weights.pth", source, tmp_path / "b", "model.variant=taew2_1")
    assert np.array_equal(reconstructed(tmp_path / "b"), whole(tmp_path / "weights.pth", source, variant="taew2_1"))


def test_a_decoder_without_its_upscaling_is_refused(videos, tmp_path):
    export = write("taehv", tmp_path / "export")
    with pytest.raises(MediaError, match=r"leave decoder_.*_upscale out"):
        run(export, videos.parent / "clip3.mp4", tmp_path / "a", "+model.decoder_time_upscale=[false,false]")
