from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable

import pytest
import torch

from vae3d import weight_files
from vae3d.checkpoints import state
from vae3d.checkpoints.formats import CheckpointError
from vae3d.checkpoints.location import find_weights
from vae3d.checkpoints.state import ResumeError, check_same_run

OLD = {"data": {"frames": {"min": 5}, "flip": False}}  # before there were fit, panorama and depth


def new(fit: bool = False, mapping: str | None = None) -> dict:
    return {"data": {"frames": {"min": 5, "fit": fit}, "flip": False, "panorama": False, "depth": {"mapping": mapping}}}


def saved(root, step, config):
    folder = state.unfinished(root, step)
    state.begin(folder)
    state.write(folder, {}, config)
    return state.commit(folder, root, step, config, {})


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    """As text, step-10000000 comes before step-9999000."""
    for step in (9_999_000, 10_000_000):
        saved(tmp_path / "checkpoints", step, OLD)
        export = tmp_path / f"exports/step-{step:07d}/model.safetensors"
        export.parent.mkdir(parents=True)
        export.touch()
    (tmp_path / "exports/step-old").mkdir()
    assert state.latest_state(tmp_path / "checkpoints").name == "step-10000000"
    assert state.superseded(tmp_path / "checkpoints", keep=1) == [9_999_000]
    assert find_weights(tmp_path) == export


def test_a_flipped_bit_of_a_training_state_is_found_when_it_is_loaded(tmp_path):
    folder = state.unfinished(tmp_path, 3)
    state.begin(folder)
    content = {"step": 3, "model": {"w": torch.zeros(5000)}, "optimizer": {}}
    state.write(folder, content, {})
    state.write_rank(folder, 0, {"w": torch.ones(5000)})
    folder = state.commit(folder, tmp_path, 3, {}, {})
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
    assert check_same_run(folder, new()) == {"data.frames.fit": (None, False), "data.panorama": (None, False)}


@pytest.mark.parametrize(
    ("changed", "key"), [({"fit": True}, "data.frames.fit"), ({"mapping": "log"}, "depth.mapping")]
)
def test_an_older_checkpoint_is_another_run_where_they_are_on(tmp_path, changed, key):
    folder = saved(tmp_path, 3, OLD)
    with pytest.raises(ResumeError, match=key):
        check_same_run(folder, new(**changed))


def test_a_run_resumes_with_settings_that_change_memory_only(tmp_path):
    """The advice for a run that does not fit. micro_frames changes results."""
    memory = {"gradient_checkpointing": False, "chunk_latents": None, "spatial": {"frame_batch": 4}}
    folder = saved(tmp_path, 3, {"model": {**memory, "micro_frames": 17}})
    less = {"gradient_checkpointing": True, "chunk_latents": 1, "spatial": {"frame_batch": 1}}
    changed = check_same_run(folder, {"model": {**less, "micro_frames": 17}})
    assert sorted(changed) == ["model.chunk_latents", "model.gradient_checkpointing", "model.spatial.frame_batch"]
    with pytest.raises(ResumeError, match=r"model\.micro_frames"):
        check_same_run(folder, {"model": {**memory, "micro_frames": 9}})


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"{", b'{"step": 3}', b'{"config": {}}', b'{"step": "3", "config": {}}',
        b'{"step": 3, "config": []}', b"\xff\xfe\x00", b"[" * 100_000, b'{"a": "' + b"x" * 2**21 + b'"}', None,
    ],
    ids=lambda content: repr(content)[:30],
)  # fmt: skip
@pytest.mark.parametrize("resume_from", [None, "step-0000001"])
def test_a_damaged_run_json_stops_a_resume_and_names_the_folder_to_delete(tmp_path, content, resume_from):
    """Neither the checkpoint before it nor the start is taken without a word."""
    for step in (1, 3):
        folder = saved(tmp_path, step, OLD)
    (folder / "run.json").unlink()
    (folder / "run.json").write_bytes(content) if content is not None else (folder / "run.json").mkdir()
    if content is None:  # no file at all: it was never complete
        assert state.latest_state(tmp_path).name == "step-0000001"
        return
    with pytest.raises(CheckpointError, match=f"run.json.*delete {folder}"):
        check_same_run(state.starting_state(tmp_path, resume_from), new())


@pytest.mark.parametrize("lazy", [False, True])
def test_a_damaged_training_state_is_named(tmp_path, lazy):
    folder = state.unfinished(tmp_path, 3)
    state.begin(folder)
    state.write(folder, {"step": 3, "model": {"a": torch.zeros(9)}, "optimizer": {}}, OLD)
    state.write_rank(folder, 0, {"a": torch.zeros(9)})
    folder = state.commit(folder, tmp_path, 3, OLD, {})
    whole = (folder / "state.pt").read_bytes()
    damage = [
        b"",
        whole[:64],
        whole[: len(whole) // 2],
        b"PK\x03\x04",
        b"\x80\x02\x8a\xff.",
        b"<html>",
        b"\x80\x0200.",
        b"(0t.",
    ]
    for content in [*damage, whole[:40] + b"\xff" * 60 + whole[100:]]:
        (folder / "state.pt").write_bytes(content)
        (folder / "rank-0.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            state.load_state(folder, lazy=lazy)
        with pytest.raises(CheckpointError, match=r"rank-0\.pt"):
            state.load_rank(folder, 0)
    for content in (
        {"step": "3", "model": {}, "optimizer": {}},
        {"step": 3, "model": [], "optimizer": {}},
        [1],
        {"a": 1},
    ):
        torch.save(content, folder / "state.pt")
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            state.load_state(folder, lazy=lazy)


class _Call:
    """Pickles as a call of a function that torch.load(weights_only=True) permits."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


def test_a_small_state_of_a_stranger_fills_neither_memory_nor_time(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "MAX_OPERATIONS", 10_000)
    nested: list = []
    for _ in range(40):
        nested = [nested, nested]
    loop: list = []
    loop.append(loop)
    for value in (_Call(bytearray, 2**40), _Call(torch.device, "cpu"), nested, loop):
        for key in ("model", "config"):
            torch.save({"step": 3, "model": {}, "optimizer": {}, key: {"a": value}}, tmp_path / "state.pt")
            with pytest.raises(CheckpointError, match=r"state\.pt"):
                state.load_state(tmp_path)
    with zipfile.ZipFile(tmp_path / "state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x04\x8d" + struct.pack("<Q", 2**24) + b"a" * 2**24 + b".")
    with pytest.raises(CheckpointError, match="compressed"):
        state.load_state(tmp_path)


def test_a_tensor_in_several_places_is_read_once(tmp_path):
    part = torch.arange(2**15).view(2, -1)[:, ::2]
    torch.save({"step": 3, "model": {"a": part, "b": part}, "optimizer": {}}, tmp_path / "state.pt")
    model = state.load_state(tmp_path)["model"]
    assert torch.equal(model["a"], part)
    assert model["a"] is model["b"]


def test_a_lone_state_file_without_its_configuration_is_refused(tmp_path):
    torch.save({"step": 3, "model": {}, "optimizer": {}}, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="configuration"):
        check_same_run(tmp_path / "state.pt", new())
