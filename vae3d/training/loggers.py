"""Trackers of scalars, text, pictures and videos, in addition to metrics.jsonl: TensorBoard, W&B, MLflow, trackio.

Each goes through Accelerate's tracker where that has a method for it, else through the package itself.
"""

from __future__ import annotations

import html
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vae3d.arguments import flatten
from vae3d.errors import UserError
from vae3d.inference.video import write_video
from vae3d.io import read_json, write_json

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from vae3d.config import schema

log = logging.getLogger("vae3d")

STATE = "trackers.json"  # in the run's folder: the tracker runs that it continues when it resumes
VALIDATION = "1_validation"
# Trackers list groups by name, so these are numbered. The part of a metric's name before the slash -> group.
GROUPS = {
    "val": VALIDATION,
    "val_clips": f"{VALIDATION}_clips",
    "val_samples": f"{VALIDATION}_samples",
    "loss_mean": "2_loss",
    "loss_weighted": "3_loss_weighted",
    "data": "5_data",
    "gan": "7_gan",
    "run": "9_run",
}
TAGS = {  # of metrics without a slash
    "val_clips": f"{VALIDATION}/clips",
    "loss": "2_loss/total",
    "loss_max": "2_loss/total_max",
    "lr": "4_optimizer/lr",
    "grad_norm": "4_optimizer/grad_norm",
    "skipped": "4_optimizer/skipped_steps",
    "prox": "4_optimizer/proximal",
    "clips_per_second": "5_speed/clips_per_second",
    "frames_per_second": "5_speed/frames_per_second",
    "teacher_cache_hits": "5_speed/teacher_cache_hits",
    "memory_gib": "6_memory/peak_gib",
    "memory_idle_gib": "6_memory/idle_gib",
    "loss_discriminator": "7_gan/loss",
}
REDUCED = "8_loss_reduced"  # losses under loss.reduction, where 2_loss has them per element
OTHER = "9_other"
SLOW = 1.0  # seconds


def tag_of(name: str, names: Mapping[str, Any] | Sequence[str] = ()) -> str:
    """The tag of a metric in trackers: `val/psnr` is `1_validation/psnr`. names: of all metrics logged with it."""
    if name in TAGS:
        return TAGS[name]
    group, _, rest = name.partition("/")
    if not rest:
        quarter = re.fullmatch(r"loss_(q\d)", name)  # of a diffusion model's timesteps
        return f"2_loss/{quarter[1]}" if quarter else f"{OTHER}/{name}"
    if group == "loss":
        return f"{REDUCED if f'loss_mean/{rest}' in names else GROUPS['loss_mean']}/{rest}"
    if group == "lr":
        return f"{TAGS['lr']}_{rest}"
    if group == "seraena":
        return f"{GROUPS['gan']}/seraena_{rest}"
    if group not in GROUPS and group.startswith("val_"):  # of a source or a size of clips
        return f"{VALIDATION}_{group.removeprefix('val_')}/{rest}"
    return f"{GROUPS[group]}/{rest}" if group in GROUPS else f"{OTHER}/{name}"


def media_tag(name: str) -> str:
    """The tag of an image or a video: `val_clips/0_a b` is `1_validation_clips/0_a_b`.

    It is the same in all trackers: after the slash, characters that one of them rejects, or that have a meaning in
    paths, are replaced by _, and long names are cut.
    """
    group, _, rest = tag_of(name).partition("/")
    return f"{group}/{_file_name(rest)}"


class TrackerError(UserError):
    """A tracker cannot be opened. Raised on rank 0 only."""

    on_every_rank = False


