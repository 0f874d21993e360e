"""The `vae3d` command, also `python -m vae3d`: `vae3d train stage=stage3 ...` trains; `vae3d --help` lists what else.

Imports nothing slow before the first line is printed, and torch only once the keys of a configuration are right: an
unknown key is reported within a second. Several ranks: `torchrun --nproc-per-node=8 -m vae3d train ...`, or
`torchrun --nproc-per-node=8 train.py ...`.
"""

from __future__ import annotations

import vae3d.interrupts  # first, for Ctrl-C during the other imports

# isort: split
import gc
import os
import re
import sys
import time
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

from vae3d.errors import UserError

# Threads that spin while they wait for each other are ten times slower where another program uses the cores. Read when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from vae3d.config.issues import ConfigIssue
    from vae3d.config.schema import TrainConfig

HELP_FLAGS = ("-h", "--help")
# The check of a VAE's training on the meta device needs these.
MODEL_KEYS = ("model", "loss", "teacher", "adversary", "stage.train", "data.frames", "data.height", "data.width")
MODEL_KEYS += ("data.buckets", "data.sources")


def check_training(cfg: DictConfig, issues: Sequence[ConfigIssue] = ()) -> TrainConfig:
    """The configuration as typed objects. Raises ConfigError with every error, those of the model included.

    issues: those of the command line. The model is built on the meta device, which imports torch, unless a key of it is
    unknown or has a wrong type.
    """
    from vae3d.config.issues import add_new, is_within, raise_if_any
    from vae3d.config.validate import training_issues

    config, found = training_issues(cfg)
    found = [*issues, *found]
    if not any(issue.malformed or is_within(issue.key, key) for issue in found for key in MODEL_KEYS):
        from vae3d.commands import meta_check

        found = add_new(found, meta_check.issues(config))
        if lacking := [issue for issue in found if issue.weights]:
            found = [issue for issue in found if not issue.weights]
            if config.debug.mode != "dry":  # which lists them, and goes on
                found.append(meta_check.missing_weights(config, lacking))
    raise_if_any(found)
    return config


class HydraCommand(NamedTuple):
    """A command that is configured by conf/<config_name>.yaml and `key=value` arguments.

    Its module has `run(config)`; of a training command `build_trainer(config, folder)` and `next_commands(trainer)`.
    example: arguments, for --help. check: module:function that takes a configuration and the errors of the command
    line, and returns typed objects or raises ConfigError. metric: makes it a training command: the metric that a sweep
    optimizes. path_node: KEY=PATH is short for KEY.path=PATH. flags: `--KEY VALUE` may stand for KEY=VALUE.
    """

    summary: str
    example: str
    config_name: str
    check: str
    metric: str | None = None
    path_node: str | None = None
    flags: tuple[str, ...] = ()


class ArgparseCommand(NamedTuple):
    """A command with flags. Its module has `main(flags)`, which returns the exit status.

    parse: module:function that reads the flags. It imports no torch, so that --help and a wrong flag are answered at
    once. None: the module imports no torch either, and its `main(arguments)` reads the flags.
    """

    summary: str
    parse: str | None = None


