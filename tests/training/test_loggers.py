"""Trackers: groups, texts, hyperparameters, pictures, resume, failures; each read back from its own store."""

from __future__ import annotations

import io
import json
import logging
import shlex
import struct
import sys
import time
from collections import defaultdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import tiny
from tests.training.quick import trainer
from tests.training.test_trainer import fresh_accelerate  # noqa: F401
from vae3d.config import schema, validate
from vae3d.config.issues import ConfigError
from vae3d.errors import UserError
from vae3d.training.freeze import parameter_list, train_parts
from vae3d.training.loggers import Logger, Loggers, TrackerError, build_loggers, flat, tag_of
from vae3d.training.runlog import RunLog

TENSORBOARD = {"logger.tensorboard.enabled": True}
PICTURE = np.zeros((16, 32, 3), np.uint8)


def tensorboard(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return events.Reload()


def text_of(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0].decode()


class Kept(Logger):
    """Keeps what it is given. fails: names of methods that raise."""

    def __init__(self, name: str = "kept", fails: dict[str, Exception] | None = None) -> None:
        self.name, self.fails, self.calls = name, fails or {}, []

    def __getattribute__(self, method: str):
        if method not in ("open", "config", "text", "scalars", "image", "video", "close"):
            return super().__getattribute__(method)

        def call(*args):
            self.calls.append((method, *args))
            if method in self.fails:
                raise self.fails[method]

        return call

    def of(self, method: str) -> list[tuple]:
        return [args for name, *args in self.calls if name == method]


# ---- names


def test_groups_of_metrics_stand_in_the_order_validation_loss_optimizer_speed_memory_gan():
    names = [
        "gan/weight",
        "memory_gib",
        "clips_per_second",
        "lr/decoder",
        "loss_weighted/l1",
        "loss_mean/l1",
        "val/psnr",
    ]
    assert sorted(map(tag_of, names)) == [
        "1_validation/psnr", "2_loss/l1", "3_loss_weighted/l1", "4_optimizer/lr_decoder",
        "5_speed/clips_per_second", "6_memory/peak_gib", "7_gan/weight",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "tag"),
    [("loss", "2_loss/total"), ("loss/mse", "2_loss/mse"), ("loss_q3", "2_loss/q3"), ("val/loss_q0", "1_validation/loss_q0"),
     ("lr", "4_optimizer/lr"), ("seraena/score_gap", "7_gan/seraena_score_gap"), ("new", "9_other/new"), ("a/b", "9_other/a/b")],
)  # fmt: skip
def test_every_metric_has_a_group(name, tag):
    assert tag_of(name) == tag


def test_a_loss_that_is_logged_per_element_too_stands_apart_from_it():
    values = {"loss/l1": 3072.0, "loss_mean/l1": 1.0}
    assert [tag_of(name, values) for name in values] == ["8_loss_reduced/l1", "2_loss/l1"]


def test_metrics_jsonl_keeps_its_keys(tmp_path):
    kept = Kept()
    log = RunLog(tmp_path, Loggers([kept]), rank=0)
    log.open(0, 1)
    log.scalars({"val/psnr": 30.0}, 1)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "val/psnr": 30.0}
    assert kept.of("scalars") == [[{"1_validation/psnr": 30.0}, 1]]


def test_only_rank_0_writes(tmp_path):
    kept = Kept()
    log = RunLog(tmp_path, Loggers([kept]), rank=1)
    log.open(0, 1)
    log.launch(0, {}, {})
    log.text("parameters", "", 0)
    log.scalars({"loss": 1.0}, 1)
    log.frames("val_clips/a", PICTURE[None], 1)
    log.close()
    assert kept.calls == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_is_listed_once_though_every_start_of_a_run_meets_it(tmp_path, rank):
    for new in ("cut.mp4", "empty.mp4"):
        log = RunLog(tmp_path, Loggers([]), rank=rank)
        log.open(0, 9)
        log.skipped_files([("small.mp4", "is too small")])
        log.errors([("bad.mp4", "is ✗"), (new, "is damaged")])
        log.close()
    lines = (tmp_path / f"data_errors{rank or ''}.jsonl").read_text().splitlines()
    names = [json.loads(line)["path"] for line in lines]
    assert names == [*["small.mp4"] * (rank == 0), "bad.mp4", "cut.mp4", "empty.mp4"]


# ---- configuration


def issues(*overrides: str) -> dict[str, tuple]:
    """Key -> value, message and hint of each error."""
    with pytest.raises(ConfigError) as caught:
        tiny.training("spatial", Path(__file__), *overrides)
    return {issue.key: (issue.value, issue.message, issue.hint) for issue in caught.value.issues}


