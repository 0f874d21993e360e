"""What run.resume_from may be called, and runs that are not to be gone on with."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from filelock import FileLock

from tests.training import quick
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.checkpoints.state import ResumeError, find_state, latest_state, load_state
from vae3d.training.runlog import RunLocked

MAPS = Path("/proc/self/maps")

OFTEN = {"trainer.save_every": 1, "trainer.max_steps": 3}


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "old"
    t = trainer(videos, folder, **OFTEN)
    t.fit()
    return folder


@pytest.mark.parametrize(
    ("asked", "step"),
    [
        ("latest", 3),
        ("step-2", 2),
        ("step-0000002", 2),
        ("{run}", 3),
        ("{run}/step-1", 1),
        ("{run}/checkpoints", 3),
        ("{run}/checkpoints/step-0000001", 1),
        ("{run}/checkpoints/step-2", 2),
        ("{run}/checkpoints/step-0000002/state.pt", 2),
    ],
)
def test_a_checkpoint_is_found_by_name_and_by_path(run, asked, step):
    found = find_state(run / "checkpoints", asked.format(run=run))
    assert found.name == f"step-{step:07d}" or found.parent.name == f"step-{step:07d}"


@pytest.mark.parametrize("asked", ["step-5500", "{run}/step-5500", "{run}/checkpoints/step-0005500"])
def test_a_name_that_is_not_there_is_told_with_those_that_are(run, asked):
    with pytest.raises(ResumeError, match=r"no such checkpoint in .*step-0000001, step-0000002, step-0000003"):
        find_state(run / "checkpoints", asked.format(run=run))


def test_latest_of_a_run_without_checkpoints_is_an_error_not_a_new_start(tmp_path):
    with pytest.raises(ResumeError, match="it has no complete checkpoint"):
        find_state(tmp_path / "checkpoints", "latest")


def test_an_incomplete_checkpoint_is_none(run, tmp_path):
    (tmp_path / "checkpoints/step-0000009").mkdir(parents=True)
    with pytest.raises(ResumeError):
        find_state(tmp_path / "checkpoints", "step-9")


def test_a_second_process_is_kept_out_of_a_run(videos, run):
    with FileLock(run / ".lock"), pytest.raises(RunLocked, match=f"another process is training in {run}; stop it, or"):
        trainer(videos, run, **OFTEN)


def test_run_resume_false_refuses_to_go_on(videos, run):
    with pytest.raises(ResumeError, match=r"holds checkpoints and run\.resume=false; give this run another run.name"):
        trainer(videos, run, **OFTEN, **{"run.resume": False})


def test_another_runs_checkpoint_goes_on_in_a_new_folder_and_leaves_its_own_alone(videos, run, tmp_path):
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    new = {"run.resume_from": f"{run}/step-2", "trainer.max_steps": 4, "trainer.save_every": 1}
    t = trainer(videos, tmp_path / "new", **new)
    assert t.step == 2
    t.fit()
    assert sorted(path.name for path in (tmp_path / "new/checkpoints").iterdir()) == ["step-0000003", "step-0000004"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before
    assert f"{run}/step-2" in (tmp_path / "new/launches.jsonl").read_text()
    again = trainer(videos, tmp_path / "new", **new)  # the same command goes on from its own newest
    assert again.step == 4
    again.log.close()


def test_a_resume_may_change_reduce_dtype_and_says_so(videos, tmp_path):
    for steps, dtype in ((1, "fp32"), (2, "bf16")):
        t = quick.trainer(videos, tmp_path, **{"trainer.max_steps": steps, "trainer.reduce_dtype": dtype})
        t.fit()
    launch = json.loads((tmp_path / "launches.jsonl").read_text().splitlines()[-1])
    assert launch["step"] == 1
    assert launch["changed_since_checkpoint"]["trainer.reduce_dtype"] == ["fp32", "bf16"]


@pytest.mark.skipif(not MAPS.exists(), reason="Linux lists what is mapped into memory there")
def test_a_resumed_run_keeps_nothing_of_its_file_in_memory(videos, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    t = trainer(videos, tmp_path / "run", **OFTEN)
    assert t.step
    assert t.optimizer.state
    gc.collect()
    assert str(tmp_path) not in MAPS.read_text()
    t.log.close()
    state = load_state(latest_state(tmp_path / "run/checkpoints"))
    assert str(tmp_path / "run/checkpoints") in MAPS.read_text()  # which it would be
    del state


def test_a_resume_says_what_changed_in_the_data(videos, tmp_path):
    table = pd.read_csv(videos).assign(path=lambda t: [str(videos.parent / name) for name in t["path"]])
    table.to_csv(tmp_path / "t.csv", index=False)
    config = quick.checked(videos)
    source = {**config.data.source, "path": str(tmp_path / "t.csv")}
    first = quick.trainer(config, tmp_path / "run", **{"data.source": source, "trainer.max_steps": 1})
    first.fit()
    table.iloc[::-1].iloc[:-2].to_csv(tmp_path / "t.csv", index=False)
    again = quick.trainer(config, tmp_path / "run", **{"data.source": source})
    again.log.close()
    before, now = [json.loads(line) for line in (tmp_path / "run/launches.jsonl").open()]
    assert before["data_changed_since_checkpoint"] == []
    gone, order = now["data_changed_since_checkpoint"]
    assert gone.startswith("2 rows removed")
    assert "10 of 10 moved" in order