# Commands whose module is called otherwise.
MODULES = {
    "check-data": "vae3d.commands.check_data",
    "bench-data": "vae3d.commands.bench_data",
    "try": "vae3d.commands.try_video",
    "app": "vae3d.app.main",
}
COMMANDS: dict[str, HydraCommand | ArgparseCommand] = {
    "try": ArgparseCommand("Show what an autoencoder does to a video", "vae3d.commands.flags:parse_try"),
    "app": ArgparseCommand("Try autoencoders on videos in a browser"),
    "train": HydraCommand(
        "Train a video autoencoder",
        "experiment=wan_finetune stage.init_from=Wan2.1_VAE.pth data.source.path=videos.csv",
        "train",
        "vae3d.commands.cli:check_training",
        metric="val/psnr",
    ),
    "infer": HydraCommand(
        "Reconstruct videos and images",
        "checkpoint=Wan2.1_VAE.pth source=videos.csv save_dir=out/wan metrics=[psnr,ssim]",
        "infer",
        "vae3d.config.validate:check_inference",
        path_node="teacher",  # an unknown key here: its error names vae3d compare
    ),
    "compare": HydraCommand(
        "Compare a distilled student with its teacher",
        "checkpoint=runs/taehv_wan_best teacher=Wan2.1_VAE.pth source=videos.csv save_dir=out/tiny",
        "compare",
        "vae3d.config.validate:check_comparison",
        path_node="teacher",  # Hydra would look for teacher=PATH in conf/teacher
    ),
    "eval": ArgparseCommand("Score reconstructed videos against their originals", "vae3d.commands.flags:parse_eval"),
    "encode": HydraCommand(
        "Encode a data set into a latent cache",
        "checkpoint=Wan2.1_VAE.pth source=videos.csv cache=latents/wan frames=17 height=256 width=256",
        "latents",
        "vae3d.config.latents:check_encoding",
        flags=("shard",),
    ),
    "encode-status": ArgparseCommand(
        "Show how much of a latent cache is encoded, and by which processes", "vae3d.commands.flags:parse_encode_status"
    ),
    "latent-stats": ArgparseCommand(
        "Print the statistics of a latent cache; write its scale into an export",
        "vae3d.commands.flags:parse_latent_stats",
    ),
    "measure-scale": ArgparseCommand(
        "Measure the scale of a model's latents; write it into its export", "vae3d.commands.flags:parse_measure_scale"
    ),
    "probe-latents": ArgparseCommand(
        "Compare the latents of several autoencoders", "vae3d.commands.flags:parse_probe_latents"
    ),
    "train-diffusion": HydraCommand(
        "Train a diffusion model on latents",
        "vae.path=Wan2.1_VAE.pth cache=latents/wan denoiser=video_transformer labels=none",
        "diffusion",
        "vae3d.config.diffusion:check_diffusion",
        metric="val/loss",
    ),
    "sample": HydraCommand(
        "Draw samples from a latent diffusion model",
        "checkpoint=runs/ldm-video_transformer-flow out=samples count=64",
        "sample",
        "vae3d.config.diffusion:check_sampling",
    ),
    "make-shards": ArgparseCommand("Write tar shards from any source", "vae3d.commands.flags:parse_make_shards"),
    "index": ArgparseCommand("Index tar shards, for training from them", "vae3d.commands.flags:parse_index"),
    "check-data": ArgparseCommand(
        "Find the files of a data set that cannot be read", "vae3d.commands.check_data:parse"
    ),
    "bench-data": ArgparseCommand(
        "Measure how fast the clips of a data set are read", "vae3d.commands.bench_data:parse"
    ),
    "convert": ArgparseCommand(
        "Convert a checkpoint to the layout of another program", "vae3d.commands.flags:parse_convert"
    ),
    "fetch-weights": ArgparseCommand("Download the pretrained networks that losses and metrics need"),
}