def test_one_logger_several_and_none():
    def enabled(*overrides: str) -> list[str]:
        node = tiny.compose(*overrides).logger
        return [name for name in ("tensorboard", "wandb", "mlflow", "trackio") if node[name].enabled]

    assert enabled() == ["tensorboard"]
    assert enabled("logger=wandb") == ["wandb"]
    assert enabled("logger=[tensorboard,mlflow]") == ["tensorboard", "mlflow"]
    assert enabled("logger=none") == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_ends_before_the_data_with_the_command_that_installs_it(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    value, _, hint = issues(f"logger=[{name}]")["logger"]
    assert value == name
    assert f"pip install -e '.[{name}]'" in hint
    assert f"\n{name} =" in (tiny.ROOT / "setup.cfg").read_text()


def test_a_folder_of_the_packages_name_is_not_the_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert issues("logger=wandb")["logger"][0] == "wandb"


def test_trackio_names_the_version_of_accelerate_that_it_needs(monkeypatch):
    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None, origin="trackio.py")
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setattr(validate.importlib.metadata, "version", lambda _: "1.8.1")
    value, message, hint = issues("logger=trackio")["logger"]
    assert value == "trackio"
    assert "accelerate>=1.9" in message
    assert "1.8.1" in message
    assert "accelerate>=1.9" in hint


def test_arguments_of_loggers_are_typed():
    found = issues("logger.wandb.mode=ofline", "logger.wandb.projet=x")
    assert found["logger.wandb.mode"][0] == "ofline"
    assert "offline" in found["logger.wandb.mode"][2]
    assert "logger.wandb.project" in found["logger.wandb.projet"][2]


def test_other_loggers_are_named_and_must_be_loggers():
    (logger,) = build_loggers(schema.Logger(), "runs", {"mine": Kept()}).loggers
    assert logger.name == "mine"
    with pytest.raises(UserError, match=r"logger\.other\.mine"):
        build_loggers(schema.Logger(), "runs", {"mine": object()})


# ---- a run in TensorBoard


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
    """The folder of a run that was killed after step 3 and resumed from step 2, to step 4."""
    from accelerate.state import AcceleratorState

    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"validation.every": 2, "validation.frames": 1, "trainer.save_every": 2, **TENSORBOARD}
    t = trainer(videos, folder, **settings, **{"trainer.max_steps": 2})
    t.fit()
    AcceleratorState._reset_state(True)
    log = RunLog(folder, build_loggers(schema.Logger(tensorboard=schema.TensorBoard(enabled=True)), "runs", {}), rank=0)
    log.open(2, 4)
    log.scalars({"loss": -1.0}, 3)
    log.close()
    trainer(videos, folder, **settings, **{"trainer.max_steps": 4, "optim.lr": 2e-3}).fit()
    AcceleratorState._reset_state(True)
    return folder


def test_tensorboard_has_each_step_once_after_a_resume(run):
    events = tensorboard(run)
    losses = {json.loads(line)["step"]: json.loads(line).get("loss") for line in (run / "metrics.jsonl").open()}
    points = events.Scalars("2_loss/total")
    assert [point.step for point in points] == [1, 2, 3, 4]
    assert points[2].value == pytest.approx(losses[3])
    assert points[2].value > 0


def test_tensorboard_lists_validation_first(run):
    tags = sorted(tensorboard(run).Tags()["scalars"])
    assert tags[0].startswith("1_validation/")
    assert {"4_optimizer/grad_norm", "5_speed/clips_per_second", "6_memory/peak_gib"} <= {*tags}


def test_texts_of_each_launch_command_configuration_versions_and_parameters(run):
    events = tensorboard(run)
    assert "data:\n" in text_of(events, "9_run/configuration").replace("    ", "")
    assert "lr: 0.002" in text_of(events, "9_run/configuration")
    assert shlex.join(sys.orig_argv).splitlines()[0] in text_of(events, "9_run/command")
    assert "torch " in text_of(events, "9_run/versions")
    assert "decoder: " in text_of(events, "9_run/parameters")
    assert [event.step for event in events.Tensors("9_run/parameters/text_summary")] == [0, 2]