class Logger:
    """Writes nothing; the base class of loggers. Rank 0 calls them. If a method raises, training goes on."""

    name = "logger"

    def open(self, folder: Path, step: int, rewound: Mapping[str, int]) -> None:
        """Start writing.

        folder: of the run. step: training starts or resumes there. rewound: tag -> last step after `step` that an
        earlier launch wrote before it was killed, and that this launch takes again.
        """

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """Hyperparameters. values: nested dicts of plain values."""

    def text(self, tag: str, text: str, step: int) -> None:
        """text: to be shown as it is, in a fixed-width font."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """values: by tag."""

    def image(self, tag: str, picture: np.ndarray, step: int, caption: str) -> None:
        """picture: [H, W, 3] uint8. caption: to be shown beside it, if there is a place for it; may be empty."""

    def video(self, tag: str, frames: np.ndarray, fps: float, step: int, caption: str) -> None:
        """frames: [T, H, W, 3] uint8. caption: as of an image."""

    def close(self, failed: bool = False) -> None:
        """Nothing is written afterwards. failed: the run ends with an error."""


class Loggers(Logger):
    """Several loggers, or none. Takes names of metrics and gives each logger tags.

    A logger that cannot be opened is an error when a run starts; when a run resumes, and after that, a logger that
    fails is a warning, once. If it takes more than SLOW seconds to fail, as without network, it is called so rarely
    that it takes at most about 5% of the time.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = list(loggers)
        self._warned: set[str] = set()
        self._pause_until: dict[str, float] = {}

    def open(self, folder: Path, step: int, rewound: Mapping[str, int]) -> None:
        """Raises TrackerError at step 0."""
        rewound = {tag_of(name, rewound): last for name, last in rewound.items()}
        opened = []
        for logger in self.loggers:
            try:
                logger.open(folder, step, rewound)
                opened.append(logger)
            except Exception as error:
                if step == 0:
                    self.loggers = opened
                    self.close()
                    raise TrackerError(
                        f"logger {logger.name} cannot be opened: {_reason(error)}\n"
                        f"{HINTS.get(logger.name, '')}leave it out of logger=... to train without it"
                    ) from error
                log.warning("this launch goes on without the logger %s: %s", logger.name, _reason(error))
        self.loggers = opened

    def config(self, values: Mapping[str, Any], step: int) -> None:
        self._each(lambda logger: logger.config(values, step))

    def text(self, name: str, text: str, step: int) -> None:
        self._each(lambda logger: logger.text(tag_of(name), text, step))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        tags = {tag_of(name, values): value for name, value in values.items()}
        self._each(lambda logger: logger.scalars(tags, step))

    def image(self, name: str, picture: np.ndarray, step: int, caption: str = "") -> None:
        self._each(lambda logger: logger.image(media_tag(name), picture, step, caption))

    def video(self, name: str, frames: np.ndarray, fps: float, step: int, caption: str = "") -> None:
        self._each(lambda logger: logger.video(media_tag(name), frames, fps, step, caption))

    def close(self, failed: bool = False) -> None:
        """May be called twice."""
        self._pause_until.clear()
        self._each(lambda logger: logger.close(failed))
        self.loggers = []

    def _each(self, write: Callable[[Logger], None]) -> None:
        for logger in self.loggers:
            start = time.monotonic()
            if start < self._pause_until.get(logger.name, start):
                continue
            try:
                write(logger)
            except Exception as error:  # every package has errors of its own
                now = time.monotonic()
                if now - start > SLOW:
                    self._pause_until[logger.name] = now + 20 * (now - start)
                if logger.name not in self._warned:
                    self._warned.add(logger.name)
                    log.warning(
                        "logger %s fails, and training goes on; metrics.jsonl has every metric, and no further error "
                        "of this logger is shown: %s",
                        logger.name,
                        _reason(error),
                    )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


HINTS = {
    "wandb": "log in with `wandb login`, or set logger.wandb.mode=offline; or ",
    "mlflow": "check logger.mlflow.tracking_uri; or ",
    "trackio": "check logger.trackio.space_id and TRACKIO_DIR; or ",
}