def module_of(name: str) -> str:
    """The module of a command."""
    return MODULES.get(name, f"vae3d.commands.{name.replace('-', '_')}")


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Run a command and return its exit status; None is 0. An error of the user's exits with status 2.

    arguments: its name and its own arguments; None: those of `vae3d`."""
    program = [os.path.abspath(sys.argv[0])]  # starts this command again, once its arguments are added
    if arguments is None:
        arguments = sys.argv[1:] or ["--help"]
        spec = sys.modules["__main__"].__spec__
        program = [*(["-m", spec.name.removesuffix(".__main__")] if spec else program), arguments[0]]
    name, *rest = arguments
    if name in HELP_FLAGS:
        print(usage())
        return 0
    if name == "--version" or (name in COMMANDS and rest == ["--version"]):  # Hydra would answer with its own
        print(f"vae3d {vae3d.__version__}")
        return 0
    if name not in COMMANDS:
        from vae3d.config.issues import close_match

        near = close_match(name, COMMANDS)
        hint = f"did you mean {near}?" if near else "`vae3d --help` lists the commands"
        print(f"error: vae3d has no command {name}; {hint}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    gc.disable()  # nearly all objects that imports make stay: collecting among them takes a quarter of the start
    try:
        if isinstance(command, HydraCommand):
            rest = without_flags(rest, command.flags)
            shows_only = any(a.startswith("-") and a not in ("-m", "--multirun") for a in rest)  # --help, --cfg, ...
            if os.environ.get("RANK", "0") == "0" and not shows_only:
                print(f"vae3d {name}: checking the configuration ...", file=sys.stderr, flush=True)
            return run_with_hydra(name, program, rest)
        if len(program) > 1:  # not one of the scripts
            sys.argv[0] = f"vae3d {name}"  # argparse's usage line begins with it
        return run_with_flags(command, module_of(name), rest)
    finally:
        gc.enable()


def without_flags(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Arguments with KEY=VALUE in place of --KEY VALUE and --KEY=VALUE, for the keys in `flags`."""
    found, rest = [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name in flags:
            argument = f"{name}={value if equals else next(rest, '')}"
        found.append(argument)
    return found


def collect_garbage_again() -> None:
    """After the imports: collect, but never look through what they made. A later job of a sweep freezes nothing: the
    objects of the job before it must be collected."""
    freeze_garbage_once()
    gc.enable()


@cache
def freeze_garbage_once() -> None:
    """Not by gc.get_freeze_count(), which counts objects one by one: 50 ms after the imports of a run."""
    gc.freeze()


def usage() -> str:
    lines = ["usage: vae3d COMMAND ...", ""]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:16} {command.summary}")
    return "\n".join([*lines, "", "`vae3d COMMAND --help` lists a command's settings."])


def run_with_flags(command: ArgparseCommand, module: str, arguments: Sequence[str]) -> int | None:
    """Run a command with flags and return its exit status."""
    from vae3d.commands.console import exit_on_user_error

    given: Any = arguments
    if command.parse is not None:
        given = resolve_name(command.parse)(arguments)
        if os.environ.get("RANK", "0") == "0" and "torch" not in sys.modules:
            print(f"{sys.argv[0]}: importing torch ...", file=sys.stderr, flush=True)

    def run() -> int | None:
        main = import_module(module).main
        collect_garbage_again()
        return main(given)

    return exit_on_user_error(run)


def run_with_hydra(name: str, program: list[str], arguments: Sequence[str]) -> None:
    """Compose the configuration from conf/ and `key=value` arguments and run the command; with -m, once per job."""
    import hydra

    from vae3d.commands import launch, sweep
    from vae3d.commands.console import exit_on_user_error
    from vae3d.config.issues import raise_if_any
    from vae3d.config.overrides import allow_unknown_keys, override_issues, without_run_values
    from vae3d.config.schema import CONF
    from vae3d.io import remove_empty

    command, module = COMMANDS[name], module_of(name)
    resolve_name(command.check)  # its module gives Hydra the defaults of the schema
    if node := command.path_node:
        arguments = [re.sub(rf"^{node}=", f"{node}.path=", argument) for argument in arguments]
    overrides = allow_unknown_keys(arguments)
    exit_on_user_error(lambda: raise_if_any(override_issues(overrides)))
    sys.argv[1:], issues = without_run_values(overrides)
    if print_help(name, sys.argv[1:]):
        return

    def job(cfg: DictConfig) -> float | None:
        if command.metric is None:
            return exit_on_user_error(lambda: run(command, module, cfg, issues))
        try:
            return exit_on_user_error(lambda: train(command, module, program, cfg, issues))
        finally:
            launch.remove_unbegun(launch.run_directory())

    job.__module__ = module  # Hydra names the job after it
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=command.config_name)(job)()
    finally:
        if command.metric is not None and sweep.current is not None:  # also after a job failed, or a signal
            print(f"\n{sweep.results(sweep.current, command.metric)}", flush=True)
            sweep.remove_unbegun(sweep.current)
            remove_empty(*launch.RunFolders.made)


