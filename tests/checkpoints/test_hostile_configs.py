"""What a stranger writes beside weights never runs, never reaches outside its folder, and is refused at once."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vae3d
from tests import tiny
from vae3d.checkpoints.export import write_diffusers, write_export, write_taehv
from vae3d.checkpoints.formats import Checkpoint
from vae3d.diffusion.build import build_network, network_config
from vae3d.diffusion.export import read_export
from vae3d.diffusion.export import write_export as write_diffusion_export
from vae3d.errors import UserError
from vae3d.io import read_yaml, yaml_text
from vae3d.loading import initialize, model_config, open_codec

CALL = "{_target_: os.system, _args_: ['touch PWNED']}"
JSON_CALL = {"_target_": "os.system", "_args_": ["touch PWNED"]}

# Where a YAML file should have a whole number.
YAML_VALUES = {
    "hydra node": CALL,
    "hydra node in a list": f"[{CALL}]",
    "hydra node of exec": '{_target_: builtins.exec, _args_: [\'open("PWNED", "w")\']}',
    "hydra node, partial": "{_target_: os.system, _partial_: true, command: touch PWNED}",
    "hydra node that finds a function": "{_target_: hydra.utils.get_method, path: os.system}",
    "hydra node of the project": "{_target_: vae3d.loading.load, path: /}",
    "a model": "{_target_: vae3d.models.spatial.SpatialVAE}",
    "flags of hydra": "{_convert_: all, _recursive_: true, _partial_: true}",
    "pairs with a hydra node": f"!!pairs [x: {CALL}]",
    "ordered map": f"!!omap [x: {CALL}]",
    "set": "!!set {a, b}",
    "python call": "!!python/object/apply:os.system ['touch PWNED']",
    "python object": "!!python/object/new:os.system ['touch PWNED']",
    "python name": "!!python/name:os.system",
    "python module": "!!python/module:os",
    "python tuple": "!!python/tuple [8, 8]",
    "own tag": "!call [touch PWNED]",
    "binary": "!!binary aGVsbG8=",
    "tagged number": "!!int '4'",
    "interpolation that calls": f"'${{oc.create:{CALL}}}'".replace("['touch PWNED']", "[touch PWNED]"),
    "interpolation of the environment": "${oc.env:HOME}",
    "interpolation of another key": "${model._target_}",
    "escaped interpolation": "'\\${x}'",
    "undefined alias": "*a",
    "alias of itself": "&a [*a]",
    "merge": "{<<: {_target_: os.system}}",
    "nan": ".nan",
    "infinity": ".inf",
    "infinity by its size": "1e400",
    "negative": "-4",
    "zero": "0",
    "one above the maximum": "65537",
    "huge": "99999999999999999999",
    "of 5000 digits": "9" * 5000,
    "of 5000 hexadecimal digits": "0x" + "f" * 5000,
    "to base 60": "1" + ":1" * 20_000,
    "fraction": "4.5",
    "true": "true",
    "null": "null",
    "text": "os.system",
    "number as text": "'4'",
    "empty text": "''",
    "a class": "vae3d.models.spatial.SpatialVAE",
    "dunder": "__class__",
    "path": "../../../../etc/passwd",
    "long text": "x" * 100_000,
    "date": "2026-01-01",
    "list": "[4]",
    "dict": "{}",
    "dict of dunders": "{__class__: {__base__: x}}",
    "deep": "[" * 2000 + "]" * 2000,
    "control character": '"\\0"',
}
# As JSON, for the other files.
JSON_VALUES = {
    "hydra node": JSON_CALL,
    "hydra node in lists": [[JSON_CALL]],
    "hydra node, partial": {"_target_": "subprocess.run", "_partial_": True, "_convert_": "all", "args": "touch PWNED"},
    "interpolation that calls": "${oc.create:{_target_: os.system, _args_: [touch PWNED]}}",
    "interpolation of the environment": "${oc.env:HOME}",
    "nan": float("nan"),
    "infinity": float("inf"),
    "negative": -4,
    "zero": 0,
    "huge": 10**30,
    "one above the maximum": 2**31 + 1,
    "fraction": 4.5,
    "true": True,
    "text": "os.system",
    "number as text": "4",
    "empty text": "",
    "a class": "vae3d.models.spatial.SpatialVAE",
    "dunder": "__class__",
    "path": "../../../../etc/passwd",
    "long text": "x" * 100_000,
    "dict": {},
    "dict of dunders": {"__class__": {"__init__": {"__globals__": 1}}},
    "deep": json.loads("[" * 100 + "]" * 100),
    "control characters": "\0\ud800\x1b[2J",
}
RAW_VALUES = {"of 5000 digits": "9" * 5000, "infinity by its size": "1e400", "very deep": "[" * 50_000 + "]" * 50_000}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WHOLE_YAML = {
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "NUL": b"\0" * 99,
    "UTF-16": "model: {}".encode("utf-16"),
    "null": b"null",
    "a number": b"3",
    "a list": b"[]",
    "text": b"model",
    "no model": b"vae3d: 1\n",
    "a model that is a list": b"model: []\nnetwork: []",
    "a model that is a number": b"model: 3\nnetwork: 3",
    "a model without a class": b"model: {}\nnetwork: {}",
    "a class that is a list": b"model: {_target_: [x]}\nnetwork: {kind: [x]}",
    "a class that is null": b"model: {_target_: null}\nnetwork: {kind: null}",
    "a function": f"model: {CALL}\nnetwork: {CALL}".encode(),
    "a class of torch": b"model: {_target_: torch.nn.Linear, in_features: 1, out_features: 1}",
    "a module's import": b"model: {_target_: vae3d.models.spatial.nn.Linear}",
    "a class that is not a model": b"model: {_target_: vae3d.models.spatial.AutoencoderKL}",
    "a class through dunders": b"model: {_target_: vae3d.models.spatial.SpatialVAE.__init__.__globals__}",
    "a path as class": b"model: {_target_: ../../evil.py}",
    "two documents": b"model: {}\n---\nmodel: {}",
    "alias bomb": BOMB.encode(),
    "a model in itself": b"model: &m {_target_: vae3d.models.opensora.OpenSoraVAE, spatial: *m, temporal: *m}",
    "keys that are no text": b"{1: 2, [3]: 4, model: {}}",
    "half a document": b"model: {_target_: 'vae3d",
    "an odd tag directive": b"%TAG ! tag:evil,2000:\n---\nmodel: !x {}",
    "large": b"x: [" + b"1, " * 400_000 + b"1]",
}
WHOLE_JSON = {
    "empty": b"",
    "binary": bytes(range(256)) * 9,
    "null": b"null",
    "a number": b"3",
    "a list": b"[]",
    "half a document": b'{"scaling_factor": ',
    "very deep": b"[" * 50_000,
    "large": b'{"x": "' + b"x" * 2**21 + b'"}',
    "class that is a list": b'{"_class_name": ["AutoencoderKLCogVideoX"]}',
}
EXTRA_KEYS = {
    "_args_": [["touch PWNED"]],
    "_partial_": True,
    "_recursive_": False,
    "_convert_": "object",
    "__class__": "x",
    "self": "x",
    "cls": "x",
    "${x}": 1,
}


@dataclass(frozen=True)
class Place:
    """A file of a checkpoint, and its text with some JSON or YAML in place of one value."""

    root: Path
    file: Path
    text: Callable[[str], str]
    load: Callable[[Path], object] = vae3d.load


def tiny_export(name: str, folder: Path) -> Path:
    config = model_config(name, *tiny.MODEL[name])
    write_export(Checkpoint(config, tiny.model(name).state_dict(), folder, "export"), folder)
    return folder


def in_json(root: Path, file: Path, *keys: str, **more: object) -> Place:
    content = json.loads(file.read_text())

    def text(value: str) -> str:
        changed = json.loads(json.dumps(content))
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = "HERE"
        return json.dumps(changed).replace('"HERE"', value)

    return Place(root, file, text, **more)


def in_yaml(root: Path, file: Path, before: str, **more: object) -> Place:
    """The first number after `before`."""
    head, _, tail = file.read_text().partition(before)
    rest = tail.partition("\n")[2]
    return Place(root, file, lambda value: f"{head}{before} {value}\n{rest}", **more)


def saved(name: str, folder: Path) -> Checkpoint:
    config = model_config(name, *tiny.MODEL[name])
    return Checkpoint(config, tiny.model(name).state_dict(), folder, "export")


def exports(folder: Path) -> dict[str, Place]:
    found = {}
    for name, key in (
        ("spatial", "groups:"), ("wan", "layers:"), ("taehv", "\n  channels:"), ("temporal_vae", "  groups:"),
    ):  # fmt: skip
        root = tiny_export(name, folder / name)
        found[name] = in_yaml(root, root / "model.yaml", key)
    network = {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "width": 24, "heads": 2, "depth": 2}
    state = build_network(network, (4, 1, 8, 8)).state_dict()
    facts = {
        "network": network_config(network, (4, 1, 8, 8)),
        "process": {"_target_": "vae3d.diffusion.gaussian.GaussianDiffusion", "steps": 50},
        "latent_shape": [4, 1, 8, 8],
        "size": [1, 64, 64],
        "classes": [],
        "trained_classes": [],
        "label_dropout": 0.1,
        "latents": {"count": 1, "mean": [0.0], "std": [1.0]},
        "vae": {
            "path": "vae",
            "model": "SpatialVAE",
            "encoder": "0",
            "config": None,
            "latents_mean": [0],
            "latents_std": [1],
        },
    }
    root = folder / "diffusion"
    write_diffusion_export(root, facts, {0.9: state})
    for name, key in (("network", "width:"), ("process", "steps:"), ("latent_shape", "latent_shape:\n- 4\n-")):
        found[f"diffusion {name}"] = in_yaml(root, root / "diffusion.yaml", key, load=read_export)
    return found


def published(folder: Path) -> dict[str, Place]:
    found = {}
    kl = tiny.model("spatial", "model.channels=[32,32]", "model.groups=32")
    config = model_config("spatial", "model.channels=[32,32]", "model.groups=32", "model.layers=1")
    write_diffusers(Checkpoint(config | {"shift_factor": 0.0}, kl.state_dict(), folder, ""), folder / "kl")
    for key in ("norm_num_groups", "scaling_factor"):
        found[f"AutoencoderKL {key}"] = in_json(folder / "kl", folder / "kl/config.json", key)
    write_diffusers(saved("wan", folder), folder / "wan")
    found["AutoencoderKLWan latents_mean"] = in_json(folder / "wan", folder / "wan/config.json", "latents_mean")
    for kind in ("AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo"):
        channels = {"block_out_channels": [8] * 4, "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2}
        getattr(diffusers, kind)(**channels).save_pretrained(folder / kind)
        for key in ("norm_num_groups", "block_out_channels"):
            found[f"{kind} {key}"] = in_json(folder / kind, folder / kind / "config.json", key)
    write_taehv(saved("taehv", folder), folder / "taehv.pth")
    for key in ("variant", "latents_mean", "latent"):
        found[f"TAEHV {key}"] = in_json(folder / "taehv.pth", folder / "taehv.json", key)
    return found


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return exports(tmp_path_factory.mktemp("exports")) | published(tmp_path_factory.mktemp("published"))


YAML_PLACES = ["spatial", "wan", "taehv", "temporal_vae", "diffusion network", "diffusion process"]
YAML_PLACES += ["diffusion latent_shape"]
JSON_PLACES = ["AutoencoderKL norm_num_groups", "AutoencoderKL scaling_factor", "AutoencoderKLWan latents_mean"]
JSON_PLACES += [
    f"AutoencoderKL{kind} {key}"
    for kind in ("CogVideoX", "HunyuanVideo")
    for key in ("norm_num_groups", "block_out_channels")
]
JSON_PLACES += ["TAEHV variant", "TAEHV latents_mean", "TAEHV latent"]


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """A call that must raise one UserError at once, with nothing run and nothing written."""
    monkeypatch.chdir(tmp_path)

    def check(call: Callable[[], object], root: Path) -> str:
        before = {path: path.lstat().st_mtime_ns for path in root.parent.rglob("*")}
        environment = dict(os.environ)
        start = time.process_time()
        with pytest.raises(UserError) as error:
            call()
        assert time.process_time() - start < 2
        assert not list(tmp_path.rglob("*"))
        assert {path: path.lstat().st_mtime_ns for path in root.parent.rglob("*")} == before
        assert dict(os.environ) == environment
        assert len(str(error.value)) < 2000
        return str(error.value)

    return check


def refused(place: Place, content: bytes, refuses: Callable[..., str]) -> str:
    print(content[:300])  # for the report of a failure
    good = place.file.read_bytes()
    place.file.write_bytes(content)
    try:
        return refuses(lambda: place.load(place.root), place.root)
    finally:
        place.file.write_bytes(good)


@pytest.mark.parametrize("name", YAML_PLACES)
def test_a_value_in_yaml_is_a_number_or_an_error(places, refuses, name):
    for what, value in YAML_VALUES.items():
        if what == "one above the maximum" and name in ("diffusion process", "diffusion latent_shape"):
            continue  # which have another maximum
        message = refused(places[name], places[name].text(value).encode(), refuses)
        assert places[name].file.name in message, what


@pytest.mark.parametrize("name", YAML_PLACES[:5])
def test_a_yaml_file_of_anything_else_is_an_error(places, refuses, name):
    for what, content in WHOLE_YAML.items():
        assert places[name].file.name in refused(places[name], content, refuses), what


@pytest.mark.parametrize("name", JSON_PLACES)
def test_a_value_in_json_has_its_type_or_is_an_error(places, refuses, name):
    values = {what: json.dumps(value) for what, value in JSON_VALUES.items()} | RAW_VALUES
    fits = {"AutoencoderKL scaling_factor": ["fraction"], "TAEHV latent": ["empty text"]}
    for what, value in values.items():
        if what in fits.get(name, ()):
            continue
        message = refused(places[name], places[name].text(value).encode(), refuses)
        assert places[name].file.name in message or "taehv.pth" in message, what


@pytest.mark.parametrize("name", [JSON_PLACES[0], JSON_PLACES[2], JSON_PLACES[3], JSON_PLACES[7]])
def test_a_json_file_of_anything_else_is_an_error(places, refuses, name):
    fits = {"class that is a list": [7]}  # of a file beside TAEHV's weights that does not say it is theirs
    for what, content in WHOLE_JSON.items():
        if JSON_PLACES.index(name) in fits.get(what, ()) or (
            name.startswith("TAEHV") and what in ("null", "a number", "a list")
        ):
            continue
        assert places[name].file.name in refused(places[name], content, refuses), what


@pytest.mark.parametrize("name", YAML_PLACES[:5])
def test_keys_that_are_no_arguments_are_errors(places, refuses, name):
    place = places[name]
    good = place.file.read_text()
    node = "network:" if name.startswith("diffusion") else "model:"
    for key, value in EXTRA_KEYS.items():
        changed = good.replace(f"{node}\n", f"{node}\n  {json.dumps(key)}: {json.dumps(value)}\n", 1)
        assert key in refused(place, changed.encode(), refuses)
    first = "heads" if node == "network:" else "_target_"
    missing = "\n".join(line for line in good.splitlines() if not line.startswith(f"  {first}:"))
    if first == "_target_":
        assert first in refused(place, missing.encode(), refuses)


def test_metadata_in_the_header_of_weights_is_checked(tmp_path_factory, refuses):
    root = tmp_path_factory.mktemp("header")
    write_taehv(saved("taehv", root), root / "good.safetensors")
    with safe_open(root / "good.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["taehv"])
    state = load_file(root / "good.safetensors")
    texts = [json.dumps(facts | {"variant": value}) for value in (*JSON_VALUES.values(), "odd", ["x"])]
    texts += [json.dumps(facts) + "x", "", "3", "[]", *RAW_VALUES.values(), '{"x": "' + "x" * 2**21 + '"}']
    for text in texts:
        save_file(state, root / "bad.safetensors", {"taehv": text})
        assert "bad.safetensors" in refuses(lambda: vae3d.load(root / "bad.safetensors"), root), text[:300]


ENTRIES: dict[str, Callable[[Path, Path], object]] = {
    "codec": lambda root, out: open_codec(root),
    "start of a run": lambda root, out: initialize(tiny.model("spatial"), str(root)),
    "start of a part": lambda root, out: initialize(tiny.model("temporal_vae"), {"spatial_vae": str(root)}),
}
SCRIPTS = {
    "convert": lambda root, out: tiny.status("convert", root, out / "made", "--to", "export"),
    "convert to diffusers": lambda root, out: tiny.status("convert", root, out / "made", "--to", "diffusers"),
    "measure": lambda root, out: tiny.status("measure-scale", root, "photos", "--out", out / "made"),
}
HOSTILE = [
    "hydra node",
    "pairs with a hydra node",
    "interpolation that calls",
    "python call",
    "huge",
    "alias of itself",
]


@pytest.mark.parametrize("what", HOSTILE)
def test_no_entry_takes_such_a_file_or_copies_it_on(places, refuses, tmp_path, capsys, what):
    place = places["spatial"]
    for call in ENTRIES.values():
        hostile = Place(place.root, place.file, place.text, load=lambda root, call=call: call(root, tmp_path))
        refused(hostile, place.text(YAML_VALUES[what]).encode(), refuses)

    def run(root: Path, main: Callable[[Path, Path], int]) -> None:
        assert main(root, tmp_path) == 2
        raise UserError(capsys.readouterr().err)

    for main in SCRIPTS.values():
        hostile = Place(place.root, place.file, place.text, load=lambda root, main=main: run(root, main))
        assert "model.yaml" in refused(hostile, place.text(YAML_VALUES[what]).encode(), refuses)


def test_sizes_that_no_memory_holds_are_refused_by_the_weights(places, refuses):
    """Built without memory, and compared with the tensors that are there, before anything is allocated."""
    assert "channels" in places["taehv"].file.read_text()
    assert "of another shape" in refused(places["taehv"], places["taehv"].text("65536").encode(), refuses)
    assert "of another shape" in refused(
        places["diffusion network"], places["diffusion network"].text("65536").encode(), refuses
    )


def test_an_unknown_class_leaves_nothing_but_its_name_to_one_who_has_the_model(places, tmp_path):
    place = places["spatial"]
    changed = place.file.read_text().replace("vae3d.models.spatial.SpatialVAE", "mine.Mine").replace("groups:", "odd:")
    good = place.file.read_text()
    place.file.write_text(changed)
    try:
        model = vae3d.load(place.root, tiny.model("spatial", seed=1))
        assert tiny.status("convert", place.root, tmp_path / "made", "--to", "export") == 2
    finally:
        place.file.write_text(good)
    assert torch.equal(model.module.encoder.conv_in.weight, tiny.model("spatial").module.encoder.conv_in.weight)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"latent_shape": [4, 2**20, 2**10, 2**10]}, "latent_shape"),
        ({"latent_shape": [4, 1, 8]}, "latent_shape"),
        ({"latent_shape": [8, 1, 8, 8]}, "channels is 4; the latents have 8"),
        ({"size": [2**15, 2**15, 2**15]}, "size"),
        ({"size": [1, 64]}, "size"),
        ({"classes": ["a"], "trained_classes": [0]}, "classes"),
        ({"classes": [1]}, r"classes\[0\]"),
        ({"trained_classes": [0]}, "trained_classes"),
        ({"trained_classes": [-1]}, r"trained_classes\[0\]"),
        ({"label_dropout": 2}, "label_dropout"),
        ({"ema": []}, "ema"),
        ({"ema": ["../../../etc/passwd"]}, r"ema\[0\]"),
        ({"ema": None}, "ema"),
        ({"vae": None}, "vae"),
        ({"vae": {"path": "vae"}}, r"vae\.model is missing"),
        ({"latents": {"count": 1, "mean": [], "std": [1.0]}}, r"latents\.mean"),
        ({"process": {"_target_": ["gaussian"]}}, "process._target_ is"),
        ({"process": {"_target_": "vae3d.diffusion.gaussian.GaussianDiffusion", "schedule": "x"}}, "schedule"),
        ({"process": {"_target_": "vae3d.diffusion.flow.RectifiedFlow", "learned_sigma": True}}, "learned_sigma"),
        ({"network": {"_target_": "vae3d.diffusion.unet.LatentUNet", "multipliers": [1e-9]}}, r"multipliers\[0\]"),
        ({"network": {"_target_": "vae3d.diffusion.transformer.VideoTransformer", "depth": 10**6}}, "depth"),
        (
            {
                "network": {
                    "_target_": "vae3d.diffusion.transformer.VideoTransformer",
                    "num_classes": 2,
                    "width": 24,
                    "heads": 2,
                    "depth": 2,
                }
            },
            "trained_classes is empty",
        ),
    ],
    ids=str,
)
def test_facts_of_a_diffusion_model_that_do_not_fit_are_named(places, refuses, changes, key):
    place = places["diffusion network"]
    content = {**read_yaml(place.file), **changes}
    assert re.search(key, refused(place, yaml_text(content).encode(), refuses))
