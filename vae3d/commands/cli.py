"""The `vae3d` command: `vae3d train stage=stage3 ...` runs what `python train.py stage=stage3 ...` runs.

Imports no torch, so that `vae3d --help` and an error in a configuration appear within a second. Several ranks:
`torchrun --nproc-per-node=8 -m vae3d.commands.cli train ...`, or `torchrun --nproc-per-node=8 train.py ...`.
"""

from __future__ import annotations

import vae3d.interrupts  # noqa: F401  (first, for Ctrl-C during the other imports)

# isort: split
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import hydra
from omegaconf import DictConfig

from vae3d.commands import launch
from vae3d.commands.check import check_training
from vae3d.config.diffusion import check_diffusion, check_sampling
from vae3d.config.latents import check_encoding
from vae3d.config.schema import CONF
from vae3d.config.validate import check_comparison, check_inference


class HydraCommand(NamedTuple):
    """A command that is configured by conf/<config_name>.yaml and `key=value` arguments.

    module: has `run(config)`; of a training command `build_trainer(config, folder)` and `describe(config)`.
    metric: makes it a training command: the metric that a sweep optimizes. path_node: KEY=PATH is short for
    KEY.path=PATH.
    """

    summary: str
    module: str
    config_name: str
    check: Callable[[DictConfig], Any]
    metric: str | None = None
    path_node: str | None = None


class ArgparseCommand(NamedTuple):
    """A command with flags. module: has `main(arguments)`, which returns the exit status."""

    summary: str
    module: str


COMMANDS: dict[str, HydraCommand | ArgparseCommand] = {
    "train": HydraCommand(
        "Train a video autoencoder", "vae3d.commands.train", "train", check_training, metric="val/psnr"
    ),
    "infer": HydraCommand(
        "Reconstruct videos and images",
        "vae3d.commands.infer",
        "infer",
        check_inference,
        path_node="teacher",  # an unknown key here: its error names scripts/compare.py
    ),
    "compare": HydraCommand(
        "Compare a distilled student with its teacher",
        "vae3d.commands.compare",
        "compare",
        check_comparison,
        path_node="teacher",  # Hydra would look for teacher=PATH in conf/teacher
    ),
    "eval": ArgparseCommand("Score reconstructed videos against their originals", "vae3d.commands.eval"),
    "encode": HydraCommand("Encode a data set into a latent cache", "vae3d.commands.encode", "latents", check_encoding),
    "latent-stats": ArgparseCommand(
        "Print the statistics of a latent cache; write its scale into an export", "vae3d.commands.latent_stats"
    ),
    "measure-scale": ArgparseCommand(
        "Measure the scale of a model's latents; write it into its export", "vae3d.commands.measure_scale"
    ),
    "probe-latents": ArgparseCommand("Compare the latents of several autoencoders", "vae3d.commands.probe_latents"),
    "train-diffusion": HydraCommand(
        "Train a diffusion model on latents",
        "vae3d.commands.train_diffusion",
        "diffusion",
        check_diffusion,
        metric="val/loss",
    ),
    "sample": HydraCommand(
        "Draw samples from a latent diffusion model", "vae3d.commands.sample", "sample", check_sampling
    ),
    "check-data": ArgparseCommand("Find the files of a data set that cannot be read", "vae3d.data.check"),
    "convert": ArgparseCommand("Convert a checkpoint to the layout of another program", "vae3d.commands.convert"),
    "fetch-weights": ArgparseCommand(
        "Download the pretrained networks that losses and metrics need", "vae3d.commands.fetch_weights"
    ),
}


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run a command and return its exit status; None is 0. Hydra commands exit by themselves on an error.

    arguments: its name and its own arguments; None: those of `vae3d`."""
    program = [os.path.abspath(sys.argv[0])]  # starts this command again, once its arguments are added
    if arguments is None:
        arguments = sys.argv[1:] or ["--help"]
        spec = sys.modules["__main__"].__spec__
        program = [*(["-m", spec.name] if spec else program), arguments[0]]
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "`vae3d --help` lists the commands"
        print(f"error: vae3d has no command {name}; {hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if isinstance(command, HydraCommand):
        return run_with_hydra(command, program, rest)
    sys.argv[0] = f"vae3d {name}"  # argparse's usage line begins with it
    return import_module(command.module).main(rest)


def usage() -> str:
    lines = ["usage: vae3d COMMAND ...", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:16} {command.summary}")
    return "\n".join([*lines, "", "`vae3d COMMAND --help` lists a command's settings."])


def run_with_hydra(command: HydraCommand, program: list[str], arguments: Sequence[str]) -> None:
    """Compose the configuration from conf/ and `key=value` arguments and run the command; with -m, once per job."""

    def job(cfg: DictConfig) -> float | None:
        if command.metric is None:
            return launch.exit_on_user_error(lambda: run(command, cfg))
        return launch.exit_on_user_error(lambda: train(command, program, cfg))

    job.__module__ = command.module  # Hydra names the job after it
    if node := command.path_node:
        arguments = [re.sub(rf"^{node}=", f"{node}.path=", argument) for argument in arguments]
    sys.argv[1:] = launch.read_arguments(arguments)
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=command.config_name)(job)()


def run(command: HydraCommand, cfg: DictConfig) -> None:
    """Check the configuration and run the command in this process."""
    config = command.check(cfg)
    from vae3d.distributed import process_group_scope  # imports torch, which a wrong configuration need not wait for

    with process_group_scope():
        import_module(command.module).run(config)


def train(command: HydraCommand, program: list[str], cfg: DictConfig) -> float | None:
    """Check the configuration and train, here or in ranks started with torchrun.

    Returns command.metric at the last step, for the sweeper.
    """
    launch.forbid_sweep_under_torchrun()
    config = command.check(cfg)
    if launch.starts_ranks(config.launcher):
        launch.torchrun_child(config.launcher, program)
    else:
        launch.with_elastic_record(lambda: train_here(command.module, config, cfg))
    return launch.last_metric(launch.run_directory(), command.metric, config.trainer.max_steps)


def train_here(name: str, config: Any, cfg: DictConfig) -> None:
    """Train in this process, or with debug=dry log what the run would be."""
    from vae3d.distributed import process_group_scope

    module = import_module(name)
    if config.debug.mode == "dry":
        module.describe(config)
        return
    folder = launch.prepare_run_folder(cfg)
    with process_group_scope():
        signum = launch.fit(module.build_trainer(config, folder))
    launch.end_after(signum)


if __name__ == "__main__":
    sys.exit(main())
