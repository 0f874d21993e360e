"""The `vae3d` command: lists the commands, and runs what the scripts run."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from ast import literal_eval
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import hydra
import pytest

import vae3d
from tests import tiny
from vae3d.checkpoints.export import WRITERS
from vae3d.commands import bench_data, check_data, cli, fetch_weights, flags, help
from vae3d.config.fields import fields_of
from vae3d.config.schema import CONF, Frames, LossTerm, TrainConfig
from vae3d.metric_names import PRESET_METRICS, SUMMARIES
from vae3d.metrics import METRICS, PRESETS

SCRIPTS = {
    "train": "train.py",
    "infer": "infer.py",
    "eval": "eval/eval_common_metric.py",
    "fetch-weights": "scripts/fetch_weights.py",
}


@pytest.fixture(scope="module")
def console(tmp_path_factory) -> list[str]:
    """The start of a command line, with the console script that pip would write."""
    file = tmp_path_factory.mktemp("bin") / "console.py"
    file.write_text("import sys\nfrom vae3d.commands.cli import main\nsys.exit(main())\n")
    return [sys.executable, str(file)]


def test_help_lists_every_command_without_torch():
    code = "import sys; from vae3d.commands import cli; cli.main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environ(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [[name, command.summary]]


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]])
def test_the_version_is_that_of_the_package(capsys, command):
    assert cli.main([*command, "--version"]) == 0
    assert capsys.readouterr().out == f"vae3d {vae3d.__version__}\n"


def test_the_first_line_is_printed_before_anything_slow_is_imported():
    code = "import sys; from vae3d.commands import cli; print(sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environ(), capture_output=True, text=True, check=True)
    assert not set(literal_eval(done.stdout)) & {"hydra", "omegaconf", "pydantic", "numpy", "pandas", "torch", "tqdm"}


def test_flags_are_taken_with_underscores_and_with_hyphens():
    for words in (["--per_channel", "--by_pixels"], ["--per-channel", "--by-pixels"]):
        args = flags.parse_measure_scale(["run", "a-b", *words, "--out=x-y"])
        assert (args.source, args.per_channel, args.by_pixels, args.out) == ("a-b", True, True, Path("x-y"))
    assert flags.parse_measure_scale(["--by-pixels", "--", "--a-b", "c"]).checkpoint == Path("--a-b")
    args = flags.parse_eval(["--real-video-dir", "a", "--rec", "b c", "--page-videos=3"])
    assert (args.ref, args.page_videos) == (Path("a"), 3)
    assert args.command == "vae3d eval --real-video-dir a --rec 'b c' --page-videos=3"  # as it was typed
    assert bench_data.parse(["a", "--clips-per-file", "2"]).clips_per_file == 2


@pytest.mark.parametrize(
    ("parse", "words"),
    [(flags.parse_measure_scale, ["run", ""]), (flags.parse_convert, ["a", "b", "--to", "wan", "--variant="]),
     (check_data.parse, [""]), (fetch_weights.main, ["--check", "--dest", ""])],
)  # fmt: skip
def test_an_empty_argument_is_not_the_working_directory(parse, words, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert end.value.code == 2
    assert "is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parse", "words", "needed"),
    [(flags.parse_latent_stats, ["cache", "--out=x"], "--write"), (flags.parse_latent_stats, ["cache", "--shift"], "--write"),
     (flags.parse_probe_latents, ["m", "--source=s", "--height=8", "--width=8", "--out=o", "--tile_overlap=8"], "--tile")],
)  # fmt: skip
def test_a_flag_that_would_do_nothing_names_the_one_it_needs(parse, words, needed, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(words)
    assert f"needs {needed}" in capsys.readouterr().err


def test_a_reader_that_ends_first_leaves_no_traceback_but_another_process_does(monkeypatch, capsys):
    broken = BrokenPipeError, BrokenPipeError(), None
    sys.excepthook(*broken)
    assert "BrokenPipeError" in capsys.readouterr().err
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit, match="141"):
            sys.excepthook(*broken)
        stream.write("nothing reads this")
    assert capsys.readouterr().err == ""


def test_flags_are_read_once(tmp_path, monkeypatch, capsys):
    read, parse = [], flags.parse_encode_status

    @functools.wraps(parse)
    def counted(argv):
        read.append(argv)
        return parse(argv)

    monkeypatch.setattr(flags, "parse_encode_status", counted)
    assert tiny.status("encode-status", tmp_path) == 2
    assert "is not a latent cache" in capsys.readouterr().err
    assert read == [[str(tmp_path)]]


ANSWERED = """
import contextlib, io, sys
from vae3d.commands import cli