def test_tensorboards_table_has_hyperparameters_and_final_validation_scores(run):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    events = EventMultiplexer().AddRunsFromDirectory(str(run.parent)).Reload()
    context = backend_context.Context(TBContext(data_provider=MultiplexerDataProvider(events, str(run.parent))))
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS]
    score = api_pb2.ColParams(metric=api_pb2.MetricName(tag="1_validation/psnr"))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=9, allowed_statuses=statuses, include_metrics=True, col_params=[score]
    )
    (group,) = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    assert group.hparams["data.height"].number_value == 16
    values = {metric.name.tag: metric.value for metric in group.metric_values}
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert values["1_validation/psnr"] == pytest.approx(last["val/psnr"])


def test_the_resolved_configuration_is_flat_in_hyperparameters():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None, "e": {}}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None", "e": "{}"}


def test_parameters_are_listed_by_part_with_shapes_and_whether_they_train():
    model = tiny.model("spatial")
    train_parts(model, {"decoder": 1.0})
    lines = parameter_list(model).splitlines()
    assert len(lines) == 2 + len([*model.parameters()])
    counts = [
        sum(p.numel() for m in model.trainable_parts()[part] for p in m.parameters()) for part in ("encoder", "decoder")
    ]
    assert lines[0] == f"encoder: 0 parameters train, {counts[0]:,} are frozen"
    assert f"decoder: {counts[1]:,} parameters train, 0 are frozen" in lines
    assert "  module.encoder.conv_in.weight  8x3x3x3  frozen" in lines
    assert "  module.decoder.conv_out.weight  3x8x3x3" in lines


# ---- failures


def test_a_logger_that_fails_warns_once_and_the_others_go_on(caplog):
    broken, kept = Kept("broken", {"scalars": OSError(28, "No space left on device")}), Kept()
    loggers = Loggers([broken, kept])
    loggers.open(Path(), 0, {})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            loggers.scalars({"loss": 1.0}, step)
        loggers.close()
    (record,) = caplog.records
    assert "broken" in record.getMessage()
    assert "No space left on device" in record.getMessage()
    assert len(kept.of("scalars")) == 3
    assert broken.of("close") == [[False]]


