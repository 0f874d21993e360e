"""train.py as users start it: python, torchrun, accelerate launch, sweeps; killed, stopped, and given nonsense."""

from __future__ import annotations

import ast
import json
import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from tests import tiny, warm
from vae3d.commands import cli

TRAIN = str(tiny.ROOT / "train.py")
PYTHON = [sys.executable, TRAIN]
STEPS = 8


def arguments(videos: Path, folder: Path, name: str, *more: str, model: str = "temporal_vae") -> list[str]:
    return [
        f"model={model}",
        *tiny.MODEL[model],
        *tiny.TRAINING,
        f"data.source.path={videos}",
        f"run.root={folder}",
        f"run.name={name}",
        "data.frames.max=5",
        *more,
    ]


# MSE, since L1's gradient is a sign, which rounding decides where a pixel is matched almost exactly.
RESUMABLE = [
    "stage=stage3", "loss=recon_kl", "loss.terms.l1.term._target_=vae3d.losses.pixel.MSE",
    "data.batch_size=4", "trainer.accumulate=2", "data.workers=2", "data.flip=true",
    "data.crop=random", "data.frames.images=0.3", "optim.eps=0.01", f"trainer.max_steps={STEPS}",
]  # fmt: skip


def trace(run: Path) -> list[dict[str, float]]:
    """Everything in metrics.jsonl that is not about the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "per_second" not in k and k != "memory_gib"} for line in lines]


def final_state(run: Path) -> dict:
    return torch.load(run / f"checkpoints/step-{STEPS:07d}/state.pt", weights_only=True)


def start(
    videos: Path,
    folder: Path,
    name: str | None,
    *extra: str,
    ranks: int = 1,
    sweep: bool = False,
    train: Sequence[str] = PYTHON,
    environment: Mapping[str, str] | None = None,
) -> warm.Job:
    """train.py in the background, in warm processes, as torchrun starts it if there are several ranks."""
    environments = [{**rank, **(environment or {})} for rank in tiny.rank_environments(ranks)]
    command = [*train, *["-m"] * sweep, *(a for a in arguments(videos, folder, name, *extra) if a != "run.name=None")]
    with open(os.devnull, "w") as output:
        return warm.Job(command, folder, environments, [output.fileno()] * ranks)


def wait_for_step(process: warm.Job, run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        file = run / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached; exit status {process.poll()}")


def run_through(videos: Path, folder: Path, name: str, more: list[str], ranks: int) -> Path:
    codes, printed = tiny.run_ranks(*PYTHON, *arguments(videos, folder, name, *more), cwd=folder, ranks=ranks)
    assert codes == [0] * ranks, "\n".join(printed)
    return folder / name


def run_killed(videos: Path, folder: Path, name: str, more: list[str], ranks: int) -> Path:
    """SIGKILL to every process at a random step, then the same command again."""
    process = start(videos, folder, name, *more, ranks=ranks)
    wait_for_step(process, folder / name, random.randint(3, STEPS - 3))  # at 2 the first checkpoint may be half-written
    process.signal(signal.SIGKILL)
    process.wait()
    run_through(videos, folder, name, more, ranks)
    starts = [json.loads(line)["step"] for line in (folder / name / "launches.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert 0 < starts[1] < STEPS
    return folder / name


@pytest.fixture(scope="module")
def one_rank(videos, tmp_path_factory):
    return run_through(videos, tmp_path_factory.mktemp("one"), "whole", RESUMABLE, ranks=1)


@pytest.fixture(scope="module")
def two_ranks(videos, tmp_path_factory):
    return run_through(videos, tmp_path_factory.mktemp("two"), "whole", RESUMABLE, ranks=2)


def assert_bit_equal(a: Path, b: Path) -> None:
    first, second = final_state(a), final_state(b)
    for kind in ("model", "ema"):
        for name, tensor in first[kind].items():
            assert torch.equal(tensor, second[kind][name]), (kind, name)
    for index, state in first["optimizer"]["state"].items():
        for name, tensor in state.items():
            assert torch.equal(tensor, second["optimizer"]["state"][index][name])
    assert trace(a) == trace(b)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_continues_bit_for_bit(request, videos, tmp_path, ranks):
    whole = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    killed = run_killed(videos, tmp_path, "killed", RESUMABLE, ranks)
    assert [line["step"] for line in trace(killed)] == list(range(1, STEPS + 1))
    assert_bit_equal(whole, killed)


def test_two_ranks_with_half_the_batch_equal_one(one_rank, two_ranks):
    one, two = final_state(one_rank), final_state(two_ranks)
    for kind in ("model", "ema"):
        for name, tensor in one[kind].items():
            assert (two[kind][name] - tensor).abs().max() < 1e-6, (kind, name)
    for a, b in zip(trace(one_rank), trace(two_ranks), strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_ranks_keep_logs_and_configurations_apart(two_ranks):
    assert sorted(path.name for path in (two_ranks / ".hydra").iterdir()) == ["rank0", "rank1"]
    assert len((two_ranks / "launches.jsonl").read_text().splitlines()) == 1


def test_accelerate_launch(videos, tmp_path):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", TRAIN]
    done = tiny.run(*launcher, *arguments(videos, tmp_path, "run", "stage=stage3", "loss=recon_kl"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [line["step"] for line in trace(tmp_path / "run")] == [1, 2]


def test_sweep_of_vae3d_train_with_torchrun_children_until_sigterm(videos, spatial_export, tmp_path):
    """Only here does torchrun itself start the ranks. The first job ends, the second is stopped, the third never starts."""
    (tmp_path / "console.py").write_text("import sys\nfrom vae3d.commands.cli import main\nsys.exit(main())\n")
    (tmp_path / "conf/optim").mkdir(parents=True)
    (tmp_path / "conf/optim/mine.yaml").write_text("betas: [0.8, 0.9]\n")
    process = start(
        videos, tmp_path, None, f"hydra.searchpath=[file://{tmp_path}/conf]", "optim=mine", "stage=stage1", "loss=recon_kl", "loss.terms.kl.weight=1e-5", "launcher=torchrun",
        "launcher.nproc=2", "trainer.max_steps=2,10000,3", "trainer.save_every=10000", "data.workers=2", "data.frames.min=1",
        f"stage.init_from.spatial_vae={spatial_export}", sweep=True,
        train=[sys.executable, str(tmp_path / "console.py"), "train"], environment=warm.python_of_torchrun(tmp_path),
    )  # fmt: skip
    stopped = sigterm_when_running(process, tmp_path / "sweep", "max_steps=10000_*")
    assert_saved_where_it_ended(stopped)
    (done,) = (tmp_path / "sweep").glob("max_steps=2_*")
    assert [line["step"] for line in trace(done)] == [1, 2]
    for job in (done, stopped):
        launch = json.loads((job / "launches.jsonl").read_text())
        assert launch["config"]["loss"]["terms"]["kl"]["weight"] == 1e-5
        assert launch["config"]["optim"]["betas"] == [0.8, 0.9]  # the ranks find the user's own folder
    assert not list((tmp_path / "sweep").glob("max_steps=3_*"))


def test_a_job_that_fails_does_not_stop_the_sweep_but_is_in_its_table_and_in_the_exit_status(videos, tmp_path):
    ours = arguments(videos, tmp_path, "job", "loss=recon_kl")
    done = tiny.run(*PYTHON, "-m", *ours, "model.temporal.groups=5,4", cwd=tmp_path)
    assert done.returncode == 1
    assert "each must be a multiple of groups=5" in done.stdout
    assert "Traceback" not in done.stdout
    assert not list((tmp_path / "sweep").glob("groups=5_*"))
    (sound,) = (tmp_path / "sweep").glob("groups=4_*")
    assert [line["step"] for line in trace(sound)] == [1, 2]
    table = done.stdout[done.stdout.index(f"2 jobs in {tmp_path / 'sweep'}") :]
    assert [line.split() for line in table.splitlines() if line.startswith("groups=")] == [
        ["groups=4", "done"], ["groups=5", "failed"],
    ]  # fmt: skip
    assert "failed: groups=5" in table
    assert "groups=5" in table.partition("failed: ")[2]

    done = tiny.run(*PYTHON, "-m", *ours, "optim.lr=2e-3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (other,) = (tmp_path / "sweep").glob("job_*")  # of another sweep with a folder of its own
    assert [line["step"] for line in trace(other)] == [1, 2]
    assert "1 job in" in done.stdout


def test_a_sweep_under_torchrun_is_refused_with_the_command_to_use(videos, tmp_path):
    done = tiny.run(
        *PYTHON, "-m", *arguments(videos, tmp_path, "job"), "optim.lr=1e-3,1e-4", cwd=tmp_path, RANK="0", WORLD_SIZE="1"
    )  # fmt: skip
    assert done.returncode == 1
    assert "vae3d train -m ... launcher=torchrun launcher.nproc=N" in done.stdout


ENDLESS = ["loss=recon_kl", "trainer.max_steps=10000", "trainer.save_every=10000", "data.workers=2"]


def test_ctrl_c_reaches_all_processes_and_saves(videos, tmp_path):
    process = start(videos, tmp_path, "run", *ENDLESS, "data.batch_size=2")
    wait_for_step(process, tmp_path / "run", 2)
    process.signal(signal.SIGINT)
    assert process.wait(timeout=60) == [128 + signal.SIGINT]
    assert_saved_where_it_ended(tmp_path / "run", "SIGINT")
    assert (tmp_path / "run/.hydra/rank0/config.yaml").is_file()


def assert_saved_where_it_ended(run: Path, signal: str = "SIGTERM") -> None:
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == trace(run)[-1]["step"]
    assert f"stopped by {signal}" in (run / "rank0.log").read_text()


def test_ctrl_c_during_a_start_is_one_line(tmp_path):
    done = tiny.run(sys.executable, "-c", "import vae3d.interrupts\nraise KeyboardInterrupt", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (128 + signal.SIGINT, ["interrupted (SIGINT)"])


@pytest.mark.parametrize(
    "entry",
    ["train.py", "infer.py", "eval/eval_common_metric.py", "scripts/demo/make_demo_videos.py", "vae3d/commands/cli.py"],
)
def test_entries_are_ready_for_ctrl_c_before_they_import_anything_slow(entry):
    imports = [
        node
        for node in ast.parse((tiny.ROOT / entry).read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = [node.names[0].name for node in imports if getattr(node, "module", None) != "__future__"]
    assert names[: 1 + names.index("vae3d.interrupts")] in (["vae3d.interrupts"], ["sys", "vae3d.interrupts"])


def test_a_run_that_fails_takes_its_workers_along(videos, tmp_path):
    failing = [
        "loss=recon_kl",
        "optim.lr=1e30",
        "trainer.max_steps=1000",
        "trainer.spike.max_consecutive_skips=2",
        "data.workers=2",
    ]
    done = tiny.run(*PYTHON, *arguments(videos, tmp_path, "run", *failing), cwd=tmp_path, timeout=90)
    assert done.returncode == 2
    assert "2 steps in a row were skipped" in done.stdout
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]


def sigterm_when_running(process: warm.Job, sweep: Path, job: str) -> Path:
    """Send SIGTERM to the process that sweeps once a job has taken a step; returns the job's folder."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not list(sweep.glob(f"{job}/metrics.jsonl")) and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pids[0], signal.SIGTERM)
    assert process.wait(timeout=60) == [128 + signal.SIGTERM]
    (folder,) = sweep.glob(job)
    return folder