for arguments in {arguments}:
    printed = io.StringIO()
    status = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main(arguments)
        except SystemExit as end:
            status = end.code
    loaded = [name for name in {slow} if name in sys.modules]
    print([arguments, status, loaded, printed.getvalue()])
"""
SLOW = ("torch", "torchvision", "numpy", "pandas", "pyarrow", "av", "decord", "cv2", "accelerate", "diffusers", "PIL")


def test_help_and_errors_of_flags_and_keys_need_no_torch_tables_or_readers(tmp_path):
    """In one process, after each: a command that imports one of them would show in those after it, so the first counts."""
    asked = [[name, "--help"] for name in cli.COMMANDS]
    wrong = {"eval": "--nonsense", "check-data": "--nonsense", "convert": "x", "train": "trainer.max_step=3"}
    code = ANSWERED.format(arguments=[*asked, *([name, word] for name, word in wrong.items())], slow=SLOW)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=tiny.environ(PYTHONPATH=str(tiny.ROOT)), capture_output=True, text=True, check=True,
    )  # fmt: skip
    answers = [literal_eval(line) for line in done.stdout.splitlines()]
    assert [arguments for arguments, *_ in answers[: len(asked)]] == asked
    for (name, flag), status, loaded, printed in answers:
        assert loaded == [], (name, flag)
        assert status == (2 if name in wrong and flag == wrong[name] else 0), printed
        if isinstance(cli.COMMANDS[name], cli.ArgparseCommand):
            assert "usage:" in printed
        else:
            assert ("Settings, KEY=VALUE" if flag == "--help" else flag.partition("=")[0]) in printed
            if flag == "--help":
                assert printed.startswith(f"usage: vae3d {name} KEY=VALUE ...\n")
                assert f"vae3d {name} {cli.COMMANDS[name].example}\n" in printed
    assert not list(tmp_path.iterdir())


def test_the_help_of_a_configured_command_is_the_one_that_hydra_prints_without_groups_of_other_commands(
    capsys, monkeypatch
):
    """Hydra's own takes two seconds. Ours has comments besides."""
    ours = help.help_text("train", ["model=wan", "stage=finetune"]).splitlines()
    ours = [line for line in ours if not line.lstrip().startswith("#")]
    monkeypatch.setattr(sys, "argv", ["train.py", "model=wan", "stage=finetune", "--help"])
    monkeypatch.setattr(
        "hydra._internal.hydra.configure_log", lambda *_: None
    )  # else later tests log to this one's stream
    with pytest.raises(SystemExit):
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")(lambda cfg: None)()
    theirs = capsys.readouterr().out.splitlines()
    others = [line for line in theirs if re.match("(denoiser|latent_experiment|process): ", line)]
    assert len(others) == 3
    assert ours == [line for line in theirs[:-1] if line not in others]


def test_help_says_above_each_key_what_it_means_and_may_be():
    of_term = ["loss:", "  terms:", "    l1:", "      term:", "        weight: 7", "      weight: 1.0"]
    lines = ["data:", "  frames:", "    max: 3", *of_term, "optim:", "  betas:", "  - 0.9", "  lr: 1.0"]
    found = list(help.explained(lines, TrainConfig))
    assert [line for line in found if "#" not in line] == lines
    above = dict(zip(found[1:], found, strict=False))
    assert above["    max: 3"] == f"    # {fields_of(Frames)['max'].description} [an integer]"
    assert above["      weight: 1.0"] == f"      # {fields_of(LossTerm)['weight'].description} [a number of at least 0]"
    assert above["  lr: 1.0"].endswith("[a number above 0]")
    assert above["        weight: 7"] == "      term:"  # an argument of a class
    assert above["  - 0.9"] == "  betas:"


