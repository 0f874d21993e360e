"""held_out.csv of a run: the files that it does not train on, as a table for other commands."""

from __future__ import annotations

import numpy as np
import pandas as pd

from tests.training import quick
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.commands.train import next_commands
from vae3d.data.batches.clips import ClipSettings
from vae3d.data.batches.held_out import HELD_OUT, HeldOutFiles, held_out_files, write_held_out
from vae3d.data.sources.table import Table
from vae3d.data.table.file_table import as_file_table

SETTINGS = ClipSettings(16, 16)


def table(folder, text: str) -> Table:
    (folder / "t.csv").write_text(text)
    return Table(folder / "t.csv")


def written(folder, *sources: HeldOutFiles) -> pd.DataFrame:
    write_held_out(folder / HELD_OUT, sources)
    return Table(folder / HELD_OUT).table()


def test_it_has_the_absolute_paths_parts_and_texts_of_its_rows(tmp_path):
    rows = 'path,start,end,text,label\na.mp4,1.5,,"one, ""two""\nlines",NA\n/b/c.tar@512+9/x.mp4,,0.1,,2\nhttps://h/d.mp4,,,None,\ne.mp4,,,"a\rb",\n'
    given = table(tmp_path, rows).table()
    again = written(tmp_path, HeldOutFiles("", as_file_table(given)))
    assert again["path"].tolist() == [
        f"{tmp_path}/a.mp4",
        "/b/c.tar@512+9/x.mp4",
        "https://h/d.mp4",
        f"{tmp_path}/e.mp4",
    ]
    for column in ("path", "start", "end", "text", "label"):
        pd.testing.assert_series_equal(again[column], given[column])
    assert set(again["split"]) == {"val"}
    assert again["error"].isna().all()


def test_rows_of_all_sources_stand_in_one_table_and_readers_ignore_the_name_of_the_source(tmp_path):
    one = as_file_table(table(tmp_path, "path,text\na.mp4,hello\n").table())
    two = as_file_table(table(tmp_path, "path,start\nb.mp4,2\n").table())
    again = written(tmp_path, HeldOutFiles("videos", one), HeldOutFiles("parts", two))
    assert again["text"].tolist() == ["hello", None]
    np.testing.assert_array_equal(again["start"], [np.nan, 2])
    assert again["error"].isna().all()
    assert pd.read_csv(tmp_path / HELD_OUT)["source"].tolist() == ["videos", "parts"]


def test_files_that_are_long_enough_for_validation_stand_first(tmp_path):
    files = as_file_table(table(tmp_path, "path,num_frames\na.png,1\nb.mp4,9\nc.mp4,4\nd.mp4,5\n").table())
    found = held_out_files([("x", files, SETTINGS), ("y", files, SETTINGS)], 5)
    listed = [(part.source, path[-5]) for part in found for path in part.table["path"]]
    assert listed == [("x", "b"), ("x", "d"), ("y", "b"), ("y", "d"), ("x", "a"), ("x", "c"), ("y", "a"), ("y", "c")]


def test_a_run_writes_it_and_its_last_commands_read_it(videos, tmp_path):
    scores = {"validation.every": 2, "validation.frames": 1, "validation.clips": 1}
    trainer = quick.trainer(videos, tmp_path, **scores)
    trainer.fit()
    paths = Table(tmp_path / HELD_OUT).table()["path"]
    assert set(paths) == {path for clip in trainer.data.held_out for path in clip.paths}
    assert not set(paths) & set(trainer.data.streams[0].table["path"])
    commands = [command for _, command in next_commands(trainer)]
    (infer,) = (command for command in commands if " infer " in command)
    assert f"source={tmp_path / HELD_OUT}" in infer
    quick.trainer(videos, tmp_path, **{"trainer.max_steps": 3, "validation.every": 0}).log.close()
    assert not (tmp_path / HELD_OUT).exists()  # nothing is held out now


def test_a_mixture_writes_the_rows_of_its_sources(mixture, tmp_path):
    quick.trainer(mixture, tmp_path).log.close()
    again = pd.read_csv(tmp_path / HELD_OUT)
    assert again["source"].value_counts().to_dict() == {"images": 4, "videos": 3}
    assert again["source"].tolist()[:3] == ["videos"] * 3  # images are too short for validation
