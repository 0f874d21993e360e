"""Loss curves of a tiny run of every experiment, on one rank and on two, to prove that a refactoring changes nothing.

    python -m tests.golden record FOLDER      before the change
    python -m tests.golden compare FOLDER     after it: runs everything again; every number must be equal, bit for bit
    python -m tests.golden publish NAME       the curve of a new experiment, rounded, into tests/golden_curves/

Sums are only made in the same order on the same kind of processor with the same versions of torch and PyAV, so record and
compare on one machine. The test suite compares one rank with tests/golden_curves/, with a tolerance.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PUBLISHED = Path(__file__).parent / "golden_curves"
LATENT = ["unet_tiny", "video_tiny"]
STEPS = 4
SIZE = ["data.batch_size=4", f"trainer.max_steps={STEPS}"]
SPEED_AND_MEMORY = ("clips_per_second", "frames_per_second", "samples_per_second", "memory_gib", "memory_idle_gib")
RENAMED = {  # since the curves were recorded
    "gan/real_right": "gan/real_accuracy",
    "gan/fake_right": "gan/fake_accuracy",
    "gan/pair_right": "gan/pair_accuracy",
}


def curve(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without speed and memory."""
    return comparable([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without speed and memory, and under the current names of metrics."""
    return [
        {RENAMED.get(name, name): line[name] for name in sorted(line) if name not in SPEED_AND_MEMORY} for line in lines
    ]


def start(run: Callable[[], None], log: Path, **environment: str) -> BaseProcess:
    """Call `run` in a forked process, which appends what it prints to `log`. This process must not compute with torch."""

    def child() -> None:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ.update(environment)
        run()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def wait(processes: list[BaseProcess], log: Path) -> None:
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit(f"a run failed:\n{log.read_text()}")


def experiment_overrides(name: str, folder: Path, data: Path) -> list[str]:
    import torch

    from tests import tiny_experiments

    torch.manual_seed(0)
    made = tiny_experiments.overrides(name, folder, data / "videos/videos.csv", data / "rooms", data / "images")
    return [*made, *SIZE]


def train(overrides: list[str], folder: Path) -> None:
    import torch

    from tests import tiny
    from vae3d.commands.cli import check_training
    from vae3d.commands.train import build_trainer

    torch.set_num_threads(1)
    build_trainer(check_training(tiny.compose(*overrides)), folder).fit()


def latent_overrides(name: str, folder: Path, data: Path) -> list[str]:
    """A tiny VAE with its measured scale, and what trains on images as they are encoded."""
    from tests.diffusion import latent_runs

    images = latent_runs.pictures(folder / "pictures")
    vae = latent_runs.vae("spatial", folder / "vae", images / "images.csv", "model.channels=[8,8,8]")
    network = "unet" if name == "unet_tiny" else "video_transformer"
    where = [f"vae.path={vae}", "cache=null", f"data.source.path={images}", "data.height=64", "data.width=64"]
    tiny = [*latent_runs.SMALL, *latent_runs.NETWORKS[network][1:], "trainer.log_every=1", "validation.every=2"]
    return [f"latent_experiment={name}", *tiny, *where, "labels=folder", f"trainer.max_steps={STEPS}", "run.name=test"]


def train_latent(overrides: list[str], folder: Path) -> None:
    import torch

    from tests import tiny
    from vae3d.commands.train_diffusion import build_trainer
    from vae3d.config.diffusion import check_diffusion

    torch.set_num_threads(1)
    build_trainer(check_diffusion(tiny.compose(*overrides, config="diffusion")), folder).fit()


def make_data(folder: Path) -> None:
    """The files that the tests' fixtures make."""
    from tests import fixtures

    class Folders:
        def mktemp(self, name: str) -> Path:
            (folder / name).mkdir()
            return folder / name

    for fixture in ("videos", "images", "rooms"):
        getattr(fixtures, fixture).__wrapped__(Folders())
    os.environ["VAE3D_WEIGHTS"] = str(folder / "weights")
    (folder / "weights").mkdir()
    fixtures.trunks.__wrapped__(None)


Curves = dict[str, dict[str, list[dict[str, Any]]]]  # by experiment and number of ranks


def run_all(folder: Path, experiments: Sequence[str], numbers_of_ranks: Sequence[int]) -> Curves:
    from tests import tiny

    log = folder / "log.txt"
    environment = {"VAE3D_CACHE": str(folder / "cache"), "VAE3D_WEIGHTS": str(folder / "data/weights")}
    environment |= {"VAE3D_ALLOW_UNVERIFIED": "1", "CUDA_VISIBLE_DEVICES": ""}
    (folder / "data").mkdir(parents=True)
    wait([start(lambda: make_data(folder / "data"), log, VAE3D_CACHE=str(folder / "cache"))], log)
    curves = {}
    for name in experiments:
        prepare, run = (latent_overrides, train_latent) if name in LATENT else (experiment_overrides, train)
        here = folder / name
        here.mkdir()

        def prepared(name=name, prepare=prepare, here=here) -> None:
            os.chdir(here)
            (here / "overrides.json").write_text(json.dumps(prepare(name, here, folder / "data")))

        wait([start(prepared, log, **environment)], log)
        overrides = json.loads((here / "overrides.json").read_text())
        curves[name] = {}
        for ranks in numbers_of_ranks:
            place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny._free_port())}
            target = here / f"ranks{ranks}"

            def rank_run(run=run, overrides=overrides, target=target, here=here) -> None:
                os.chdir(here)
                run(overrides, target)

            ranks_running = []
            for rank in range(ranks):
                mine = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                ranks_running.append(start(rank_run, log, **environment, **mine))
            wait(ranks_running, log)
            curves[name][str(ranks)] = curve(target)
        lines = " and ".join(str(len(lines)) for lines in curves[name].values())
        print(f"{name}: {lines} lines", flush=True)
    return curves


