from __future__ import annotations

import pytest

from vae3d.checkpoints import state
from vae3d.checkpoints.state import ResumeError, refuse_other_run

OLD = {"data": {"frames": {"min": 5}, "flip": False}}  # before there were fit, panorama and depth


def new(fit: bool = False, mapping: str | None = None) -> dict:
    return {"data": {"frames": {"min": 5, "fit": fit}, "flip": False, "panorama": False, "depth": {"mapping": mapping}}}


def saved(root, step, config):
    folder = state.unfinished(root, step)
    state.begin(folder)
    state.write(folder, {}, config)
    state.seal(folder, step, config, {})
    return state.finish(folder, root, step)


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
