from __future__ import annotations

import pytest
import torch

from vae3d.checkpoints import state
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.state import ResumeError, refuse_other_run

OLD = {"data": {"frames": {"min": 5}, "flip": False}}  # before there were fit, panorama and depth


def new(fit: bool = False, mapping: str | None = None) -> dict:
    return {"data": {"frames": {"min": 5, "fit": fit}, "flip": False, "panorama": False, "depth": {"mapping": mapping}}}


def saved(root, step, config):
    folder = state.unfinished(root, step)
    state.begin(folder)
    state.write(folder, {}, config)
    return state.finish(folder, root, step, config, {})


def test_a_flipped_bit_of_a_training_state_is_found_when_it_is_loaded(tmp_path):
    """torch.load does not compare the CRCs that torch.save writes."""
    folder = state.unfinished(tmp_path, 3)
    state.begin(folder)
    content = {"step": 3, "model": {"w": torch.zeros(5000)}, "optimizer": {}}
    state.write(folder, content, {})
    state.write_rank(folder, 0, {"w": torch.ones(5000)})
    folder = state.finish(folder, tmp_path, 3, {}, {})
    assert state.load_state(folder)["step"] == 3
    assert len(state.load_rank(folder, 0)["w"]) == 5000
    for name, load in (("state.pt", state.load_state), ("rank-0.pt", lambda path: state.load_rank(path, 0))):
        whole = (folder / name).read_bytes()
        value = bytearray(whole)
        value[len(whole) // 2] ^= 1  # of a weight
        for damaged in (bytes(value), whole[:-30], whole[: len(whole) // 2], b"", b"PK"):
            (folder / name).write_bytes(damaged)
            with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*; delete .*step-0000003 to resume"):
                load(folder)
        (folder / name).write_bytes(whole)
        load(folder)


def test_an_older_checkpoint_resumes_where_new_settings_are_off(tmp_path):
    folder = saved(tmp_path, 3, OLD)
    assert refuse_other_run(folder, new()) == {"data.frames.fit": (None, False), "data.panorama": (None, False)}


@pytest.mark.parametrize(
    ("changed", "key"), [({"fit": True}, "data.frames.fit"), ({"mapping": "log"}, "depth.mapping")]
)
def test_an_older_checkpoint_is_another_run_where_they_are_on(tmp_path, changed, key):
    folder = saved(tmp_path, 3, OLD)
    with pytest.raises(ResumeError, match=key):
        refuse_other_run(folder, new(**changed))