def test_sigterm_ends_a_sweep(videos, tmp_path):
    process = start(videos, tmp_path, "a,b", *ENDLESS, "data.batch_size=2", sweep=True)
    assert_saved_where_it_ended(sigterm_when_running(process, tmp_path / "sweep", "name=a_*"))
    assert not list((tmp_path / "sweep").glob("name=b_*"))


def test_dry_run_opens_the_data_lists_missing_weights_counts_what_it_will_need_and_leaves_nothing(videos, tmp_path):
    model = [
        *arguments(videos, tmp_path, "run"),
        "stage=stage3",
        "validation.every=1",
        "validation.metrics=[psnr,rfid]",
    ]
    done = tiny.run(
        *PYTHON, "debug=dry", *model, "validation.frames=5", "data.workers=1000",
        cwd=tmp_path, VAE3D_WEIGHTS=str(tmp_path), TORCH_HOME=str(tmp_path), HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    for line in (
        r"OpenSoraVAE: 0\.\d\d M parameters",
        r"trains temporal_encoder: 0\.\d\d M, learning rate x 1",
        r"5 frames of 16x16 -> latent 4x2x8x8",
        r"batch of 2 clips = 1 rank x 1 micro-batch x 2 clips",
        r"\d+ training files",
        r"\d+ frames, [\d.]+ per file",
        r"the first batch, 2x3x\dx16x16, took",
        r"data\.workers=1000: this machine has \d+ processors",
        r"weights-inception-2015-12-05-6726825d\.pth, 96 MB",
        r"vgg16-397923af\.pth, 553 MB",
        r"fetch-weights \S+ vgg16-397923af\.pth --dest",
        r"memory of the device, per rank: [\d.]+ MiB = weights",
        r"memory of the host, per rank: [\d.]+ [MG]iB",
        r"time: [\d.e-]+ TFLOP per step",
        r"disk: [\d.]+ MiB at most: 1 x \(checkpoint",
    ):
        assert re.search(line, done.stdout), (line, done.stdout)
    assert not list(tmp_path.iterdir())


def test_a_failed_check_leaves_nothing_in_a_run_and_in_a_sweep(videos, tmp_path):
    wrong = arguments(videos, tmp_path / "runs", "a/b", "trainer.max_step=3")
    for flags, more, status in (([], [], 2), (["-m"], ["optim.lr=1e-3,1e-4"], 1)):
        done = tiny.run(*PYTHON, *flags, *wrong, *more, cwd=tmp_path)
        assert done.returncode == status, done.stdout
        assert "trainer.max_step" in done.stdout
        assert not list(tmp_path.iterdir())
    (tmp_path / "runs").mkdir()
    tiny.run(*PYTHON, *wrong, cwd=tmp_path)
    assert [*tmp_path.iterdir()] == [tmp_path / "runs"]  # which was there
    (tmp_path / "runs/a/b").mkdir(parents=True)
    (tmp_path / "runs/a/b/notes.txt").touch()
    tiny.run(*PYTHON, *wrong, cwd=tmp_path)
    assert (tmp_path / "runs/a/b/notes.txt").exists()


def test_missing_weights_are_one_error_with_one_command_and_settings_that_need_none(videos, tmp_path):
    empty = {"VAE3D_WEIGHTS": str(tmp_path / "none here"), "TORCH_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    scores = ["validation.every=1", "validation.frames=5", "validation.metrics=[psnr,rfid]", "trainer.best=rfid"]
    given = arguments(videos, tmp_path, "run", "stage=stage3", *scores)
    done = tiny.run(*PYTHON, *given, cwd=tmp_path, **empty)
    assert done.returncode == 2
    assert "1 error" in done.stdout
    assert "loss.terms.lpips" in done.stdout
    assert "validation.metrics" in done.stdout
    *names, flag, folder = shlex.split(re.search(r"vae3d fetch-weights (.*)", done.stdout)[1])
    assert sorted(names) == ["vgg16-397923af.pth", "weights-inception-2015-12-05-6726825d.pth"]
    assert (flag, folder) == ("--dest", empty["VAE3D_WEIGHTS"])
    without = shlex.split(re.search(r"or go on without: (.*)", done.stdout)[1])
    assert without == ["loss=recon_kl", "validation.metrics=[psnr]", "trainer.best=null"]
    done = tiny.run(*PYTHON, *given, "loss.terms.lpips.weight=0.5", cwd=tmp_path, **empty)
    assert "fetch-weights" in done.stdout
    assert "go on without" not in done.stdout  # with this setting of lpips, recon_kl would be an error


def test_the_commands_that_a_run_ends_with_work(videos, tmp_path):
    overrides = [
        "loss=recon_kl",
        "validation.every=1",
        "validation.frames=5",
        "validation.clips=1",
        "logger=tensorboard",
    ]
    done = tiny.run(*PYTHON, *arguments(videos, tmp_path, "run", *overrides), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    closing = done.stdout[done.stdout.index("2 steps of 2 clips in ") :]
    assert "at step 0  " in closing
    for path in re.findall(r"^(?:run|checkpoint|export) +(\S+)$", closing, re.MULTILINE):
        assert (tmp_path / path).exists()
    commands = [
        shlex.split(line) for line in closing.splitlines() if re.search(r"^(vae3d|python -m|tensorboard) ", line)
    ]
    names = [words[next(i for i, word in enumerate(words) if word in cli.COMMANDS)] for words in commands[:-1]]
    assert names == ["train", "try", "infer", "eval"]
    assert commands[-1][:2] == ["tensorboard", "--logdir"]
    assert (tmp_path / commands[-1][2]).is_dir()
    for name, words in zip(names, commands, strict=False):
        arguments_of = words[words.index(name) + 1 :]
        again = tiny.run(sys.executable, "-m", "vae3d", name, *arguments_of, cwd=tmp_path)
        assert again.returncode == 0, (words, again.stdout)
    assert [line["step"] for line in trace(tmp_path / "run") if "loss" in line] == [1, 2, 3, 4]
    assert list(tmp_path.glob("try_*/index.html"))


FAULTY_TABLES = {
    "missing.csv": (None, "data.source.path={path}: no such file or folder"),
    "all_missing.csv": ("path\na.mp4\nb.mp4\n", "2 of 2 files cannot be read, more than data.max_broken=0.2"),
}


@pytest.mark.parametrize("name", FAULTY_TABLES)
def test_faulty_tables_end_as_one_message(tmp_path, name):
    content, message = FAULTY_TABLES[name]
    if content is not None:
        (tmp_path / name).write_text(content)
    done = tiny.run(*PYTHON, *arguments(tmp_path / name, tmp_path, "run", "loss=recon_kl"), cwd=tmp_path)
    assert done.returncode == 2
    assert message.format(path=tmp_path / name) in done.stdout
    assert ("`root` of the source" in done.stdout) == (content is not None)  # data.source.root, or that of a mixture
    assert "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) <= 5