def build_loggers(config: schema.Logger, root: str | Path, other: Mapping[str, Logger]) -> Loggers:
    """The enabled loggers. root: folder of all runs. other: the loggers of config.other, by name."""
    loggers: list[Logger] = []
    if config.tensorboard.enabled:
        loggers.append(TensorBoardLogger())
    if config.wandb.enabled:
        loggers.append(WandBLogger(config.wandb))
    if config.mlflow.enabled:
        loggers.append(MLflowLogger(config.mlflow, root))
    if config.trackio.enabled:
        loggers.append(TrackioLogger(config.trackio))
    for name, logger in other.items():
        if not isinstance(logger, Logger):
            raise UserError(f"logger.other.{name} is a {type(logger).__name__}; use a subclass of {__name__}.Logger")
        logger.name = name
        loggers.append(logger)
    return Loggers(loggers)


def _started(tracker: GeneralTracker) -> Any:
    if hasattr(tracker, "start"):  # before accelerate 1.8 the constructor starts it
        tracker.start()
    return tracker


def flat(values: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Nested dicts as one, keys joined by dots; values other than numbers as text."""
    simple = bool | int | float | str
    return {name: value if isinstance(value, simple) else str(value) for name, value in flatten(values).items()}


class TensorBoardLogger(Logger):
    """Files in RUN/tensorboard for `tensorboard --logdir runs`."""

    name = "tensorboard"

    def open(self, folder: Path, step: int, rewound: Mapping[str, int]) -> None:
        from accelerate.tracking import TensorBoardTracker

        # purge_step hides entries that a killed run wrote after its last checkpoint. A start at step 0 validates again.
        self.tracker = _started(TensorBoardTracker(self.name, str(folder), purge_step=step + 1 if step else 0))
        self.writer = self.tracker.writer

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """As TensorBoardTracker.store_init_configuration, which would start a second run in a folder of its own.

        Without an Experiment summary TensorBoard's table shows the hyperparameters of all runs, not of the first only,
        and the last value of every scalar beside them.
        """
        from torch.utils.tensorboard.summary import hparams

        _, session_start, _ = hparams(flat(values), {})
        self.writer.file_writer.add_summary(session_start, step)

    def text(self, tag: str, text: str, step: int) -> None:
        self.tracker.log({tag: "".join(f"    {line}\n" for line in text.splitlines())}, step)  # Markdown's code

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.tracker.log(dict(values), step)

    def image(self, tag: str, picture: np.ndarray, step: int, caption: str) -> None:
        self.tracker.log_images({tag: picture[None]}, step, dataformats="NHWC")

    def video(self, tag: str, frames: np.ndarray, fps: float, step: int, caption: str) -> None:
        """An animated PNG. SummaryWriter.add_video makes a GIF, whose 256 colours differ from the frames as much as
        reconstructions do. TensorBoard does not declare other formats as images."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        first, *others = [Image.fromarray(frame) for frame in frames]
        moving = {"save_all": True, "append_images": others, "duration": round(1000 / fps), "loop": 0}
        stream = io.BytesIO()
        first.save(stream, "PNG", compress_level=1, **moving)  # other levels take twice as long
        encoded = Summary.Image(
            height=first.height, width=first.width, colorspace=3, encoded_image_string=stream.getvalue()
        )
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=encoded)]), step)

    def close(self, failed: bool = False) -> None:
        self.tracker.finish()


