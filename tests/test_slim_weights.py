"""Slim files, which hold the used tensors alone: made from .pth files without torch, and found."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from vae3d.commands import fetch_weights
from vae3d.commands.fetch_weights import write_slim
from vae3d.pretrained import weights
from vae3d.pretrained.lpips import LPIPSNet
from vae3d.pretrained.weights import WeightFile, WeightsMissing, find


def trunk() -> dict[str, torch.Tensor]:
    """AlexNet's state dict, random, with a small classifier."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        features = torchvision.models.alexnet(weights=None).features.state_dict()
    state = {f"features.{key}": torch.randn(t.shape, generator=generator) * 0.05 for key, t in features.items()}
    return {**state, "classifier.1.weight": torch.randn(2, 3, generator=generator)}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.nn.Parameter], ids=["tensor", "parameter"])
def test_slim_files_hold_what_was_saved_in_either_format(tmp_path, zipped, kind):
    whole = torch.randn(10, 7)
    state = {key: kind(tensor) for key, tensor in trunk().items()}
    state |= {"features.view": whole[3:5], "features.scalar": torch.tensor(2.5), "features.empty": torch.zeros(0, 3)}
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    write_slim(tmp_path / "net.pth", tmp_path / "net.safetensors", "features.")
    kept = load_file(tmp_path / "net.safetensors")
    assert int.from_bytes((tmp_path / "net.safetensors").read_bytes()[:8], "little") % 8 == 0, "the data is aligned"
    assert kept.keys() == {key for key in state if key.startswith("features.")}
    for key, tensor in kept.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[key]), key


def test_lpips_of_a_slim_trunk_is_the_same_to_the_bit(tmp_path):
    torch.save(trunk(), tmp_path / "alexnet.pth")
    write_slim(tmp_path / "alexnet.pth", tmp_path / "slim.safetensors", "features.")
    x, y = torch.rand(2, 2, 3, 64, 48) * 2 - 1
    whole, slim = (LPIPSNet("alex").load(tmp_path / name) for name in ("alexnet.pth", "slim.safetensors"))
    assert torch.equal(whole(x, y), slim(x, y))


def test_vgg16s_pickle_of_2017_is_read(tmp_path):
    """Tensors were then rebuilt by torch._utils._rebuild_tensor, which torch.save no longer writes."""
    path = tmp_path / "net.pth"
    state = {"features.0.weight": torch.randn(4, 3)}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    new = b"_rebuild_tensor_v2\n"
    content = path.read_bytes()
    assert content.count(new) == 1
    # the arguments after the stride: requires_grad (False) and an empty OrderedDict of hooks
    begin = content.index(b"\x89ccollections\nOrderedDict\n", content.index(new))
    end = content.index(b"R", content.index(b")", begin)) + 1
    end += 2 if content[end : end + 1] == b"q" else 0
    path.write_bytes(content[:begin].replace(new, b"_rebuild_tensor\n") + content[end:])
    write_slim(path, tmp_path / "net.safetensors", "features.")
    assert torch.equal(load_file(tmp_path / "net.safetensors")["features.0.weight"], state["features.0.weight"])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused(tmp_path, zipped):
    state = {"features.0.weight": torch.zeros(2), "x": Malicious(tmp_path / "made")}
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="x is not a contiguous fp32 tensor"):
        write_slim(tmp_path / "net.pth", tmp_path / "slim.safetensors", "features.")
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "slim.safetensors").exists()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(3, 2).T, "features.0 is not a contiguous fp32 tensor"),
        (torch.zeros(2).half(), "features.0 is not a contiguous fp32 tensor"),
        (3, "features.0 is not a contiguous fp32 tensor"),
    ],
    ids=["transposed", "half", "number"],
)
def test_what_is_not_a_contiguous_fp32_tensor_is_refused(tmp_path, tensor, message):
    torch.save({"features.0": tensor}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=message):
        write_slim(tmp_path / "net.pth", tmp_path / "slim.safetensors", "features.")


