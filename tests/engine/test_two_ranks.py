"""What two ranks do together when one of them meets an unsound clip; and what they are pulled to."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys

import pytest
import torch

from tests import tiny
from tests.engine import quick, two_ranks
from tests.engine.test_trainer import fresh_accelerate  # noqa: F401


@pytest.fixture(scope="module")
def ranks(videos, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "tests.engine.two_ranks", str(folder)]
    (folder / "config.pickle").write_bytes(pickle.dumps(quick.checked(videos)))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    for rank in ("0", "1"):
        with (folder / f"rank{rank}.log").open("w") as log:
            env = tiny.environ(RANK=rank, LOCAL_RANK=rank, **place)
            running.append(subprocess.Popen(command, cwd=tiny.ROOT, env=env, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0, 0], "\n".join((folder / f"rank{rank}.log").read_text() for rank in (0, 1))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", two_ranks.UNSOUND)
def test_a_loss_that_one_rank_finds_unsound_is_skipped_by_both(ranks, name):
    for report in ranks:
        values = report["steps"][name]
        assert values["skipped"] == 1.0
        if name == "spike":  # which the mean over ranks and micro-batches would not have shown
            assert values["loss"] < 5.0 * report["spikes"]["mean"] < values["loss_max"]
        assert report["steps"]["after"]["skipped"] == 0.0


def test_ranks_stay_equal_and_decide_in_one_collective(ranks):
    first, second = ranks
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
    assert first["spikes"] == second["spikes"] == first["resumed"] == second["resumed"]
    assert first["spikes"]["accepted"] == two_ranks.SOUND + 1
    assert first["collectives"] == 1.0
    assert first["steps"]["after"] == second["steps"]["after"]


def test_two_ranks_are_pulled_as_one_is(videos, tmp_path, ranks):
    one = quick.trainer(videos, tmp_path, **two_ranks.SETTINGS, **{"trainer.accumulate": 4})
    alone = two_ranks.sound_steps(one, 4)
    for name, tensor in ranks[0]["sound"].items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-6)
    drift = sum((tensor - one.proximal.anchor[name]).abs().sum() for name, tensor in alone.items())
    assert drift > 1e-3