class ContinuedLogger(Logger):
    """A logger whose entries cannot be deleted.

    A run that resumes from a checkpoint continues its tracker run, whose name stands in trackers.json. Steps that were
    written there before a kill are not written again: the resumed run computes the same values.
    """

    def open(self, folder: Path, step: int, rewound: Mapping[str, int]) -> None:
        file = folder / STATE
        saved = read_json(file) if file.is_file() else {}
        before = saved.get(self.name, {}) if step else {}
        place = self.place(folder)
        if before.get("place") != place:
            before = {}
        run = self.start(folder, before.get("run"))
        written: dict[str, int] = {}
        if run == before.get("run"):
            written = dict(before["written"])
            for tag, last in rewound.items():
                written[tag] = max(last, written.get(tag, last))
        write_json(file, {**saved, self.name: {"place": place, "run": run, "written": written}})
        self.written = written
        self.last_validation = max([s for tag, s in written.items() if tag.startswith(f"{VALIDATION}/")], default=-1)

    def place(self, folder: Path) -> str:
        """Where its tracker runs are: a run of another place is not continued."""
        raise NotImplementedError

    def start(self, folder: Path, run: str | None) -> str:
        """Continue `run`, or start a new one; return its id or name."""
        raise NotImplementedError

    def unwritten(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        return {tag: value for tag, value in values.items() if step > self.written.get(tag, -1)}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:60]  # of a file name's 255 bytes trackers add numbers of their own


@contextmanager
def _mp4(tag: str, frames: np.ndarray, fps: float) -> Iterator[Path]:
    """A temporary H.264 file. The packages encode arrays with moviepy or ffmpeg, which are not installed."""
    with TemporaryDirectory() as folder:
        path = Path(folder, f"{tag.rpartition('/')[2]}.mp4")
        write_video(path, frames, fps, "h264")
        yield path


