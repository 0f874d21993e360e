"""Run folders, ranks and exit statuses of training commands. Imports no torch."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vae3d.commands.console import exit_on_user_error, print_error, rank
from vae3d.commands.sweep import JOB, SETTINGS, begin_sweep, metric_rows, record_job
from vae3d.config.overrides import quoted
from vae3d.config.schema import Launcher
from vae3d.errors import UserError
from vae3d.io import naming, remove_empty, write_text

if TYPE_CHECKING:
    from vae3d.training.trainer import Trainer

R = TypeVar("R")
BEFORE_TRAINING = re.compile(rf"rank\d+\.log|{re.escape(JOB)}")  # names in a run's folder
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# torchrun without the traceback that it prints after a signal; by then all ranks have ended.
TORCHRUN = """\
import sys
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.run import main
try:
    main()
except SignalException as error:
    sys.exit(128 + error.sigval)
"""


def run_directory() -> Path:
    return Path(HydraConfig.get().runtime.output_dir)


def write_configuration(folder: Path, cfg: DictConfig) -> None:
    """Write the configuration into the folder of a run that begins, as .hydra/rank<N>/*.yaml. Raises FileError.

    Hydra's own writer is off (output_subdir: null): it follows symbolic links, and would replace the configuration of
    a run that this process may not resume.
    """
    info = HydraConfig.instance().cfg
    target = folder / ".hydra" / f"rank{rank()}"
    with naming(target):
        target.mkdir(parents=True, exist_ok=True)
        for name, content in (("config", cfg), ("hydra", info), ("overrides", info.hydra.overrides.task)):
            write_text(target / f"{name}.yaml", OmegaConf.to_yaml(content))


def remove_unbegun(folder: Path) -> None:
    """Remove what this process put into a run's folder if no training began in it, as after a failed check or a dry
    run, and the folders that are empty then."""
    if not folder.is_dir() or any(not BEFORE_TRAINING.fullmatch(path.name) for path in folder.iterdir()):
        return
    (folder / f"rank{rank()}.log").unlink(missing_ok=True)
    is_inside = RunFolders.root in folder.parents
    above = takewhile(lambda parent: parent != RunFolders.root, folder.parents) if is_inside else ()
    remove_empty(folder, *above, *RunFolders.made)


class RunFolders(Callback):
    """Exits with one message if the folder of a run or sweep cannot be created, or if a sweep's multirun.yaml is a
    symbolic link. In a sweep, writes how each job ended into its folder, for sweep.results.

    Exits by SystemExit: Hydra turns other exceptions of callbacks into warnings.

    root: run.root. made: folders that had to be created for it, the innermost first.
    """

    root: ClassVar[Path] = Path()
    made: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        HydraConfig.instance().set_config(config)  # as Hydra does next: the name of a run may refer to its choices
        self.make(config, Path(config.hydra.run.dir))

    @staticmethod
    def make(config: DictConfig, folder: Path) -> None:
        root = Path(str(config.run.root)).absolute()
        RunFolders.root = root
        RunFolders.made = [path for path in (root, *root.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"error: run.root={config.run.root}: {folder} cannot be created: {error.strerror}", file=sys.stderr)
            sys.exit(2)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.make(config, Path(config.hydra.sweep.dir))
        file = Path(config.hydra.sweep.dir) / SETTINGS
        if file.is_symlink():
            print(f"error: {file}: is a symbolic link to {os.readlink(file)}; delete it", file=sys.stderr)
            sys.exit(2)
        begin_sweep(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            record_job(Path(config.hydra.runtime.output_dir), job_return)


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ or "RANK" in os.environ


def starts_ranks(launcher: Launcher) -> bool:
    """Whether this process starts torchrun instead of training itself."""
    return launcher.name == "torchrun" and not under_torchrun()


def search_path() -> list[str]:
    """The override that names the user's own folders of configuration files, of --config-dir and hydra.searchpath; none
    without them."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [f"{source.schema}://{source.path}" for source in sources if source.provider.endswith("command-line")]
    return [f"hydra.searchpath=[{','.join(map(quoted, folders))}]"] if folders else []


def torchrun_child(launcher: Launcher, program: Sequence[str]) -> None:
    """Run this job again under torchrun, with the same overrides and run folder, and wait for it.

    program: what to start, such as ["train.py"] or ["-m", "vae3d", "train"]. Raises RuntimeError if it
    fails: then Hydra continues with the sweep's next job, which it does not after SystemExit.
    """
    overrides = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+").startswith("launcher")]
    overrides += search_path()
    command = [
        *(sys.executable, "-c", TORCHRUN),
        *([] if any("rdzv" in a or "master" in a for a in launcher.args) else ["--standalone"]),
        *(f"--nproc-per-node={launcher.nproc}", *launcher.args),
        *(*program, *overrides, f"hydra.run.dir={quoted(str(run_directory()))}"),
    ]
    # In its own session: the terminal sends Ctrl-C to this process only, which forwards it once.
    child = subprocess.Popen(command, start_new_session=True)
    received: list[int] = []

    def forward(signum: int, _: object) -> None:
        received.append(signum)
        child.send_signal(signum)

    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    for signum, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(signum, forward)
    try:
        code = child.wait()
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    if received:
        sys.exit(128 + received[0])
    if code:
        logs = f"; see the log files in {run_directory()}" if run_directory().is_dir() else ""
        raise RuntimeError(f"torchrun exited with {code}{logs}")


def fit(trainer: Trainer) -> int:
    """Run trainer.fit(); returns the number of the signal that ended it, or 0.

    A UserError after a signal exits with status 2, which ends a sweep too; without a signal it is raised, and the
    sweep continues with its next job.
    """
    try:
        trainer.fit()
    except UserError as error:
        if not trainer.stopped_by:
            raise
        print_error(error)
        sys.exit(2)
    return trainer.stopped_by


def last_metric(folder: Path, name: str, step: int) -> float | None:
    """A metric at a step, from the run's metrics.jsonl.

    NaN if the run has the metric at other steps only, as after a failed validation; None if it never has it.
    """
    values = {row["step"]: row[name] for row in metric_rows(folder) if name in row}
    return values.get(step, math.nan) if values else None


def with_elastic_record(run: Callable[[], R]) -> R:
    """Call run() such that torchrun's summary shows a rank's exception, which Hydra would catch."""
    if not under_torchrun():
        return run()
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(exit_on_user_error)(run)