def main() -> int:
    from tests.tiny_experiments import EXPERIMENTS
    from vae3d.errors import UserError
    from vae3d.io import hold_lock

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    for action in ("record", "compare"):
        arguments = actions.add_parser(action)
        arguments.add_argument("folder", type=Path)
        arguments.add_argument("experiments", nargs="*", help="by default all")
    actions.add_parser("publish").add_argument("experiments", nargs="+", choices=EXPERIMENTS, metavar="NAME")
    args = parser.parse_args()
    experiments = args.experiments or [*EXPERIMENTS, *LATENT]
    if args.action == "compare":
        missing = [name for name in experiments if not (args.folder / f"{name}.json").is_file()]
        if missing:
            sys.exit(f"{args.folder} has no recording of {', '.join(missing)}; record it before the change")
    # Always the same folder: some splits depend on the paths of files.
    scratch = Path(tempfile.gettempdir()) / "vae3d_golden"
    running = UserError("another `python -m tests.golden` is running; wait for it")
    try:
        with hold_lock(scratch.with_suffix(".lock"), running):
            shutil.rmtree(scratch, ignore_errors=True)
            curves = run_all(scratch, experiments, (1,) if args.action == "publish" else (1, 2))
            shutil.rmtree(scratch)
    except UserError as error:
        sys.exit(f"error: {error}")
    if args.action == "publish":
        return publish(curves)
    return record(curves, args.folder) if args.action == "record" else compare(curves, args.folder)


def publish(curves: Curves) -> int:
    for name, curve_of in curves.items():
        lines = [f' "{step}": {json.dumps(values)}' for step, values in rounded(curve_of["1"]).items()]
        (PUBLISHED / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 0


def rounded(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Losses by step, and the last validation's PSNR, to six digits."""
    steps: dict[int, dict[str, float]] = {}
    for line in lines:
        losses = {name: value for name, value in line.items() if name == "loss" or name.startswith("loss/")}
        steps.setdefault(line["step"], {}).update(losses)
    for line in [line for line in lines if "val/psnr" in line][-1:]:
        steps[line["step"]]["val/psnr"] = line["val/psnr"]
    return {step: {name: float(f"{values[name]:.6g}") for name in values} for step, values in steps.items() if values}


def record(curves: Curves, folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    for name, curve_of in curves.items():
        (folder / f"{name}.json").write_text(json.dumps(curve_of, indent=0) + "\n")
    return 0


def compare(curves: Curves, folder: Path) -> int:
    different = 0
    for name, curve_of in curves.items():
        recorded = json.loads((folder / f"{name}.json").read_text())
        for ranks, lines in curve_of.items():
            before = comparable(recorded[ranks])
            if not any(line["step"] == 0 for line in before):  # recorded before runs validated before step 1
                lines = [line for line in lines if line["step"]]
            if before != json.loads(json.dumps(lines)):
                different += 1
                print(f"{name}, {ranks} ranks: differs {first_difference(before, lines)}")
    print(f"{different} of {2 * len(curves)} curves differ")
    return int(different > 0)


def first_difference(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    for old, new in zip(before, after, strict=False):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                return f"at step {old.get('step')}: {name} was {old.get(name)} and is {new.get(name)}"
    return f"in its number of lines: {len(before)} and {len(after)}"


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # noqa: F401  (once, for all children)

    import vae3d.loading  # noqa: F401

    sys.exit(main())
