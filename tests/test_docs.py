"""The pages: settings that they name, generated figures, and the site's hooks."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shlex
from collections.abc import Iterator

import pytest
from omegaconf import DictConfig

import vae3d
from docs import make_diffusers_table, make_speed_chart, site_hooks
from tests import tiny
from vae3d.arguments import without_source_name
from vae3d.commands import cli
from vae3d.config.issues import ConfigError, ConfigIssue, raise_if_any
from vae3d.config.overrides import allow_unknown_keys, override_issues
from vae3d.config.schema import CONF
from vae3d.config.validate import training_issues

DOCS = tiny.ROOT / "docs"
PAGES = [tiny.ROOT / "README.md", *sorted(set(DOCS.glob("*.md")) - {DOCS / "reference.md", DOCS / "needs.md"})]
SECTIONS = ("adversary", "data", "debug", "launcher", "loss", "model", "optim", "run", "stage", "teacher", "trainer")
CONFIGURED = {name: command for name, command in cli.COMMANDS.items() if isinstance(command, cli.HydraCommand)}
FLAGGED = {name: command for name, command in cli.COMMANDS.items() if getattr(command, "parse", None)}
SCRIPTS = {"train.py": "train", "infer.py": "infer", "compare.py": "compare", "encode_latents.py": "encode"}
SCRIPTS |= {"train_latent_diffusion.py": "train-diffusion", "sample_latent_diffusion.py": "sample"}
SETTING = re.compile(rf"(?<![\w./-])((?:{'|'.join((*SECTIONS, 'validation'))})(?:\.\w+)+)=")


def known_settings() -> tuple[set[str], set[str]]:
    """Keys of docs/reference.md, and the arguments of the classes that nodes name."""
    text = (DOCS / "reference.md").read_text()
    keys = re.findall(r"^\| `([\w.]+)` ", text, re.MULTILINE)
    return {*keys, "data.buckets", "data.weight"}, set(re.findall(r"^\| `(\w+)` ", text, re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_settings_in_the_pages_exist(page):
    """`trainer.keep=2` is a key; of nodes, such as model.spatial.frame_batch, the last part is an argument."""
    keys, arguments = known_settings()
    for key in map(without_source_name, SETTING.findall(page.read_text())):
        free = key.startswith(("loss.terms.", "teacher.features", "stage.init_from.", "stage.train.", "data.sources."))
        of_node = key.split(".")[0] in ("model", "adversary") or key.startswith("data.source.")
        assert free or key in keys or (of_node and key.rpartition(".")[2] in arguments), key


def printed_commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name and words of the configured commands in blocks, and in `code`, where `...` stands for what is left out.
    Those that a shell or a sweep completes are skipped, and keys without values."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    named = re.compile(rf"(?:vae3d ({'|'.join(CONFIGURED)})|({'|'.join(map(re.escape, SCRIPTS))}))( .*)")
    for line in [*blocks.splitlines(), *(f"{code} ..." for code in inline)]:
        if "$" not in line and (match := named.search(line)):
            words = shlex.split(match[3], comments=True)
            if not {"-m", "--help"} & {*words}:
                yield match[1] or SCRIPTS[match[2]], [word for word in words if not word.endswith("=")]


def issues_of(name: str, words: list[str]) -> list[ConfigIssue]:
    """What the check says, without files and packages that are missing here, and values of `...`."""
    command = CONFIGURED[name]
    arguments = [re.sub(rf"^{command.path_node}=", f"{command.path_node}.path=", word) for word in words if "=" in word]
    arguments += ["run.name=test"] * (command.metric is not None)
    issues = override_issues(allow_unknown_keys(arguments))
    if not issues:
        try:
            check = cli.resolve_name(command.check) if name != "train" else without_meta_device
            check(tiny.compose(*arguments, config=command.config_name))
        except ConfigError as error:
            issues = error.issues
    elsewhere = ("no such file or folder", "needs the package", *["required"] * ("..." in words))
    return [issue for issue in issues if not issue.message.startswith(elsewhere)]


def without_meta_device(cfg: DictConfig) -> None:
    raise_if_any(training_issues(cfg)[1])


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != "extend"], ids=lambda page: page.stem)
def test_the_commands_on_the_pages_pass_their_checks(page):
    """On docs/extend.md they need what the reader adds."""
    for name, words in printed_commands(page.read_text()):
        assert not issues_of(name, words), shlex.join([name, *words])


def test_the_flags_on_the_pages_are_those_of_the_commands():
    parsers = {name: cli.resolve_name(command.parse) for name, command in FLAGGED.items()}
    named = re.compile(rf"vae3d ({'|'.join(parsers)}) ([^|;&`\n]+)")
    wrong = []
    for page in PAGES:
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
        for name, words in named.findall(blocks):
            try:
                parsers[name]([word for word in shlex.split(words, comments=True) if word != "..."])
            except SystemExit:
                wrong.append(f"{page.name}: vae3d {name} {words}")
    assert not wrong


def test_the_examples_of_help_pass_their_checks():
    for name, command in CONFIGURED.items():
        assert not issues_of(name, command.example.split()), name


def test_every_ratio_of_the_speed_chart_stands_on_the_page_that_it_names(tmp_path):
    for entry in make_speed_chart.entries():
        if "line" in entry:
            continue  # of the table of networks
        assert entry["quote"] in (DOCS / entry["page"]).read_text().replace("\n", " "), entry["what"]
        for number in (entry[name] for name in ("ratio", "before", "after") if name in entry):
            assert f"{number:g}" in (DOCS / entry["page"]).read_text(), entry["what"]
    make_speed_chart.draw(tmp_path / "speed.svg")
    assert (tmp_path / "speed.svg").stat().st_size > 10_000


def test_the_tables_of_networks_are_those_of_the_last_runs():
    bench, page = tiny.load_script("bench_networks"), (DOCS / "speed.md").read_text()
    *earlier, run = make_speed_chart.runs()
    assert f"<!-- networks -->\n{bench.table(run, earlier)}<!-- /networks -->" in page
    first, second = json.loads((DOCS / "networks_xeon.json").read_text())["runs"]
    assert second["rows"].keys() == bench.LINES.keys() >= run["rows"].keys() >= bench.CASES.keys()
    assert not any("error" in row for some in (run, first, second) for row in some["rows"].values())
    ratios = [tuple(f"{some['rows'][name]['ratio']:.2f}" for some in (first, second)) for name in bench.CASES]
    assert [pair for pair in ratios if ", ".join(pair) not in page] == []


def test_the_table_of_diffusers_autoencoders_is_that_of_the_adapter():
    assert make_diffusers_table.table() in (DOCS / "models.md").read_text(), "run: python docs/make_diffusers_table.py"


def test_every_experiment_stands_on_the_page_of_needs():
    experiments = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    assert json.loads((DOCS / "needs.json").read_text()).keys() <= experiments
    page = (DOCS / "needs.md").read_text()
    assert all(f"`{name}`" in page for name in experiments), "run: python docs/make_needs.py"


def test_the_needs_of_a_toy_are_counted_as_they_stand_on_the_page():
    from docs import make_needs

    name, written = "wan_tiny", make_needs.load()["wan_tiny"]
    config = make_needs.composed(name)
    with make_needs.step_cost.countable():
        step = make_needs.step_cost.build(config, device="meta")
        assert step.bytes_on_disk() == (written.checkpoint, written.export)
    assert make_needs.toy_row(name, written) in (DOCS / "needs.md").read_text()


def test_the_api_page_has_every_public_name():
    named = [name for names in site_hooks.API.values() for name in names]
    assert {f"vae3d.{name}" for name in vae3d.__all__} <= set(named)
    assert len(named) == len(set(named))
    for name in named:
        module, _, attribute = name.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), attribute)), name
        assert f"::: {name}\n" in site_hooks.api_page()


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/train.md#stages", "train.md#stages"),
        ("index.md", "docs/speed.svg", "speed.svg"),
        ("wan.md", "../README.md#install", "index.md#install"),
        ("python.md", "../examples/own_loop.py", "examples/own_loop.py"),
        ("CONTRIBUTING.md", "docs/extend.md", "extend.md"),
        ("wan.md", "#cost", "#cost"),
        ("wan.md", "https://example.org/README.md", "https://example.org/README.md"),
    ],
)
def test_links_of_the_repository_lead_to_the_same_file_of_the_site(page, link, expected):
    assert site_hooks.with_site_links(f"[x]({link})", page) == f"[x]({expected})"


@pytest.mark.parametrize(
    ("paragraph", "expected"),
    [
        (
            "Read a file. path: which. a, b: sizes. Raises MediaError.",
            "Read a file.\n\n- `path`: which.\n\n- `a`, `b`: sizes.\n\nRaises MediaError.",
        ),
        ("video: of size\n[B].", "- `video`: of size [B]."),
        ("A note: no argument.", "A note: no argument."),
        ("    path: code", "    path: code"),
    ],
)
def test_arguments_of_a_docstring_become_a_list(paragraph, expected):
    assert re.sub(r"\n\n+", "\n\n", site_hooks.as_list(paragraph, {"path", "a", "b", "video"})) == expected