def print_help(name: str, arguments: Sequence[str]) -> bool:
    """Print the help that `--help` asks for; for a wrong choice exit with status 2. False if it does not, or if there
    are other flags, which are Hydra's."""
    flags = {a for a in arguments if a.startswith("-")}
    if flags.isdisjoint(HELP_FLAGS) or not flags <= {*HELP_FLAGS, "-m", "--multirun"}:
        return False
    from hydra.errors import HydraException

    from vae3d.commands.help import help_text

    command = COMMANDS[name]
    try:
        settings = help_text(command.config_name, [a for a in arguments if a not in flags])
    except HydraException as error:
        print(f"error: {str(error).partition('Config search path')[0].strip()}", file=sys.stderr)
        sys.exit(2)
    print(f"usage: vae3d {name} KEY=VALUE ...\n\n{command.summary}:\n  vae3d {name} {command.example}")
    print(f"On several GPUs:\n  torchrun --nproc_per_node=8 -m vae3d {name} ...\n\n{settings}")
    return True


def run(command: HydraCommand, module: str, cfg: DictConfig, issues: Sequence[ConfigIssue]) -> None:
    """Check the configuration and run the command in this process."""
    config = resolve_name(command.check)(cfg, issues)
    from vae3d.distributed import process_group_scope  # imports torch, which a wrong configuration need not wait for

    with process_group_scope():
        command_module = import_module(module)
        collect_garbage_again()
        command_module.run(config)


def train(
    command: HydraCommand, module: str, program: list[str], cfg: DictConfig, issues: Sequence[ConfigIssue]
) -> float | None:
    """Check the configuration and train, here or in ranks started with torchrun.

    Returns command.metric at the last step, for the sweeper.
    """
    from vae3d.commands import launch
    from vae3d.commands.console import in_sweep

    if in_sweep() and launch.under_torchrun():  # whose ranks would run different jobs once one of them fails
        raise UserError(
            "a sweep (-m) cannot run under torchrun; let each job start its own ranks:\n"
            "  vae3d train -m ... launcher=torchrun launcher.nproc=N"
        )
    config = resolve_name(command.check)(cfg, issues)
    if launch.starts_ranks(config.launcher):
        launch.torchrun_child(config.launcher, program)
    else:
        launch.with_elastic_record(lambda: train_here(module, config, cfg))
    return launch.last_metric(launch.run_directory(), command.metric, config.trainer.max_steps)


def train_here(module: str, config: Any, cfg: DictConfig) -> None:
    """Train in this process, or with debug=dry log what the run would be.

    Exits with status 128 + N if signal N ended the run; neither `&&` nor a sweep continues then.
    """
    from vae3d.commands import launch
    from vae3d.commands.closing import closing
    from vae3d.commands.console import in_sweep, no_log_file
    from vae3d.distributed import process_group_scope

    dry = config.debug.mode == "dry"
    command = import_module("vae3d.commands.dry_run" if dry else module)
    collect_garbage_again()
    if dry:
        no_log_file()
        command.describe(config)
        return
    folder = launch.run_directory()
    with process_group_scope():
        trainer = command.build_trainer(config, folder)
        launch.write_configuration(folder, cfg)
        first_step, start = trainer.step, time.monotonic()
        signum = launch.fit(trainer)
        seconds = time.monotonic() - start
        # A sweep ends with a table instead.
        trainer.log.say(closing(trainer, first_step, seconds, [] if in_sweep() else command.next_commands(trainer)))
    if signum:
        sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
