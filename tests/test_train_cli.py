"""train.py as users start it: python, torchrun, accelerate launch, sweeps; killed, stopped, and given nonsense."""

from __future__ import annotations

import ast
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests import tiny

TRAIN = str(tiny.ROOT / "train.py")
PYTHON = [sys.executable, TRAIN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN]
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


def start(command: list[str], cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=tiny.environ(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        file = run / "metrics.jsonl"
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached; exit status {process.poll()}")


def run_through(launcher: list[str], videos: Path, folder: Path, name: str, more: list[str]) -> Path:
    done = tiny.run(*launcher, *arguments(videos, folder, name, *more), cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder / name


def run_killed(launcher: list[str], videos: Path, folder: Path, name: str, more: list[str]) -> Path:
    """SIGKILL to every process at a random step, then the same command again."""
    command = [*launcher, *arguments(videos, folder, name, *more)]
    process = start(command, folder)
    wait_for_step(process, folder / name, random.randint(3, STEPS - 3))  # at 2 the first checkpoint may be half-written
    agent = psutil.Process(process.pid)
    for victim in [agent, *agent.children(recursive=True)]:  # torchrun's ranks have sessions of their own
        victim.kill()
    process.wait()
    run_through(launcher, videos, folder, name, more)
    starts = [json.loads(line)["step"] for line in (folder / name / "launches.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert 0 < starts[1] < STEPS
    return folder / name


@pytest.fixture(scope="module")
def one_rank(videos, tmp_path_factory):
    return run_through(PYTHON, videos, tmp_path_factory.mktemp("one"), "whole", RESUMABLE)


@pytest.fixture(scope="module")
def two_ranks(videos, tmp_path_factory):
    """torchrun train.py stage=stage3 model=temporal_vae"""
    return run_through(TORCHRUN, videos, tmp_path_factory.mktemp("two"), "whole", RESUMABLE)


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
    killed = run_killed(PYTHON if ranks == 1 else TORCHRUN, videos, tmp_path, "killed", RESUMABLE)
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
    run_through(launcher, videos, tmp_path, "run", ["stage=stage3", "loss=recon_kl"])
    assert [line["step"] for line in trace(tmp_path / "run")] == [1, 2]


def test_sweep_with_torchrun_children_of_vae3d_train(videos, trunks, spatial_export, tmp_path):
    (tmp_path / "console.py").write_text("import sys\nfrom vae3d.commands.cli import main\nsys.exit(main())\n")
    done = tiny.run(
        sys.executable, str(tmp_path / "console.py"), "train", "-m", "stage=stage1,stage3", "loss.terms.kl.weight=1e-5", "launcher=torchrun",
        *(a for a in arguments(videos, tmp_path, "x") if not a.startswith("run.name")),
        "data.frames.min=1", "data.height=32", "data.width=32", f"stage.init_from.spatial_vae={spatial_export}",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    jobs = sorted(path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir())
    assert [job.rpartition("-")[0] for job in jobs] == ["0-temporal_vae-stage1", "1-temporal_vae-stage3"]
    for job in jobs:
        launch = json.loads((tmp_path / "sweep" / job / "launches.jsonl").read_text())
        assert launch["config"]["loss"]["terms"]["kl"]["weight"] == 1e-5
        assert [line["step"] for line in trace(tmp_path / "sweep" / job)] == [1, 2]


def test_a_crashed_job_does_not_stop_the_sweep_but_tells_and_another_sweep_has_folders_of_its_own(videos, tmp_path):
    ours = arguments(videos, tmp_path, "job", "loss=recon_kl")
    done = tiny.run(*PYTHON, "-m", *ours, "model.temporal.groups=5,4", cwd=tmp_path)
    assert done.returncode == 1
    assert "each must be a multiple of groups=5" in done.stdout
    (crashed,), (sound,) = (list((tmp_path / "sweep").glob(f"{number}-job-*")) for number in (0, 1))
    assert not (crashed / "metrics.jsonl").exists()
    assert [line["step"] for line in trace(sound)] == [1, 2]

    done = tiny.run(*PYTHON, "-m", *ours, "optim.lr=2e-3", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    (other,) = set((tmp_path / "sweep").glob("0-job-*")) - {crashed}
    assert [line["step"] for line in trace(other)] == [1, 2]


def test_a_sweep_under_torchrun_is_refused_with_the_command_to_use(videos, tmp_path):
    done = tiny.run(
        *PYTHON, "-m", *arguments(videos, tmp_path, "job"), "optim.lr=1e-3,1e-4", cwd=tmp_path, RANK="0", WORLD_SIZE="1"
    )  # fmt: skip
    assert done.returncode == 1
    assert "python train.py -m ... launcher=torchrun launcher.nproc=N" in done.stdout


ENDLESS = ["loss=recon_kl", "trainer.max_steps=10000", "trainer.save_every=10000", "data.workers=2"]


def test_ctrl_c_reaches_all_processes_and_saves(videos, tmp_path):
    process = start([*PYTHON, *arguments(videos, tmp_path, "run", *ENDLESS, "data.batch_size=2")], tmp_path)
    wait_for_step(process, tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
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
    ["train.py", "infer.py", "eval/eval_common_metric.py", "scripts/encode_latents.py",
     "scripts/sample_latent_diffusion.py", "scripts/train_latent_diffusion.py", "scripts/convert_checkpoint.py",
     "scripts/latent_stats.py", "scripts/measure_scale.py", "scripts/probe_latents.py", "scripts/compare.py",
     "scripts/demo/make_demo_videos.py", "vae3d/commands/cli.py"],
)  # fmt: skip
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


@pytest.mark.parametrize("launcher", ["local", "torchrun"])
def test_sigterm_ends_a_sweep(videos, tmp_path, launcher):
    ranks = ["launcher.nproc=2"] if launcher == "torchrun" else []
    more = [*ENDLESS, "data.batch_size=2", f"launcher={launcher}", *ranks]
    process = start([*PYTHON, "-m", *arguments(videos, tmp_path, "a,b", *more)], tmp_path)
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and not list((tmp_path / "sweep").glob("0-a-*/metrics.jsonl")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    (first,) = (tmp_path / "sweep").glob("0-a-*")
    assert_saved_where_it_ended(first)
    assert not list((tmp_path / "sweep").glob("1-b-*"))


def test_dry_run_describes_and_leaves_nothing(videos, tmp_path):
    done = tiny.run(*PYTHON, "debug=dry", f"data.source.path={videos}", "stage=stage3", "loss=recon_kl", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    for line in (
        "OpenSoraVAE: 393.34 M parameters",
        "trains temporal_encoder: 144.42 M, learning rate x 1",
        "33 frames of 256x256 -> latent 4x9x32x32",
        "batch of 8 clips = 1 ranks x 1 micro-batches x 8 clips",
        "12 rows, 12 of 12 files exist",
    ):
        assert line in done.stdout
    assert not list(tmp_path.rglob("metrics.jsonl"))


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
    assert "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) <= 5