def test_loggers_learn_that_a_run_failed(videos, tmp_path, monkeypatch):
    t = trainer(videos, tmp_path, **{"trainer.save_every": 0})
    kept = Kept()
    t.log.logger = Loggers([kept])
    monkeypatch.setattr(t, "train_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        t.fit()
    t.log.close()
    assert kept.of("close") == [[True]]


def test_a_logger_that_fails_slowly_is_called_seldom(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("vae3d.training.loggers.time.monotonic", lambda: clock[0])

    class Slow(Logger):
        calls = 0

        def scalars(self, values, step):
            self.calls += 1
            clock[0] += 60
            raise OSError("timeout")

    slow = Slow()
    loggers = Loggers([slow])
    for step in range(2000):
        loggers.scalars({}, step)
        clock[0] += 1
    assert slow.calls * 60 / clock[0] < 0.06
    assert slow.calls > 1


def test_a_logger_that_cannot_be_opened_is_an_error_at_the_start_and_a_warning_on_resume(caplog):
    kept, broken = Kept(), Kept("broken", {"open": OSError("no network")})
    with pytest.raises(TrackerError, match=r"broken.*no network"):
        Loggers([kept, broken]).open(Path(), 0, {})
    assert kept.of("close") == [[False]]
    loggers = Loggers([kept, broken])
    with caplog.at_level(logging.WARNING):
        loggers.open(Path(), 5, {})
    assert "broken" in caplog.text
    assert loggers.loggers == [kept]


def test_training_goes_on_when_tensorboard_cannot_write(videos, tmp_path, monkeypatch, caplog):
    from tensorboard.summary.writer.record_writer import RecordWriter

    t = trainer(videos, tmp_path, **TENSORBOARD, **{"trainer.max_steps": 3, "trainer.save_every": 0})

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr("threading.excepthook", lambda args: None)  # TensorBoard's writer thread dies of it
    with caplog.at_level(logging.WARNING):
        assert t.fit()
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


# ---- trackers that cannot delete: each is written, killed after step 3, resumed from step 1, and read back


def settings(name: str, **values) -> schema.Logger:
    kind = {"wandb": schema.WandB, "mlflow": schema.MLflow, "trackio": schema.Trackio}[name]
    return schema.Logger(**{name: kind(enabled=True, **values)})


def killed_and_resumed(config: schema.Logger, folder: Path) -> None:
    """A run of 4 steps, whose first launch fails after step 3, when a resume continues from step 1."""
    PartialState()  # as in training; Accelerate's trackers need it
    folder.mkdir()
    video = np.stack([PICTURE] * 3)
    for first, rewound, last in ((0, {}, 3), (1, {"loss": 3, "val/psnr": 2}, 4)):
        loggers = build_loggers(config, folder.parent, {})
        loggers.open(folder, first, rewound)
        loggers.config({"optim": {"lr": 0.1 + first}}, first)
        loggers.text("run/command", "train <x>", first)
        for step in range(first + 1, last + 1):
            loggers.scalars({"loss": 10.0 * step}, step)
            if step % 2 == 0:
                loggers.scalars({"val/psnr": 30.0 + step}, step)
                loggers.image("val_clips/0_a", PICTURE, step, "psnr 31")
                loggers.video("val_clips/1_a", video, 8.0, step, "psnr 32")
        loggers.close(failed=first == 0)


LOSSES, SCORES = [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)], [(2, 32.0), (4, 34.0)]


def wandb_history(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a .wandb file: a LevelDB log of protobuf records in blocks of 32 KiB, after seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, found = path.read_bytes(), 7, b"", defaultdict(list)
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last part
            record, part = Record.FromString(part), b""
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                if isinstance(value, int | float):
                    found[tag].append((row["_step"], value))
    return found


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install -e '.[wandb]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    killed_and_resumed(settings("wandb", mode="offline", tags=["a"]), tmp_path / "run")
    first, second = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == second.name.rpartition("-")[2]  # one run, in two files
    files = [next(folder.glob("*.wandb")) for folder in (first, second)]
    for _ in range(100):
        if "1_validation/psnr" in wandb_history(files[1]):
            break
        time.sleep(0.1)  # W&B's process still writes
    histories = [*map(wandb_history, files)]
    assert histories[0]["2_loss/total"] == LOSSES[:3]
    assert histories[1]["2_loss/total"] == LOSSES[2:]  # W&B may not have had the last step of a killed run
    assert [history["1_validation/psnr"] for history in histories] == [SCORES[:1], SCORES[1:]]
    media = [path.suffix for path in first.rglob("files/media/**/*") if path.is_file()]
    assert sorted(media) == [".html", ".mp4", ".png"]
    assert len([*second.rglob("*.mp4")]) == 1


class FakeWandB(ModuleType):
    """As much of wandb as a run needs, to hold what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started, self.logged, self.finished, self.config = [], [], [], {}

    def init(self, **given):
        self.started.append(given)
        config = SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values))
        return SimpleNamespace(id=given["id"] or "new", step=0, config=config, log=self.log, finish=self.finish)

    def finish(self, exit_code):
        self.finished.append(exit_code)

    def log(self, values, step=None, **options):
        self.logged.append((values, step))

    def Html(self, text):
        return text

    def Image(self, picture, caption):
        return caption, picture

    def Video(self, path, caption, format):
        return caption, format, Path(path).read_bytes()[4:8]


def test_wandb_takes_its_arguments_and_a_resume_continues_its_run(tmp_path, monkeypatch):
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    killed_and_resumed(settings("wandb", project="p", entity="e", tags=["a", "b"], group="g"), tmp_path / "run")
    first, second = fake.started
    assert {name: first[name] for name in ("project", "entity", "name", "tags", "group", "id", "resume")} == {
        "project": "p", "entity": "e", "name": "run", "tags": ["a", "b"], "group": "g", "id": None, "resume": None,
    }  # fmt: skip
    assert (second["id"], second["resume"]) == ("new", "allow")
    assert Path(first["dir"]) == tmp_path / "run"
    assert fake.finished == [1, 0]
    assert fake.config == {"optim": {"lr": 1.1}}
    assert [step for values, step in fake.logged if "1_validation/psnr" in values] == [2, 4]
    images = [values["1_validation_clips/0_a"] for values, _ in fake.logged if "1_validation_clips/0_a" in values]
    assert images == [("psnr 31", PICTURE)] * 2
    videos = [values["1_validation_clips/1_a"] for values, _ in fake.logged if "1_validation_clips/1_a" in values]
    assert videos == [("psnr 32", "mp4", b"ftyp")] * 2
    assert ({"9_run/command": "<pre>train &lt;x&gt;</pre>"}, None) in fake.logged
    killed = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", killed)
    build_loggers(settings("wandb", project="p", entity="e"), tmp_path, {}).open(tmp_path / "run", 0, {})
    build_loggers(settings("wandb", project="other", entity="e"), tmp_path, {}).open(tmp_path / "run", 1, {})
    assert [given["id"] for given in killed.started] == [None, None]  # not resumed; in another project


def test_mlflow_in_a_file(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install -e '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    killed_and_resumed(settings("mlflow", experiment="e", tags={"team": "x"}), tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])

    def history(tag: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, tag)]

    assert (history("2_loss/total"), history("1_validation/psnr")) == (LOSSES, SCORES)
    assert (run.info.run_name, run.info.status, run.data.tags["team"]) == ("run", "FINISHED", "x")
    assert run.data.params["optim.lr"] == "0.1"
    folders = {
        path: [file.path for file in client.list_artifacts(run.info.run_id, path)]
        for path in ("9_run", "1_validation_clips")
    }
    assert folders["9_run"] == ["9_run/command_step0.txt", "9_run/command_step1.txt"]
    assert folders["1_validation_clips"] == [f"1_validation_clips/1_a_step{step}.mp4" for step in (2, 4)]
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(images) == 2
    assert all("1_validation_clips" in path and "0_a" in path for path in images)


def test_trackio_on_this_machine(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed: pip install -e '.[trackio]'")
    script = f"""
from pathlib import Path
from tests.training.test_loggers import killed_and_resumed, settings
killed_and_resumed(settings("trackio", project="p"), Path({str(tmp_path / "run")!r}))
from trackio.sqlite_storage import SQLiteStorage
import json
json.dump([SQLiteStorage.get_run_records("p"), SQLiteStorage.get_logs("p", "run"), SQLiteStorage.get_run_config("p", "run")], open({str(tmp_path / "out.json")!r}, "w"))
"""
    # TRACKIO_DIR is read when trackio is imported.
    done = tiny.run(
        sys.executable, "-c", script, cwd=tiny.ROOT, TRACKIO_DIR=str(tmp_path / "trackio"), HF_HUB_OFFLINE="1"
    )
    assert done.returncode == 0, done.stdout
    records, logs, config = json.loads((tmp_path / "out.json").read_text())
    assert len(records) == 1

    def history(tag: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[tag]) for entry in logs if tag in entry]

    assert (history("2_loss/total"), history("1_validation/psnr")) == (LOSSES, SCORES)
    assert config["optim.lr"] == 1.1  # of the last launch
    for tag, kind, caption in (("0_a", "image", "psnr 31"), ("1_a", "video", "psnr 32")):
        media = history(f"1_validation_clips/{tag}")
        assert [step for step, _ in media] == [2, 4]
        assert (media[0][1]["_type"], media[0][1]["caption"]) == (f"trackio.{kind}", caption)


# ---- pictures


def test_images_and_videos_have_the_same_names_in_all_trackers_whatever_the_file_is_called():
    kept = [Kept("a"), Kept("b")]
    loggers = Loggers(kept)
    hostile = ["a b", "../../x", "<script>", "a\nb", "名", "x" * 300]
    for index, name in enumerate(hostile):
        loggers.image(f"val_clips/{index}_{name}", PICTURE, 1, name)
        loggers.video(f"val_clips/{index}_{name}", PICTURE[None], 8.0, 1, name)
    expected = ["0_a_b", "1_.._.._x", "2__script_", "3_a_b", "4_名", "5_" + "x" * 58]
    for logger in kept:
        for method in ("image", "video"):
            assert [args[0] for args in logger.of(method)] == [f"1_validation_clips/{name}" for name in expected]
            assert [args[-1] for args in logger.of(method)] == hostile


def test_tensorboard_shows_an_image_as_png_and_a_video_as_png_that_moves_with_exact_colours(tmp_path):
    loggers = build_loggers(schema.Logger(tensorboard=schema.TensorBoard(enabled=True)), "runs", {})
    loggers.open(tmp_path, 0, {})
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    loggers.image("val_clips/0_a", picture, 1)
    loggers.video("val_clips/1_a", np.stack([picture, 255 - picture]), 8.0, 1)
    loggers.close()
    events = tensorboard(tmp_path)
    shown = {tag: Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)) for tag in events.Tags()["images"]}
    assert {tag: (image.format, getattr(image, "n_frames", 1)) for tag, image in shown.items()} == {
        "1_validation_clips/0_a": ("PNG", 1), "1_validation_clips/1_a": ("PNG", 2),
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(shown["1_validation_clips/0_a"]), picture)
    moving = shown["1_validation_clips/1_a"]
    frames = []
    for frame in ImageSequence.Iterator(moving):
        frames.append(np.asarray(frame.convert("RGB")))
        assert frame.info["duration"] == 125
    np.testing.assert_array_equal(frames, [picture, 255 - picture])
    assert moving.info["loop"] == 0  # for ever