def test_help_explains_no_entries_of_lists_and_lists_the_keys_of_a_section_that_is_not_shown():
    lines = ["modle: wan", "data:", "  buckets:", "  - frames: 17", "    height: 2", "  sources: {}", "  fps: 2"]
    found = list(help.explained(lines, TrainConfig))
    assert found[found.index("modle: wan") - 1] == "# unknown key"
    first = found.index("  buckets:")
    assert found[first : first + 3] == lines[2:5]
    assert "weight]" in found[found.index("  sources: {}") - 1]
    assert "buckets" not in found[first - 1].partition("[")[2]
    assert found[-2].startswith("  # ")
    hidden = list(help.explained(["data:", "  buckets: null"], TrainConfig))
    assert "group of the keys shapes, aspects" in " ".join(hidden)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["infer", "--help", "data=folder"], "data"),
        (["train", "--help", "stage="], "stage"),
        (["train", "-m", "--help", "optim.lr=1,2"], "optim.lr=1,2"),
    ],
)
def test_a_wrong_choice_under_help_is_one_error(monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(sys, "argv", ["vae3d", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert named in captured.err
    assert "Traceback" not in captured.err


def test_the_help_of_diffusion_offers_no_choices_of_autoencoders():
    resolve_name(cli.COMMANDS["train-diffusion"].check)  # registers the defaults
    groups = re.findall(r"^([\w/]+): \w+, ", help.help_text("diffusion", []), re.MULTILINE)
    assert groups == ["data", "debug", "denoiser", "latent_experiment", "launcher", "logger", "optim", "process"]


def test_help_of_an_unknown_choice_is_an_error(tmp_path):
    done = tiny.run(*SCRIPT, "model=wam", "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert "model=wam" in done.stdout


def test_the_tables_of_flags_agree_with_what_they_stand_for():
    assert tuple(WRITERS) == flags.LAYOUTS
    assert PRESETS.keys() == PRESET_METRICS.keys()
    assert METRICS.keys() == SUMMARIES.keys()


@pytest.mark.parametrize(("arguments", "shown"), [([], True), (["-m"], True), (["--cfg", "job"], False)])
def test_a_start_says_so_at_once_unless_its_output_is_the_answer(monkeypatch, capsys, arguments, shown):
    monkeypatch.setattr(cli, "run_with_hydra", lambda *_: None)
    cli.main(["train", *arguments])
    captured = capsys.readouterr()
    assert ("vae3d train" in captured.err) == shown
    assert captured.out == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_and_a_configuration(name):
    command, module = cli.COMMANDS[name], cli.module_of(name)
    assert find_spec(module)
    if isinstance(command, cli.HydraCommand):
        assert callable(resolve_name(command.check))
        assert (CONF / f"{command.config_name}.yaml").is_file()
    if script := SCRIPTS.get(name):
        text = (tiny.ROOT / script).read_text()
        assert f'cli.main(["{name}", *sys.argv[1:]])' in text or f"from {module} import main" in text


def test_an_unknown_command_is_an_error_with_the_nearest_name(capsys):
    assert cli.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_vae3d_train_is_train_py(console, videos, tmp_path):
    model = [*tiny.MODEL["spatial"], *tiny.TRAINING, "stage=finetune", "stage.init_from=random", "loss=recon_kl"]
    words = ["model=spatial", *model, "data.frames.min=1", "data.frames.max=1", f"data.source.path={videos}"]
    done = tiny.run(*console, "train", *words, "run.name=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert [json.loads(line)["step"] for line in (tmp_path / "runs/run/metrics.jsonl").open()] == [1, 2]
    launch = json.loads((tmp_path / "runs/run/launches.jsonl").read_text())
    assert launch["command"][-len(words) - 2 :] == ["train", *words, "run.name=run"]  # as it was typed
    written = (tmp_path / "runs/run/.hydra/rank0/config.yaml").read_text()
    refused = tiny.run(*console, "train", *words, "run.name=run", "run.seed=5", cwd=tmp_path)
    assert refused.returncode == 2, refused.stdout
    assert (tmp_path / "runs/run/.hydra/rank0/config.yaml").read_text() == written  # of the run, which has another seed
    wrong = [tiny.run(*start, *words, "run.nmae=run", cwd=tmp_path) for start in ([*console, "train"], SCRIPT)]
    assert [done.returncode for done in wrong] == [2, 2]
    assert wrong[0].stdout == wrong[1].stdout
    assert "run.nmae" in wrong[0].stdout


SCRIPT = [sys.executable, str(tiny.ROOT / "train.py")]


def test_vae3d_runs_commands_with_flags(console, videos, tmp_path):
    done = tiny.run(*console, "check-data", str(videos), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "12 of 12 rows are good" in done.stdout
    done = tiny.run(*console, "convert", "nothing", "out", "--to=export", cwd=tmp_path)
    assert done.returncode == 2
    done = tiny.run(*console, "eval", "--nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: vae3d eval" in done.stdout