class WandBLogger(ContinuedLogger):
    """Weights & Biases. Its step is the training step."""

    name = "wandb"

    def __init__(self, settings: schema.WandB) -> None:
        self.settings = settings

    def place(self, folder: Path) -> str:
        return f"{self.settings.entity or ''}/{self.settings.project}"

    def start(self, folder: Path, run: str | None) -> str:
        from accelerate.tracking import WandBTracker

        # By default a run without network would wait for ever at its end.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
        settings, run = self.settings, self.settings.id or run
        online = (settings.mode or os.environ.get("WANDB_MODE", "online")) == "online"
        self.tracker = _started(
            WandBTracker(
                settings.project,
                entity=settings.entity,
                name=settings.name or folder.name,
                group=settings.group,
                tags=settings.tags or None,
                notes=settings.notes,
                mode=settings.mode,
                dir=str(folder),
                id=run,
                resume="allow" if run and online else None,
            )
        )
        self.run = self.tracker.run
        return self.run.id

    def unwritten(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Also those of the last step of a killed run: W&B writes a step when the next one begins."""
        return dict(values) if step >= max(self.written.values(), default=0) else super().unwritten(values, step)

    def config(self, values: Mapping[str, Any], step: int) -> None:
        # WandBTracker.store_init_configuration does the same; that of accelerate 1.9 starts another run for it.
        self.run.config.update(dict(values), allow_val_change=True)

    def text(self, tag: str, text: str, step: int) -> None:
        import wandb

        # Without a step: a resumed run may be at a later one already, and would drop it.
        self.run.log({tag: wandb.Html(f"<pre>{html.escape(text)}</pre>")}, commit=False)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if step >= self.run.step and (values := self.unwritten(values, step)):  # W&B drops earlier steps, noisily
            self.tracker.log(values, step)

    def image(self, tag: str, picture: np.ndarray, step: int, caption: str) -> None:
        import wandb

        if step >= self.run.step and step > self.last_validation:
            self.tracker.log({tag: wandb.Image(picture, caption=caption)}, step)

    def video(self, tag: str, frames: np.ndarray, fps: float, step: int, caption: str) -> None:
        import wandb

        if step >= self.run.step and step > self.last_validation:
            with _mp4(tag, frames, fps) as path:
                self.tracker.log({tag: wandb.Video(str(path), caption=caption, format="mp4")}, step)

    def close(self, failed: bool = False) -> None:
        self.run.finish(exit_code=int(failed))


class MLflowLogger(ContinuedLogger):
    """MLflow, on a server or in a file."""

    name = "mlflow"

    def __init__(self, settings: schema.MLflow, root: str | Path) -> None:
        self.settings, self.root = settings, Path(root).absolute()
        self.local = f"sqlite:///{self.root / 'mlflow.db'}"

    def place(self, folder: Path) -> str:
        return self.settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or self.local

    def start(self, folder: Path, run: str | None) -> str:
        # By default each call tries for minutes to reach a server, while training waits.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        import mlflow
        from accelerate.tracking import MLflowTracker

        settings, place = self.settings, self.place(folder)
        mlflow.set_tracking_uri(place)
        self.tracker = _started(
            MLflowTracker(
                settings.experiment,
                logging_dir=(self.root / "mlflow").as_uri() if place == self.local else None,
                run_id=settings.run_id or run,
                run_name=settings.name or folder.name,
                tags=settings.tags or None,
            )
        )
        return self.tracker.active_run.info.run_id

    def config(self, values: Mapping[str, Any], step: int) -> None:
        """A parameter of MLflow keeps its first value; the text `configuration` of each launch has the current ones."""
        import mlflow

        known = mlflow.get_run(self.tracker.active_run.info.run_id).data.params
        self.tracker.store_init_configuration(
            {name: value for name, value in flat(values).items() if name not in known}
        )

    def text(self, tag: str, text: str, step: int) -> None:
        import mlflow

        mlflow.log_text(text, f"{tag}_step{step}.txt")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if values := self.unwritten(values, step):
            self.tracker.log(values, step)

    def image(self, tag: str, picture: np.ndarray, step: int, caption: str) -> None:
        import mlflow

        if step > self.last_validation:
            mlflow.log_image(picture, key=tag, step=step, synchronous=True)

    def video(self, tag: str, frames: np.ndarray, fps: float, step: int, caption: str) -> None:
        import mlflow

        if step > self.last_validation:
            with _mp4(f"{tag}_step{step}", frames, fps) as path:
                mlflow.log_artifact(str(path), tag.partition("/")[0])

    def close(self, failed: bool = False) -> None:
        import mlflow

        mlflow.end_run("FAILED" if failed else "FINISHED")


class TrackioLogger(ContinuedLogger):
    """trackio, in its local database or a Space. It continues runs by name."""

    name = "trackio"

    def __init__(self, settings: schema.Trackio) -> None:
        self.settings = settings

    def place(self, folder: Path) -> str:
        return f"{self.settings.space_id or ''}/{self.settings.project}"

    def start(self, folder: Path, run: str | None) -> str:
        from accelerate.tracking import TrackioTracker

        settings = self.settings
        name = settings.name or run or folder.name
        self.tracker = _started(
            TrackioTracker(
                settings.project,
                name=name,
                group=settings.group,
                space_id=settings.space_id,
                resume="allow" if name == run else "never",
                embed=False,
            )
        )
        self.run = self.tracker.run
        return name

    def config(self, values: Mapping[str, Any], step: int) -> None:
        # TrackioTracker.store_init_configuration adds its keyword allow_val_change to the values.
        self.run.config.update(flat(values))

    def text(self, tag: str, text: str, step: int) -> None:
        import trackio

        self.run.log({tag: trackio.Markdown(f"```\n{text}\n```")}, step=step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        if values := self.unwritten(values, step):
            self.run.log(values, step=step)  # as TrackioTracker.log, which drops the step before accelerate 1.14

    def image(self, tag: str, picture: np.ndarray, step: int, caption: str) -> None:
        import trackio

        if step > self.last_validation:
            self.run.log({tag: trackio.Image(picture, caption=caption)}, step=step)

    def video(self, tag: str, frames: np.ndarray, fps: float, step: int, caption: str) -> None:
        import trackio

        if step > self.last_validation:
            with _mp4(tag, frames, fps) as path:
                self.run.log({tag: trackio.Video(str(path), caption=caption)}, step=step)

    def close(self, failed: bool = False) -> None:
        self.tracker.finish()