def test_another_format_and_a_file_without_such_tensors_are_refused(tmp_path):
    (tmp_path / "pickles").write_bytes(pickle.dumps(1) * 5)
    with pytest.raises(ValueError, match=r"pickles: is a pickle that torch\.save did not write"):
        write_slim(tmp_path / "pickles", tmp_path / "slim.safetensors", "features.")
    torch.save({"classifier": torch.zeros(2)}, tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"net\.pth has no tensor called features\.\*"):
        write_slim(tmp_path / "net.pth", tmp_path / "slim.safetensors", "features.")


# --- beside their manifest


@pytest.fixture
def slim_place(tmp_path, monkeypatch):
    """(folder, fetch_weights.py) with AlexNet in the folder, made slim."""
    monkeypatch.delenv("VAE3D_ALLOW_UNVERIFIED")
    monkeypatch.setenv("VAE3D_WEIGHTS", str(tmp_path))
    path = tmp_path / "alexnet.pth"
    torch.save(trunk(), path)
    file = WeightFile(path.name, "http://nowhere", "MIT", ("lpips",), None, weights.sha256(path), slim="features.")
    for module in (weights, fetch_weights):
        monkeypatch.setattr(module, "FILES", {file.name: file})
    assert fetch_weights.main(["--metrics", "lpips", "--slim", "--dest", str(path.parent)]) == 0
    return path.parent, fetch_weights


def test_making_a_file_slim_keeps_the_whole_one_that_was_there(slim_place):
    folder, _ = slim_place
    assert {path.name for path in folder.iterdir()} == {"alexnet.pth", "alexnet.features.safetensors", "manifest.json"}
    kept = load_file(folder / "alexnet.features.safetensors")
    assert kept.keys() == {key for key in trunk() if key.startswith("features.")}
    assert all(torch.equal(kept[key], trunk()[key]) for key in kept)


def test_the_manifest_names_the_slim_file_and_its_source(slim_place):
    folder, _ = slim_place
    path = folder / "alexnet.features.safetensors"
    assert json.loads((folder / "manifest.json").read_text()) == {
        path.name: {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": weights.sha256(path),
            "licence": "MIT",
            "url": "http://nowhere",
            "source": "alexnet.pth",
            "source_sha256": weights.sha256(folder / "alexnet.pth"),
        }
    }


def test_a_slim_file_is_found_with_its_manifest_only(slim_place):
    folder, fetch_weights = slim_place
    (folder / "alexnet.pth").unlink()
    assert find("alexnet.pth") == folder / "alexnet.features.safetensors"
    assert fetch_weights.main(["all", "--dest", str(folder)]) == 0, "nothing need be fetched"
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsMissing, match=r"cannot be verified: .*manifest\.json is missing"):
        find("alexnet.pth")


def test_a_slim_file_of_another_content_or_source_is_refused(slim_place):
    folder, _ = slim_place
    (folder / "alexnet.pth").unlink()
    path, manifest = folder / "alexnet.features.safetensors", folder / "manifest.json"
    content, text = path.read_bytes(), manifest.read_text()
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(
        WeightsMissing,
        match=rf"sha256 [0-9a-f]{{64}}, but {json.loads(text)[path.name]['sha256']} in .*manifest\.json;",
    ):
        find("alexnet.pth")
    path.write_bytes(content)
    manifest.write_text(text.replace('"source_sha256": "', '"source_sha256": "0'))
    with pytest.raises(WeightsMissing, match=r"was made from a file of sha256 0.*, not from alexnet\.pth"):
        find("alexnet.pth")


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"alexnet.features.safetensors": 1}', '{"other": {}}', "\xff"])
def test_a_slim_file_beside_a_broken_manifest_is_refused(slim_place, text):
    folder, _ = slim_place
    (folder / "alexnet.pth").unlink()
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(WeightsMissing, match=r"cannot be verified: .*manifest\.json has no hashes of it"):
        find("alexnet.pth")
